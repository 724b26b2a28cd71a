"""External: the language model being interpreted, versioned by the hash of its weights."""

import dagster as dg

from autointerp_dagster.partitions import observed_asset
from autointerp_dagster.resources.models import SubjectModels
from autointerp_dagster.study import Study


def build_subject_model(study: Study) -> dg.AssetsDefinition:
    """The asset of one study."""

    @observed_asset(study, "subject_model")
    def subject_model(models: SubjectModels) -> dg.ObserveResult:
        model = models.of(study)
        return dg.ObserveResult(
            data_version=dg.DataVersion(model.identity()), metadata=model.about()
        )

    return subject_model
