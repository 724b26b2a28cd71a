"""What the commands share: arguments, options, consoles, and how an error is told."""

import os
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import dagster as dg
import typer
from rich.console import Console
from sqlalchemy.exc import SQLAlchemyError

from autointerp_dagster.adapters.study_layers import with_plain_layers
from autointerp_dagster.core.errors import AutoInterpError, StudyError, told
from autointerp_dagster.study import Study, load_study

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
JsonOption = Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")]


class RecordsError(AutoInterpError):
    """Dagster's records, of runs and events, cannot be read or written."""


def plain_errors(command: Callable[..., None]) -> Callable[..., None]:
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


def studies_folder() -> Path:
    """Where studies are looked for by name."""
    return Path(os.environ.get("AUTOINTERP_STUDIES", "studies"))


def study_of(name: str) -> Study:
    """The study that an argument names.

    Raises:
        StudyError: If there is no such file, or it has a mistake.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = studies_folder() / f"{name}.yaml"
    if not path.exists():
        known = sorted(found.stem for found in path.parent.glob("*.yaml"))
        raise StudyError(f"{path}: no such study. In {path.parent}/ there are: {known}.")
    return with_plain_layers(load_study(path))


@contextmanager
def dagster_instance() -> Iterator[dg.DagsterInstance]:
    """The instance of DAGSTER_HOME, which is ``./dagster_home`` unless set.

    Raises:
        RecordsError: If its records cannot be read or written, then or in the block.
    """
    home = Path(os.environ.setdefault("DAGSTER_HOME", str(Path("dagster_home").resolve())))
    streams = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    try:
        home.mkdir(parents=True, exist_ok=True)
        settings = home / "dagster.yaml"
        if not settings.exists():
            settings.write_text("telemetry: {enabled: false}\nnux: {enabled: false}\n")
        with dg.DagsterInstance.get() as instance:
            yield instance
    except AutoInterpError:
        raise
    except Exception as error:  # Dagster's own on Postgres have no common kind
        cause = next((one for one in _causes(error) if _is_of(one, home)), None)
        if cause is None:
            raise
        for descriptor, kept in streams.items():  # may still lead to a log among the records
            os.dup2(kept, descriptor)
        free = ""
        if _is_on_disk(cause) and home.is_dir():
            free = f", {shutil.disk_usage(home).free / 1e6:.1f} MB are free"
        raise RecordsError(
            f"{home}: Dagster's records cannot be read or written: {told(cause)}{free}. "
            f"{_remedy(cause, home)}, and run again: what is finished is in the study's store and "
            "is not made again."
        ) from error
    finally:
        for kept in streams.values():
            os.close(kept)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that led to it."""
    found: BaseException | None = error
    while found is not None:
        yield found
        hidden = found.__suppress_context__
        found = found.__cause__ or (None if hidden else found.__context__)


def _is_of(error: BaseException, home: Path) -> bool:
    """Whether an error is one of Dagster's records."""
    if isinstance(error, OSError):
        return error.filename is not None and Path(str(error.filename)).is_relative_to(home)
    return isinstance(error, SQLAlchemyError)


def _is_on_disk(cause: BaseException) -> bool:
    """Whether the records are files of this machine, not a server's."""
    return isinstance(cause, OSError) or isinstance(getattr(cause, "orig", None), sqlite3.Error)


def _remedy(cause: BaseException, home: Path) -> str:
    if not _is_on_disk(cause):
        return f"See that the server in {home / 'dagster.yaml'} is up and its address right"
    if isinstance(cause, OSError) or re.search("is full|disk I/O", str(cause)):
        return "Free space there, or name another folder in DAGSTER_HOME"
    return "Name another folder in DAGSTER_HOME"
