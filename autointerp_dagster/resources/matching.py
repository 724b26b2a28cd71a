"""Whether two layers hold the same latents, and explained them alike."""

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
import polars as pl

from autointerp_dagster.adapters.shards import ActivationShard
from autointerp_dagster.core.metrics import (
    Explained,
    explanation_similarity,
    matched_latents,
    with_cofiring,
)
from autointerp_dagster.core.schemas import ACTIVATIONS, EXPLANATIONS, STUDY_METRICS
from autointerp_dagster.core.scorers import Embedder
from autointerp_dagster.core.types import LayerKey
from autointerp_dagster.resources.coders import Coders
from autointerp_dagster.resources.stage_inputs import StageInputs
from autointerp_dagster.study import Study


def matched_rows(
    stage: StageInputs, study: Study, coders: Coders, embedder: Embedder
) -> pl.DataFrame:
    """``STUDY_METRICS`` rows for every two layers that share the coder or the hookpoint.

    Latents are each other's nearest among all of both layers; what is compared are the pairs that
    both were explained and fire together. Layers whose decoders differ in width are left out.

    Args:
        stage: ``study_metrics``.
        study: Whose layers these are.
        coders: For the decoder directions.
        embedder: Tells how alike two explanations are.
    """
    texts = {layer: _explanations(stage, study, layer) for layer in study.layer_keys}
    vectors = _Vectors(embedder)
    rows = [STUDY_METRICS.empty()]
    for a, b in combinations(study.layer_keys, 2):
        is_comparable = a.hookpoint == b.hookpoint or a.coder == b.coder
        if is_comparable and texts[a].height and texts[b].height:
            matches = _matches(stage, study, coders, {layer: texts[layer] for layer in (a, b)})
            if matches is not None:
                rows += _compared(matches, (a, b), (texts[a], texts[b]), study, vectors)
    return pl.concat(rows)


class _Vectors:
    """An embedder that is asked for each text once."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._known: dict[str, np.ndarray] = {}

    def of(self, texts: Sequence[str]) -> np.ndarray:
        """One row per text; no columns without texts."""
        new = sorted(set(texts) - self._known.keys())
        if new:
            self._known.update(zip(new, self._embedder.embed(new), strict=True))
        return np.stack([self._known[t] for t in texts]) if texts else np.zeros((0, 0), np.float32)


def _matches(
    stage: StageInputs, study: Study, coders: Coders, texts: dict[LayerKey, pl.DataFrame]
) -> pl.DataFrame | None:
    """The explained latents that two layers share; null if their decoders differ in width."""
    a, b = texts
    found = [coders.of(study, layer).coder for layer in texts]
    widths = {coder.decoder_rows([0]).shape[1] for coder in found}
    if len(widths) > 1:
        return None
    directions = [coder.decoder_rows(range(coder.num_latents)).numpy() for coder in found]
    explained = [
        frame["latent"].unique().sort().to_numpy().astype(np.int64) for frame in texts.values()
    ]
    config = study.metrics
    matches = matched_latents(
        directions[0],
        directions[1],
        (explained[0], explained[1]),
        min_cosine=config.match_min_cosine,
    )
    fired_a = _activations(stage, study, a, matches["latent_a"])
    fired_b = _activations(stage, study, b, matches["latent_b"])
    return with_cofiring(matches, fired_a, fired_b, config.match_min_cofiring)


def _compared(
    matches: pl.DataFrame,
    layers: tuple[LayerKey, LayerKey],
    texts: tuple[pl.DataFrame, pl.DataFrame],
    study: Study,
    vectors: _Vectors,
) -> Iterator[pl.DataFrame]:
    for explainer in study.explainers:
        mine = [frame.filter(pl.col("explainer") == explainer) for frame in texts]
        if not any(frame.is_empty() for frame in mine):
            own, other = (
                _explained(frame.join(matches, left_on="latent", right_on=column), vectors)
                for frame, column in zip(mine, ("latent_a", "latent_b"), strict=True)
            )
            names = (str(layers[0]), str(layers[1]), explainer)
            yield explanation_similarity(matches, own, other, names, study.metrics)


def _explained(frame: pl.DataFrame, vectors: _Vectors) -> Explained:
    """Without explanations that the embedder gives no direction."""
    frame = frame.sort("latent")
    found = vectors.of(frame["text"].to_list())
    norm = np.linalg.norm(found, axis=1)
    is_known = np.isfinite(norm) & (norm > 0)
    return Explained(frame["latent"].to_numpy().astype(np.int64)[is_known], found[is_known])


def _explanations(stage: StageInputs, study: Study, layer: LayerKey) -> pl.DataFrame:
    cells = [cell for cell in study.cells if cell.layer == layer]
    tables = [
        stage.store.table(blob)
        for cell in cells
        for blob in stage.input("explanations", cell).blobs
        if blob.name.split("/")[0] == EXPLANATIONS.name
    ]
    rows = pl.concat([EXPLANATIONS.empty(), *tables])
    return rows.filter((pl.col("status") == "ok") & pl.col("selected")).sort("latent")


def _activations(
    stage: StageInputs, study: Study, layer: LayerKey, latents: pl.Series
) -> pl.DataFrame:
    """Of these latents; cells that hold none of them are not read."""
    tables = [ACTIVATIONS.empty()]
    for cell in study.cells:
        wanted = latents.filter(latents.is_between(cell.range.start, cell.range.stop - 1)).to_list()
        if cell.layer != layer or not wanted:
            continue
        manifest = stage.input("activation_cache", cell)
        if manifest.status == "ok":
            tables.append(ActivationShard(stage.store, manifest).read_each(wanted))
    return pl.concat(tables)
