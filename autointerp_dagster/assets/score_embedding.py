"""Windows ranked by the similarity of their embedding to the explanation's."""

import dagster as dg

from autointerp_dagster.resources.embedding import embedding_asset
from autointerp_dagster.study import Study


def build_score_embedding(study: Study) -> dg.AssetsDefinition:
    """The asset of one study."""
    return embedding_asset(study, "embedding")
