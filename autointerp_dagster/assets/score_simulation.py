"""The activation of every token, predicted from the explanation."""

import dagster as dg

from autointerp_dagster.resources.judging import asking_asset
from autointerp_dagster.study import Study


def build_score_simulation(study: Study) -> dg.AssetsDefinition:
    """The asset of one study."""
    return asking_asset(study, "simulation")
