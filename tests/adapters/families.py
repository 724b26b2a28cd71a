"""Tiny models of every family whose sites have names, with random weights: 3 layers of width 16."""

from collections.abc import Callable
from functools import cache

import torch
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

N_LAYERS, D_MODEL, D_MLP, VOCAB = 3, 16, 24, 50

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": D_MLP,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 4}
_VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


_WINDOWED = {**_GROUPED, "sliding_window": 4, "query_pre_attn_scalar": 4}
_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=D_MODEL, n_inner=D_MLP, n_layer=N_LAYERS, n_head=4,
        n_positions=64, bos_token_id=1, eos_token_id=2,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**_SIZES, rotary_pct=0.5),
    "gpt_neox_serial": lambda: GPTNeoXConfig(
        **_SIZES, rotary_pct=0.5, use_parallel_residual=False
    ),
    "llama": lambda: LlamaConfig(**_GROUPED),
    "mistral": lambda: MistralConfig(**_GROUPED, sliding_window=4),
    "qwen2": lambda: Qwen2Config(**_GROUPED),
    "qwen3": lambda: Qwen3Config(**_GROUPED),
    "gemma2": lambda: Gemma2Config(**_WINDOWED),
    "gemma3_text": lambda: Gemma3TextConfig(**_WINDOWED),
    "gemma3": lambda: Gemma3Config(
        text_config=_WINDOWED, vision_config=_VISION, mm_tokens_per_image=4
    ),
}  # fmt: skip
FAMILIES = tuple(name for name in _CONFIGS if name != "gpt_neox_serial")


def config_of(family: str) -> PreTrainedConfig:
    """Of a tiny model; ``gpt_neox_serial`` is a GPT-NeoX without parallel residual."""
    return _CONFIGS[family]()


@cache
def tiny_model(family: str) -> PreTrainedModel:
    """Random in every parameter: a norm's scale too, and biases. Do not change it."""
    model = AutoModelForCausalLM.from_config(config_of(family), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.requires_grad_(False).eval()


def tokens() -> torch.Tensor:
    """Two contexts of 7 tokens."""
    return torch.arange(14).reshape(2, 7) * 3 % VOCAB
