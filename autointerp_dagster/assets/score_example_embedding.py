"""Test windows ranked by their nearness to train windows; no explanation is needed."""

import dagster as dg

from autointerp_dagster.resources.embedding import embedding_asset
from autointerp_dagster.study import Study


def build_score_example_embedding(study: Study) -> dg.AssetsDefinition:
    """The asset of one study."""
    return embedding_asset(study, "example_embedding")
