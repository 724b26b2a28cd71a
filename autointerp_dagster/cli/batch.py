"""Asking by file: questions out, answers in."""

from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from rich.console import Console
from rich.table import Table
from upath import UPath

from autointerp_dagster.adapters.llm.batch.answers import Imported, import_answers
from autointerp_dagster.adapters.llm.batch.files import (
    Batch,
    BatchFile,
    BatchWriter,
    Question,
    numbered_paths,
)
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.cli.report import printable
from autointerp_dagster.core.config import LocalLLMConfig, RemoteLLMConfig
from autointerp_dagster.core.errors import StoreError, StudyError
from autointerp_dagster.resources.pending import EXPLAIN, Piece, Survey, stages_that_ask
from autointerp_dagster.study import Study


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one batch file."""

    requests: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote, and what it left for later."""

    files: tuple[BatchFile, ...]
    n_waiting: int
    """Cells whose scores wait for explanations."""
    n_without_records: int
    """Cells that nothing is known of."""


def export_batch(
    study: Study, store: Store, out: Path, stages: Collection[str] | None, limits: Limits
) -> Exported:
    """Writes what a study still has to ask as files for a batch endpoint.

    Args:
        study: The study.
        store: Its store, where what was asked is kept.
        out: The first file; further ones are numbered.
        stages: Names of the stages whose questions are wanted; null: all.
        limits: Of one file.

    Raises:
        StudyError: If a stage has no questions for a server.
        StoreError: If a file exists or cannot be written.
    """
    _check_remote(study, stages)
    written: set[int] = set()
    waiting = set()
    with Survey(study, store, study.cells, stages=stages) as survey:
        with _Writers(study, store, out, limits) as writers:
            for piece in survey.pieces():
                if piece.waits:
                    waiting.add(piece.cell)
                if piece.stage not in survey.stages:
                    continue
                for asked in piece.asked:
                    short = int(asked.call_id[:16], 16)
                    if asked.is_pending and short not in written:  # ids are unique in a file
                        written.add(short)
                        writers.of(piece).add(Question(asked.call_id, asked.request))
        return Exported(tuple(writers.files), len(waiting), len(survey.without_records))


class _Writers(ExitStack):
    """One writer per model."""

    def __init__(self, study: Study, store: Store, out: Path, limits: Limits) -> None:
        super().__init__()
        self._study, self._store, self._limits = study, store, limits
        self._paths = numbered_paths(out)
        self._by_identity: dict[str, BatchWriter] = {}

    @property
    def files(self) -> list[BatchFile]:
        return [file for writer in self._by_identity.values() for file in writer.files]

    def of(self, piece: Piece) -> BatchWriter:
        identity, config = piece.model.identity, piece.model.config
        if identity not in self._by_identity:
            assert isinstance(config, RemoteLLMConfig)  # checked before
            writer = BatchWriter(
                self._store.root,
                self._study.name,
                config,
                identity,
                self._paths,
                max_requests=self._limits.requests,
                max_bytes=self._limits.n_bytes,
            )
            self._by_identity[identity] = self.enter_context(writer)
        return self._by_identity[identity]


def print_exported(study: Study, exported: Exported, console: Console) -> None:
    """Prints the files and what to do with them."""
    if exported.files:
        table = Table("file", "model", "requests", "MB", title=f"{study.name}: batch export")
        for file in exported.files:
            mb = f"{file.n_bytes / 1e6:,.1f}"
            table.add_row(str(file.path), printable(file.model), f"{file.n_requests:,}", mb)
        console.print(table)
    for line in _next_steps(study, exported):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def import_batch(path: Path, roots: list[UPath]) -> Imported:
    """Records the answers of a file in the journals of the stores that asked.

    Raises:
        StoreError: If the file cannot be read, or a store cannot be written.
    """
    try:
        with path.open("rb") as lines:
            return import_answers(lines, lambda batch: Batch.find(roots, batch))
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


def _next_steps(study: Study, exported: Exported) -> Iterator[str]:
    for file in exported.files:
        answers = file.path.with_name(f"{file.path.stem}-answers.jsonl")
        given, wanted = quote(str(file.path)), quote(str(answers))
        yield f"vllm run-batch -i {given} -o {wanted} --model {quote(printable(file.model))}"
        yield f"autointerp batch import {wanted}"
    if exported.n_waiting:
        yield (
            f"The scores of {exported.n_waiting} cells wait for explanations: import the answers, "
            "then export again."
        )
    if exported.n_without_records:
        yield (
            f"{exported.n_without_records} of {len(study.cells)} cells have no up-to-date "
            f"latent_records. `autointerp run {study.name} --until latent_records` makes them; it "
            "asks no language model."
        )
    if not (exported.files or exported.n_waiting or exported.n_without_records):
        yield f"Nothing is left to ask. `autointerp run {study.name} --replay` makes the results."


def _check_remote(study: Study, stages: Collection[str] | None) -> None:
    known = stages_that_ask(study)
    for stage in known if stages is None else stages:
        if stage not in known:
            raise StudyError(
                f"study {study.name}: stage {stage!r} asks no language model. Those that do: "
                f"{known}."
            )
        part = "explainer" if stage == EXPLAIN else "judge"
        if isinstance(getattr(study.models, part), LocalLLMConfig):
            raise StudyError(
                f"study {study.name}: models.{part}: a model in this process (source: ...), wanted "
                f"one behind a server for the questions of {stage}. Describe it with base_url or "
                "serve, as the server that will read the batch knows it, or name other stages "
                "with --stage."
            )
