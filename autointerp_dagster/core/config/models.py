"""Which models play which part, and where they run."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from autointerp_dagster.core.config.base import Parameters

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["bfloat16", "float32", "float16"]


class ModelOptions(Parameters, frozen=True):
    """What transformers is told when it loads a model; its own names, and its own meaning."""

    execution_only: ClassVar[frozenset[str]] = frozenset(
        {"device_map", "max_memory", "offload_folder"}
    )

    device_map: str | dict[str, int | str] | None = None
    """Shards the model: ``auto``, ``balanced``, ``sequential``, or module to device. Takes the
    place of ``device``."""
    max_memory: dict[int | str, int | str] | None = None
    """Of each device that ``device_map`` may use, e.g. ``{0: 70GiB, cpu: 200GiB}``."""
    offload_folder: str | None = None
    """For the weights that ``device_map`` puts on the disk."""
    attn_implementation: (
        Literal[
            "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3",
        ]
        | None
    ) = None  # fmt: skip
    """Null: transformers chooses."""
    quantization_config: dict[str, Any] | None = None
    """E.g. ``{quant_method: bitsandbytes, load_in_8bit: true}``; needs the package that does it. A
    model that is stored quantised says so itself."""

    @field_validator("max_memory", mode="before")
    @classmethod
    def _number_devices(cls, value: object) -> object:
        """The keys of a study file are texts."""
        if not isinstance(value, Mapping):
            return value
        return {int(k) if str(k).isdigit() else k: of for k, of in value.items()}


class SubjectModelConfig(Parameters, frozen=True):
    """The language model being interpreted."""

    execution_only: ClassVar[frozenset[str]] = frozenset({"device", "batch_size", "threads"})

    source: str
    """Hub name, local folder, GGUF file, or ``embedded:smollm2-135m-instruct``."""
    revision: str | None = None
    """Commit, tag or branch of a hub model."""
    gguf_file: str | None = None
    """The GGUF file in a hub repository or folder with several files. It is dequantised once."""
    dtype: DType = "bfloat16"
    """Of weights and forward pass."""
    device: Device = "auto"
    """``auto``: CUDA where there is one."""
    batch_size: int = Field(default=8, ge=1)
    """Contexts of equal length per forward pass."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; null: all cores. On a shared machine use 1."""
    model_kwargs: ModelOptions = ModelOptions()
    """Sharding, quantisation and attention, done by transformers."""


class LocalLLMConfig(Parameters, frozen=True):
    """A model that runs inside this process through transformers; chats need its chat template."""

    execution_only: ClassVar[frozenset[str]] = frozenset({"device", "threads"})

    source: str
    """Hub name, local folder, or ``embedded:smollm2-135m-instruct``."""
    revision: str | None = None
    dtype: DType = "bfloat16"
    device: Device = "auto"
    threads: int | None = Field(default=None, ge=1)


class RemoteLLMConfig(Parameters, frozen=True):
    """A model behind an OpenAI-compatible server (vLLM, SGLang, llama.cpp, OpenRouter, OpenAI)."""

    execution_only: ClassVar[frozenset[str]] = frozenset(
        {
            "api_key_env",
            "max_in_flight",
            "timeout_s",
            "serve_timeout_s",
            "tokenizer",
            "usd_per_1m_prompt",
            "usd_per_1m_cached",
            "usd_per_1m_completion",
        }
    )

    base_url: str | None = Field(default=None, pattern=r"^https?://[^?#]+$")
    """Up to and including ``/v1``, e.g. ``http://127.0.0.1:8000/v1``; no secrets in it."""
    serve: str | None = None
    """Instead of ``base_url``: a command that serves the model on 127.0.0.1, with ``{port}`` where
    the port goes, e.g. ``vllm serve Qwen/Qwen3-32B --port {port}``. It is started by the first
    call of a run and ended with the run. No shell reads it; no secrets in it."""
    serve_timeout_s: float = Field(default=1800.0, gt=0)
    """Seconds until a started server must answer."""
    model: str
    """The name that the server knows the model by."""
    alias: str | None = None
    """The endpoint's name in identities; null: ``base_url`` or ``serve``. With an alias the server
    may move without making its answers strangers to the journal."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; the key itself is never written."""
    max_in_flight: int = Field(default=64, ge=1)
    """Requests under way at most; fewer while the server is overloaded."""
    timeout_s: float = Field(default=120.0, gt=0)
    """Seconds to wait for one answer before it is asked for again."""
    structured_outputs: bool = True
    """Ask for a JSON schema; switched off by itself where the server refuses it."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Sent along with every request, e.g. ``{chat_template_kwargs: {enable_thinking: false}}``:
    a model that thinks aloud would use up the few tokens that an answer gets."""
    tokenizer: str | None = None
    """Folder or hub name of the model's tokenizer, for exact estimates before anything is paid;
    null: an estimate from the length of the text."""
    usd_per_1m_prompt: float = Field(default=0.0, ge=0)
    """Price of a million prompt tokens."""
    usd_per_1m_cached: float | None = Field(default=None, ge=0)
    """Price of a million prompt tokens that the server's prefix cache had; null: as any others."""
    usd_per_1m_completion: float = Field(default=0.0, ge=0)
    """Price of a million completion tokens."""

    @field_validator("base_url")
    @classmethod
    def _check_address(cls, base_url: str | None) -> str | None:
        if base_url is not None and "@" in base_url.split("://", maxsplit=1)[1].split("/")[0]:
            raise ValueError(
                "got credentials before the host, wanted an address only. Put the key into an "
                "environment variable and name it in api_key_env"
            )
        return base_url

    @model_validator(mode="after")
    def _check_where(self) -> "RemoteLLMConfig":
        if (self.base_url is None) == (self.serve is None):
            raise ValueError(
                "wanted either base_url (a server that runs) or serve (a command that starts one)."
            )
        if self.serve is not None and "{port}" not in self.serve:
            raise ValueError("serve: wanted {port} in the command, where the server's port goes.")
        return self

    @property
    def has_price(self) -> bool:
        """Whether a call costs anything."""
        return self.usd_per_1m_prompt > 0 or self.usd_per_1m_completion > 0

    @property
    def endpoint(self) -> str:
        """The endpoint's name in identities."""
        return self.alias or (self.base_url or "").rstrip("/") or self.serve or ""

    def usd_of(self, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> float:
        """Price of a call.

        Args:
            prompt_tokens: All of them.
            cached_tokens: Of these, those that a prefix cache had.
            completion_tokens: Written by the model.
        """
        cached_price = self.usd_per_1m_cached
        if cached_price is None:
            cached_price = self.usd_per_1m_prompt
        fresh = (prompt_tokens - cached_tokens) * self.usd_per_1m_prompt
        written = completion_tokens * self.usd_per_1m_completion
        return (fresh + cached_tokens * cached_price + written) / 1e6

    def at(self, base_url: str) -> "RemoteLLMConfig":
        """The same model, answered by the server at ``base_url``; its identity stays."""
        served = {"base_url": base_url, "serve": None, "alias": self.endpoint}
        return self.model_copy(update=served)

    def identity(self) -> dict[str, Any]:
        """As for all parameters; the endpoint's name stands for its address or command."""
        fields = super().identity()
        return {**fields, "base_url": self.endpoint, "serve": None, "alias": None}


def _where_it_runs(value: object) -> str:
    names = value if isinstance(value, Mapping) else dir(value)
    return "<remote>" if "base_url" in names or "serve" in names else "<local>"


LLMConfig = Annotated[
    Annotated[LocalLLMConfig, Tag("<local>")] | Annotated[RemoteLLMConfig, Tag("<remote>")],
    Discriminator(_where_it_runs),
]
"""With ``base_url`` or ``serve`` a server, with ``source`` a model in this process."""


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
    batch_size: int = Field(default=16, ge=1)
    """Texts of 32 tokens per batch, of longer ones fewer; a GPU wants 256 and more."""


class ModelsConfig(Parameters, frozen=True):
    """The models of a study by the part they play."""

    subject: SubjectModelConfig
    explainer: LLMConfig
    judge: LLMConfig | None = None
    """Null: the explainer judges too."""
    base_lm: LLMConfig | None = None
    """A model that continues and scores plain text. Needed by surprisal, intervention, simulation
    all at once and the ``output`` explainer."""
    embedder: EmbedderConfig | None = None
    """Needed by the embedding and example_embedding scorers."""

    @model_validator(mode="after")
    def _default_to_explainer(self) -> "ModelsConfig":
        if self.judge is None:
            object.__setattr__(self, "judge", self.explainer)
        return self
