"""How much less surprising an explanation is after text written under an intervention."""

import dagster as dg

from autointerp_dagster.resources.judging import asking_asset
from autointerp_dagster.study import Study


def build_score_intervention(study: Study) -> dg.AssetsDefinition:
    """The asset of one study."""
    return asking_asset(study, "intervention")
