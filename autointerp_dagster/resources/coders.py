"""Sparse coders by the study and layer that name them."""

from collections.abc import Callable

import dagster as dg

from autointerp_dagster.adapters.coder_files import LoadedCoder, coder_identity, open_coder
from autointerp_dagster.core.llm import JournalBlock
from autointerp_dagster.core.types import LatentId, LayerKey
from autointerp_dagster.resources.models import SubjectModels
from autointerp_dagster.study import Study

LATENTS_PER_BLOCK = 4096
"""Of the journal: a cell reads only the blocks of its latents."""


class Coders(dg.ConfigurableResource):
    """The sparse coders whose latents are explained."""

    def of(self, study: Study, layer: LayerKey) -> LoadedCoder:
        """The coder of one layer.

        Raises:
            CoderError: If its files are missing or do not fit.
            ModelError: If they name a place that the subject model's family does not have.
        """
        return open_coder(study.coders[layer.coder], layer.hookpoint, _model_type_of(study))

    def identity(self, study: Study, layer: LayerKey) -> str:
        """Hash of the coder's content, read again only after its files have changed.

        Raises:
            CoderError: If its files are missing or do not fit.
        """
        return coder_identity(study.coders[layer.coder], layer.hookpoint, _model_type_of(study))

    def block_of(
        self, study: Study, layer: LayerKey, stage: str
    ) -> Callable[[LatentId], JournalBlock]:
        """Where the calls about a latent of this layer are journalled."""
        coder_hash = self.identity(study, layer)
        return lambda latent: JournalBlock(stage, coder_hash, latent.index // LATENTS_PER_BLOCK)


def _model_type_of(study: Study) -> Callable[[], str]:
    """Asked for only where a name depends on it: a step that asks judges needs no subject model."""
    return lambda: SubjectModels().of(study).model_type
