"""What a finished study found, as tables in the terminal."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl
from rich.console import Console
from rich.table import Table
from rich.text import Text

from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.metrics import FAMILIES, LEAST_FLOORS, judge_is_too_weak
from autointerp_dagster.core.schemas import (
    EXPLANATIONS,
    LATENT_METRICS,
    LAYER_METRICS,
    MAIN_VARIANT,
    STUDY_METRICS,
)
from autointerp_dagster.core.types import Cell, LayerKey, WholeStudy
from autointerp_dagster.study import Study
from autointerp_dagster.study.parameters import parts_asked

Headlines = dict[tuple[Any, ...], dict[str, Any]]
"""Rows of ``latent_metrics`` by (coder, hookpoint, latent, explainer, scorer, subject)."""

MAX_LATENTS = 8
"""Of a study that are shown; a terminal holds no more that anybody reads."""

_KEY = ["coder", "hookpoint", "latent", "explainer"]

_SCORE_WIDTH, _TEXT_WIDTH = 15, 50
"""Characters of a score's column, and at least of the explanation's."""


def print_report(
    study: Study, store: Store, console: Console, max_latents: int = MAX_LATENTS
) -> None:
    """Prints some latents with explanations, scores, intervals and floors, and the comparisons.

    Every layer has its share of the latents shown: those that most scorers were asked about, the
    first of equals. One cell at a time is in memory.

    Args:
        study: The study.
        store: Its store.
        console: Where to.
        max_latents: Of the study that are shown.
    """
    room, n_more = max_latents, 0
    cells: dict[LayerKey, list[Cell]] = {layer: [] for layer in study.layer_keys}
    for cell in study.cells:
        cells[cell.layer].append(cell)
    for n_before, layer in enumerate(study.layer_keys):
        share = -(-room // (len(cells) - n_before))
        explained, headline, n_latents = _some_latents(study, store, cells[layer], share)
        if explained.height:
            for table in _layer_tables(study, layer, explained, headline, console.width):
                console.print(table)
        n_shown = explained["latent"].n_unique()
        room, n_more = room - n_shown, n_more + n_latents - n_shown
    if n_more:
        console.print(
            f"{n_more:,} more latents are not shown; the tables in the store have all, and "
            "`autointerp why STUDY LAYER LATENT` shows one."
        )
    for layer in study.layer_keys:
        medians = _medians(study, store, layer)
        if not medians.is_empty():
            console.print(_medians_table(layer, study, medians))
    _print_comparisons(study, store, console)
    console.print(f"Results: {store.root}  (tables as Parquet; `autointerp status {study.name}`)")
    console.print("Why a score is what it is: `autointerp why STUDY LAYER LATENT`.")
    console.print("In the browser: `make ui`, then http://127.0.0.1:3000")


def _print_comparisons(study: Study, store: Store, console: Console) -> None:
    head = store.head(study.name, "study_metrics", str(WholeStudy()))
    if head is None:
        return
    comparisons = store.table(head.blob(STUDY_METRICS.name))
    if len(study.coders) > 1:
        console.print(_coders_table(comparisons, _interval_name(study)))
    console.print(_floors_table(comparisons, _interval_name(study)))
    for line in _warnings(study, comparisons):
        console.print(line)


def _layer_tables(
    study: Study, layer: LayerKey, explained: pl.DataFrame, headline: Headlines, width: int
) -> Iterator[Table]:
    """Some latents of a layer, a table for each lot of scorers."""
    title = f"{layer}: value / floor, below it the {_interval_name(study)}"
    for scorers in _fitting(study.scorers.asked, width):
        yield _layer_table(title, scorers, explained, headline)
    free = [name for name in study.scorers.asked if not FAMILIES[name].needs_explanation]
    if free:
        title = f"{layer}: without an explanation, {_interval_name(study)}"
        yield _free_table(title, free, headline)


def _some_latents(
    study: Study, store: Store, cells: Sequence[Cell], room: int
) -> tuple[pl.DataFrame, Headlines, int]:
    """The explanations and scores of a layer's most scored latents, and how many it has.

    Skipped latents are left out.
    """
    explained, headlines, n_latents = EXPLANATIONS.empty(), Headlines(), 0
    for cell in cells:
        mine = [
            frame.filter(pl.col("selected") & (pl.col("status") != "skipped"))
            for frame in _tables(study, store, cell, "explanations", EXPLANATIONS.name)
        ]
        explained = pl.concat([explained, *mine])
        n_latents += pl.concat([EXPLANATIONS.empty(), *mine])["latent"].n_unique()
        for frame in _tables(study, store, cell, "latent_metrics", LATENT_METRICS.name):
            headlines |= _headlines(study, frame)
        n_values = Counter(key[2] for key, row in headlines.items() if row["value"] is not None)
        latents = explained["latent"].unique().to_list()
        shown = sorted(latents, key=lambda latent: (-n_values[latent], latent))[:room]
        explained = explained.filter(pl.col("latent").is_in(shown))
        headlines = {key: row for key, row in headlines.items() if key[2] in shown}
    return explained, headlines, n_latents


def _tables(
    study: Study, store: Store, cell: Cell, asset: str, table: str
) -> Iterator[pl.DataFrame]:
    head = store.head(study.name, asset, str(cell))
    for blob in () if head is None else head.blobs:
        if blob.name.split("/")[0] == table:
            yield store.table(blob)


def _fitting(scorers: Sequence[str], width: int) -> Iterator[Sequence[str]]:
    """The scorers of explanations in lots that fit side by side into a terminal."""
    scorers = [name for name in scorers if FAMILIES[name].needs_explanation]
    n = max(2, (width - _TEXT_WIDTH) // _SCORE_WIDTH)
    for start in range(0, max(len(scorers), 1), n):
        yield scorers[start : start + n]


def _layer_table(
    title: str, scorers: Sequence[str], explained: pl.DataFrame, headline: Headlines
) -> Table:
    table = Table(title=title, expand=True)
    table.add_column("latent, explainer\nexplanation", ratio=1, no_wrap=True, overflow="ellipsis")
    for scorer in scorers:
        table.add_column(f"{scorer}\n{_metric(scorer)}", no_wrap=True, min_width=12)
    last = None
    for row in explained.sort(_KEY).iter_rows(named=True):
        key = tuple(row[name] for name in _KEY)
        scores = [_score(headline, key, scorer) for scorer in scorers]
        if scorers and not any(scores):
            continue  # none of these was asked about it
        if last not in (None, row["latent"]):
            table.add_section()
        last = row["latent"]
        text = Text.assemble((f"{row['latent']} ", "bold"), (f"{row['explainer']}\n", "dim"))
        text.append(printable(row["text"] or f"({row['status']}: {row['reason']})"))
        table.add_row(text, *scores)
    return table


def _free_table(title: str, scorers: Sequence[str], headline: Headlines) -> Table:
    """Of the scorers that need no explanation: one row per latent."""
    table = Table(title=title)
    table.add_column("latent")
    for scorer in scorers:
        table.add_column(f"{scorer}\n{_metric(scorer)}", no_wrap=True)
    for latent in sorted({key[:3] for key in headline}):
        scores = [_score(headline, (*latent, None), scorer) for scorer in scorers]
        if any(scores):
            table.add_row(f"[bold]{latent[2]}[/]", *(score.replace("\n", " ") for score in scores))
    return table


def asks_nobody(study: Study) -> str:
    """What to say where questions are wanted of a study that has none."""
    return (
        f"No stage of study {study.name} asks a language model. `autointerp run {study.name}` "
        "makes the results."
    )


def printable(text: str) -> str:
    """Text of a model or a corpus without characters that command a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def _headlines(study: Study, metrics: pl.DataFrame) -> Headlines:
    """The headline metric of each scorer, over all windows."""
    rows = metrics.filter(pl.col("variant") == "all").iter_rows(named=True)
    return {
        (*(row[name] for name in _KEY), row["scorer"], row["subject"]): row
        for row in rows
        if row["scorer"] in study.scorers.asked
        and row["metric"] == FAMILIES[row["scorer"]].headline
    }


def _score(headline: Headlines, key: tuple[object, ...], scorer: str) -> str:
    own, floor = headline.get((*key, scorer, "own")), headline.get((*key, scorer, "other"))
    if own is None or own["value"] is None:
        return "" if own is None else str(own["status"])
    shown = f"{own['value']:.2f}"
    if floor is not None and floor["value"] is not None:
        shown += f" / {floor['value']:.2f}"
    if own["lo"] is not None and own["hi"] is not None:
        shown += f"\n\\[{own['lo']:.2f}, {own['hi']:.2f}]"
    return shown


def _metric(scorer: str) -> str:
    """The headline metric of a scorer, short."""
    return FAMILIES[scorer].headline.replace("balanced_", "bal.")


def _medians(study: Study, store: Store, layer: LayerKey) -> pl.DataFrame:
    """Medians of the headline metrics over the latents of a layer, own and floors."""
    head = store.head(study.name, "layer_metrics", str(layer))
    if head is None:
        return LAYER_METRICS.empty()
    headline = pl.DataFrame(
        [(scorer, FAMILIES[scorer].headline) for scorer in study.scorers.asked],
        {"scorer": pl.String, "metric": pl.String},
        orient="row",
    )
    medians = store.table(head.blob(LAYER_METRICS.name)).filter(
        (pl.col("variant") == MAIN_VARIANT) & (pl.col("statistic") == "median")
    )
    return medians.join(headline, on=["scorer", "metric"], how="semi")


def _interval_name(study: Study) -> str:
    return f"{100 * study.metrics.confidence:g} % interval"


def _medians_table(layer: LayerKey, study: Study, medians: pl.DataFrame) -> Table:
    """By scorer and explainer; floors are over the latents that have them, so compare by lift."""
    scorers = study.scorers.asked
    subjects = medians["subject"]
    floors = ("other", "random") if (subjects == "random").any() else ("other",)
    table = Table(title=f"{layer}: median over latents")
    table.add_column("scorer, metric\nexplainer", no_wrap=True)
    for name in ("chance", "median", _interval_name(study)):
        table.add_column(name, no_wrap=True)
    for name in (*(f"floor:\n{floor}" for floor in floors), "latents"):
        table.add_column(name, no_wrap=True)
    rows = {(r["scorer"], r["explainer"], r["subject"]): r for r in medians.iter_rows(named=True)}
    own = sorted((key[:2] for key in rows if key[2] == "own"), key=lambda key: str(key[1]))
    for scorer, explainer in sorted(own, key=lambda key: scorers.index(key[0])):
        row = rows[(scorer, explainer, "own")]
        table.add_row(
            f"[bold]{scorer}[/] {_metric(scorer)}\n  [dim]{explainer or 'no explanation'}[/]",
            _chance(scorer),
            _median(row) or str(row["status"]),
            "" if row["lo"] is None else f"{row['lo']:.2f} to {row['hi']:.2f}",
            *(_median(rows.get((scorer, explainer, floor))) for floor in floors),
            str(row["n"]),
        )
    return table


def _chance(scorer: str) -> str:
    chance = FAMILIES[scorer].chance
    return "" if chance is None else f"{chance:g}"


def _median(row: dict[str, Any] | None) -> str:
    return "" if row is None or row["value"] is None else f"{row['value']:.2f}"


def _coders_table(comparisons: pl.DataFrame, interval_name: str) -> Table:
    table = Table(title="Coder against coder: difference of the medians, mean over shared layers")
    for name in ("coders", "scorer\nexplainer", "a - b", interval_name, "p", "n"):
        table.add_column(name, no_wrap=True)
    for row in comparisons.filter(pl.col("comparison") == "coder").iter_rows(named=True):
        asked = f"{row['scorer']}\n  [dim]{row['explainer'] or 'no explanation'}[/]"
        table.add_row(f"{row['a']} - {row['b']}", asked, *_difference(row))
    return table


def _floors_table(comparisons: pl.DataFrame, interval_name: str) -> Table:
    table = Table()
    for name in ("scorer", "explainer", "own -\nother", interval_name, "p", "latents"):
        table.add_column(name, no_wrap=True)
    table.title = "Is a latent's own explanation better than another's? (paired over latents)"
    for row in _own_against_other(comparisons).iter_rows(named=True):
        table.add_row(str(row["scorer"]), str(row["explainer"]), *_difference(row))
    return table


def _difference(row: dict[str, Any]) -> tuple[str, str, str, str]:
    """Value, interval, p and number of latents of a row of ``study_metrics``."""
    return (
        "" if row["value"] is None else f"{row['value']:+.3f}",
        "" if row["lo"] is None else f"{row['lo']:+.3f} to {row['hi']:+.3f}",
        "" if row["p"] is None else f"{row['p']:.3f}",
        str(row["n"]),
    )


def _own_against_other(comparisons: pl.DataFrame) -> pl.DataFrame:
    return comparisons.filter(
        (pl.col("comparison") == "subject")
        & (pl.col("a") == "own")
        & (pl.col("b") == "other")
        & (pl.col("statistic") == "mean_difference")
    )


def _warnings(study: Study, comparisons: pl.DataFrame) -> list[str]:
    """In words: where own is not better than other for sure, and where nobody can tell."""
    floors = _own_against_other(comparisons)
    n_pairs = {(r["scorer"], r["explainer"]): r["n"] for r in floors.iter_rows(named=True)}
    lines: list[str] = []
    for scorer in study.scorers.asked:
        for explainer in study.explainers:
            is_too_weak = judge_is_too_weak(comparisons, scorer, explainer)
            n = n_pairs.get((scorer, explainer), LEAST_FLOORS)
            if is_too_weak:
                lines.append(
                    f"[yellow]{scorer}, {explainer}: {_who(study, scorer)} is too weak[/]: it does "
                    "not tell a latent's own explanation from another latent's (the interval "
                    "includes 0)."
                )
            elif is_too_weak is None and study.floors.sample and n < LEAST_FLOORS:
                lines.append(
                    f"[yellow]{scorer}, {explainer}: too few floors to tell[/] whether "
                    f"{_who(study, scorer)} is too weak: {n} latents, wanted {LEAST_FLOORS} "
                    "(floors.sample)."
                )
    return lines


def _who(study: Study, scorer: str) -> str:
    """What decides a scorer's values."""
    parts = parts_asked(study, f"score_{scorer}")
    names = {"judge": "this judge", "base_lm": "this base model"}
    return names[parts[0]] if parts else "this embedder"
