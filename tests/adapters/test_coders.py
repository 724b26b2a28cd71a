"""Coders in sparsify's format are read as they are, and what does not fit is refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from autointerp_dagster.adapters.coders import (
    LoadedCoder,
    check_fits,
    coder_identity,
    discover_hookpoints,
    open_coder,
)
from autointerp_dagster.adapters.subject_models import open_subject_model
from autointerp_dagster.core.config import SparsifyCoderConfig, SubjectModelConfig
from autointerp_dagster.core.errors import CoderError, ModelError
from autointerp_dagster.core.sparse_coders import TopK
from autointerp_dagster.core.types import LayerKey

HOOKPOINT = "layers.0"


def load(folder: Path, hookpoint: str = HOOKPOINT) -> LoadedCoder:
    return open_coder(SparsifyCoderConfig(path=folder), hookpoint)


@pytest.fixture
def copied_dir(tiny_sparsify_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny coders that a test may change."""
    return Path(shutil.copytree(tiny_sparsify_dir, tmp_path / "coders"))


def change(folder: Path, config: dict[str, object] | None = None, **tensors: Tensor | None) -> None:
    """Replace keys of cfg.json and tensors (dots written ``__``; None removes)."""
    file = folder / HOOKPOINT / "cfg.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | (config or {})))
    weights = folder / HOOKPOINT / "sae.safetensors"
    merged = load_file(weights) | {k.replace("__", "."): v for k, v in tensors.items()}
    save_file({k: v.contiguous() for k, v in merged.items() if v is not None}, weights)


def tensor_of(folder: Path, name: str) -> Tensor:
    return load_file(folder / HOOKPOINT / "sae.safetensors")[name]


def test_a_coder_encodes_as_the_formula_of_its_format_says(tiny_sparsify_dir: Path) -> None:
    coder = load(tiny_sparsify_dir).coder
    tensors = load_file(tiny_sparsify_dir / HOOKPOINT / "sae.safetensors")
    x = torch.randn(10, 16, generator=torch.Generator().manual_seed(2))
    latents = torch.relu(
        torch.nn.functional.linear(
            x - tensors["b_dec"], tensors["encoder.weight"], tensors["encoder.bias"]
        )
    )
    values, indices = latents.topk(4, dim=-1)
    expected = torch.zeros(10, 64).scatter_(1, indices, values)
    torch.testing.assert_close(coder.encode_dense(x), expected)
    assert (coder.num_latents, coder.d_in, coder.activation) == (64, 16, TopK(4))
    assert torch.equal(coder.decoder_rows([3]), tensors["W_dec"][3:4])


def test_num_latents_0_means_d_in_times_the_expansion_factor(copied_dir: Path) -> None:
    change(copied_dir, {"num_latents": 0, "expansion_factor": 4})
    assert load(copied_dir).coder.num_latents == 64


def test_bfloat16_weights_are_read_and_the_decoder_is_kept_small(copied_dir: Path) -> None:
    tensors = load_file(copied_dir / HOOKPOINT / "sae.safetensors")
    save_file(
        {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()},
        copied_dir / HOOKPOINT / "sae.safetensors",
    )
    coder = load(copied_dir).coder
    assert coder.encoder.dtype == torch.float32
    assert coder.decoder.dtype == torch.bfloat16


def test_the_identity_is_that_of_the_content(tiny_sparsify_dir: Path, copied_dir: Path) -> None:
    identity = load(tiny_sparsify_dir).identity
    assert load(copied_dir).identity == identity
    assert coder_identity(SparsifyCoderConfig(path=copied_dir), HOOKPOINT) == identity
    assert load(copied_dir, "layers.1").identity != identity
    bias = tensor_of(copied_dir, "encoder.bias")
    change(copied_dir, encoder__bias=bias + 1)
    changed = load(copied_dir).identity
    assert changed != identity
    change(copied_dir, {"k": 3}, encoder__bias=bias)
    assert load(copied_dir).identity not in (identity, changed)


def test_how_to_compute_comes_from_the_study_and_is_no_part_of_its_identity(
    tiny_sparsify_dir: Path,
) -> None:
    plain = SparsifyCoderConfig(path=tiny_sparsify_dir)
    told = SparsifyCoderConfig(path=tiny_sparsify_dir, screen="bfloat16", compiled=True)
    coder = open_coder(told, HOOKPOINT).coder
    assert coder.describe()["screen"] == "bfloat16"
    assert coder.computing.compiled
    assert open_coder(plain, HOOKPOINT).coder.describe()["screen"] == "float32"  # it is small
    assert told.identity() == plain.identity()
    assert open_coder(told, HOOKPOINT).identity == open_coder(plain, HOOKPOINT).identity


def test_hookpoints_are_found_in_natural_order(tmp_path: Path) -> None:
    for name in ("layers.10", "layers.9", "embed_tokens", "layers.9.mlp", "logs"):
        (tmp_path / name).mkdir()
        if name != "logs":
            (tmp_path / name / "cfg.json").write_text("{}")
    found = discover_hookpoints(SparsifyCoderConfig(path=tmp_path))
    assert found == ["embed_tokens", "layers.9", "layers.9.mlp", "layers.10"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"activation": "groupmax"}, r"cfg\.json: activation 'groupmax' is not supported"),
        ({"activation": "relu"}, "activation 'relu'"),
        ({"transcode": True}, "transcode .* is not supported"),
        ({"skip_connection": True}, "skip_connection .* is not supported"),
        ({"signed": True}, "signed .* is not supported"),
        ({"k": 65}, "num_latents 64, k 65"),
        ({"k": 0}, "k 0"),
        ({"d_in": 0}, "d_in 0"),
        ({"num_latents": 0, "expansion_factor": 0}, "num_latents 0"),
        ({"num_latents": "many"}, r"cfg\.json: num_latents: .*integer"),
    ],
)
def test_a_coder_of_another_kind_is_refused_by_name(
    copied_dir: Path, config: dict[str, object], message: str
) -> None:
    change(copied_dir, config)
    with pytest.raises(CoderError, match=message):
        load(copied_dir)


def test_an_old_run_of_transcoders_is_refused(copied_dir: Path) -> None:
    (copied_dir / "config.json").write_text('{"transcode": true}')
    with pytest.raises(CoderError, match=r"config\.json: transcode"):
        load(copied_dir)


def test_each_tensor_fault_names_file_tensor_and_shapes(copied_dir: Path) -> None:
    encoder, b_dec = tensor_of(copied_dir, "encoder.weight"), tensor_of(copied_dir, "b_dec")
    faults: list[tuple[dict[str, Tensor | None], str]] = [
        ({"W_dec": None}, r"missing tensors \['W_dec'\]"),
        ({"W_skip": torch.zeros(16, 16)}, r"unknown tensors \['W_skip'\]"),
        ({"encoder__weight": encoder.T}, r"encoder\.weight .*\[16, 64\].*\[64, 16\].*transposed"),
        ({"encoder__bias": torch.zeros(63)}, r"encoder\.bias has shape \[63\].*\[64\]"),
        ({"b_dec": torch.zeros(15)}, r"b_dec has shape \[15\].*\[16\]"),
        ({"b_dec": b_dec.clone().fill_(torch.nan)}, r"b_dec .* has 16 values that are not finite"),
        ({"b_dec": torch.zeros(16, dtype=torch.int64)}, "b_dec .*int64.* not finite floats"),
    ]
    for i, (tensors, message) in enumerate(faults):
        folder = copied_dir.parent / f"fault{i}"
        shutil.copytree(copied_dir, folder)
        change(folder, **tensors)
        with pytest.raises(CoderError, match=rf"sae\.safetensors: .*{message}"):
            load(folder)


def test_missing_and_damaged_files_are_errors(copied_dir: Path) -> None:
    with pytest.raises(CoderError, match=r"no cfg\.json.*layers\.0, layers\.1"):
        load(copied_dir, "layers.2")
    (copied_dir / HOOKPOINT / "sae.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(CoderError, match=r"sae\.safetensors: unreadable"):
        load(copied_dir)
    (copied_dir / HOOKPOINT / "sae.safetensors").unlink()
    with pytest.raises(CoderError, match="never pickle"):
        load(copied_dir)
    (copied_dir / HOOKPOINT / "cfg.json").write_text("{")
    with pytest.raises(CoderError, match=r"cfg\.json: no JSON"):
        load(copied_dir)
    with pytest.raises(CoderError, match="nowhere: no such folder"):
        discover_hookpoints(SparsifyCoderConfig(path=copied_dir / "nowhere"))
    (copied_dir / "empty").mkdir()
    with pytest.raises(CoderError, match=r"no <hookpoint>/cfg\.json"):
        discover_hookpoints(SparsifyCoderConfig(path=copied_dir / "empty"))


def test_a_coder_must_fit_its_hookpoint_and_the_grid(
    tiny_subject_model_dir: Path, tiny_sparsify_dir: Path
) -> None:
    subject_model = open_subject_model(
        SubjectModelConfig(source=str(tiny_subject_model_dir), dtype="float32", device="cpu")
    )
    loaded = load(tiny_sparsify_dir)
    check_fits(loaded, subject_model, LayerKey("sae", "layers.2"), max_num_latents=64)
    with pytest.raises(CoderError, match=r"d_in is 16.*'layers\.0\.mlp\.up_proj' have width 32"):
        check_fits(loaded, subject_model, LayerKey("sae", "layers.0.mlp.up_proj"))
    with pytest.raises(ModelError, match=r"'layers\.7'"):
        check_fits(loaded, subject_model, LayerKey("sae", "layers.7"))
    with pytest.raises(CoderError, match=r"64 latents.*cover 63.*Raise max_num_latents"):
        check_fits(loaded, subject_model, LayerKey("sae", "layers.0"), max_num_latents=63)
