"""Subject models, loaded when first asked for and once per process."""

import dagster as dg

from autointerp_dagster.adapters.subject_models import SubjectModel, open_subject_model
from autointerp_dagster.study import Study


class SubjectModels(dg.ConfigurableResource):
    """The language models being interpreted."""

    def of(self, study: Study) -> SubjectModel:
        """The study's subject model; its weights are read when they are first needed.

        Raises:
            ModelError: If it cannot be found.
        """
        return open_subject_model(study.models.subject)
