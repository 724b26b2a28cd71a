"""Whether coders at one hookpoint found the same latents, and explained them alike."""

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import polars as pl

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
    """``STUDY_METRICS`` rows for every two coders at one hookpoint.

    Latents are matched over whole layers; what is compared are the pairs that both were explained.

    Args:
        stage: ``study_metrics``.
        study: Whose layers these are.
        coders: For the decoder directions.
        embedder: Tells how alike two explanations are.
    """
    rows = [
        part
        for a, b in combinations(study.layer_keys, 2)
        if a.hookpoint == b.hookpoint
        for part in _pair(stage, study, coders, embedder, a, b)
    ]
    return pl.concat([STUDY_METRICS.empty(), *rows])


def _pair(
    stage: StageInputs,
    study: Study,
    coders: Coders,
    embedder: Embedder,
    a: LayerKey,
    b: LayerKey,
) -> Iterator[pl.DataFrame]:
    texts = [_explanations(stage, study, layer) for layer in (a, b)]
    matches = matched_latents(_directions(coders, study, a), _directions(coders, study, b))
    matches = matches.drop("n_both", "n_either", "jaccard")
    for column, explained in zip(("latent_a", "latent_b"), texts, strict=True):
        matches = matches.filter(pl.col(column).is_in(explained["latent"].unique().implode()))
    fired_a = _activations(stage, study, a, matches["latent_a"])
    fired_b = _activations(stage, study, b, matches["latent_b"])
    matches = with_cofiring(matches, fired_a, fired_b)
    for explainer in study.explainers:
        mine = [frame.filter(pl.col("explainer") == explainer) for frame in texts]
        if not any(frame.is_empty() for frame in mine):
            vectors = [_embedded(frame, embedder) for frame in mine]
            names = (str(a), str(b), explainer)
            yield explanation_similarity(matches, vectors[0], vectors[1], names, study.metrics)


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


def _directions(coders: Coders, study: Study, layer: LayerKey) -> np.ndarray:
    coder = coders.of(study, layer).coder
    return coder.decoder_rows(range(coder.num_latents)).numpy()


def _activations(
    stage: StageInputs, study: Study, layer: LayerKey, latents: pl.Series
) -> pl.DataFrame:
    manifests = [stage.input("activation_cache", c) for c in study.cells if c.layer == layer]
    tables = [
        stage.store.table(manifest.blob(ACTIVATIONS.name)).filter(
            pl.col("latent").is_in(latents.implode())
        )
        for manifest in manifests
        if manifest.status == "ok"
    ]
    return pl.concat([ACTIVATIONS.empty(), *tables])


def _embedded(frame: pl.DataFrame, embedder: Embedder) -> Explained:
    latents = frame["latent"].to_numpy().astype(np.int64)
    return Explained(latents, embedder.embed(frame["text"].to_list()))
