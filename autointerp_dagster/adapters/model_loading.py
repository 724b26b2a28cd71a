"""Loading what a folder holds of a model: configuration, tokenizer, weights.

Each is loaded once per process; a folder whose files have changed is another one. No code from the
folder is ever run, and no weights are read but safetensors.
"""

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from autointerp_dagster.adapters.model_files import Stamp, ggufs_in
from autointerp_dagster.adapters.tokenizers import HFDetokenizer
from autointerp_dagster.core.config.models import ModelOptions
from autointerp_dagster.core.errors import ModelError

_HERE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""For whatever transformers loads."""

logger = logging.getLogger(__name__)


class Vocabulary(NamedTuple):
    """A tokenizer and the way back."""

    tokenizer: PreTrainedTokenizerBase
    detokenizer: HFDetokenizer


@lru_cache(maxsize=8)
def load_config(folder: Path, stamp: Stamp) -> PreTrainedConfig:
    """What the model in a folder says about itself.

    Raises:
        ModelError: If transformers does not know it.
    """
    del stamp  # part of the cache key alone
    try:
        return AutoConfig.from_pretrained(folder, **_HERE)
    except (OSError, ValueError, KeyError) as error:
        files = ggufs_in(folder)
        hint = f" Or set gguf_file to one of {', '.join(files)}." if files else ""
        raise ModelError(
            f"model {folder}: no configuration that transformers {transformers.__version__} knows "
            f"({type(error).__name__}: {error}). Wanted the config.json of a causal language model "
            f"that needs no code of its own.{hint}"
        ) from error


def module_paths(folder: Path, stamp: Stamp) -> tuple[str, ...]:
    """Every module's path relative to the base model, outside in; loads no weights.

    Raises:
        ModelError: If transformers does not know the model, or it is no causal language model.
    """
    base_model = empty_model(folder, stamp).base_model
    return tuple(name for name, _ in base_model.named_modules() if name)


@lru_cache(maxsize=8)
def empty_model(folder: Path, stamp: Stamp) -> PreTrainedModel:
    """The model in a folder without weights: its parameters have shapes, and take no memory.

    Raises:
        ModelError: If transformers does not know the model, or it is no causal language model.
    """
    config = load_config(folder, stamp)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, ImportError) as error:
        raise _unloadable(folder, error) from error
    return model.eval()


@lru_cache(maxsize=8)
def load_vocabulary(folder: Path, stamp: Stamp) -> Vocabulary:
    """The tokenizer in a folder; loads no weights.

    Raises:
        ModelError: If there is none.
    """
    load_config(folder, stamp)  # its error says more
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **_HERE)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model {folder}: the tokenizer cannot be loaded ({type(error).__name__}: {error}). "
            "Wanted tokenizer.json and tokenizer_config.json beside the weights."
        ) from error
    return Vocabulary(tokenizer, HFDetokenizer(tokenizer))


@lru_cache(maxsize=2)
def load_model(
    folder: Path, stamp: Stamp, dtype: str, device: str, options: str
) -> PreTrainedModel:
    """The model in a folder, in evaluation mode.

    Args:
        folder: Holds its files.
        stamp: Of the folder.
        dtype: Name of the type of its weights, those that are not quantised.
        device: Where it is, unless the options shard it.
        options: A ``ModelOptions`` as JSON.

    Raises:
        ModelError: If it cannot be loaded, or its tokenizer is another model's.
    """
    kwargs = ModelOptions.model_validate_json(options).model_dump(exclude_none=True)
    config, tokenizer = load_config(folder, stamp), load_vocabulary(folder, stamp).tokenizer
    is_quantised = "quantization_config" in kwargs or hasattr(config, "quantization_config")
    if is_quantised and "device_map" not in kwargs:
        kwargs["device_map"] = {"": device}  # quantised weights are made where they are to be
    logger.info("loading %s in %s on %s", folder, dtype, kwargs.get("device_map", device))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), use_safetensors=True, **_HERE, **kwargs
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _unloadable(folder, error) from error
    _refuse_foreign_tokenizer(folder, model, tokenizer)
    if "device_map" not in kwargs:
        nn.Module.to(model, device)
    return model.eval()


def _unloadable(folder: Path, error: Exception) -> ModelError:
    return ModelError(
        f"model {folder}: cannot be loaded ({type(error).__name__}: {error}). Wanted a causal "
        "language model with config.json and safetensors weights, and for model_kwargs the "
        "packages that they need."
    )


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
