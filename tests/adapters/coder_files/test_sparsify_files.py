"""Coders in sparsify's format are read as they are, and what does not fit is refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from autointerp_dagster.adapters.coder_files import (
    LoadedCoder,
    check_fits,
    coder_identity,
    discover_hookpoints,
    open_coder,
)
from autointerp_dagster.adapters.subject_models import open_subject_model
from autointerp_dagster.core.config import FileCoderConfig, SubjectModelConfig
from autointerp_dagster.core.errors import CoderError, ModelError
from autointerp_dagster.core.types import LayerKey

HOOKPOINT = "layers.0"


def load(folder: Path, hookpoint: str = HOOKPOINT) -> LoadedCoder:
    return open_coder(FileCoderConfig(path=folder), hookpoint)


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
    loaded = load(tiny_sparsify_dir)
    coder = loaded.coder
    assert (loaded.reads, loaded.writes, loaded.expected_l0) == (HOOKPOINT, HOOKPOINT, 4)
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
    assert (coder.num_latents, coder.d_in, coder.d_out) == (64, 16, 16)
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
    assert coder_identity(FileCoderConfig(path=copied_dir), HOOKPOINT) == identity
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
    plain = FileCoderConfig(path=tiny_sparsify_dir)
    told = FileCoderConfig(path=tiny_sparsify_dir, screen="bfloat16", compiled=True)
    coder = open_coder(told, HOOKPOINT).coder
    assert coder.describe()["screen"] == "bfloat16"
    assert coder.computing.compiled
    assert open_coder(plain, HOOKPOINT).coder.describe()["screen"] == "float32"  # it is small
    assert told.identity() == plain.identity()
    assert open_coder(told, HOOKPOINT).identity == open_coder(plain, HOOKPOINT).identity


def test_the_precision_of_the_product_is_part_of_what_a_coder_is(tiny_sparsify_dir: Path) -> None:
    plain = FileCoderConfig(path=tiny_sparsify_dir)
    fast = FileCoderConfig(path=tiny_sparsify_dir, precision="bfloat16", compiled=True)
    loaded = open_coder(fast, HOOKPOINT)
    assert loaded.identity != open_coder(plain, HOOKPOINT).identity
    assert loaded.identity == coder_identity(fast, HOOKPOINT)
    elsewhere = loaded.coder.to(torch.device("meta")).describe()  # any device but a CPU
    assert (elsewhere["precision"], elsewhere["compiled"]) == ("bfloat16", True)
    assert "compiled" not in loaded.coder.describe()


def test_hookpoints_are_found_in_natural_order(tmp_path: Path) -> None:
    for name in ("layers.10", "layers.9", "embed_tokens", "layers.9.mlp", "logs"):
        (tmp_path / name).mkdir()
        if name != "logs":
            (tmp_path / name / "cfg.json").write_text("{}")
    seeds = tmp_path / "layers.11" / "seed1"
    best = tmp_path / "best" / "layers.9" / "layers.9"
    for folder in (seeds, best):
        folder.mkdir(parents=True)
        (folder / "cfg.json").write_text("{}")
    found = discover_hookpoints(FileCoderConfig(path=tmp_path))
    assert found == ["embed_tokens", "layers.9", "layers.9.mlp", "layers.10", "layers.11"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"activation": "relu"}, "activation is 'relu', wanted one of topk, groupmax"),
        ({"activation": "groupmax", "k": 5}, "groupmax with k 5 of 64 latents, wanted a divisor"),
        ({"signed": True}, "signed is not supported: its activations may be negative"),
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


def encoded(loaded: LoadedCoder, x: Tensor) -> Tensor:
    return loaded.coder.encode_dense(x)


@pytest.mark.parametrize("where", ["cfg.json", "config.json", "sae in config.json"])
def test_transcoders_of_old_runs_read_the_input_and_take_b_dec_off_it(
    copied_dir: Path, where: str
) -> None:
    """Until February 2025 ``transcode`` was said by the run, or skip_connection meant it."""
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
    as_autoencoder = encoded(load(copied_dir), x)
    changes: dict[str, object] = {}
    if where == "config.json":
        (copied_dir / "config.json").write_text('{"transcode": true}')
    elif where == "sae in config.json":
        (copied_dir / "config.json").write_text('{"sae": {"transcode": true}}')
    else:
        changes = {"skip_connection": True}
    file = copied_dir / HOOKPOINT / "cfg.json"
    config = {k: v for k, v in json.loads(file.read_text()).items() if k != "transcode"}
    file.write_text(json.dumps(config))
    tensors = {"W_skip": torch.eye(16)} if changes else {}
    change(copied_dir, changes, **tensors)
    loaded = load(copied_dir)
    assert (loaded.reads, loaded.writes) == ("layers.0.input", "layers.0")
    assert torch.equal(encoded(loaded, x), as_autoencoder)
    if changes:
        nothing = loaded.coder.encode(x)._replace(
            token=torch.zeros(0, dtype=torch.int64),
            latent=torch.zeros(0, dtype=torch.int64),
            value=torch.zeros(0),
        )
        b_dec = tensor_of(copied_dir, "b_dec")
        torch.testing.assert_close(loaded.coder.decode(nothing, x), x + b_dec)


def test_what_a_coder_says_itself_outweighs_its_run(copied_dir: Path) -> None:
    (copied_dir / "config.json").write_text('{"transcode": true}')
    assert load(copied_dir).reads == "layers.0"  # its cfg.json says transcode: false


def test_coders_of_one_folder_differ_in_kind_place_and_width(copied_dir: Path) -> None:
    """Defect 15 of the reference: one transcode flag and one width for all hookpoints."""
    wide = copied_dir / "layers.1.mlp"
    wide.mkdir()
    config = {"d_in": 12, "num_latents": 20, "k": 2, "transcode": True, "skip_connection": True}
    (wide / "cfg.json").write_text(json.dumps(config))
    sizes = {"encoder.weight": (20, 12), "W_dec": (20, 12), "b_dec": (12,), "W_skip": (12, 12)}
    tensors = {name: torch.randn(*size) for name, size in sizes.items()}
    save_file(tensors | {"encoder.bias": torch.zeros(20)}, wide / "sae.safetensors")
    plain, transcoder = load(copied_dir), load(copied_dir, "layers.1.mlp")
    assert (plain.reads, plain.writes) == ("layers.0", "layers.0")
    assert (plain.coder.d_in, plain.coder.num_latents) == (16, 64)
    assert (transcoder.reads, transcoder.writes) == ("layers.1.mlp.input", "layers.1.mlp")
    assert (transcoder.coder.d_in, transcoder.coder.num_latents) == (12, 20)
    x = torch.zeros(1, 12)  # b_dec is in output space: nothing is taken off the input
    assert torch.equal(encoded(transcoder, x), torch.zeros(1, 20))
    assert load(copied_dir, "layers.1.mlp.input").identity == transcoder.identity


def test_a_seed_is_chosen_by_select(copied_dir: Path) -> None:
    for seed in (0, 1):
        target = copied_dir / "layers.2" / f"seed{seed}"
        shutil.copytree(copied_dir / HOOKPOINT, target)
        config = json.loads((target / "cfg.json").read_text())
        (target / "cfg.json").write_text(json.dumps(config | {"k": seed + 1}))
    with pytest.raises(
        CoderError, match=r"2 coders for layers\.2: layers\.2/seed0, .*seed1.*select"
    ):
        load(copied_dir, "layers.2")
    chosen = open_coder(FileCoderConfig(path=copied_dir, select="seed1"), "layers.2")
    assert (chosen.reads, chosen.expected_l0) == ("layers.2", 2)
    assert load(copied_dir, "layers.2/seed1").identity == chosen.identity


def test_the_best_checkpoint_is_taken_where_there_is_no_other(copied_dir: Path) -> None:
    best = copied_dir / "best" / HOOKPOINT / HOOKPOINT
    shutil.copytree(copied_dir / HOOKPOINT, best)
    config = json.loads((best / "cfg.json").read_text())
    (best / "cfg.json").write_text(json.dumps(config | {"k": 3}))
    assert load(copied_dir).expected_l0 == 4
    chosen = open_coder(FileCoderConfig(path=copied_dir, select="best"), HOOKPOINT)
    assert chosen.expected_l0 == 3
    shutil.rmtree(copied_dir / HOOKPOINT)
    assert load(copied_dir).identity == chosen.identity


def test_a_single_coder_s_folder_is_named_after_its_hookpoint(
    copied_dir: Path, tmp_path: Path
) -> None:
    alone = copied_dir / HOOKPOINT
    identity = load(copied_dir).identity
    assert load(alone).identity == identity
    with pytest.raises(
        CoderError, match=r"no coder of 'layers\.5'\. There are coders of: layers\.0"
    ):
        load(alone, "layers.5")
    renamed = tmp_path / "mine"
    shutil.copytree(alone, renamed)
    assert load(renamed, "layers.5").reads == "layers.5"  # nothing says otherwise
    assert load(renamed).identity == identity
    assert load(renamed, "layers.5").identity != identity  # another place


def test_the_study_can_say_where_a_coder_reads(tiny_sparsify_dir: Path) -> None:
    config = FileCoderConfig(path=tiny_sparsify_dir, reads="layers.2.input", writes="layers.2")
    loaded = open_coder(config, HOOKPOINT)
    assert (loaded.reads, loaded.writes) == ("layers.2.input", "layers.2")


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
    with pytest.raises(CoderError, match=r"no coder of 'layers\.2'.*: layers\.0, layers\.1\."):
        load(copied_dir, "layers.2")
    (copied_dir / HOOKPOINT / "sae.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(CoderError, match=r"sae\.safetensors: unreadable"):
        load(copied_dir)
    (copied_dir / HOOKPOINT / "sae.safetensors").unlink()
    with pytest.raises(CoderError, match=r"sae\.safetensors: no such file"):
        load(copied_dir)
    (copied_dir / HOOKPOINT / "cfg.json").write_text("{")
    with pytest.raises(CoderError, match=r"cfg\.json: no JSON"):
        load(copied_dir)
    (copied_dir / HOOKPOINT / "cfg.json").unlink()
    shutil.copyfile(
        copied_dir / "layers.1" / "sae.safetensors", copied_dir / HOOKPOINT / "sae.safetensors"
    )
    with pytest.raises(CoderError, match=r"cfg\.json: no such file"):
        load(copied_dir)
    with pytest.raises(CoderError, match="nowhere: no such folder"):
        discover_hookpoints(FileCoderConfig(path=copied_dir / "nowhere"))
    (copied_dir / "empty").mkdir()
    with pytest.raises(
        CoderError, match=r"empty: no coder here\. Files: none\. Wanted .*sparsify: "
    ):
        discover_hookpoints(FileCoderConfig(path=copied_dir / "empty"))


def test_a_coder_must_fit_its_hookpoint_and_the_grid(
    tiny_subject_model_dir: Path, tiny_sparsify_dir: Path
) -> None:
    subject_model = open_subject_model(
        SubjectModelConfig(source=str(tiny_subject_model_dir), dtype="float32", device="cpu")
    )
    loaded = load(tiny_sparsify_dir)
    check_fits(loaded, subject_model, LayerKey("sae", "layers.2"), max_num_latents=64)

    def placed(reads: str, writes: str) -> LoadedCoder:
        config = FileCoderConfig(path=tiny_sparsify_dir, reads=reads, writes=writes)
        return open_coder(config, HOOKPOINT)

    layer = LayerKey("sae", HOOKPOINT)
    wide = "layers.0.mlp.up_proj"
    with pytest.raises(CoderError, match=r"d_in is 16.*'layers\.0\.mlp\.up_proj' have width 32"):
        check_fits(placed(wide, "layers.0"), subject_model, layer)
    with pytest.raises(CoderError, match=r"d_out is 16.*'layers\.0\.mlp\.up_proj' have width 32"):
        check_fits(placed("layers.0.mlp.input", wide), subject_model, layer)
    with pytest.raises(ModelError, match=r"'layers\.7'"):
        check_fits(placed("layers.7", "layers.7"), subject_model, layer)
    with pytest.raises(CoderError, match=r"64 latents.*cover 63.*Raise max_num_latents"):
        check_fits(loaded, subject_model, LayerKey("sae", "layers.0"), max_num_latents=63)
