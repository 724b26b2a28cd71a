"""What the explainer and the judge may see of each latent: windows with their split, statistics."""

from autointerp_dagster.core.latent_records.record import LatentRecord, Window, records_in_order
from autointerp_dagster.core.latent_records.tables import (
    RecordCounts,
    RecordTables,
    latent_records_of,
    record_counts,
)

__all__ = [
    "LatentRecord",
    "RecordCounts",
    "RecordTables",
    "Window",
    "latent_records_of",
    "record_counts",
    "records_in_order",
]
