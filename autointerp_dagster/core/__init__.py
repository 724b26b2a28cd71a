"""The science: pure functions on tensors and frames. No Dagster, network, disk or clock."""
