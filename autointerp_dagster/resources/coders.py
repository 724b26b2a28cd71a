"""Sparse coders by the study and layer that name them."""

import logging
from collections.abc import Callable
from functools import cache

import dagster as dg

from autointerp_dagster.adapters.baseline_coders import (
    Materials,
    baseline_identity,
    open_baseline,
)
from autointerp_dagster.adapters.coder_files import (
    LoadedCoder,
    coder_identity,
    open_coder,
    published_l0,
)
from autointerp_dagster.adapters.corpora import Corpus
from autointerp_dagster.adapters.hashing import json_hash
from autointerp_dagster.core.config import FileCoderConfig
from autointerp_dagster.core.errors import CoderError
from autointerp_dagster.core.llm import JournalBlock
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import LatentId, LayerKey
from autointerp_dagster.resources.corpora import Corpora
from autointerp_dagster.resources.models import SubjectModels
from autointerp_dagster.study import Study

logger = logging.getLogger(__name__)

LATENTS_PER_BLOCK = 4096
"""Of the journal: a cell reads only the blocks of its latents."""


class Coders(dg.ConfigurableResource):
    """The sparse coders whose latents are explained."""

    def of(self, study: Study, layer: LayerKey) -> LoadedCoder:
        """The coder of one layer; a baseline is made, from the subject model.

        Raises:
            CoderError: If its files are missing or do not fit, or it cannot be made.
            ModelError: If it names a place that the subject model does not have.
        """
        config = study.coders[layer.coder]
        if isinstance(config, FileCoderConfig):
            return open_coder(config, study.address_of(layer), _model_type_of(study))
        return open_baseline(config, layer.hookpoint, self._materials(study, layer))

    def identity(self, study: Study, layer: LayerKey) -> str:
        """Hash of the coder's content, read again only after its files have changed.

        Of a baseline: of what it is made of; no model is run.

        Raises:
            CoderError: If its files are missing or do not fit.
        """
        config = study.coders[layer.coder]
        if isinstance(config, FileCoderConfig):
            return coder_identity(config, study.address_of(layer), _model_type_of(study))
        return baseline_identity(config, layer.hookpoint, self._materials(study, layer))

    def identities(self, study: Study) -> dict[str, str]:
        """Of every layer, by its key; of discovered ones only those whose files can be read now.

        Raises:
            CoderError: As :meth:`identity`, if the study itself names the layers.
        """
        found: dict[str, str] = {}
        for layer in study.layer_keys:
            try:
                found[str(layer)] = self.identity(study, layer)
            except CoderError as error:
                if not study.discovers:
                    raise
                logger.warning("%s: not observed: %s", layer, error)
        return found

    def block_of(
        self, study: Study, layer: LayerKey, stage: str
    ) -> Callable[[LatentId], JournalBlock]:
        """Where the calls about a latent of this layer are journalled."""
        coder_hash = self.identity(study, layer)
        return lambda latent: JournalBlock(stage, coder_hash, latent.index // LATENTS_PER_BLOCK)

    def _materials(self, study: Study, layer: LayerKey) -> Materials:
        def beside(coder: str) -> LayerKey:
            return LayerKey(coder, layer.hookpoint)

        def l0_of(coder: str) -> float | None:
            config = study.coders[coder]
            if not isinstance(config, FileCoderConfig):
                return None  # it follows from what the baseline is
            return published_l0(config, layer.hookpoint, _model_type_of(study))

        @cache
        def corpus() -> Corpus:
            return Corpora().of(study)

        def dataset(n_tokens: int) -> TokenDataset:
            config = study.tokens.model_copy(update={"n_tokens": n_tokens})
            return Corpora().tokens(corpus(), model, config)

        model, cut = SubjectModels().of(study), study.tokens.identity()
        del cut["n_tokens"]
        return Materials(
            subject_model=model,
            coder=lambda name: self.of(study, beside(name)),
            coder_identity=lambda name: self.identity(study, beside(name)),
            published_l0=l0_of,
            dataset=dataset,
            dataset_identity=lambda: json_hash([corpus().identity(), cut]),
        )


def _model_type_of(study: Study) -> Callable[[], str]:
    """Asked for only where a name depends on it: a step that asks judges needs no subject model."""
    return lambda: SubjectModels().of(study).model_type
