"""The commands: run, plan, judge, batch export, batch import, status, why, compare."""

import logging
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import dagster as dg
import transformers
import typer
from rich.console import Console

from autointerp_dagster.adapters.llm.batch.files import MAX_BYTES, MAX_REQUESTS
from autointerp_dagster.adapters.ratings import read_ratings
from autointerp_dagster.adapters.study_layers import with_plain_layers
from autointerp_dagster.cli.batch import (
    Limits,
    export_batch,
    import_batch,
    print_exported,
    print_imported,
    readable_studies,
)
from autointerp_dagster.cli.compare import (
    comparison_as_json,
    print_comparison,
    print_ratings,
)
from autointerp_dagster.cli.judge import calibration_as_json, print_calibration
from autointerp_dagster.cli.plan import missing_records, plan_as_json, print_plan
from autointerp_dagster.cli.report import print_report
from autointerp_dagster.cli.run import Selection, materialize, print_dry_run, print_outcome
from autointerp_dagster.cli.status import print_status
from autointerp_dagster.cli.why import walk_score
from autointerp_dagster.core.errors import AutoInterpError, StudyError
from autointerp_dagster.resources.calibrating import N_WINDOWS, calibrate
from autointerp_dagster.resources.comparing import compare_scores, rate_scores, read_scores
from autointerp_dagster.resources.planning import plan_study
from autointerp_dagster.resources.progress import on_terminal
from autointerp_dagster.resources.store import StoreResource
from autointerp_dagster.study import Study, load_study

app = typer.Typer(
    help="Explain and score the latents of sparse autoencoders.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
batch = typer.Typer(
    help="Ask by file: for batch endpoints, and for machines without a network.",
    no_args_is_help=True,
)
app.add_typer(batch, name="batch")
console = Console()

StudyArgument = Annotated[
    str,
    typer.Argument(
        metavar="STUDY", help="A study file, or the name of one in ./studies, e.g. demo."
    ),
]
LayersOption = Annotated[
    list[str] | None,
    typer.Option(help="Only these layers, e.g. sae@layers.9; may be given several times."),
]
RangesOption = Annotated[
    list[str] | None,
    typer.Option(help="Only these ranges, e.g. 0000000-0002047; may be given several times."),
]


def _plain_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Expected errors in one line without a traceback, exit code 1."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except AutoInterpError as error:
            Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]", end=" ")
            Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print(str(error))
            raise typer.Exit(1) from error

    return run


@app.command()
@_plain_errors
def run(
    study: StudyArgument,
    layers: LayersOption = None,
    ranges: RangesOption = None,
    until: Annotated[
        str | None,
        typer.Option(
            help="Stop after this stage, e.g. latent_records; the whole graph by default."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be materialized, and stop.")
    ] = False,
    replay: Annotated[
        bool,
        typer.Option(
            "--replay",
            help="Send nothing to any language model: take answers from the journal alone.",
        ),
    ] = False,
) -> None:
    """Materialize a study, or a part of it, with progress bars.

    What the store already holds is linked, not computed again. Killed at any moment, the same
    command goes on where it stopped. The runs show in the UI as well.

    With --replay, rows whose call the journal lacks have the reason not_recorded, and their cells
    count as cut short: a later run makes them whole.
    """
    loaded = _study(study)
    selection = Selection.of(loaded, layers, ranges, until)
    if dry_run:
        print_dry_run(loaded, selection, console)
        return
    logging.getLogger("autointerp_dagster").addHandler(_ConsoleLines())
    logging.getLogger("autointerp_dagster").setLevel(logging.INFO)
    transformers.logging.disable_progress_bar()
    store = StoreResource().of(loaded)
    with _instance() as instance:
        budget = materialize(loaded, selection, instance, "replay" if replay else "record")
    if selection.is_whole(loaded):
        print_report(loaded, store, console)
    print_outcome(loaded, selection, store, budget, console)


@app.command()
@_plain_errors
def plan(
    study: StudyArgument,
    layers: LayersOption = None,
    ranges: RangesOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")] = False,
) -> None:
    """Say what a study will cost before anything is paid: requests, tokens, USD, per stage.

    Counts the real prompts that a run would send now, from the latents' records and the journal;
    asks no language model and writes nothing. Prices, budgets and tokenizers are the study's.
    """
    loaded = _study(study)
    selection = Selection.of(loaded, layers, ranges, None)
    found = plan_study(loaded, StoreResource().of(loaded), selection.cells, on_terminal)
    if len(found.without_records) == len(selection.cells):
        raise StudyError(f"study {loaded.name}: {missing_records(loaded, found)}")
    if as_json:
        typer.echo(plan_as_json(loaded, found))
    else:
        print_plan(loaded, found, console)


@app.command()
@_plain_errors
def judge(
    study: StudyArgument,
    scorer: Annotated[
        list[str] | None,
        typer.Option(help="Only this scorer: detection or fuzzing; may be given several times."),
    ] = None,
    windows: Annotated[
        int, typer.Option(min=2, help="Windows of each class, per latent of the pack.")
    ] = N_WINDOWS,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")] = False,
) -> None:
    """Find out in minutes what the study's judge is good for, before a run is paid.

    Asks it about latents whose truth is known, with their true descriptions (ceiling) and with
    those of others (floor), by the study's own detection and fuzzing parameters. The answers are
    kept, so asking again is free; what is spent counts towards the study's budget.
    """
    loaded = _study(study)
    found = calibrate(loaded, StoreResource().of(loaded), scorer, windows, on_terminal)
    if as_json:
        typer.echo(calibration_as_json(loaded, found))
    else:
        print_calibration(loaded, found, console)


@batch.command("export")
@_plain_errors
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
    loaded = _study(study)
    limits = Limits(max_requests, int(max_mb * 1e6))
    store = StoreResource().of(loaded)
    with Console(stderr=True).status("Going through the prompts"):
        exported = export_batch(loaded, store, out, stage, limits, again=again)
    print_exported(loaded, exported, console)


@batch.command("import")
@_plain_errors
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
    folder = Path(os.environ.get("AUTOINTERP_STUDIES", "studies"))
    warnings = Console(stderr=True)
    studies = readable_studies(folder, warnings) if study is None else [_study(study)]
    roots = list(dict.fromkeys(StoreResource().of(known).root for known in studies))
    with Console(stderr=True).status("Reading answers"):
        imported = import_batch(file, roots)
    print_imported(file, imported, console)
    if not imported.n_usable:
        raise typer.Exit(1)


@app.command()
@_plain_errors
def status(study: StudyArgument) -> None:
    """Show, for each stage, how many cells are done, cut short, or missing."""
    loaded = _study(study)
    print_status(loaded, StoreResource().of(loaded), console)


@app.command()
@_plain_errors
def why(
    study: StudyArgument,
    layer: Annotated[str, typer.Argument(help="e.g. sae@layers.9")],
    latent: Annotated[int, typer.Argument(help="Index of the latent.")],
    scorer: Annotated[str | None, typer.Option(help="Only this scorer, e.g. detection.")] = None,
    manifest: Annotated[
        str | None,
        typer.Option(help="Path of an older score manifest in the store; the newest by default."),
    ] = None,
) -> None:
    """Walk a score back to the prompt, the windows, the documents and the weights that made it.

    Reads the store alone: it works when Dagster's event log is gone, and for superseded scores.
    """
    loaded = _study(study)
    walk_score(loaded, StoreResource().of(loaded), layer, latent, scorer, manifest, console)


@app.command()
@_plain_errors
def compare(
    studies: Annotated[
        list[str],
        typer.Argument(
            metavar="STUDY [STUDY ...]",
            help="Study files or names; the first is what the others are compared with.",
        ),
    ],
    ratings: Annotated[
        Path | None,
        typer.Option(
            help="CSV of people's ratings: coder, hookpoint, latent, explainer, rating, and "
            "perhaps rater, explanation. One study is enough then."
        ),
    ] = None,
    layers: LayersOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")] = False,
) -> None:
    """Compare finished studies over the latents that both scored, or scores with human ratings.

    Pairs are made by coder, hookpoint and latent, per scorer and explainer of the same name.
    Reads the stores alone; nothing is computed anew and no model is asked.
    """
    loaded = [_study(name) for name in studies]
    if len(loaded) < 2 and ratings is None:
        raise StudyError(
            f"compare: got {loaded[0].name} alone, wanted two studies or more, or one with "
            "--ratings FILE."
        )
    rows = None if ratings is None else read_ratings(ratings)
    scores = [
        read_scores(
            study,
            StoreResource().of(study),
            [cell.layer for cell in Selection.of(study, layers, None, None).cells],
        )
        for study in loaded
    ]
    comparison = compare_scores(scores[0], scores[1:]) if len(scores) > 1 else None
    rated = [] if rows is None else [rate_scores(one, rows) for one in scores]
    if as_json:
        typer.echo(comparison_as_json(comparison, rated))
        return
    if comparison is not None:
        print_comparison(comparison, console)
    for one in rated:
        print_ratings(one, console)


class _ConsoleLines(logging.Handler):
    """The package's log as plain lines above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


def _study(name: str) -> Study:
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = Path(os.environ.get("AUTOINTERP_STUDIES", "studies")) / f"{name}.yaml"
    if not path.exists():
        known = sorted(found.stem for found in path.parent.glob("*.yaml"))
        raise StudyError(f"{path}: no such study. In {path.parent}/ there are: {known}.")
    return with_plain_layers(load_study(path))


def _instance() -> dg.DagsterInstance:
    """The instance of DAGSTER_HOME, which is ``./dagster_home`` unless set."""
    home = Path(os.environ.setdefault("DAGSTER_HOME", str(Path("dagster_home").resolve())))
    home.mkdir(parents=True, exist_ok=True)
    settings = home / "dagster.yaml"
    if not settings.exists():
        settings.write_text("telemetry: {enabled: false}\nnux: {enabled: false}\n")
    return dg.DagsterInstance.get()


if __name__ == "__main__":
    sys.exit(app())
