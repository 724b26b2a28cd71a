"""Studies side by side: their scores from their stores, and what else is different between them."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import polars as pl

from autointerp_dagster.adapters.manifests import Manifest
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.errors import StudyError
from autointerp_dagster.core.metrics.compare import StudyDifference, compared_studies
from autointerp_dagster.core.metrics.ratings import (
    RATED_ITEM,
    Agreement,
    RaterAgreement,
    rater_agreement,
    ratings_agreement,
)
from autointerp_dagster.core.schemas import EXPLANATIONS, LATENT_METRICS
from autointerp_dagster.core.types import LayerKey
from autointerp_dagster.study import Study
from autointerp_dagster.study.parameters import parameters_of
from autointerp_dagster.study.stages import SCORE_STAGES, STAGES

FEW_PAIRS = 30
"""Pairs below which a comparison is warned of."""

_METRICS = "latent_metrics"
_MODELS = ("judge", "base_lm", "embedder", "query_prefix")
"""Who answers a scorer, as the parameters of its manifests name them."""
_TRAIN_ONLY = ("n_train", "n_negative_train", "n_select", "n_negative_select")
"""Of the sampling: what moves no test window."""


@dataclass(frozen=True, slots=True)
class StudyScores:
    """A study's scores and everything that they were made from."""

    study: Study
    store: Store
    latent_metrics: pl.DataFrame
    manifests: tuple[Manifest, ...]
    """Of the scores and, each once, of all that is above them."""
    external: Mapping[tuple[str, str], frozenset[str]]
    """By asset and place: the versions of external inputs, one unless a study is half remade."""
    warnings: tuple[str, ...]

    def versions(self, asset: str) -> dict[str, frozenset[str]]:
        """By place: the content of an asset that the scores rest on."""
        found = {place: hashes for (name, place), hashes in self.external.items() if name == asset}
        for manifest in self.manifests:
            if manifest.stage == asset:
                before = found.get(manifest.cell, frozenset())
                found[manifest.cell] = before | {manifest.content_hash}
        return found

    def parameters(self, stage: str) -> dict[str, frozenset[str]]:
        """The values of each parameter that a stage was made with, over all of its places."""
        values: defaultdict[str, set[str]] = defaultdict(set)
        for manifest in self.manifests:
            if manifest.stage == stage and manifest.status == "ok":
                for key, value in _flat(manifest.parameters):
                    values[key].add(json.dumps(value))
        return {key: frozenset(found) for key, found in values.items()}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Studies against the first of them."""

    baseline: str
    rows: tuple[StudyDifference, ...]
    changes: Mapping[str, tuple[str, ...]]
    """By study: what it was made with, other than the baseline."""
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RatedStudy:
    """People's ratings against the scores of one study."""

    study: str
    raters: RaterAgreement
    agreements: tuple[Agreement, ...]
    n_ratings: int
    """In the file."""
    n_other_text: int
    """Dropped: the text that was rated is not the study's."""
    unexplained: tuple[str, ...]
    """Dropped: items that the study did not explain, with their lines."""


def read_scores(
    study: Study, store: Store, layers: Sequence[LayerKey] | None = None
) -> StudyScores:
    """The scores of a study, as far as they are made.

    Args:
        study: The study.
        store: Its store.
        layers: Only these; all by default.

    Raises:
        StudyError: If none of its scores is made.
        StoreError: If a manifest or table is missing or damaged.
    """
    cells = [cell for cell in study.cells if layers is None or cell.layer in layers]
    heads = [store.head(study.name, _METRICS, str(cell)) for cell in cells]
    made = [head for head in heads if head is not None]
    if not made:
        raise StudyError(
            f"study {study.name}: {_METRICS} was never materialized, so there is nothing to "
            f"compare. `autointerp run {study.name}` makes it."
        )
    tables = [store.table(h.blob(LATENT_METRICS.name)) for h in made if h.status == "ok"]
    manifests, external = _ancestry(study, store, made)
    return StudyScores(
        study,
        store,
        pl.concat([LATENT_METRICS.empty(), *tables]),
        manifests,
        external,
        tuple(_gaps(study, store, len(cells), made, manifests)),
    )


def compare_scores(baseline: StudyScores, others: Sequence[StudyScores]) -> Comparison:
    """Every study against the first, paired over latents; intervals as the first study asks.

    Raises:
        StudyError: If two studies have one name, a layer's coder is not the same in both, or no
            latent was scored by both.
    """
    names = [scores.study.name for scores in (baseline, *others)]
    if len(set(names)) < len(names):
        raise StudyError(f"compare: studies {names}: two have one name. Rename one of them.")
    for other in others:
        _refuse_other_coders(baseline, other)
    rows = compared_studies(
        baseline.latent_metrics,
        {other.study.name: other.latent_metrics for other in others},
        baseline.study.metrics,
    )
    for other in others:
        _refuse_nothing_shared(baseline, other, rows)
    warnings = chain(
        baseline.warnings,
        *(other.warnings for other in others),
        *(_other_circumstances(baseline, other) for other in others),
        _few_pairs(rows),
    )
    changes = {other.study.name: tuple(_changes(baseline, other)) for other in others}
    return Comparison(baseline.study.name, tuple(rows), changes, tuple(dict.fromkeys(warnings)))


def rate_scores(scores: StudyScores, ratings: pl.DataFrame) -> RatedStudy:
    """People's ratings against the scores of a study.

    Args:
        scores: Of the study whose explanations were rated.
        ratings: ``adapters.ratings.RATINGS``.

    Raises:
        StudyError: If none of the ratings is of an explanation of the study.
    """
    items = list(RATED_ITEM)
    explained = _explained(scores)
    joined = ratings.join(explained, on=items, how="left").sort("line")
    unexplained = joined.filter(pl.col("text").is_null())
    is_other = _plain("explanation") != _plain("text")
    known = joined.drop_nulls("text").with_columns(is_other=is_other.fill_null(value=False))
    kept = known.filter(~pl.col("is_other"))
    n_other = known.height - kept.height
    if kept.is_empty():
        raise StudyError(
            f"study {scores.study.name}: none of {ratings.height} ratings is of one of its "
            f"explanations ({unexplained.height} of latents that it did not explain by that "
            f"explainer, {n_other} of other texts). Check coder, hookpoint, latent and explainer."
        )
    rated = kept.select(*items, "rater", "rating")
    found = ratings_agreement(rated, scores.latent_metrics, scores.study.metrics)
    return RatedStudy(
        study=scores.study.name,
        raters=rater_agreement(rated),
        agreements=tuple(found),
        n_ratings=ratings.height,
        n_other_text=n_other,
        unexplained=tuple(
            f"line {row['line']}: {row['coder']}@{row['hookpoint']} latent {row['latent']} by "
            f"{row['explainer']}"
            for row in unexplained.iter_rows(named=True)
        ),
    )


def _plain(column: str) -> pl.Expr:
    """A text without what spreadsheets change: white space."""
    return pl.col(column).str.replace_all(r"\s+", " ").str.strip_chars()


def _explained(scores: StudyScores) -> pl.DataFrame:
    """The texts that were scored."""
    frames = [
        scores.store.table(blob)
        for manifest in scores.manifests
        for blob in manifest.blobs
        if manifest.stage == "explanations" and blob.name.split("/")[0] == EXPLANATIONS.name
    ]
    every = pl.concat([EXPLANATIONS.empty(), *frames])
    return every.filter(pl.col("selected") & pl.col("text").is_not_null()).select(
        *RATED_ITEM, "text"
    )


def _ancestry(
    study: Study, store: Store, heads: Iterable[Manifest]
) -> tuple[tuple[Manifest, ...], dict[tuple[str, str], frozenset[str]]]:
    """The manifests below some and they themselves, and the external inputs of all.

    A result that was linked rests on another study's manifests; where the study's own has the same
    content, that is followed, as it says how the study makes it.
    """
    found = {(head.stage, head.cell, head.content_hash): head for head in heads}
    external: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    todo = list(found.values())
    while todo:
        for upstream in todo.pop().upstream:
            key = (upstream.asset, upstream.cell, upstream.content_hash)
            if upstream.manifest is None:
                external[upstream.asset, upstream.cell].add(upstream.content_hash)
            elif key not in found:
                head = store.head(study.name, upstream.asset, upstream.cell)
                if head is None or head.content_hash != upstream.content_hash:
                    head = store.manifest(upstream.manifest)
                found[key] = head
                todo.append(found[key])
    return tuple(found.values()), {key: frozenset(hashes) for key, hashes in external.items()}


def _gaps(
    study: Study, store: Store, n_cells: int, made: list[Manifest], manifests: Sequence[Manifest]
) -> Iterator[str]:
    """What is missing, cut short, or not what the study file says now."""
    run = f"`autointerp run {study.name}`"
    if len(made) < n_cells:
        missing = n_cells - len(made)
        yield f"{study.name}: {missing} of {n_cells} cells have no scores. {run} makes them."
    n_short = sum(not head.complete for head in made)
    if n_short:
        yield f"{study.name}: {n_short} of {n_cells} cells were cut short. {run} goes on with them."
    stale = {m.stage for m in manifests if _is_stale(study, store, m)}
    if stale:
        named = ", ".join(name for name in STAGES if name in stale)
        yield (
            f"{study.name}: the scores were made with another {named} than the study says now. "
            f"{run} brings them up to date."
        )


def _is_stale(study: Study, store: Store, manifest: Manifest) -> bool:
    """Whether the study says otherwise now; a model that it names anew is not noticed."""
    stage = STAGES[manifest.stage]
    wanted = json.loads(json.dumps(parameters_of(study, stage.name)))
    if stage.version != manifest.stage_version:
        return True
    if any(manifest.parameters.get(key) != value for key, value in wanted.items()):
        return True
    head = store.head(study.name, stage.name, manifest.cell)
    return head is not None and head.content_hash != manifest.content_hash


def _refuse_other_coders(first: StudyScores, second: StudyScores) -> None:
    coders, others = first.versions("sparse_coders"), second.versions("sparse_coders")
    differ = sorted(layer for layer in coders.keys() & others if coders[layer] != others[layer])
    if differ:
        raise StudyError(
            f"compare: the sparse coders of {first.study.name} and {second.study.name} at "
            f"{', '.join(differ)} have different weights, so a latent of one is not the latent of "
            "the same index of the other. Leave these layers out with --layers, or give the "
            "coders two names in one study: its layer comparison does not pair latents."
        )


def _refuse_nothing_shared(
    first: StudyScores, second: StudyScores, rows: Sequence[StudyDifference]
) -> None:
    name = second.study.name
    if any(row.study == name and row.n_pairs for row in rows):
        return
    raise StudyError(
        f"compare: {first.study.name} and {name} have no latent that both scored by the same "
        f"scorer and explainer. {_asked(first.study)}; {_asked(second.study)}. Explainers are "
        "matched by name: name alike what is to be compared, and select the same latents."
    )


def _asked(study: Study) -> str:
    return (
        f"{study.name} has explainers {list(study.explainers)}, scorers "
        f"{list(study.scorers.asked)}, layers {[str(layer) for layer in study.layer_keys]}"
    )


def _other_circumstances(first: StudyScores, second: StudyScores) -> Iterator[str]:
    """What makes a difference hard to put down to the explanations."""
    names = f"{first.study.name} and {second.study.name}"
    for asset, consequence in (
        ("subject_model", "the latents read other vectors"),
        ("token_dataset", "the latents fire on other text, and were judged on it"),
    ):
        if first.versions(asset) != second.versions(asset):
            yield f"{names}: not the same {asset}, so {consequence}."
    for stage in SCORE_STAGES:
        differ = _differing(first, second, stage)
        models = [key for key in differ if key.split(".")[0] in _MODELS]
        if models:
            yield (
                f"{names}: {stage} asked another {', '.join(models)}. Scores depend on the judge: "
                "the difference is not that of the explanations alone. Compare the lifts."
            )
    sampling = _differing(first, second, "latent_records")
    windows = [key for key in sampling if key not in _TRAIN_ONLY]
    if windows:
        yield (
            f"{names}: the test windows are others (sampling: {', '.join(windows)}), so that the "
            "scores differ by what was asked, too."
        )
    for layers, study in (
        (set(first.study.layer_keys) - set(second.study.layer_keys), first.study),
        (set(second.study.layer_keys) - set(first.study.layer_keys), second.study),
    ):
        if layers:
            yield f"only {study.name} has {', '.join(str(layer) for layer in sorted(layers))}."


def _differing(first: StudyScores, second: StudyScores, stage: str) -> list[str]:
    """Parameters whose values are not the same, of a stage that both have."""
    a, b = first.parameters(stage), second.parameters(stage)
    if not (a and b):
        return []
    return [key for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]


def _changes(first: StudyScores, second: StudyScores) -> Iterator[str]:
    for stage in STAGES:
        if stage in (_METRICS, "layer_metrics", "study_metrics"):
            continue
        a, b = first.parameters(stage), second.parameters(stage)
        for key in _differing(first, second, stage):
            yield f"{stage}: {key} {_shown(a.get(key))} -> {_shown(b.get(key))}"


def _shown(values: frozenset[str] | None) -> str:
    if not values:
        return "(none)"
    return " and ".join(sorted(v if len(v) <= 60 else f"{v[:20]}..." for v in values))


def _few_pairs(rows: Sequence[StudyDifference]) -> Iterator[str]:
    """Where the latents that both scored say little, or are a special part of all."""
    few: defaultdict[str, list[str]] = defaultdict(list)
    part: defaultdict[str, list[str]] = defaultdict(list)
    for row in rows:
        larger = max(row.n_baseline, row.n_study)
        where = f"{row.scorer} {row.measure} of {row.explainer or 'no explainer'} at {row.coder}"
        if row.n_pairs < FEW_PAIRS:
            few[row.study].append(f"{where} ({row.n_pairs})")
        elif 2 * row.n_pairs < larger:
            part[row.study].append(f"{where} ({row.n_pairs} of {larger})")
    for study, named in few.items():
        is_all = len(named) == sum(row.study == study for row in rows)
        where = "in all comparisons" if is_all else "; ".join(named)
        yield f"{study}: fewer than {FEW_PAIRS} pairs, so that little is certain: {where}."
    for study, named in part.items():
        yield (
            f"{study}: less than half of the latents are paired, and they may be unlike the "
            f"others: {'; '.join(named)}."
        )


def _flat(parameters: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested parameters by dotted keys."""
    for key, value in parameters.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
