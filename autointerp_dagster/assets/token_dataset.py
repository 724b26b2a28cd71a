"""The corpus as contexts of tokens, one document per context, BOS first."""

from collections.abc import Iterator

import dagster as dg

from autointerp_dagster.adapters.datasets import write_dataset
from autointerp_dagster.partitions import stage_asset
from autointerp_dagster.resources.corpora import Corpora
from autointerp_dagster.resources.models import SubjectModels
from autointerp_dagster.resources.progress import ProgressDisplay
from autointerp_dagster.resources.store import Commit, StoreResource
from autointerp_dagster.study import Study


def build_token_dataset_asset(study: Study) -> dg.AssetsDefinition:
    """The asset of one study."""

    @stage_asset(study, "token_dataset")
    def token_dataset(
        context: dg.AssetExecutionContext,
        store: StoreResource,
        models: SubjectModels,
        corpora: Corpora,
        progress: ProgressDisplay,
    ) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
        model, corpus = models.of(study), corpora.of(study)
        external = {
            "subject_model": lambda _: model.identity(),
            "corpus": lambda _: corpus.identity(),
        }
        about = {"subject_model": model.about, "corpus": corpus.about}
        with store.stage(context, study, "token_dataset", external=external, about=about) as stage:
            for place in stage.pending():
                dataset = corpora.tokens(corpus, model, study.tokens, progress.on(context))
                summary = {
                    "n_tokens": len(dataset.tokens),
                    "n_contexts": dataset.contexts.height,
                    "n_documents": dataset.documents.height,
                    "n_tokens_by_source": dataset.n_tokens_by_source(),
                    "corpus": corpus.about(),
                }
                blobs = write_dataset(stage.store, dataset)
                execution = {"subject_model": model.about()}
                stage.commit(place, Commit(blobs, summary, execution=execution))
            yield from stage.report()

    return token_dataset
