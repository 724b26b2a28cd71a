"""Coders in formats without an installable package: their files, and numpy's encode."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

from autointerp_dagster.adapters.coder_files import LoadedCoder, open_coder
from autointerp_dagster.core.config import FileCoderConfig

Arrays = dict[str, np.ndarray]
D_IN, D_OUT, N_LATENTS = 8, 12, 24


def arrays(seed: int, d_in: int = D_IN, d_out: int = D_IN) -> Arrays:
    """``W_enc [d_in, n]``, ``W_dec [n, d_out]``, biases and positive thresholds."""
    rng = np.random.default_rng(seed)
    return {
        "W_enc": rng.normal(size=(d_in, N_LATENTS)).astype(np.float32),
        "b_enc": rng.normal(size=N_LATENTS).astype(np.float32),
        "W_dec": rng.normal(size=(N_LATENTS, d_out)).astype(np.float32),
        "b_dec": rng.normal(size=d_out).astype(np.float32),
        "threshold": rng.uniform(0.2, 2.0, size=N_LATENTS).astype(np.float32),
    }


def inputs(seed: int, d_in: int = D_IN) -> np.ndarray:
    return (2 * np.random.default_rng(seed).normal(size=(20, d_in))).astype(np.float32)


def jump(pre: np.ndarray, threshold: np.ndarray | float) -> np.ndarray:
    return np.maximum(pre, 0) * (pre > threshold)


def largest(pre: np.ndarray, k: int) -> np.ndarray:
    """The k largest of each row, those above zero."""
    kept = np.zeros_like(pre)
    for row, values in enumerate(pre):
        best = np.argsort(-values)[:k]
        kept[row, best] = np.maximum(values[best], 0)
    return kept


def agrees(loaded: LoadedCoder, x: np.ndarray, expected: np.ndarray) -> None:
    """Both encoders give what numpy gave, and it is worth comparing."""
    assert 0.02 < float((expected > 0).mean()) < 0.9
    tokens = torch.from_numpy(x)
    wanted = torch.from_numpy(expected.astype(np.float32))
    torch.testing.assert_close(loaded.coder.encode_dense(tokens), wanted, atol=1e-5, rtol=1e-5)
    found = loaded.coder.encode(tokens)
    dense = torch.zeros_like(wanted)
    dense[found.token, found.latent] = found.value
    torch.testing.assert_close(dense, wanted, atol=1e-5, rtol=1e-5)


def decodes(loaded: LoadedCoder, x: np.ndarray, expected: np.ndarray) -> None:
    tokens = torch.from_numpy(x)
    found = loaded.coder.decode(loaded.coder.encode(tokens), tokens)
    wanted = torch.from_numpy(expected.astype(np.float32))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def load(path: Path, hookpoint: str, model_type: str | None = None, **how: object) -> LoadedCoder:
    config = FileCoderConfig.model_validate({"path": path, **how})
    return open_coder(config, hookpoint, None if model_type is None else lambda: model_type)


def write_npz(file: Path, of: Arrays) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **of)


def write_safetensors(file: Path, of: Mapping[str, np.ndarray | torch.Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: torch.as_tensor(v).contiguous() for k, v in of.items()}, file)


def write_pt(file: Path, of: Mapping[str, object]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in of.items()}, file
    )


def write_json(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def write_yaml(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(content))


def openai_state(of: Arrays, **more: object) -> dict[str, object]:
    """OpenAI's names and orientation."""
    return {
        "pre_bias": of["b_dec"],
        "encoder.weight": of["W_enc"].T.copy(),
        "latent_bias": of["b_enc"],
        "decoder.weight": of["W_dec"].T.copy(),
        "stats_last_nonzero": torch.zeros(N_LATENTS, dtype=torch.int64),
        "latents_activation_frequency": torch.ones(N_LATENTS),
        "latents_mean_square": torch.zeros(N_LATENTS),
        **more,
    }


def llama_state(of: Arrays) -> Arrays:
    """Llama Scope's names and orientation."""
    return {
        "encoder.weight": of["W_enc"].T,
        "encoder.bias": of["b_enc"],
        "decoder.weight": of["W_dec"].T,
        "decoder.bias": of["b_dec"],
    }


def circuit_state(of: Arrays, **more: np.ndarray) -> Arrays:
    """circuit-tracer's names and orientation."""
    return {
        "W_enc": of["W_enc"].T,
        "W_dec": of["W_dec"],
        "b_enc": of["b_enc"],
        "b_dec": of["b_dec"],
        **more,
    }
