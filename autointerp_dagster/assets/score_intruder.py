"""A judge finds the window that does not belong; no explanation is needed."""

import dagster as dg

from autointerp_dagster.resources.judging import asking_asset
from autointerp_dagster.study import Study


def build_score_intruder(study: Study) -> dg.AssetsDefinition:
    """The asset of one study."""
    return asking_asset(study, "intruder")
