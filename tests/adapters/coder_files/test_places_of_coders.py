"""Where a coder reads and writes: what the files say, what the study says, and what follows."""

from pathlib import Path

import pytest
from format_builders import (
    D_IN,
    N_LATENTS,
    arrays,
    circuit_state,
    load,
    openai_state,
    write_json,
    write_npz,
    write_pt,
    write_safetensors,
    write_yaml,
)

from autointerp_dagster.adapters.coder_files import published_l0
from autointerp_dagster.core.config import FileCoderConfig
from autointerp_dagster.core.errors import CoderError

MLP = ("layers.3.mlp.input", "layers.3.mlp")


def write_circuit(folder: Path, **settings: str) -> Path:
    if settings:
        write_yaml(folder / "config.yaml", {"model_kind": "transcoder_set", **settings})
    write_safetensors(folder / "layer_3.safetensors", circuit_state(arrays(0)))
    return folder


def write_sparsify(folder: Path, **changes: object) -> None:
    of = arrays(0)
    config = {"d_in": D_IN, "num_latents": N_LATENTS, "k": 4, "transcode": False, **changes}
    write_json(folder / "cfg.json", config)
    tensors = {"encoder.weight": of["W_enc"].T, "encoder.bias": of["b_enc"]}
    write_safetensors(
        folder / "sae.safetensors", {**tensors, "W_dec": of["W_dec"], "b_dec": of["b_dec"]}
    )


def write_dictionary(folder: Path, io: str) -> Path:
    about = {"dict_class": "JumpReluAutoEncoder", "activation_dim": D_IN, "dict_size": N_LATENTS}
    write_json(folder / "config.json", {"trainer": about, "buffer": {"io": io}})
    write_pt(folder / "ae.pt", arrays(0))
    return folder


@pytest.mark.parametrize("asked", [*MLP, "blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out"])
def test_a_transcoder_that_only_the_study_places_is_asked_for_by_either_side(
    tmp_path: Path, asked: str
) -> None:
    loaded = load(write_circuit(tmp_path), asked, "llama")
    assert (loaded.reads, loaded.writes) == MLP


@pytest.mark.parametrize("settings", [{}, {"feature_input_hook": "hook_mlp_in"}])
@pytest.mark.parametrize("reads", ["layers.3.mlp.input", "layers.{layer}.mlp.input"])
def test_a_transcoder_writes_as_before_where_the_study_says_only_what_it_reads(
    tmp_path: Path, settings: dict[str, str], reads: str
) -> None:
    output = {"feature_output_hook": "mlp.hook_out"} if settings else {}
    folder = write_circuit(tmp_path / "circuit", **settings, **output)
    loaded = load(folder, "layers.3.mlp", "llama", reads=reads)
    assert (loaded.reads, loaded.writes) == MLP
    write_sparsify(tmp_path / "sparsify" / "layers.3.mlp", transcode=True)
    loaded = load(tmp_path / "sparsify", "layers.3.mlp", "llama", reads=reads)
    assert (loaded.reads, loaded.writes) == MLP


def test_a_transcoder_of_which_nobody_says_where_it_writes_is_refused(tmp_path: Path) -> None:
    norm = "layers.3.post_attention_layernorm.normalized"
    with pytest.raises(
        CoderError, match=r"layer_3\.safetensors: a transcoder that reads .* write reads and writes"
    ):
        load(write_circuit(tmp_path), norm, "llama")
    said = load(tmp_path, norm, "llama", reads=norm, writes="layers.3.mlp")
    assert (said.reads, said.writes) == (norm, "layers.3.mlp")


def test_a_coder_of_inputs_reads_the_input_of_the_module_that_the_study_names(
    tmp_path: Path,
) -> None:
    inputs = write_dictionary(tmp_path / "in", "in")
    transcoder = write_dictionary(tmp_path / "in_and_out", "in_and_out")
    outputs = write_dictionary(tmp_path / "out", "out")
    for asked in MLP:
        loaded = load(inputs, asked, "gpt_neox")
        assert (loaded.reads, loaded.writes) == ("layers.3.mlp.input", "layers.3.mlp.input")
        assert "autoencoder" in loaded.about
        loaded = load(transcoder, asked, "gpt_neox")
        assert (loaded.reads, loaded.writes) == MLP
        assert load(outputs, asked, "gpt_neox").reads == asked
    write_dictionary(tmp_path / "both", "both")
    with pytest.raises(CoderError, match=r"config\.json: buffer\.io: .*'in_and_out'"):
        load(tmp_path / "both", "layers.3.mlp", "gpt_neox")


def test_in_the_middle_of_a_layer_it_writes_the_same_whoever_says_where_it_is(
    tmp_path: Path,
) -> None:
    """The residual stream goes past the norm that reads it: see ``hookpoints.writes_of``."""
    state = openai_state(arrays(0), activation="ReLU")
    write_pt(tmp_path / "resid_post_attn_v5_32k" / "autoencoders" / "3.pt", state)
    write_pt(tmp_path / "bare" / "3.pt", state)
    by_files = load(tmp_path / "resid_post_attn_v5_32k", "h.3.ln_2.input", "gpt2")
    by_study = load(tmp_path / "bare", "h.3.ln_2.input", "gpt2")
    assert (by_files.reads, by_files.writes) == ("h.3.ln_2.input", "h.3.attn")
    assert (by_study.reads, by_study.writes) == ("h.3.ln_2.input", "h.3.attn")


def test_the_study_s_word_counts_more_than_the_name_of_a_folder(tmp_path: Path) -> None:
    write_sparsify(tmp_path / "saes" / "first_try")
    with pytest.raises(CoderError, match=r"coders of: first_try\. .*say where it reads \(reads\)"):
        load(tmp_path / "saes", "layers.5", "llama")
    assert load(tmp_path / "saes", "layers.5", "llama", reads="layers.5").reads == "layers.5"
    write_sparsify(tmp_path / "mlps" / "layers.5.mlp")
    write_sparsify(tmp_path / "mlps" / "layers.6.mlp")
    for layer in (5, 6):  # its number is in the folder's name
        asked = f"layers.{layer}.mlp"
        moved = load(tmp_path / "mlps", asked, "llama", reads="layers.{layer}.mlp.up_proj")
        assert moved.reads == f"layers.{layer}.mlp.up_proj"


def test_a_number_that_is_no_layer_s_hides_no_coder(tmp_path: Path) -> None:
    write_dictionary(tmp_path / "pythia-h100-16x" / "trainer_0", "out")
    assert load(tmp_path, "layers.3", "gpt_neox").reads == "layers.3"


@pytest.mark.parametrize("path", ["", "layers.3.mlp", "layers.3.mlp/sae.safetensors"])
def test_an_old_run_s_settings_count_however_its_coder_is_named(tmp_path: Path, path: str) -> None:
    """Until February 2025 the run alone said that its coders were transcoders."""
    write_sparsify(tmp_path / "layers.3.mlp", transcode=None)
    write_json(tmp_path / "config.json", {"transcode": True})
    loaded = load(tmp_path / path, "layers.3.mlp", "llama")
    assert (loaded.reads, loaded.writes) == MLP


def test_an_autoencoder_whose_settings_name_both_sides_is_none_that_goes_from_one_to_the_other(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "resid_post" / "layer_3_width_16k_l0_small"
    lower = {name.replace("W_", "w_"): array for name, array in arrays(0).items()}
    write_safetensors(folder / "params.safetensors", lower)
    place = "model.layers.3.output"
    write_json(folder / "config.json", {"hf_hook_point_in": place, "hf_hook_point_out": place})
    loaded = load(tmp_path, "layers.3", "gemma3_text")
    assert (loaded.reads, loaded.writes) == ("layers.3", "layers.3")
    assert "Threshold autoencoder of 24 latents, layers.3 (" in loaded.about


def test_a_published_l0_is_known_without_the_tensors_and_makes_no_coder_another(
    tmp_path: Path,
) -> None:
    for l0 in (22, 70):
        root = tmp_path / str(l0) / "gemma-scope-2b-pt-res"
        write_npz(root / f"layer_3/width_16k/average_l0_{l0}/params.npz", arrays(0))
    first, other = (tmp_path / name / "gemma-scope-2b-pt-res" for name in ("22", "70"))
    assert load(first, "layers.3").identity == load(other, "layers.3").identity
    assert load(other, "layers.3").expected_l0 == 70
    (file,) = other.rglob("params.npz")
    file.write_bytes(b"")
    assert published_l0(FileCoderConfig(path=other), "layers.3") == 70
