"""A tiny subject model and sparse coders, made in code: offline, the same in every run.

- ``tiny_subject_model_dir``: 3-layer Llama of width 16, byte-level BPE tokenizer whose BOS is id 0.
- ``tiny_sparsify_dir``: TopK coders (64 latents, k = 4) at its ``layers.0`` and ``layers.1``.
- ``hub``: an empty Hugging Face Hub on loopback, see ``hub_server.py``.
- ``s3``: an S3 server on loopback, see ``object_store.py``.
- ``postgres``: the URL of a Postgres database on loopback, see ``postgres_server.py``.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from hub_server import hub as hub  # fixtures
from hypothesis import settings
from object_store import s3 as s3
from postgres_server import postgres as postgres
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")

os.environ.pop("COLUMNS", None)  # workers of pytest-xdist set it, and consoles would keep to it

TEXTS = (
    "The river runs past the old mill, and the mill stands on the river.",
    "She said that the cat sat on the mat; the cat had eaten the rat.",
    "naïve café, Übergröße, 中文字符 and 日本語, emoji 🙂🙃, done.",
    "One, two, three, four. One hundred and two hundred.",
)
D_IN = 16
NUM_LATENTS = 64
K = 4


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _spool_dir(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test goes on with what another run's pass left."""
    os.environ["AUTOINTERP_SPOOL"] = str(tmp_path_factory.mktemp("spool"))


@pytest.fixture(scope="session")
def tiny_subject_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For ``SubjectModelConfig(source=str(folder), dtype="float32")``. Do not write in it."""
    folder = tmp_path_factory.mktemp("subject_model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=D_IN,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
            bos_token_id=0,
            eos_token_id=None,
        )
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sparsify_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder for ``FileCoderConfig(path=folder)``. Do not write in it."""
    folder = tmp_path_factory.mktemp("coders")
    generator = torch.Generator().manual_seed(1)
    for hookpoint in ("layers.0", "layers.1"):
        encoder = torch.randn(NUM_LATENTS, D_IN, generator=generator)
        tensors = {
            "encoder.weight": encoder,
            "encoder.bias": 0.1 * torch.randn(NUM_LATENTS, generator=generator),
            "W_dec": torch.nn.functional.normalize(encoder, dim=1),
            "b_dec": 0.1 * torch.randn(D_IN, generator=generator),
        }
        config = {
            "activation": "topk",
            "expansion_factor": 4,
            "normalize_decoder": True,
            "num_latents": NUM_LATENTS,
            "k": K,
            "multi_topk": False,
            "skip_connection": False,
            "transcode": False,
            "d_in": D_IN,
        }
        (folder / hookpoint).mkdir()
        save_file(tensors, folder / hookpoint / "sae.safetensors")
        (folder / hookpoint / "cfg.json").write_text(json.dumps(config))
    return folder
