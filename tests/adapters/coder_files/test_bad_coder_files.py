"""What cannot be the coder that its files claim is one error: file, tensor, shapes, remedy."""

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from format_builders import (
    arrays,
    inputs,
    load,
    openai_state,
    write_json,
    write_npz,
    write_pt,
    write_safetensors,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from write_oracles import HERE

from autointerp_dagster import load_sparse_coder
from autointerp_dagster.adapters.coder_files import open_coder
from autointerp_dagster.adapters.coder_files.checking import Wanted, checked_tensors
from autointerp_dagster.adapters.coder_files.weights import read_weights
from autointerp_dagster.core.config import FileCoderConfig
from autointerp_dagster.core.errors import CoderError

Change = Callable[[dict[str, Tensor]], None]

SAMPLES = {
    "sparsify/topk": ("layers.3/sae.safetensors", "layers.3", "encoder.weight", [24, 8]),
    "saelens/standard": ("sae_weights.safetensors", "h.3", "W_enc", [8, 24]),
    "saelens/gated": ("sae_weights.safetensors", "h.3", "W_dec", [24, 8]),
    "saelens/jumprelu_skip_transcoder": ("sae_weights.safetensors", "h.3.mlp", "W_skip", [12, 8]),
    "dictionary_learning/AutoEncoder": ("ae.pt", "layers.3", "decoder.weight", [8, 24]),
    "dictionary_learning/JumpReluAutoEncoder": ("ae.pt", "layers.3", "W_enc", [8, 24]),
}
"""A coder's weights, hookpoint, one of its matrices and its shape."""
MODEL_TYPES = {"sparsify": "llama", "saelens": "gpt2", "dictionary_learning": "gpt_neox"}


def changed(case: str, folder: Path, change: Change) -> str:
    """The message for a copy of an oracle's checkpoint whose tensors were changed."""
    file, hookpoint, _, _ = SAMPLES[case]
    shutil.copytree(HERE / case, folder)
    weights = folder / file
    is_torch = weights.suffix == ".pt"
    tensors = torch.load(weights, weights_only=True) if is_torch else load_file(weights)
    change(tensors)
    if is_torch:
        torch.save(tensors, weights)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights)
    model_type = MODEL_TYPES[case.split("/")[0]]
    with pytest.raises(CoderError) as caught:
        open_coder(FileCoderConfig(path=folder), hookpoint, lambda: model_type)
    message = str(caught.value)
    assert message.startswith(f"{folder}/{file}: ")
    assert "In the study, " in message
    return message


@pytest.mark.parametrize("case", SAMPLES)
def test_a_transposed_matrix_is_told_by_its_shape(case: str, tmp_path: Path) -> None:
    _, _, name, shape = SAMPLES[case]

    def turn(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].T.contiguous()

    message = changed(case, tmp_path / "coder", turn)
    assert f"tensor {name} has shape {shape[::-1]}, wanted {shape}" in message
    assert "it is transposed" in message
    assert message.count("has shape") == 1  # it is the only one that is wrong


@pytest.mark.parametrize("case", SAMPLES)
def test_values_that_are_not_finite_are_counted(case: str, tmp_path: Path) -> None:
    name = SAMPLES[case][2]

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].contiguous()
        tensors[name].view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])

    message = changed(case, tmp_path / "coder", spoil)
    assert f"tensor {name} (torch.float32) has 3 values that are not finite floats" in message


@pytest.mark.parametrize("case", SAMPLES)
def test_missing_and_unknown_tensors_are_named_together(case: str, tmp_path: Path) -> None:
    name = SAMPLES[case][2]

    def rename(tensors: dict[str, Tensor]) -> None:
        tensors["W_mystery"] = tensors.pop(name)

    message = changed(case, tmp_path / "coder", rename)
    assert f"missing tensors ['{name}']; unknown tensors ['W_mystery']" in message


@pytest.mark.parametrize("case", SAMPLES)
def test_a_width_that_the_settings_deny_is_an_error(case: str, tmp_path: Path) -> None:
    def widen(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if 24 in tensor.shape:
                axis = list(tensor.shape).index(24)
                tensors[name] = torch.cat([tensor, tensor], dim=axis)

    message = changed(case, tmp_path / "coder", widen)
    assert "48" in message
    assert "wanted" in message
    assert "24" in message


def test_an_npz_that_disagrees_with_itself_is_an_error(tmp_path: Path) -> None:
    root = tmp_path / "gemma-scope-2b-pt-res"
    file = root / "layer_3/width_16k/average_l0_70/params.npz"
    of = arrays(0)
    write_npz(file, of | {"W_enc": of["W_enc"].T})
    with pytest.raises(
        CoderError, match=r"W_enc has shape \[24, 8\], wanted \[8, 24\].*transposed"
    ) as e:
        load(root, "layers.3")
    assert str(e.value).startswith(f"{file}: ")
    write_npz(file, of | {"threshold": of["threshold"][:-1]})
    with pytest.raises(CoderError, match=r"has shape \[2[34]\]"):
        load(root, "layers.3")
    write_npz(file, {"W_enc": of["W_enc"]})
    with pytest.raises(
        CoderError, match=r"missing tensors \['W_dec', 'b_dec', 'b_enc', 'threshold'\]"
    ):
        load(root, "layers.3")


def test_arrays_of_python_objects_are_not_unpickled(tmp_path: Path) -> None:
    root = tmp_path / "gemma-scope-2b-pt-res"
    file = root / "layer_3/width_16k/average_l0_70/params.npz"
    write_npz(file, {"W_enc": np.array([{"a": 1}], dtype=object)})
    with pytest.raises(CoderError, match=r"params\.npz: unreadable \(ValueError: Object arrays"):
        load(root, "layers.3")


DAMAGED = {
    "an interrupted download": b"",
    "a page of a login": b"<!DOCTYPE html>",
    "text": b"hello",
    "a zip of something else": b"PK\x05\x06" + bytes(18),
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
}


@pytest.mark.parametrize("what", DAMAGED)
@pytest.mark.parametrize("suffix", [".pt", ".npz", ".safetensors"])
def test_whatever_lies_in_place_of_a_file_is_one_error(
    tmp_path: Path, suffix: str, what: str
) -> None:
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(DAMAGED[what])
    with pytest.raises(CoderError, match=r"^the coder's: (unreadable|holds|missing)") as caught:
        checked_tensors(read_weights(file, "the coder's"), Wanted({"W": ("a",)}), {})
    assert ("git lfs pull" in str(caught.value)) == (what == "a pointer")
    assert len(str(caught.value).splitlines()) == 1


def test_bytes_that_cannot_be_inflated_are_no_crash(tmp_path: Path) -> None:
    whole = io.BytesIO()
    np.savez_compressed(whole, W_enc=np.ones((30, 40), np.float32))
    content = bytearray(whole.getvalue())
    first = content.index(b"W_enc.npy") + 24
    content[first : first + 6] = bytes(255 - byte for byte in content[first : first + 6])
    (tmp_path / "params.npz").write_bytes(content)
    with pytest.raises(CoderError, match=r"unreadable \(error: Error -3 while decompressing"):
        read_weights(tmp_path / "params.npz", "params.npz")


def test_parameters_are_read_as_the_tensors_that_they_are(tmp_path: Path) -> None:
    state = openai_state(arrays(0), activation="ReLU")
    trained = {
        name: torch.nn.Parameter(torch.tensor(of)) if isinstance(of, np.ndarray) else of
        for name, of in state.items()
    }
    write_pt(tmp_path / "state" / "3.pt", state)
    write_pt(tmp_path / "parameters" / "3.pt", trained)
    x = torch.from_numpy(inputs(1))
    one, other = (load(tmp_path / name, "h.3", "gpt2") for name in ("state", "parameters"))
    assert torch.equal(one.coder.encode(x).value, other.coder.encode(x).value)
    assert one.identity == other.identity


class Payload:
    """What a pickle that runs code looks like."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (os.environ["AUTOINTERP_TEST_PAYLOAD"],)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harm = tmp_path / "harm"
    monkeypatch.setenv("AUTOINTERP_TEST_PAYLOAD", str(harm))
    write_pt(
        tmp_path / "resid_post_mlp_v5_32k" / "autoencoders" / "3.pt", {"activation": Payload()}
    )
    with pytest.raises(CoderError, match=r"3\.pt: holds more than tensors .* can run code"):
        load(tmp_path, "h.3", "gpt2")
    assert not harm.exists()
    (tmp_path / "resid_post_mlp_v5_32k" / "autoencoders" / "3.pt").write_bytes(b"PK\x03\x04broken")
    with pytest.raises(CoderError, match=r"3\.pt: (unreadable|holds more)"):
        load(tmp_path, "h.3", "gpt2")


def sae_copy(folder: Path, case: str = "standard", **changes: object) -> Path:
    shutil.copytree(HERE / "saelens" / case, folder)
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("standard", {"architecture": "quantum"}, "architecture is 'quantum', wanted one of stand"),
        ("standard", {"normalize_activations": "batch"}, "normalize_activations is 'batch'"),
        ("standard", {"dtype": "int8"}, "dtype is 'int8', wanted one of float32"),
        ("standard", {"d_in": 0}, r"cfg\.json: d_in: .*greater than or equal to 1"),
        ("standard", {"d_sae": "many"}, r"cfg\.json: d_sae: .*integer"),
        ("topk", {"k": None}, "topk with k None, wanted a whole number"),
        ("topk", {"k": 25}, r"sae_weights\.safetensors: TopK: k is 25, wanted 1 to 24"),
        ("transcoder", {"apply_b_dec_to_input": True}, "a transcoder with apply_b_dec_to_input"),
        (
            "transcoder",
            {"normalize_activations": "layer_norm"},
            "a transcoder with normalize_activations 'layer_norm' is not supported",
        ),
        (
            "standard",
            {"metadata": {"hook_name": "blocks.3.attn.hook_z", "hook_head_index": 2,
                          "sae_lens_version": "6.0.0"}},
            "hook_head_index 2 is not supported: it reads one head",
        ),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_here_are_refused_by_name(
    tmp_path: Path, case: str, changes: dict[str, object], message: str
) -> None:
    folder = sae_copy(tmp_path / "sae", case, **changes)
    with pytest.raises(CoderError, match=message):
        load(folder, "h.3.mlp" if "transcoder" in case else "h.3", "gpt2")


def test_an_activation_from_before_6_that_is_not_linear_is_refused(tmp_path: Path) -> None:
    folder = sae_copy(tmp_path / "sae", "old_standard", activation_fn_str="tanh-relu")
    with pytest.raises(
        CoderError, match="architecture is 'standard with tanh-relu', wanted one of"
    ):
        load(folder, "h.3", "gpt2")


def test_saelens_folding_and_scaling_are_noted(tmp_path: Path) -> None:
    kwargs = {"fold_ln": True, "center_writing_weights": True, "device": "cuda"}
    metadata = {
        "hook_name": "blocks.3.hook_resid_pre",
        "sae_lens_version": "6.1.0",
        "model_from_pretrained_kwargs": kwargs,
    }
    folder = sae_copy(tmp_path / "a", "standard_expected_average_only_in", metadata=metadata)
    loaded = load(folder, "h.3.input", "gpt2")
    assert "fold_ln, center_writing_weights" in loaded.notes[0]
    assert "taken as folded into the weights" in loaded.notes[1]
    assert load(HERE / "saelens" / "standard", "h.3", "gpt2").notes == ()
    untold = load(HERE / "saelens" / "old_standard", "h.3", "gpt2")
    assert "does not say how TransformerLens loaded the model" in untold.notes[0]
    plain: dict[str, object] = {"model_from_pretrained_kwargs": {"center_writing_weights": False}}
    told = sae_copy(tmp_path / "b", "old_standard", **plain)
    assert load(told, "h.3", "gpt2").notes == ()
    assert load(told, "h.3", "gpt2").identity == untold.identity


def test_finetuned_scales_multiply_the_decoder_only_where_they_are_declared(tmp_path: Path) -> None:
    plain = load(HERE / "saelens" / "old_standard", "h.3", "gpt2").coder
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    factors = torch.linspace(0.5, 2.0, 24)
    for declared, factor in ((True, factors), (False, torch.ones(24)), (False, factors)):
        name = f"{declared}{float(factor[0])}"
        folder = sae_copy(tmp_path / name, "old_standard", finetuning_scaling_factor=declared)
        weights = folder / "sae_weights.safetensors"
        save_file(load_file(weights) | {"scaling_factor": factor}, weights)
        if declared or bool((factor == 1).all()):
            found = load(folder, "h.3", "gpt2").coder
            assert torch.equal(found.encode_dense(x), plain.encode_dense(x))
            wanted = plain.decoder_rows(range(24)) * factor[:, None]
            torch.testing.assert_close(found.decoder_rows(range(24)), wanted)
        else:
            with pytest.raises(CoderError, match="scaling_factor is not all ones"):
                load(folder, "h.3", "gpt2")


def test_a_number_of_active_latents_that_differs_from_the_settings_is_an_error(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "coder"
    shutil.copytree(HERE / "dictionary_learning" / "AutoEncoderTopK", folder)
    config = json.loads((folder / "config.json").read_text())
    config["trainer"]["k"] = 9
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CoderError, match=r"ae\.pt: k is 4, config\.json says 9"):
        load(folder, "layers.3", "gpt_neox")


def test_a_folder_of_many_coders_needs_a_hookpoint(tiny_sparsify_dir: Path) -> None:
    with pytest.raises(CoderError, match=r"2 coders for any hookpoint: layers\.0, layers\.1\."):
        load_sparse_coder(tiny_sparsify_dir)
    coder = load_sparse_coder(tiny_sparsify_dir, "layers.1")
    assert (coder.num_latents, coder.d_in) == (64, 16)
    x = torch.ones(2, 16)
    assert coder.encode_dense(x).shape == (2, 64)
    alone = load_sparse_coder(str(tiny_sparsify_dir / "layers.1"))
    assert torch.equal(alone.encode_dense(x), coder.encode_dense(x))


def test_a_folder_without_any_coder_says_what_it_saw(tmp_path: Path) -> None:
    write_json(tmp_path / "notes" / "readme.json", {})
    write_safetensors(tmp_path / "model.safetensors", {"w": torch.zeros(1)})
    with pytest.raises(CoderError) as caught:
        load_sparse_coder(tmp_path)
    message = str(caught.value)
    assert "Files: model.safetensors, notes/readme.json." in message
    assert "saelens: cfg.json with sae_weights.safetensors" in message
    with pytest.raises(CoderError, match="revision 'main', but this is a path"):
        load_sparse_coder(tmp_path, revision="main")
    with pytest.raises(CoderError, match="no such folder or file"):
        load_sparse_coder(tmp_path / "nowhere")


def test_a_format_that_is_named_is_the_only_one_looked_for(tmp_path: Path) -> None:
    shutil.copytree(HERE / "saelens" / "standard", tmp_path / "sae")
    with pytest.raises(CoderError, match=r"no coder here\. .*Wanted \(openai: "):
        load_sparse_coder(tmp_path / "sae", format="openai")
    assert load_sparse_coder(tmp_path / "sae", format="saelens").num_latents == 24


def test_a_site_is_asked_for_by_either_name(tmp_path: Path) -> None:
    folder = HERE / "saelens" / "standard"
    by_site = load_sparse_coder(folder, "blocks.3.hook_resid_post")
    by_module = load_sparse_coder(folder, "h.3", model_type="gpt2")
    assert torch.equal(by_site.decoder_rows([0]), by_module.decoder_rows([0]))
    with pytest.raises(CoderError, match=r"There are coders of: blocks\.3\.hook_resid_post"):
        load_sparse_coder(folder, "h.3")  # without the model's type nobody knows that they are one


def test_the_public_name_is_the_only_one() -> None:
    import autointerp_dagster

    with pytest.raises(AttributeError, match="no attribute 'load_coder'"):
        autointerp_dagster.load_coder  # noqa: B018
