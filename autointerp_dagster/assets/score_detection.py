"""A judge says which plain windows contain the feature that an explanation describes."""

import dagster as dg

from autointerp_dagster.resources.judging import asking_asset
from autointerp_dagster.study import Study


def build_score_detection(study: Study) -> dg.AssetsDefinition:
    """The asset of one study."""
    return asking_asset(study, "detection")
