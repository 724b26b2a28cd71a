"""Asking by file: questions out, answers in."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table
from upath import UPath

from autointerp_dagster.adapters.llm.batch.answers import Imported, import_answers
from autointerp_dagster.adapters.llm.batch.files import (
    BatchFile,
    BatchWriter,
    answers_path,
    check_series_free,
    free_paths,
    numbered_paths,
)
from autointerp_dagster.adapters.llm.batch.records import Batch, Outstanding, Question
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.adapters.study_layers import with_plain_layers
from autointerp_dagster.cli.report import asks_nobody, printable
from autointerp_dagster.core.config import LocalLLMConfig, RemoteLLMConfig
from autointerp_dagster.core.errors import StoreError, StudyError
from autointerp_dagster.resources.pending import Replayed, Survey, before_asking, stages_that_ask
from autointerp_dagster.study import Study, load_study
from autointerp_dagster.study.parameters import llm_config, parts_asked


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one batch file."""

    requests: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote, and what it left for later."""

    files: tuple[BatchFile, ...] = ()
    n_waiting: int = 0
    """Cells whose scores wait for explanations."""
    n_without_records: int = 0
    """Cells that nothing is known of."""
    n_outstanding: Mapping[str, int] = field(default_factory=dict)
    """Questions left out, because an earlier batch asked them and its answers are not imported; by
    that batch's name and file."""


def export_batch(
    study: Study,
    store: Store,
    out: Path | None,
    stages: Collection[str] | None,
    limits: Limits,
    *,
    again: bool = False,
) -> Exported:
    """Writes what a study still has to ask as files for a batch endpoint.

    Args:
        study: The study.
        store: Its store, where what was asked is kept.
        out: The first file; further ones are numbered. Null: a free name in this folder.
        stages: Names of the stages whose questions are wanted; null: all.
        limits: Of one file.
        again: Whether to ask also what an earlier batch asked and no import answered.

    Raises:
        StudyError: If a stage has no questions for a server.
        StoreError: If a file exists or cannot be written; then nothing was exported.
    """
    _check_remote(study, stages)
    if not stages_that_ask(study):
        return Exported()
    if out is not None:
        check_series_free(out)  # before a survey, which may take hours
        paths = numbered_paths(out)
    else:
        paths = free_paths(Path(f"{study.name}-batch.jsonl"))
    outstanding = None if again else Outstanding(store.root)
    writer = _writer(study, store, paths, limits)
    left_out: Counter[str] = Counter()
    waiting: set[object] = set()
    with Survey(study, store, study.cells, stages=stages) as survey, writer:
        for model, question in _pending(survey, waiting):
            batch = None if outstanding is None else outstanding.batch_of(question)
            if batch is None:
                assert isinstance(model.config, RemoteLLMConfig)  # checked before
                writer.add(question, model.config, model.identity)
            else:
                left_out[batch] += 1
    return Exported(tuple(writer.files), len(waiting), len(survey.without_records), left_out)


def _writer(study: Study, store: Store, paths: Iterator[Path], limits: Limits) -> BatchWriter:
    return BatchWriter(
        store.root, study.name, paths, max_requests=limits.requests, max_bytes=limits.n_bytes
    )


def _pending(survey: Survey, waiting: set[object]) -> Iterator[tuple[Replayed, Question]]:
    """Every question that is to be sent, once for each block of the journal that wants its answer.

    Cells that wait are added to ``waiting``.
    """
    seen: set[int] = set()
    for piece in survey.pieces():
        if piece.waits:
            waiting.add(piece.cell)
        if piece.stage not in survey.stages:
            continue
        for asked in piece.asked:
            wanted = hash((asked.call_id, asked.request.block))
            if asked.is_pending and wanted not in seen:
                seen.add(wanted)
                yield asked.model, Question(asked.call_id, asked.request)


def print_exported(study: Study, exported: Exported, console: Console) -> None:
    """Prints the files and what to do with them."""
    if exported.files:
        table = Table("file", "model", "requests", "MB", title=f"{study.name}: batch export")
        for file in exported.files:
            mb = f"{file.n_bytes / 1e6:,.1f}"
            table.add_row(str(file.path), printable(file.config.model), f"{file.n_requests:,}", mb)
        console.print(table)
    for line in _next_steps(study, exported):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def readable_studies(folder: Path, console: Console) -> list[Study]:
    """The studies of a folder that can be read; the others are named on the console.

    Raises:
        StudyError: If there is none.
    """
    studies: list[Study] = []
    for path in sorted(folder.glob("*.yaml")):
        try:
            studies.append(with_plain_layers(load_study(path)))
        except StudyError as error:
            line = (
                f"Skipped: {path}: {error} If its store asked, mend it, or name one with --study."
            )
            console.print(printable(line), markup=False, highlight=False, soft_wrap=True)
    if not studies:
        raise StudyError(
            f"{folder.resolve()}: no study there that can be read. Name the one that asked with "
            "--study, start in the folder that holds studies/, or set AUTOINTERP_STUDIES."
        )
    return studies


def import_batch(path: Path, roots: list[UPath]) -> Imported:
    """Records the answers of a file in the journals of the stores that asked.

    Raises:
        StoreError: If the file cannot be read, or a store cannot be written.
    """
    return import_answers(_lines_of(path), lambda batch: Batch.find(roots, batch))


def _lines_of(path: Path) -> Iterator[bytes]:
    """Only what goes wrong in here is a fault of the file."""
    try:
        with path.open("rb") as lines:
            yield from lines
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}.") from error


def print_imported(path: Path, imported: Imported, console: Console) -> None:
    """Prints what became of the lines, and what comes next."""
    table = Table("answers", "lines", title=f"{printable(path.name)}: batch import")
    table.columns[1].justify = "right"
    for name, n in (
        ("recorded", imported.n_recorded),
        ("known already", imported.n_known),
        ("failed", imported.n_failed),
        ("unknown", imported.n_unknown),
    ):
        table.add_row(name, f"{n:,}")
    console.print(table)
    for line in _outcome(imported):
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def _outcome(imported: Imported) -> Iterator[str]:
    for fault in imported.faults:
        yield f"line {fault.line}: {fault.reason}"
    n_more = imported.n_failed + imported.n_unknown - len(imported.faults)
    if n_more:
        yield f"... and {n_more:,} more."
    usage = imported.usage
    if imported.n_recorded:
        yield (
            f"Recorded: {usage.prompt_tokens:,} prompt tokens, {usage.cached_tokens:,} of them "
            f"cached, {usage.completion_tokens:,} completion tokens, {usage.usd:,.2f} USD."
        )
    for name in sorted(imported.studies):
        yield (
            f"Next: `autointerp batch export {name}` for what is still to be asked; when nothing "
            f"is, `autointerp run {name} --replay`."
        )
    if not imported.n_usable:
        yield "No line could be used."


def _next_steps(study: Study, exported: Exported) -> Iterator[str]:
    for file in exported.files:
        yield from _asking(file)
    if exported.n_outstanding:
        n = sum(exported.n_outstanding.values())
        yield (
            f"Left out: {n:,} that were exported before and are not answered yet. Import the "
            "answers, or ask them again with --again:"
        )
        for batch, n_asked in exported.n_outstanding.items():
            yield f"  {n_asked:,} in batch {printable(batch)}"
    if exported.n_waiting:
        yield (
            f"The scores of {exported.n_waiting} cells wait for explanations: import the answers, "
            "then export again."
        )
    if exported.n_without_records:
        yield (
            f"{exported.n_without_records} of {len(study.cells)} cells have no up-to-date "
            f"{before_asking(study)}. `autointerp run {study.name} --until {before_asking(study)}` "
            "makes them; it asks no language model."
        )
    if not stages_that_ask(study):
        yield asks_nobody(study)
    elif exported == Exported():
        yield f"Nothing is left to ask. `autointerp run {study.name} --replay` makes the results."


def _asking(file: BatchFile) -> Iterator[str]:
    """How a file gets its answers, as commands where there are any."""
    given, wanted = quote(str(file.path)), quote(str(answers_path(file.path)))
    if urlsplit(file.config.base_url or "").hostname == "api.openai.com":
        yield f"Upload {given} as a batch of the OpenAI API; save its output file as {wanted}"
    else:
        model = quote(printable(file.config.model))
        yield f"vllm run-batch -i {given} -o {wanted} --model {model}"
    yield f"autointerp batch import {wanted}"


def _check_remote(study: Study, stages: Collection[str] | None) -> None:
    known = stages_that_ask(study)
    for stage in known if stages is None else stages:
        if stage not in known:
            raise StudyError(
                f"study {study.name}: stage {stage!r} asks no language model. Those that do: "
                f"{known}."
            )
        for part in parts_asked(study, stage):
            if isinstance(llm_config(study, part), LocalLLMConfig):
                raise StudyError(
                    f"study {study.name}: models.{part}: a model in this process (source: ...), "
                    f"wanted one behind a server for the questions of {stage}. Describe it with "
                    "base_url or serve, as the server that will read the batch knows it, or name "
                    "other stages with --stage."
                )
