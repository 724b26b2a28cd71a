"""Studies against the first of them, and people's ratings against scores, as tables or as JSON."""

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from autointerp_dagster.cli.report import printable
from autointerp_dagster.core.metrics.compare import StudyDifference
from autointerp_dagster.core.metrics.ratings import Agreement
from autointerp_dagster.resources.comparing import Comparison, RatedStudy

_SHOWN_ITEMS = 5
"""Items that were dropped, of those that JSON has all of."""


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Prints, per study, what it was made with and how its scores differ from the baseline's."""
    studies = list(dict.fromkeys(row.study for row in comparison.rows))
    for study in studies:
        for measure in ("score", "lift"):
            family = [row for row in comparison.rows if row.measure == measure]
            rows = [row for row in family if row.study == study]
            if rows:
                has_family = len(family) > 1
                console.print(_differences_table(comparison.baseline, rows, has_family=has_family))
        changes = comparison.changes[study]
        lines = changes or ("nothing: the same parameters throughout",)
        _say(console, f"{study} was made with other parameters than {comparison.baseline}:")
        for line in lines:
            _say(console, f"  {line}")
    _say(
        console,
        "A difference is the mean over the latents that both studies scored, of this study minus "
        f"{comparison.baseline}. Medians are over these pairs, in brackets over all latents of the "
        "study. Lift: a latent's score minus that with another latent's explanation. p: Wilcoxon's "
        "signed-rank test, in brackets adjusted by Holm over all rows of the same measure.",
    )
    for warning in comparison.warnings:
        console.print("[yellow]Warning:[/]", end=" ")
        _say(console, warning)


def print_ratings(rated: RatedStudy, console: Console) -> None:
    """Prints each scorer's agreement with people, how people agree, and what was left out."""
    table = Table(title=f"{rated.study}: Spearman's correlation with human ratings")
    for name in ("scorer", "metric", "explainer", "Spearman", "interval", "items", "no\nscore"):
        table.add_column(name, no_wrap=True)
    for row in rated.agreements:
        table.add_row(*_agreement(row))
    console.print(table)
    raters = rated.raters
    line = f"{rated.n_ratings} ratings by {raters.n_raters} rater(s), {raters.n_items} items used."
    if raters.spearman is not None:
        line += (
            f" Raters among themselves: Spearman {raters.spearman:.2f} (mean over "
            f"{raters.n_pairs} pair(s))."
        )
    _say(console, line)
    if rated.n_other_text:
        _say(console, f"{rated.n_other_text} dropped: they rate another text than the study has.")
    if rated.unexplained:
        shown = "; ".join(rated.unexplained[:_SHOWN_ITEMS])
        more = "; ..." if len(rated.unexplained) > _SHOWN_ITEMS else ""
        _say(console, f"{len(rated.unexplained)} dropped, never explained: {shown}{more}")


def comparison_as_json(comparison: Comparison | None, rated: Sequence[RatedStudy]) -> str:
    """The same as JSON, for scripts."""
    content: dict[str, Any] = {}
    if comparison is not None:
        content |= {
            "baseline": comparison.baseline,
            "differences": [row._asdict() for row in comparison.rows],
            "changes": comparison.changes,
            "warnings": comparison.warnings,
        }
    if rated:
        content["ratings"] = [
            {
                "study": one.study,
                "agreements": [row._asdict() for row in one.agreements],
                "raters": one.raters._asdict(),
                "n_ratings": one.n_ratings,
                "n_other_text": one.n_other_text,
                "unexplained": one.unexplained,
            }
            for one in rated
        ]
    return json.dumps(content, indent=1)


def _differences_table(
    baseline: str, rows: Sequence[StudyDifference], *, has_family: bool
) -> Table:
    measure = "lift over the floor" if rows[0].measure == "lift" else "score"
    table = Table(title=f"{rows[0].study} against {baseline}, paired over latents: {measure}")
    absent = {"p"} if has_family else {"p\n(Holm)"}
    absent |= set() if len({row.coder for row in rows}) > 1 else {"coder"}
    cells = [_cells(baseline, row) for row in rows]
    names = [name for name in cells[0] if name not in absent]
    for name in names:
        table.add_column(name, no_wrap=name != "coder")
    for row in cells:
        table.add_row(*(row[name] for name in names))
    return table


def _cells(baseline: str, row: StudyDifference) -> dict[str, str]:
    """A row by heading, two lines high."""
    return {
        "scorer\nexplainer": f"{row.scorer}\n  {row.explainer or '(none)'}",
        "coder": row.coder,
        f"{baseline}\nmedian\n(all)": _pair(row.paired_median_baseline, row.median_baseline),
        f"{row.study}\nmedian\n(all)": _pair(row.paired_median_study, row.median_study),
        "difference\ninterval": _difference(row),
        "p\n(Holm)": f"{_p(row.p)}\n({_p(row.p_holm)})",
        "p": _p(row.p),
        "pairs\n(latents of each)": f"{row.n_pairs}\n({row.n_baseline}, {row.n_study})",
    }


def _difference(row: StudyDifference) -> str:
    if row.difference is None:
        return "-"
    interval = "" if row.lo is None else f"\n{row.lo:+.3f} to {row.hi:+.3f}"
    return f"{row.difference:+.3f}{interval}"


def _agreement(row: Agreement) -> list[str]:
    return [
        row.scorer,
        row.metric.replace("balanced_", "bal."),
        row.explainer or "(all)",
        "" if row.spearman is None else f"{row.spearman:.2f}",
        "" if row.lo is None else f"{row.lo:.2f} to {row.hi:.2f}",
        str(row.n),
        str(row.n_unscored or ""),
    ]


def _pair(paired: float | None, every: float | None) -> str:
    return f"{_number(paired)}\n({_number(every)})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return "<.001" if value < 0.001 else f"{value:.3f}"


def _say(console: Console, line: str) -> None:
    console.print(printable(line), markup=False, highlight=False, soft_wrap=True)
