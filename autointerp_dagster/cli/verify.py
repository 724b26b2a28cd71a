"""What a check of a study's files found, and how to get back what is lost."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from autointerp_dagster.adapters.heads import Name
from autointerp_dagster.adapters.verifying import Fault, Verified
from autointerp_dagster.cli.run import Selection
from autointerp_dagster.study import Study
from autointerp_dagster.study.stages import places_of


def names_of(study: Study, selection: Selection) -> set[Name] | None:
    """The places whose heads are looked at; null: all.

    A selection of cells leaves out what is made from others, too: layer and study metrics.
    """
    if selection.is_whole(study):
        return None
    names = {
        (stage.name, str(cell))
        for stage in selection.stages
        if stage.scope == "cell"
        for cell in selection.cells
    }
    for stage in selection.stages:
        for layer in places_of(study, "layer") if stage.scope == "layer" else ():
            cells = {cell for cell in study.cells if cell.layer == layer}
            if cells <= set(selection.cells):
                names.add((stage.name, str(layer)))
    return names


def print_verified(study: Study, found: Verified, console: Console) -> None:
    """Prints what was checked, and each fault with the command that makes the file again."""
    console.print(
        f"{study.name}: {found.n_manifests:,} manifests, {found.n_blobs:,} files of "
        f"{found.n_bytes / 1e6:,.1f} MB, {found.n_segments:,} files of the journal: "
        + (f"[bold red]{len(found.faults)} faults[/]" if found.faults else "all as written.")
    )
    if not found.faults:
        return
    table = Table("place", "file", "fault", "makes it again, after --discard", show_lines=True)
    for fault in found.faults:
        place = f"{fault.asset} {fault.cell}".strip()
        cells = (place, fault.path, fault.text, rebuilt_by(study, fault))
        table.add_row(*map(escape, cells))
    console.print(table)
    console.print(
        f"`autointerp verify {study.name} --discard` deletes what is damaged; then run the "
        "commands. Models' answers come from the journal and are not paid for again."
    )


def print_discarded(removed: Sequence[str], console: Console) -> None:
    """Prints what was deleted."""
    for path in removed:
        console.print(f"deleted {path}", markup=False, highlight=False, soft_wrap=True)


def rebuilt_by(study: Study, fault: Fault) -> str:
    """The command that makes a file again; for the journal, what there is to do."""
    if fault.kind == "journal":
        return "restore it from a backup; deleted, its calls are paid for again when they are asked"
    command = f"autointerp run {study.name}"
    layer, _, block = fault.cell.partition("/")
    if fault.kind != "blob" or "@" not in layer:
        return command  # what rests on it, all over the study, is made again
    return f"{command} --layers {layer}" + (f" --ranges {block}" if block else "")
