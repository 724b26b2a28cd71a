"""Windows ranked by how much likelier the explanation makes them to a base model."""

import dagster as dg

from autointerp_dagster.resources.judging import asking_asset
from autointerp_dagster.study import Study


def build_score_surprisal(study: Study) -> dg.AssetsDefinition:
    """The asset of one study."""
    return asking_asset(study, "surprisal")
