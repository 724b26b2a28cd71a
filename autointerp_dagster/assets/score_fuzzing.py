"""A judge says in which windows every marked token fits the explanation."""

import dagster as dg

from autointerp_dagster.resources.judging import asking_asset
from autointerp_dagster.study import Study


def build_score_fuzzing(study: Study) -> dg.AssetsDefinition:
    """The asset of one study."""
    return asking_asset(study, "fuzzing")
