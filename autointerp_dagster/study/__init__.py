"""A study: one YAML file that says which latents of which coders are explained and scored, how.

The file may ``extends:`` another study (for sweeps). Every mistake in it becomes one line that
names file, line, key and remedy.
"""

from pathlib import Path

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from autointerp_dagster.core.errors import StudyError
from autointerp_dagster.study.budget import BudgetConfig
from autointerp_dagster.study.file import StudyFile
from autointerp_dagster.study.model import Study

__all__ = ["BudgetConfig", "Study", "find_studies", "load_study"]


def load_study(path: str | Path) -> Study:
    """Reads a study file.

    Raises:
        StudyError: If the file is missing, is no YAML, has an unknown or repeated key, or a value
            that does not fit; one line per problem, with file, line, value and nearest key.
    """
    file = StudyFile.read(Path(path))
    content = {"name": Path(path).stem, **file.content}
    try:
        return Study.model_validate(content)
    except ValidationError as error:
        problems = [file.explain(problem, Study) for problem in _causes(error.errors())]
        raise StudyError("\n".join(problems)) from error


def find_studies(folder: Path) -> list[Study]:
    """The studies of a folder, by file name.

    Raises:
        StudyError: If there is no such folder, one of them cannot be read, or two have one name.
    """
    if not folder.is_dir():
        raise StudyError(
            f"{folder.resolve()}: no such folder of studies. Start in the folder that holds "
            "studies/, or set AUTOINTERP_STUDIES."
        )
    studies = [load_study(path) for path in sorted(folder.glob("*.yaml"))]
    names = [study.name for study in studies]
    for name in names:
        if names.count(name) > 1:
            raise StudyError(f"{folder}: two studies are named {name!r}. Rename one of them.")
    return studies


def _causes(problems: list[ErrorDetails]) -> list[ErrorDetails]:
    """Without those of lists that are too short only because an item of them does not fit."""
    lists = {problem["loc"][:-1] for problem in problems}
    return [p for p in problems if p["type"] != "too_short" or p["loc"] not in lists]
