"""The subject model: weights, tokenizer and hookpoints of a Hugging Face causal language model.

Nothing is loaded before it is needed, and a model is loaded once per process, however many studies
and assets use it; a folder whose files have changed counts as another model.
"""

import hashlib
import json
import platform
import threading
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from autointerp_dagster.adapters.gguf_files import converted_folder
from autointerp_dagster.adapters.model_files import (
    CONFIG_FILES,
    commit_of,
    file_hash,
    folder_identity,
    resolve_folder,
    resolve_gguf,
    stamp_of,
    weights_hash,
)
from autointerp_dagster.adapters.model_loading import (
    empty_model,
    load_config,
    load_model,
    load_vocabulary,
    module_paths,
)
from autointerp_dagster.adapters.tokenizers import HFDetokenizer
from autointerp_dagster.core.config import SubjectModelConfig
from autointerp_dagster.core.errors import ModelError
from autointerp_dagster.core.hooks import captured

_FINAL_NORMS = ("norm", "final_layer_norm", "ln_f", "final_norm")
"""Names that models give the norm before the output head."""

_N_TRIED = 3
"""Tokens that a width is found with."""

_loading = threading.Lock()
_trying = threading.Lock()
"""Held while a model without weights runs: hooks of two threads would see each other's vectors."""


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
    def gguf(self) -> Path | None:
        """The GGUF file that the model is; null if it is a folder of the usual files.

        Fetches a hub model's file that is not there yet.
        """
        config = self.config
        return resolve_gguf(config.source, config.revision, config.gguf_file)

    @cached_property
    def folder(self) -> Path:
        """Where the files are; fetches a hub model, and converts a GGUF file, not there yet."""
        if self.gguf is not None:
            return converted_folder(self.gguf, self.config.dtype)
        return resolve_folder(self.config.source, self.config.revision)

    @property
    def model(self) -> PreTrainedModel:
        """The whole model, on its device or devices, in evaluation mode."""
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        options = self.config.model_kwargs
        with _loading:
            return load_model(
                self.folder,
                stamp_of(self.folder),
                self.config.dtype,
                choose_device(self.config.device),
                options.model_dump_json(exclude_defaults=True),
            )

    @property
    def model_config(self) -> PreTrainedConfig:
        """What the model's configuration says; loads no weights, and of a hub model fetches none.

        Raises:
            ModelError: If transformers does not know it.
        """
        return load_config(self._config_folder, stamp_of(self._config_folder))

    @cached_property
    def _config_folder(self) -> Path:
        if self.gguf is not None:
            return self.folder
        return resolve_folder(self.config.source, self.config.revision, CONFIG_FILES)

    @property
    def model_type(self) -> str:
        """The architecture's name in the model's configuration, e.g. ``gemma2``."""
        return self.model_config.model_type

    @property
    def base_model(self) -> nn.Module:
        """The model without its head; hookpoints count from here."""
        return self.model.base_model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer; loading it loads no weights."""
        return load_vocabulary(self.folder, stamp_of(self.folder)).tokenizer

    @property
    def detokenizer(self) -> HFDetokenizer:
        """From token ids to pieces of text."""
        return load_vocabulary(self.folder, stamp_of(self.folder)).detokenizer

    @property
    def bos_id(self) -> int | None:
        """The token that begins every context; null if the tokenizer has none. 0 is a token."""
        bos_id = self.tokenizer.bos_token_id
        if bos_id is not None and not isinstance(bos_id, int):
            raise ModelError(
                f"model {self.folder}: BOS is {bos_id!r}, wanted one token id or none."
            )
        return bos_id

    @property
    def device(self) -> torch.device:
        """Where the model begins, and tokens go; of a sharded model the first of its devices."""
        chosen = torch.device(choose_device(self.config.device))
        if self.config.model_kwargs.device_map is None:
            return chosen
        embedding: Any = self.model.get_input_embeddings()
        return chosen if embedding.weight.is_meta else embedding.weight.device

    @property
    def execution(self) -> dict[str, object]:
        """What may change results in their last bits only, and which model it was, to be recorded.

        ``device_map`` is there for a model with one.
        """
        device, device_map = self.device, self.config.model_kwargs.device_map
        return {
            "device": str(device),
            "hardware": _hardware(device),
            "batch_size": self.config.batch_size,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "subject_model": self.about(),
            **({} if device_map is None else {"device_map": device_map}),
        }

    def about(self) -> dict[str, Any]:
        """Which model it is, for people: where from, which commit, the hash of its weights.

        Reads the weights once per process and again after they have changed.
        """
        path = self.gguf or self.folder
        about = {
            "source": self.config.source,
            "gguf_file": None if self.gguf is None else self.gguf.name,
            "revision": self.config.revision,
            "commit": commit_of(path),
            "weights_sha256": weights_hash(path) if self.gguf is None else file_hash(self.gguf),
            "model_type": self.model_type,
            "dtype": self.config.dtype,
            **self._deciding_options(),
        }
        return {name: value for name, value in about.items() if value is not None}

    @property
    def hookpoints(self) -> tuple[str, ...]:
        """Every module's path relative to the base model, e.g. ``layers.9.mlp``, outside in.

        Loads no weights, and of a hub model fetches none.
        """
        return module_paths(self._config_folder, stamp_of(self._config_folder))

    @torch.no_grad()
    def unembedding(self) -> Unembedding:
        """The output head and the scale of the norm before it, in the model's dtype.

        The scale is found by what the norm does to a vector of unit mean square, because models
        store it in different ways.

        Raises:
            ModelError: If the model has no output head, or one that is quantised or offloaded.
        """
        head = self.model.get_output_embeddings()
        if head is None:
            raise ModelError(f"model {self.folder}: has no output head, wanted a causal model.")
        weight = head.weight.detach()
        if weight.is_meta or not weight.is_floating_point():
            raise ModelError(
                f"model {self.folder}: the output head is offloaded or quantised ({weight.dtype} "
                f"on {weight.device}), wanted floats. Leave it out of models.subject.model_kwargs, "
                "or set logit_lens: false."
            )
        decoder = self.model.get_decoder()
        norm = next((n for n in (getattr(decoder, name, None) for name in _FINAL_NORMS) if n), None)
        if norm is None:
            return Unembedding(weight, None, centres=False)
        width = weight.shape[1]
        where = next((p.device for p in norm.parameters()), weight.device)
        ones = torch.ones(width, dtype=weight.dtype, device=where)
        signs = ones.clone()
        signs[1::2] = -1
        nothing = norm(torch.zeros_like(ones))
        scale = (norm(signs) - nothing) * signs
        centres = bool((norm(ones) - nothing).abs().max() < 0.1)
        return Unembedding(weight, scale.to(weight.device), centres)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without BOS. A special token's name in a text is plain text."""
        encoded = self.tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        return encoded.input_ids

    def identity(self) -> str:
        """Hash over the weights, the model's and tokenizer's configuration, BOS and dtype.

        Of a GGUF file it is over its content, so that it does not depend on who converted it. Reads
        every file once per process and again after one has changed.
        """
        files = folder_identity(self.folder) if self.gguf is None else file_hash(self.gguf)
        about: list[object] = [files, self.config.dtype, self.bos_id]
        if options := self._deciding_options():
            about.append(options)
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def _deciding_options(self) -> dict[str, Any]:
        options = self.config.model_kwargs.identity()
        return {name: value for name, value in options.items() if value is not None}

    def width_of(self, hookpoint: str) -> int:
        """Width of the vectors at a hookpoint, found by running one token.

        Raises:
            ModelError: If there is no such module (the nearest are named), or it does not give one
                vector per token.
        """
        base_model = self.base_model
        tokens = torch.zeros((1, _N_TRIED), dtype=torch.int64, device=self.device)
        with torch.inference_mode(), captured(base_model, [hookpoint]) as outputs:
            base_model(input_ids=tokens, use_cache=False)
        return _width(hookpoint, outputs[hookpoint])

    def width_from_config(self, hookpoint: str) -> int | None:
        """Width of the vectors at a hookpoint, found without loading weights; null if that fails.

        The model runs on shapes alone, which not every architecture's code can do.

        Raises:
            ModelError: As for :meth:`width_of`.
        """
        base_model = empty_model(self._config_folder, stamp_of(self._config_folder)).base_model
        tokens = torch.zeros((1, _N_TRIED), dtype=torch.int64, device="meta")
        # With a ready mask the model need not look at values to make one.
        mask = torch.zeros((1, 1, _N_TRIED, _N_TRIED), device="meta")
        try:
            with _trying, torch.inference_mode(), captured(base_model, [hookpoint]) as outputs:
                base_model(input_ids=tokens, attention_mask=mask, use_cache=False)
        except (RuntimeError, ValueError, TypeError):
            return None
        return _width(hookpoint, outputs[hookpoint])


def _width(hookpoint: str, vectors: Tensor) -> int:
    shape = tuple(vectors.shape)
    if len(shape) != 3 or shape[:2] != (1, _N_TRIED):
        raise ModelError(
            f"hookpoint {hookpoint!r}: output of shape {shape} for {_N_TRIED} tokens, wanted "
            f"(1, {_N_TRIED}, width). Choose a module that gives one vector per token."
        )
    return shape[2]


def open_subject_model(config: SubjectModelConfig) -> SubjectModel:
    """The subject model that a study names; nothing is read yet.

    Configurations that differ only in batch size or threads share the weights.

    Raises:
        ModelError: At the first use, if it cannot be had or loaded, or if its tokenizer is another
            model's.
    """
    return _opened(config.model_dump_json())


@cache
def _opened(config: str) -> SubjectModel:
    return SubjectModel(SubjectModelConfig.model_validate_json(config))


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
