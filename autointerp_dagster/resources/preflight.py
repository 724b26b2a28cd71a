"""Everything that can be wrong with a study, asked before anything expensive begins."""

from autointerp_dagster.adapters.coders import check_fits
from autointerp_dagster.adapters.corpora import open_corpus
from autointerp_dagster.adapters.llm import open_backend
from autointerp_dagster.resources.coders import Coders
from autointerp_dagster.resources.models import SubjectModels
from autointerp_dagster.study import Study


def check_study(study: Study) -> None:
    """Checks model, tokenizer, hookpoints, coders, corpus and language models against each other.

    Raises:
        AutoInterpError: The first thing that does not fit; names file, key, value and remedy.
    """
    open_corpus(study.corpus)
    model = SubjectModels().of(study)
    for layer in study.layer_keys:
        check_fits(Coders().of(study, layer), model, layer, study.max_num_latents)
    for config in () and {study.models.explainer, study.models.judge or study.models.explainer}:
        open_backend(config).check()  # type: ignore
