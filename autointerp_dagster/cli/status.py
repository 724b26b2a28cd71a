"""What of a study is done."""

from rich.console import Console
from rich.table import Table

from autointerp_dagster.adapters.heads import read_heads
from autointerp_dagster.adapters.manifests import Manifest
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.study import Study
from autointerp_dagster.study.stages import places_of, stages_of


def print_status(study: Study, store: Store, console: Console) -> None:
    """Prints, per stage, how many places are done, cut short or missing, and what they cost."""
    table = Table(
        "stage", "made", "cut short", "missing", "rows", "seconds", "USD", title=study.name
    )
    known, damaged = read_heads(store, study.name)
    for stage in stages_of(study):
        if stage.is_external:
            continue
        heads = [known.get((stage.name, str(place))) for place in places_of(study, stage.scope)]
        made = [head for head in heads if head is not None]
        usd = sum(head.provenance.usage.get("usd", 0) for head in made)
        cut_short = [head for head in made if not head.complete]
        table.add_row(
            stage.name,
            f"{len(made) - len(cut_short)}/{len(heads)}",
            str(len(cut_short) or ""),
            str(len(heads) - len(made) or ""),
            str(sum(map(_n_rows, made))),
            f"{sum(head.provenance.seconds for head in made):.1f}",
            f"{usd:.2f}" if usd else "",
        )
    console.print(table)
    console.print(f"Results: {store.root}")
    if damaged:
        console.print(
            f"Damaged: {len(damaged)} places, counted as missing. See `autointerp verify`."
        )


def _n_rows(head: Manifest) -> int:
    """Rows of its tables; of vectors, which are no table, the windows that have one."""
    rows = [blob.n_rows for blob in head.blobs if blob.n_rows is not None]
    return sum(rows) if any(rows) else int(head.summary.get("n_windows", 0))
