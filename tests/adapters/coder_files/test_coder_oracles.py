"""Checkpoints that the packages themselves wrote are encoded here as by these packages.

``oracles`` holds them with what their own ``encode`` and ``decode`` gave; ``write_oracles.py``
wrote it, and says with which versions.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from write_oracles import CASES, HERE, N_LATENTS, K

from autointerp_dagster.adapters.coder_files import LoadedCoder, open_coder
from autointerp_dagster.core.config import FileCoderConfig
from autointerp_dagster.core.errors import CoderError
from autointerp_dagster.core.sparse_coders import LinearCoder

HOOKPOINTS = {
    "sparsify/groupmax": "layers.3.mlp",
    "sparsify/transcoder": "layers.3.mlp",
    "sparsify/skip_transcoder": "layers.3.mlp",
    "saelens/standard_hook_z": "h.3.attn.c_proj.input",
}
"""Of the cases that are not at the third layer's residual stream."""
MODEL_TYPES = {"sparsify": "llama", "saelens": "gpt2", "dictionary_learning": "gpt_neox"}
FOLDERS = sorted(path.parent for path in HERE.glob("*/*/expected.safetensors"))
ENCODED = [folder for folder in FOLDERS if not folder.name.startswith("refused")]


def open_case(folder: Path, *, any_format: bool = True) -> LoadedCoder:
    case = folder.relative_to(HERE).as_posix()
    model_type = MODEL_TYPES[folder.parent.name]
    layer = "h.3" if model_type == "gpt2" else "layers.3"
    if "transcoder" in case and "saelens" in case:
        layer = "h.3.mlp"
    config = FileCoderConfig(path=folder, format="auto" if any_format else folder.parent.name)
    return open_coder(config, HOOKPOINTS.get(case, layer), lambda: model_type)


@pytest.mark.parametrize("folder", ENCODED, ids=lambda p: p.relative_to(HERE).as_posix())
def test_a_coder_encodes_and_decodes_as_the_package_that_wrote_it(folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    x, encoded = expected["x"], expected["encoded"].float()
    coder = open_case(folder).coder
    assert isinstance(coder, LinearCoder)
    assert coder.dtype == x.dtype
    # In bfloat16 a package rounds the product to 8 bits, and once more with the bias added.
    tolerance = 1e-5 * encoded.abs() + 1e-6
    if x.dtype == torch.bfloat16:
        tolerance = 1.01 * 2**-8 * (2 * encoded.abs() + coder.bias.abs())
    found = coder.encode_dense(x)
    assert torch.equal(found > 0, encoded > 0)
    assert bool(((found - encoded).abs() <= tolerance).all())
    sparse = coder.encode(x)
    dense = torch.zeros_like(found)
    dense[sparse.token, sparse.latent] = sparse.value
    assert bool(((dense - encoded).abs() <= tolerance).all())
    if "decoded" in expected and x.dtype == torch.float32:
        decoded = coder.decode(sparse, x)
        torch.testing.assert_close(decoded, expected["decoded"], atol=1e-4, rtol=1e-4)


def test_the_oracles_are_worth_comparing_with() -> None:
    """Every case has tokens on which some latents fire and some do not."""
    assert len(ENCODED) >= 40
    for folder in ENCODED:
        fires = load_file(folder / "expected.safetensors")["encoded"] > 0
        assert fires.shape[1] == N_LATENTS
        assert 0.02 < float(fires.float().mean()) < 0.9, folder
    assert {folder.parent.name for folder in ENCODED} == set(CASES)


@pytest.mark.parametrize("folder", ENCODED, ids=lambda p: p.relative_to(HERE).as_posix())
def test_the_format_is_recognised_by_the_names_of_the_files(folder: Path) -> None:
    recognised = open_case(folder)
    named = open_case(folder, any_format=False)
    assert recognised.format == folder.parent.name
    assert recognised.about == named.about
    assert recognised.about.startswith(f"{folder.parent.name}: ")
    assert recognised.identity == named.identity


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("refused_abstopk", "abstopk is not supported: its activations may be negative"),
        ("refused_matching_pursuit", "matching_pursuit is not supported: .*not linear"),
        ("refused_temporal", "temporal is not supported: its encoder attends over positions"),
    ],
)
def test_what_is_no_function_of_one_vector_is_refused_by_name(case: str, message: str) -> None:
    with pytest.raises(CoderError, match=rf"{case}/cfg\.json: {message}"):
        open_case(HERE / "saelens" / case)


@pytest.mark.parametrize(
    ("case", "reads", "writes", "expected_l0"),
    [
        ("sparsify/topk", "layers.3", "layers.3", K),
        ("sparsify/seed", "layers.3", "layers.3", K),
        ("sparsify/best", "layers.3", "layers.3", K),
        ("sparsify/groupmax", "layers.3.mlp", "layers.3.mlp", K),
        ("sparsify/transcoder", "layers.3.mlp.input", "layers.3.mlp", K),
        ("sparsify/skip_transcoder", "layers.3.mlp.input", "layers.3.mlp", K),
        ("saelens/standard", "h.3", "h.3", None),
        ("saelens/standard_hook_z", "h.3.attn.c_proj.input", "h.3.attn.c_proj.input", None),
        ("saelens/old_topk", "h.3", "h.3", K),
        ("saelens/batchtopk", "h.3", "h.3", K),
        ("saelens/batchtopk_checkpoint", "h.3", "h.3", K),
        ("saelens/jumprelu_skip_transcoder", "h.3.ln_2.normalized", "h.3.mlp", None),
        ("dictionary_learning/AutoEncoderTopK", "layers.3", "layers.3", K),
        ("dictionary_learning/BatchTopKSAE", "layers.3", "layers.3", K),
        ("dictionary_learning/JumpReluAutoEncoder", "layers.3", "layers.3", None),
    ],
)
def test_a_coder_comes_with_its_place_and_its_l0(
    case: str, reads: str, writes: str, expected_l0: float | None
) -> None:
    loaded = open_case(HERE / case)
    assert (loaded.reads, loaded.writes, loaded.expected_l0) == (reads, writes, expected_l0)


def test_a_transcoder_of_another_width_is_read_with_both() -> None:
    coder = open_case(HERE / "saelens" / "transcoder").coder
    assert (coder.d_in, coder.d_out) == (8, 12)


@pytest.mark.slow
@pytest.mark.parametrize("package", sorted(CASES))
def test_the_packages_still_write_what_is_committed(package: str) -> None:
    """In an environment of the package's own, which ``AUTOINTERP_ORACLE_<package>`` names."""
    python = os.environ.get(f"AUTOINTERP_ORACLE_{package}")
    if python is None:
        pytest.skip(f"no environment with {package}; see write_oracles.py")
    script = Path(__file__).parent / "write_oracles.py"
    command = [python, str(script), package, "--check"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert checked.returncode == 0, checked.stderr


def test_versions_are_recorded() -> None:
    for package in CASES:
        versions = json.loads((HERE / package / "versions.json").read_text())
        assert all(versions.values())
        assert len(versions) == 2
