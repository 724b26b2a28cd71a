"""``autointerp batch``: export, import."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from autointerp_dagster.adapters.llm.batch.files import MAX_BYTES, MAX_REQUESTS
from autointerp_dagster.cli.batch import (
    Limits,
    export_batch,
    import_batch,
    print_exported,
    print_imported,
    readable_studies,
)
from autointerp_dagster.cli.shared import (
    StudyArgument,
    console,
    plain_errors,
    studies_folder,
    study_of,
)
from autointerp_dagster.resources.store import StoreResource

app = typer.Typer(
    help="Ask by file: for batch endpoints, and for machines without a network.",
    no_args_is_help=True,
)


@app.command("export")
@plain_errors
def export(
    study: StudyArgument,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The file; further ones are numbered. By default STUDY-batch.jsonl, numbered if "
            "there is one."
        ),
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(
            help="Only the questions of this stage, e.g. explanations; may be given several times."
        ),
    ] = None,
    again: Annotated[
        bool,
        typer.Option(
            "--again", help="Also what an earlier export asked and no import has answered yet."
        ),
    ] = False,
    max_requests: Annotated[int, typer.Option(min=1, help="Per file.")] = MAX_REQUESTS,
    max_mb: Annotated[float, typer.Option(min=0.001, help="Per file.")] = MAX_BYTES / 1e6,
) -> None:
    """Write what a study still has to ask as JSONL, for OpenAI's batch API or `vllm run-batch`.

    Scores need explanations, so there are two rounds at least: export, answer and import the
    explanations, then the scores. Answers in a wrong format are asked again in the next round.

    What an earlier export asked is left out until its answers are imported; what came back without
    an answer is asked again.
    """
    loaded = study_of(study)
    limits = Limits(max_requests, int(max_mb * 1e6))
    store = StoreResource().of(loaded)
    with Console(stderr=True).status("Going through the prompts"):
        exported = export_batch(loaded, store, out, stage, limits, again=again)
    print_exported(loaded, exported, console)


@app.command("import")
@plain_errors
def import_(
    file: Annotated[Path, typer.Argument(help="Answers as JSONL.")],
    study: Annotated[
        str | None,
        typer.Option(help="Whose store asked; by default every study of ./studies is looked at."),
    ] = None,
) -> None:
    """Take the answers of a batch into the journal; the next run uses them.

    An answer that the journal has already is left alone. Lines without an answer are counted, with
    their reason; the next export asks again. If no line could be used, the exit code is 1.
    """
    warnings = Console(stderr=True)
    studies = readable_studies(studies_folder(), warnings) if study is None else [study_of(study)]
    roots = list(dict.fromkeys(StoreResource().of(known).root for known in studies))
    with Console(stderr=True).status("Reading answers"):
        imported = import_batch(file, roots)
    print_imported(file, imported, console)
    if not imported.n_usable:
        raise typer.Exit(1)
