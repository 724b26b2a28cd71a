"""Every parameter of a study, once: frozen pydantic models that ``study.py`` composes."""

from autointerp_dagster.core.config.base import Parameters
from autointerp_dagster.core.config.coders import CoderConfig, SparsifyCoderConfig
from autointerp_dagster.core.config.corpus import (
    CorpusConfig,
    EmbeddedCorpusConfig,
    TextFilesConfig,
    TokenConfig,
)
from autointerp_dagster.core.config.explaining import (
    DefaultExplainerConfig,
    ExplainerConfig,
    LatentSample,
    LatentSelection,
    TopTokensExplainerConfig,
)
from autointerp_dagster.core.config.models import (
    EmbedderConfig,
    LLMConfig,
    LocalLLMConfig,
    ModelsConfig,
    RemoteLLMConfig,
    SubjectModelConfig,
)
from autointerp_dagster.core.config.sampling import SamplingConfig
from autointerp_dagster.core.config.scoring import (
    DetectionConfig,
    EmbeddingConfig,
    FloorsConfig,
    FuzzingConfig,
    MetricsConfig,
    ScorersConfig,
)

__all__ = [
    "CoderConfig",
    "CorpusConfig",
    "DefaultExplainerConfig",
    "DetectionConfig",
    "EmbeddedCorpusConfig",
    "EmbedderConfig",
    "EmbeddingConfig",
    "ExplainerConfig",
    "FloorsConfig",
    "FuzzingConfig",
    "LLMConfig",
    "LatentSample",
    "LatentSelection",
    "LocalLLMConfig",
    "MetricsConfig",
    "ModelsConfig",
    "Parameters",
    "RemoteLLMConfig",
    "SamplingConfig",
    "ScorersConfig",
    "SparsifyCoderConfig",
    "SubjectModelConfig",
    "TextFilesConfig",
    "TokenConfig",
    "TopTokensExplainerConfig",
]
