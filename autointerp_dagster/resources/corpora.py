"""Corpora by the study that names them."""

import dagster as dg

from autointerp_dagster.adapters.corpora import Corpus, open_corpus
from autointerp_dagster.adapters.subject_models import SubjectModel
from autointerp_dagster.adapters.tokenizers import vocabulary_size
from autointerp_dagster.core.config import TokenConfig
from autointerp_dagster.core.tokens import TokenDataset, build_token_dataset, known_tokens
from autointerp_dagster.core.types import Progress, silent
from autointerp_dagster.study import Study


class Corpora(dg.ConfigurableResource):
    """Where the text comes from."""

    def of(self, study: Study) -> Corpus:
        """The study's corpus.

        Raises:
            CorpusError: If it cannot be found.
        """
        return open_corpus(study.corpus)

    def tokens(
        self, corpus: Corpus, model: SubjectModel, config: TokenConfig, progress: Progress = silent
    ) -> TokenDataset:
        """A corpus as contexts of tokens; it is read no further than needed.

        Args:
            corpus: The one whose identity is recorded: of a branch of the hub another one, made
                later, may be of a later commit.
            model: Whose tokenizer cuts the text.
            config: How many tokens, in contexts of what length.
            progress: Shows how many tokens there are so far.

        Raises:
            CorpusError: If the corpus cannot be read, or holds no context.
        """
        documents = known_tokens(corpus.documents(), vocabulary_size(model.tokenizer))
        return build_token_dataset(documents, model.encode, model.bos_id, config, progress)
