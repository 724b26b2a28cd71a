"""Writes a tiny Llama as a GGUF file, the way llama.cpp's converter lays it out."""

from pathlib import Path

import gguf
import numpy as np
from transformers import LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    model: LlamaForCausalLM, path: Path, kind: gguf.GGMLQuantizationType | None = None
) -> Path:
    """The model with a byte-level BPE tokenizer whose BOS and EOS are token 0.

    Args:
        model: Any Llama with at least 260 tokens.
        path: Of the file.
        kind: What matrices are quantised to; null: all is float32.
    """
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, config.vocab_size)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        gguf_name, weight = _gguf_name(name), tensor.float().numpy()
        n_heads = heads.get(gguf_name.rpartition(".")[2])
        if n_heads is not None:  # the halves that a rotation turns together become neighbours
            halves = weight.reshape(n_heads, 2, -1, weight.shape[1])
            weight = halves.swapaxes(1, 2).reshape(weight.shape)
        if kind is not None and weight.ndim == 2:
            blocks = gguf.quantize(weight, kind)
            writer.add_tensor(f"{gguf_name}.weight", blocks, raw_dtype=kind)
        else:
            writer.add_tensor(f"{gguf_name}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, n_tokens: int) -> None:
    tokens = ["<s>", *bytes_to_unicode().values(), "th", "the"]
    tokens += [f"<unused{i}>" for i in range(n_tokens - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["t h", "th e"])
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in _TOP:
        return _TOP[stem]
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_LAYER[part]}"
