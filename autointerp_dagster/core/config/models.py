"""Which models play which part, and where they run."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from autointerp_dagster.core.config.base import Parameters

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["bfloat16", "float32"]


class SubjectModelConfig(Parameters, frozen=True):
    """The language model being interpreted."""

    execution_only: ClassVar[frozenset[str]] = frozenset({"device", "batch_size", "threads"})

    source: str
    """Hub name, local folder, or ``embedded:smollm2-135m-instruct``."""
    revision: str | None = None
    """Commit, tag or branch of a hub model."""
    dtype: DType = "bfloat16"
    """Of weights and forward pass."""
    device: Device = "auto"
    """``auto``: CUDA where there is one."""
    batch_size: int = Field(default=8, ge=1)
    """Contexts of equal length per forward pass."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; null: all cores. On a shared machine use 1."""


class LocalLLMConfig(Parameters, frozen=True):
    """A chat model that runs inside this process through transformers."""

    execution_only: ClassVar[frozenset[str]] = frozenset({"device", "threads"})

    source: str
    """Hub name, local folder, or ``embedded:smollm2-135m-instruct``."""
    revision: str | None = None
    dtype: DType = "bfloat16"
    device: Device = "auto"
    threads: int | None = Field(default=None, ge=1)


class RemoteLLMConfig(Parameters, frozen=True):
    """A chat model behind an OpenAI-compatible server (vLLM, llama.cpp, OpenRouter, OpenAI)."""

    execution_only: ClassVar[frozenset[str]] = frozenset(
        {"api_key_env", "max_in_flight", "timeout_s", "usd_per_1m_prompt", "usd_per_1m_completion"}
    )

    base_url: str = Field(pattern=r"^https?://[^?#]+$")
    """Up to and including ``/v1``, e.g. ``http://127.0.0.1:8000/v1``; no secrets in it."""
    model: str
    """The name that the server knows the model by."""
    alias: str | None = None
    """The endpoint's name in identities; null: ``base_url``. With an alias the server may move
    without making its answers strangers to the journal."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; the key itself is never written."""
    max_in_flight: int = Field(default=32, ge=1)
    """Requests under way at once."""
    timeout_s: float = Field(default=120.0, gt=0)
    """Seconds to wait for one answer before it is asked for again."""
    structured_outputs: bool = True
    """Ask for a JSON schema; switched off by itself where the server refuses it."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Sent along with every request, e.g. ``{chat_template_kwargs: {enable_thinking: false}}``:
    a model that thinks aloud would use up the few tokens that an answer gets."""
    usd_per_1m_prompt: float = Field(default=0.0, ge=0)
    """Price of a million prompt tokens."""
    usd_per_1m_completion: float = Field(default=0.0, ge=0)
    """Price of a million completion tokens."""

    @property
    def has_price(self) -> bool:
        """Whether a call costs anything."""
        return self.usd_per_1m_prompt > 0 or self.usd_per_1m_completion > 0

    def identity(self) -> dict[str, Any]:
        """As for all parameters; an alias stands for the address."""
        fields = super().identity()
        return {**fields, "base_url": self.alias or self.base_url.rstrip("/")}


def _where_it_runs(value: object) -> str:
    names = value if isinstance(value, Mapping) else dir(value)
    return "<remote>" if "base_url" in names else "<local>"


LLMConfig = Annotated[
    Annotated[LocalLLMConfig, Tag("<local>")] | Annotated[RemoteLLMConfig, Tag("<remote>")],
    Discriminator(_where_it_runs),
]
"""With ``base_url`` a server, with ``source`` a model in this process."""


class EmbedderConfig(Parameters, frozen=True):
    """A sentence embedder (sentence-transformers)."""

    execution_only: ClassVar[frozenset[str]] = frozenset({"device", "batch_size"})

    source: str
    """Hub name, local folder, or ``embedded:all-minilm-l6-v2``."""
    revision: str | None = None
    query_prefix: str = (
        "Instruct: Retrieve sentences that could be related to the explanation.\nQuery:"
    )
    """Put before an explanation; empty for embedders without instructions."""
    device: Device = "auto"
    batch_size: int = Field(default=64, ge=1)


class ModelsConfig(Parameters, frozen=True):
    """The models of a study by the part they play."""

    subject: SubjectModelConfig
    explainer: LLMConfig
    judge: LLMConfig | None = None
    """Null: the explainer judges too."""
    embedder: EmbedderConfig | None = None
    """Needed by the embedding scorer."""

    @model_validator(mode="after")
    def _default_to_explainer(self) -> "ModelsConfig":
        if self.judge is None:
            object.__setattr__(self, "judge", self.explainer)
        return self
