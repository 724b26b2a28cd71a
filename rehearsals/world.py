"""A synthetic study of any number of layers and ranges, whose cells are tiny."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

N_WORDS, D_MODEL, CONTEXT_LEN, K = 60, 16, 32, 8
N_DOCUMENTS = 40


def build_world(folder: Path, n_layers: int, n_latents: int) -> Path:
    """Writes ``model``, ``coders`` and ``corpus`` below ``folder``, the same every time."""
    generator = torch.Generator().manual_seed(0)
    _save_model(folder / "model", n_layers, generator)
    for layer in range(n_layers):
        _save_coder(folder / "coders" / f"h.{layer}", n_latents, generator)
    rng = np.random.default_rng(0)
    lines = [
        json.dumps({"text": " ".join(f"w{i}" for i in rng.integers(1, N_WORDS, CONTEXT_LEN - 1))})
        for _ in range(N_DOCUMENTS)
    ]
    (folder / "corpus").mkdir()
    (folder / "corpus" / "texts.jsonl").write_text("\n".join(lines))
    return folder


def write_study(
    folder: Path, world: Path, base_url: str, n_layers: int, n_latents: int, range_size: int
) -> Path:
    """A study over every layer of a world; its store is ``folder/store``."""
    llm = {"base_url": base_url, "model": "fake", "timeout_s": 60.0}
    content: dict[str, Any] = {
        "models": {
            "subject": {
                "source": str(world / "model"), "dtype": "float32", "device": "cpu", "threads": 1,
                "batch_size": 32,
            },
            "explainer": llm,
            "judge": dict(llm),
        },
        "corpus": {"kind": "files", "path": str(world / "corpus")},
        "tokens": {"n_tokens": 100_000, "context_len": CONTEXT_LEN, "min_visible": 4},
        "coders": {"sae": {"format": "sparsify", "path": str(world / "coders")}},
        "layers": [f"h.{layer}" for layer in range(n_layers)],
        "max_num_latents": n_latents,
        "range_size": range_size,
        "latents": {"sample": n_latents // range_size, "per": "layer"},
        "sampling": {
            "window_len": 8, "n_train": 2, "n_select": 0, "n_test": 2, "n_negative_train": 0,
            "n_negative_select": 0, "n_negative_test": 2, "n_quantiles": 1, "min_tokens": 1,
            "min_test_windows": 1,
        },
        "explainers": {"default": {"kind": "default", "n_examples": 2}},
        "scorers": {"detection": {}},
        "floors": {"sample": 1, "donor_block": range_size},
        "metrics": {"n_bootstrap": 100},
        "checks": {"fvu": None},  # the coders are random: they rebuild nothing
        "logit_lens": False,
        "store": str(folder / "store"),
    }  # fmt: skip
    path = folder / "studies" / "rehearsal.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def _save_model(folder: Path, n_layers: int, generator: torch.Generator) -> None:
    vocabulary = {"<s>": 0, **{f"w{i}": i for i in range(1, N_WORDS)}}
    tokenizer = Tokenizer(WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=N_WORDS,
            n_positions=CONTEXT_LEN,
            n_embd=D_MODEL,
            n_layer=n_layers,
            n_head=1,
            n_inner=D_MODEL,
            bos_token_id=0,
            eos_token_id=None,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_" not in name:
                parameter.normal_(std=0.3, generator=generator)
    model.save_pretrained(folder)


def _save_coder(folder: Path, n_latents: int, generator: torch.Generator) -> None:
    tensors = {
        "encoder.weight": torch.randn(n_latents, D_MODEL, generator=generator),
        "encoder.bias": torch.zeros(n_latents),
        "W_dec": torch.randn(n_latents, D_MODEL, generator=generator),
        "b_dec": torch.zeros(D_MODEL),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "sae.safetensors")
    config = {"activation": "topk", "num_latents": n_latents, "k": K, "d_in": D_MODEL}
    (folder / "cfg.json").write_text(json.dumps(config))
