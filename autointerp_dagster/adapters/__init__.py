"""The outside world behind core's protocols. No Dagster: usable from a notebook."""
