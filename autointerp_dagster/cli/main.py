"""The commands: run, plan, judge, status, discover, stale, why, compare, verify, gc; and batch."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import transformers
import typer

from autointerp_dagster.adapters.pruning.survey import SUPERSEDED_DAYS
from autointerp_dagster.adapters.ratings import read_ratings
from autointerp_dagster.adapters.verifying import discard, verify
from autointerp_dagster.cli import batch_commands
from autointerp_dagster.cli.compare import (
    comparison_as_json,
    print_comparison,
    print_ratings,
)
from autointerp_dagster.cli.discover import look_by_hand, print_discovered, print_look
from autointerp_dagster.cli.gc import (
    named_studies,
    print_pruned,
    pruned,
    pruned_as_json,
    pruned_spools,
    stores_of,
)
from autointerp_dagster.cli.judge import calibration_as_json, print_calibration
from autointerp_dagster.cli.plan import missing_records, plan_as_json, print_plan
from autointerp_dagster.cli.report import print_report
from autointerp_dagster.cli.run import Selection, materialize, print_dry_run, print_outcome
from autointerp_dagster.cli.shared import (
    JsonOption,
    LayersOption,
    RangesOption,
    StudyArgument,
    console,
    dagster_instance,
    plain_errors,
    studies_folder,
    study_of,
)
from autointerp_dagster.cli.stale import print_stale, stale_as_json
from autointerp_dagster.cli.status import print_status
from autointerp_dagster.cli.verify import names_of, print_discarded, print_verified
from autointerp_dagster.cli.walk import SHOWN_WINDOWS, walk_latent
from autointerp_dagster.cli.why import print_walk, walk_as_json
from autointerp_dagster.core.errors import StudyError
from autointerp_dagster.resources.calibrating import N_WINDOWS, calibrate
from autointerp_dagster.resources.comparing import compare_scores, rate_scores, read_scores
from autointerp_dagster.resources.planning import plan_study
from autointerp_dagster.resources.progress import on_terminal
from autointerp_dagster.resources.staleness import out_of_date
from autointerp_dagster.resources.store import StoreResource

app = typer.Typer(
    help="Explain and score the latents of sparse autoencoders.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(batch_commands.app, name="batch")


@app.command()
@plain_errors
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
    stale: Annotated[
        bool,
        typer.Option("--stale", help="Only what `autointerp stale` lists; look at nothing else."),
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

    With --stale, only the places that are out of date, and those that follow, are looked at.

    With --replay, rows whose call the journal lacks have the reason not_recorded, and their cells
    count as cut short: a later run makes them whole.
    """
    loaded = study_of(study)
    selection = Selection.of(loaded, layers, ranges, until)
    store = StoreResource().of(loaded)
    only = {one.name for one in out_of_date(loaded, store)} if stale else None
    if dry_run:
        print_dry_run(loaded, selection, console, only)
        return
    transformers.logging.disable_progress_bar()
    mode = "replay" if replay else "record"
    with _log_as_lines(), dagster_instance() as instance:
        budget = materialize(loaded, selection, instance, mode, only)
    if selection.is_whole(loaded):
        print_report(loaded, store, console)
    print_outcome(loaded, selection, store, budget, console)


@app.command()
@plain_errors
def plan(
    study: StudyArgument,
    layers: LayersOption = None,
    ranges: RangesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a study will cost before anything is paid: requests, tokens, USD, per stage.

    Counts the real prompts that a run would send now, from the latents' records and the journal;
    asks no language model and writes nothing. Prices, budgets and tokenizers are the study's.
    """
    loaded = study_of(study)
    selection = Selection.of(loaded, layers, ranges, None)
    found = plan_study(loaded, StoreResource().of(loaded), selection.cells, on_terminal)
    if len(found.without_records) == len(selection.cells):
        raise StudyError(f"study {loaded.name}: {missing_records(loaded, found)}")
    if as_json:
        typer.echo(plan_as_json(loaded, found))
    else:
        print_plan(loaded, found, console)


@app.command()
@plain_errors
def judge(
    study: StudyArgument,
    scorer: Annotated[
        list[str] | None,
        typer.Option(help="Only this scorer: detection or fuzzing; may be given several times."),
    ] = None,
    windows: Annotated[
        int, typer.Option(min=2, help="Windows of each class, per latent of the pack.")
    ] = N_WINDOWS,
    as_json: JsonOption = False,
) -> None:
    """Find out in minutes what the study's judge is good for, before a run is paid.

    Asks it about latents whose truth is known, with their true descriptions (ceiling) and with
    those of others (floor), by the study's own detection and fuzzing parameters. The answers are
    kept, so asking again is free; what is spent counts towards the study's budget.
    """
    loaded = study_of(study)
    found = calibrate(loaded, StoreResource().of(loaded), scorer, windows, on_terminal)
    if as_json:
        typer.echo(calibration_as_json(loaded, found))
    else:
        print_calibration(loaded, found, console)


@app.command()
@plain_errors
def status(study: StudyArgument) -> None:
    """Show, for each stage, how many cells are done, cut short, or missing."""
    loaded = study_of(study)
    print_status(loaded, StoreResource().of(loaded), console)
    print_discovered(loaded, StoreResource().of(loaded), console)


@app.command()
@plain_errors
def discover(
    study: StudyArgument,
    forget: Annotated[
        list[str] | None,
        typer.Option(help="Take this layer out of the study; may be given several times."),
    ] = None,
) -> None:
    """Look for new coders of a study with `layers: discover`, and register those that are sound.

    What the study's sensor and schedule do, without asking for runs.
    """
    loaded = study_of(study)
    with dagster_instance() as instance:
        seen = look_by_hand(loaded, StoreResource().of(loaded), instance, forget or [])
    if seen is not None:
        print_look(loaded, seen, console)


@app.command()
@plain_errors
def stale(study: StudyArgument, as_json: JsonOption = False) -> None:
    """List every place that is out of date, and why: what a run would not skip.

    Compares manifests with the study, the models' and coders' files and the code; loads no model,
    asks nobody and writes nothing. A place follows if only an input of it is out of date.
    """
    loaded = study_of(study)
    found = out_of_date(loaded, StoreResource().of(loaded))
    if as_json:
        typer.echo(stale_as_json(loaded, found))
    else:
        print_stale(loaded, found, console)


@app.command()
@plain_errors
def why(
    study: StudyArgument,
    layer: Annotated[str, typer.Argument(help="e.g. sae@layers.9")],
    latent: Annotated[int, typer.Argument(help="Index of the latent.")],
    scorer: Annotated[str | None, typer.Option(help="Only this scorer, e.g. detection.")] = None,
    manifest: Annotated[
        str | None,
        typer.Option(help="Path of an older score manifest in the store; the newest by default."),
    ] = None,
    windows: Annotated[
        int, typer.Option(min=0, help="Windows to walk, of each explainer and subject.")
    ] = SHOWN_WINDOWS,
    as_json: JsonOption = False,
) -> None:
    """Walk a score back to the prompt, the windows, the documents and the weights that made it.

    Reads the store alone: it works when Dagster's event log is gone, and for superseded scores.
    """
    loaded = study_of(study)
    walk = walk_latent(
        loaded,
        StoreResource().of(loaded),
        layer,
        latent,
        scorer=scorer,
        manifest=manifest,
        n_windows=windows,
    )
    if as_json:
        typer.echo(walk_as_json(walk))
    else:
        print_walk(loaded, walk, console)


@app.command()
@plain_errors
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
    as_json: JsonOption = False,
) -> None:
    """Compare finished studies over the latents that both scored, or scores with human ratings.

    Pairs are made by coder, hookpoint and latent, per scorer and explainer of the same name.
    Reads the stores alone; nothing is computed anew and no model is asked.
    """
    loaded = [study_of(name) for name in studies]
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


@app.command("verify")
@plain_errors
def verify_(
    study: StudyArgument,
    layers: LayersOption = None,
    ranges: RangesOption = None,
    discard_faults: Annotated[
        bool,
        typer.Option(
            "--discard", help="Delete what is damaged, so that `autointerp run` makes it again."
        ),
    ] = False,
) -> None:
    """Read every file that a study's results rest on, and check it against its checksums.

    Heads, manifests, tables and tensors, down to the tokens, and the journal's answers. Damaged and
    missing files are listed with the command that makes them again; then the exit code is 1.
    """
    loaded = study_of(study)
    store = StoreResource().of(loaded)
    names = names_of(loaded, Selection.of(loaded, layers, ranges, None))
    found = verify(store, loaded.name, names, on_terminal)
    print_verified(loaded, found, console)
    if discard_faults:
        print_discarded(discard(store, found), console)
    if found.faults:
        raise typer.Exit(1)


@app.command()
@plain_errors
def gc(
    studies: Annotated[
        list[str] | None,
        typer.Argument(metavar="[STUDY ...]", help="Study files or names, whose stores are meant."),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="The stores of all studies of the studies folder.")
    ] = False,
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete what is listed; otherwise nothing is touched.")
    ] = False,
    superseded_days: Annotated[
        float,
        typer.Option(min=1.0, help="Keep what newer results replaced for so many days."),
    ] = SUPERSEDED_DAYS,
    as_json: JsonOption = False,
) -> None:
    """List what the stores of some studies do not need any more; with --delete, delete it.

    Kept is all that any study's present results rest on, whatever they replaced in the last 30
    days, the language models' answers about their coders, and every file younger than a day. Runs
    may go on meanwhile. Killed at any moment, it leaves a whole store.
    """
    chosen = named_studies(studies, every, studies_folder(), study_of)
    found = [pruned(store, superseded_days, delete) for store in stores_of(chosen)]
    spools = pruned_spools(delete)
    if as_json:
        typer.echo(pruned_as_json(found, spools))
    else:
        print_pruned(found, spools, console)


class _ConsoleLines(logging.Handler):
    """The package's log as plain lines above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _log_as_lines() -> Iterator[None]:
    """Prints the package's log while a run goes on, and never into another command's output."""
    logger, lines = logging.getLogger("autointerp_dagster"), _ConsoleLines()
    level = logger.level
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(lines)
        logger.setLevel(level)


if __name__ == "__main__":
    sys.exit(app())
