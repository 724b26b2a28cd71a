"""Human ratings of explanations from a CSV file; every mistake in it has a line."""

import csv
import math
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import polars as pl

from autointerp_dagster.core.errors import StudyError

RATINGS = {
    "coder": pl.String,
    "hookpoint": pl.String,
    "latent": pl.UInt32,
    "explainer": pl.String,
    "rater": pl.String,  # empty where the file names none
    "rating": pl.Float64,
    "explanation": pl.String,  # the text that was rated; null where the file has none
    "line": pl.UInt32,  # of the file, on which the row begins
}
"""Columns of a table of ratings."""

_WANTED = ("coder", "hookpoint", "latent", "explainer", "rating")
_OPTIONAL = ("rater", "explanation")
_MAX_LATENT = 2**32 - 1
_MAX_PROBLEMS = 20
"""Told at once."""


def read_ratings(path: Path) -> pl.DataFrame:
    """Reads ratings: one row per explanation and rater, more is better, on any scale.

    Args:
        path: CSV, UTF-8, comma separated, with a header: ``coder, hookpoint, latent, explainer,
            rating`` and perhaps ``rater`` and ``explanation``, in any order.

    Returns:
        ``RATINGS``, in the order of the file.

    Raises:
        StudyError: If the file cannot be read, a column is missing or unknown, a value does not
            fit, or a rater rates an item twice; one line per problem, with file and line.
    """
    lines = _rows(path)
    header = _header(path, next(lines, (1, []))[1])
    problems: list[str] = []
    rows: list[dict[str, Any]] = []
    seen: dict[tuple[Any, ...], int] = {}
    for line, cells in lines:
        if len(cells) != len(header):
            problems.append(
                f"{path}:{line}: {len(cells)} cells, wanted {len(header)}. Quote text that has "
                "commas."
            )
            continue
        row = dict.fromkeys(RATINGS) | dict(zip(header, cells, strict=True)) | {"line": line}
        wrong = [f"{path}:{line}: {problem}" for problem in _convert(row)]
        item = tuple(row[name] for name in ("coder", "hookpoint", "latent", "explainer", "rater"))
        if not wrong and seen.setdefault(item, line) != line:
            wrong = [f"{path}:{line}: the same rater rated the same item in line {seen[item]}."]
        problems += wrong
        rows.append(row)
    _refuse(path, problems, rows)
    return pl.DataFrame(rows, schema=RATINGS)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line on which a row begins, and its cells; empty lines are left out."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise StudyError(f"{path}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise StudyError(f"{path}: not UTF-8 at byte {error.start}. Save it as UTF-8.") from error
    reader = csv.reader(StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield line, [cell.strip() for cell in cells]
            line = reader.line_num + 1
    except csv.Error as error:
        raise StudyError(f"{path}:{line}: no CSV: {error}. Save it as CSV.") from error


def _header(path: Path, names: list[str]) -> list[str]:
    unknown = [name for name in names if name not in (*_WANTED, *_OPTIONAL)]
    missing = [name for name in _WANTED if name not in names]
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if unknown or missing or twice:
        raise StudyError(
            f"{path}:1: columns {names}: missing {missing}, unknown {unknown}, given twice "
            f"{twice}. Wanted {', '.join(_WANTED)} and perhaps {', '.join(_OPTIONAL)}, separated "
            "by commas."
        )
    return names


def _convert(row: dict[str, Any]) -> Iterator[str]:
    """Gives the row's values their types; says what does not fit."""
    row["rater"] = row["rater"] or ""
    row["explanation"] = row["explanation"] or None
    for name in ("coder", "hookpoint", "explainer"):
        if not row[name]:
            yield f"{name}: empty. Fill it in."
    latent, rating = row["latent"], row["rating"]
    if latent.isascii() and latent.isdigit() and len(latent) < 12 and int(latent) <= _MAX_LATENT:
        row["latent"] = int(latent)
    else:
        yield f"latent: got {latent!r}, wanted an index, 0 or more."
    value = _number(rating)
    if math.isfinite(value):
        row["rating"] = value
    else:
        yield f"rating: got {rating!r}, wanted a number. Leave out the row if there is none."


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _refuse(path: Path, problems: list[str], rows: list[dict[str, Any]]) -> None:
    if problems:
        n_more = len(problems) - _MAX_PROBLEMS
        more = [f"... and {n_more} more."] if n_more > 0 else []
        raise StudyError("\n".join([*problems[:_MAX_PROBLEMS], *more]))
    if not rows:
        raise StudyError(f"{path}: no ratings, wanted a row per explanation and rater.")
