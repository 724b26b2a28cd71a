"""Small tables and plots for the UI."""

import base64
import io
import re
from collections.abc import Mapping, Sequence

import dagster as dg
import numpy as np
import polars as pl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

PREVIEW_ROWS = 10
_MAX_TEXT = 200
_AXES = (0.14, 0.2, 0.83, 0.75)
"""Of a figure. It is fixed, and numbers are plain: matplotlib's own layout, a patch per bin and
typeset powers took twice the time, and each cell has such pictures."""
_BARE_ADDRESS = re.compile(r"(://|@|www)", re.IGNORECASE)
_ZERO_WIDTH_SPACE = "\N{ZERO WIDTH SPACE}"


def preview(frame: pl.DataFrame, rows: int = PREVIEW_ROWS) -> dg.MetadataValue:
    """The first rows of a table as Markdown; corpus text in it is escaped."""
    shown = frame.head(rows)
    lines = ["| " + " | ".join(shown.columns) + " |", "|" + "---|" * shown.width]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in shown.iter_rows()]
    return dg.MetadataValue.md("\n".join(lines))


def table(rows: Sequence[Mapping[str, str | int]]) -> dg.MetadataValue:
    """Rows with the same columns as a table that the page shows at once, as plain text."""
    return dg.MetadataValue.table([dg.TableRecord(dict(row)) for row in rows])


def histogram(values: pl.Series, label: str, *, log: bool = False) -> dg.MetadataValue:
    """A histogram as an inline picture.

    Args:
        values: Finite numbers; with ``log`` above zero. May be empty.
        label: Of the horizontal axis, with its unit.
        log: Logarithmic bins.
    """
    figure = Figure(figsize=(5, 2.5))
    axes = figure.add_axes(_AXES)
    numbers = values.cast(pl.Float64).to_numpy()
    if numbers.size:
        edges = (
            np.geomspace(numbers.min(), numbers.max() * 1.001, 31)
            if log
            else np.linspace(numbers.min(), numbers.max() + 1e-9, 31)
        )
        axes.stairs(*np.histogram(numbers, edges), fill=True)
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,g}"))
        axes.minorticks_off()
    axes.set_xlabel(label)
    axes.set_ylabel("count")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=80)
    encoded = base64.b64encode(picture.getvalue()).decode()
    return dg.MetadataValue.md(f"![{label}](data:image/png;base64,{encoded})")


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}"
    text = str(value)
    return escaped(text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…")


def escaped(text: str) -> str:
    """Text that a Markdown page shows as it is, on one line: no markup, no HTML, no links.

    Punctuation becomes character references, which mean no markup. Renderers also make links of
    bare addresses, after references are resolved; a zero-width space in them prevents that.
    """
    unlinked = _BARE_ADDRESS.sub(rf"\1{_ZERO_WIDTH_SPACE}", text)
    return "".join(map(_reference, unlinked))


def _reference(character: str) -> str:
    if not character.isascii() or character.isalnum():
        return character
    return f"&#{ord(character)};" if character.isprintable() and character != " " else " "
