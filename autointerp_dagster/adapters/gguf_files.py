"""GGUF files as model folders in the ordinary layout, dequantised once by transformers.

transformers reads a GGUF file anew for the configuration, the tokenizer and the weights, and each
takes many seconds (10 s for a vocabulary of 49,000, on one core), in every process. So what it made
is kept in the cache folder, in the type that was asked for.

The embedded model has a converter of its own: it takes a tenth of the time and needs no other
package, but knows one architecture. Both give the same weights, to the bit.
"""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from autointerp_dagster.adapters.embedded.packages import build_once, cache_folder
from autointerp_dagster.adapters.model_files import file_hash
from autointerp_dagster.core.errors import ModelError

logger = logging.getLogger(__name__)


def converted_folder(file: Path, dtype: str, cache_dir: Path | None = None) -> Path:
    """Folder with the model, configuration and tokenizer of a GGUF file; made once per content.

    Args:
        file: Of any architecture and quantisation that transformers reads.
        dtype: Name of the type of the weights on disk, e.g. ``bfloat16``.
        cache_dir: See ``embedded.cache_folder``.

    Raises:
        ModelError: If transformers cannot read it.
    """
    name = f"{file.stem}-{file_hash(file)[:16]}-{dtype}"
    target = cache_folder(cache_dir) / "models" / name
    if target.is_dir():
        return target
    logger.info("dequantising %s to %s; this is done once", file, target)
    return build_once(target, partial(_convert, file, dtype))


def _convert(file: Path, dtype: str, out: Path) -> None:
    try:
        tokenizer, model = _read(file, dtype)
    except (OSError, ValueError, KeyError, NotImplementedError, ImportError) as error:
        raise ModelError(
            f"model {file}: transformers {transformers.__version__} cannot read this GGUF file "
            f"({type(error).__name__}: {error}). Use a file of another architecture or "
            "quantisation, or the model's safetensors."
        ) from error
    config: Any = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # what is saved is dense
    config.save_pretrained(out)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(out)
    weights = out / "model.safetensors"
    save_model(model, str(weights), metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors makes it private; a cache may be shared
    tokenizer.save_pretrained(out)
    _leave_out_tokens(out / "tokenizer.json", model.get_input_embeddings().weight.shape[0])


def _leave_out_tokens(tokenizer_file: Path, n_embeddings: int) -> None:
    """Special tokens that transformers adds by default to a vocabulary that has none of the name.

    The model has no embedding for them.
    """
    about = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    about["added_tokens"] = [t for t in about["added_tokens"] if t["id"] < n_embeddings]
    tokenizer_file.write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")


def _read(file: Path, dtype: str) -> tuple[Any, Any]:
    where: dict[str, Any] = {
        "pretrained_model_name_or_path": file.parent,
        "gguf_file": file.name,
        "local_files_only": True,
        "trust_remote_code": False,
    }
    if hasattr(transformers, "GgufConfig"):  # which would keep the blocks where it finds a kernel
        packed = transformers.GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=getattr(torch, dtype), quantization_config=packed
        )
    else:
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=getattr(torch, dtype))
    return AutoTokenizer.from_pretrained(**where), model
