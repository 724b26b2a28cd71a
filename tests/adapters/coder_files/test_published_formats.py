"""Formats without an installable package: files built to the format, and numpy's encode."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from format_builders import (
    D_IN,
    D_OUT,
    N_LATENTS,
    agrees,
    arrays,
    circuit_state,
    decodes,
    inputs,
    jump,
    largest,
    llama_state,
    load,
    openai_state,
    write_json,
    write_npz,
    write_pt,
    write_safetensors,
    write_yaml,
)

from autointerp_dagster.adapters.coder_files import discover_hookpoints, open_coder
from autointerp_dagster.core.config import FileCoderConfig
from autointerp_dagster.core.errors import CoderError, ModelError

NORM = "layers.3.pre_feedforward_layernorm"
POST_NORM = "layers.3.post_feedforward_layernorm"
L0 = "layer_3/width_16k/average_l0_70/params.npz"


@pytest.mark.parametrize(
    ("repository", "reads", "writes"),
    [
        ("gemma-scope-2b-pt-res", "layers.3", "layers.3"),
        ("gemma-scope-9b-it-res", "layers.3", "layers.3"),
        ("gemma-scope-2b-pt-mlp", POST_NORM, POST_NORM),
        ("gemma-scope-2b-pt-att", "layers.3.self_attn.o_proj.input", None),
        ("gemma-scope-2b-pt-transcoders", f"{NORM}.normalized", POST_NORM),
    ],
)
def test_gemma_scope_is_placed_by_its_repository_s_name(
    tmp_path: Path, repository: str, reads: str, writes: str | None
) -> None:
    of, x = arrays(0), inputs(1)
    write_npz(tmp_path / repository / L0, of)
    loaded = load(tmp_path / repository, reads, "gemma2")
    assert loaded.format == "gemma_scope"
    assert (loaded.reads, loaded.writes) == (reads, writes or reads)
    assert loaded.expected_l0 == 70
    assert "BOS" in loaded.notes[0]
    expected = jump(x @ of["W_enc"] + of["b_enc"], of["threshold"])
    agrees(loaded, x, expected)
    decodes(loaded, x, expected @ of["W_dec"] + of["b_dec"])


def test_gemma_scope_transcoders_are_asked_for_by_either_side(tmp_path: Path) -> None:
    write_npz(tmp_path / "gemma-scope-2b-pt-transcoders" / L0, arrays(0))
    one, other = (load(tmp_path, side, "gemma2") for side in (f"{NORM}.normalized", POST_NORM))
    assert one.identity == other.identity
    assert "Threshold transcoder of 24 latents" in one.about


def test_gemma_scope_s_coder_is_chosen_by_its_published_l0(tmp_path: Path) -> None:
    root = tmp_path / "gemma-scope-2b-pt-res"
    for l0 in (22, 70, 141):
        for layer in (3, 30):
            file = f"layer_{layer}/width_16k/average_l0_{l0}/params.npz"
            write_npz(root / file, arrays(l0))
    write_npz(root / "layer_3/width_65k/average_l0_70/params.npz", arrays(1))
    with pytest.raises(
        CoderError, match=r"4 coders for layers\.3: .*average_l0_22, .*select .* l0"
    ):
        load(root, "layers.3")
    with pytest.raises(CoderError, match="2 coders for layers"):
        load(root, "layers.3", l0=75)
    assert load(root, "layers.3", select="width_16k", l0=75).expected_l0 == 70
    assert load(root, "layers.3", select="layer_*/width_16k/average_l0_141").expected_l0 == 141
    assert load(root, "layers.3", select="width_65k").expected_l0 == 70
    with pytest.raises(CoderError, match="select 'width_1m' names none of the coders here"):
        load(root, "layers.3", select="width_1m")
    with pytest.raises(CoderError, match=r"no coder of 'layers\.4'"):
        load(root, "layers.4")
    assert discover_hookpoints(FileCoderConfig(path=root)) == ["layers.3", "layers.30"]


def test_gemma_scope_in_a_renamed_folder_needs_the_study_s_word(tmp_path: Path) -> None:
    write_npz(tmp_path / "mine" / L0, arrays(0))
    by_layer = load(tmp_path / "mine", POST_NORM, "gemma2")
    assert by_layer.reads == POST_NORM  # as the study's layer says
    with pytest.raises(CoderError, match=r"no coder of 'layers\.4'"):
        load(tmp_path / "mine", "layers.4")
    said = load(
        tmp_path / "mine", "layers.3", reads="layers.{layer}.mlp.input", writes="layers.{layer}"
    )
    assert (said.reads, said.writes) == ("layers.3.mlp.input", "layers.3")
    shutil.copytree(tmp_path / "mine" / "layer_3", tmp_path / "flat" / "first")
    with pytest.raises(CoderError, match=r"its layer is not known.*Write the layer's number"):
        load(tmp_path / "flat", "layers.3", reads="layers.{layer}")


def test_gemma_scope_s_embedding_coder_reads_embeddings_as_the_model_scales_them(
    tmp_path: Path,
) -> None:
    of, x = arrays(0), inputs(1)
    root = tmp_path / "gemma-scope-2b-pt-res"
    write_npz(root / "embedding/width_4k/average_l0_21/params.npz", of)
    loaded = load(root, "embed_tokens", "gemma2")
    scaled = x * D_IN**0.5
    expected = jump(x @ of["W_enc"] + of["b_enc"], of["threshold"])
    agrees(loaded, scaled, expected)
    decodes(loaded, scaled, expected @ of["W_dec"] * D_IN**0.5 + of["b_dec"])
    lower = {name.replace("W_", "w_"): array for name, array in of.items()}
    write_npz(root / "embedding/width_4k/average_l0_6/params.npz", lower)
    agrees(load(root, "embed_tokens", "gemma2", l0=6), scaled, expected)


def gemma_2_state(d_out: int = D_OUT, seed: int = 0) -> dict[str, np.ndarray]:
    return {name.replace("W_", "w_"): array for name, array in arrays(seed, D_IN, d_out).items()}


def test_gemma_scope_2_is_placed_by_its_settings(tmp_path: Path) -> None:
    of, x = arrays(0, D_IN, D_OUT), inputs(1)
    skip = np.random.default_rng(5).normal(size=(D_IN, D_OUT)).astype(np.float32)
    folder = tmp_path / "transcoder" / "layer_3_width_16k_l0_medium_affine"
    write_safetensors(
        folder / "params.safetensors", gemma_2_state() | {"affine_skip_connection": skip}
    )
    settings = {
        "architecture": "jump_relu",
        "model_name": "gemma-v3-4b-pt",
        "hf_hook_point_in": "model.layers.3.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.3.post_feedforward_layernorm.output",
        "affine_connection": True,
    }
    write_json(folder / "config.json", settings)
    loaded = load(tmp_path, NORM, "gemma3_text")
    assert (loaded.format, loaded.reads, loaded.writes) == ("gemma_scope_2", NORM, POST_NORM)
    expected = jump(x @ of["W_enc"] + of["b_enc"], of["threshold"])
    agrees(loaded, x, expected)
    decodes(loaded, x, expected @ of["W_dec"] + of["b_dec"] + x @ skip)
    wrapped = load(tmp_path, POST_NORM, "gemma3")
    assert wrapped.reads == f"language_model.{NORM}"
    write_json(folder / "config.json", settings | {"architecture": "topk"})
    with pytest.raises(CoderError, match=r"architecture is 'topk', wanted one of jump_relu"):
        load(tmp_path, NORM, "gemma3_text")


@pytest.mark.parametrize(
    ("site", "reads", "writes"),
    [
        ("resid_post", "layers.3", None),
        ("resid_post_all", "layers.3", None),
        ("attn_out", "layers.3.self_attn.o_proj.input", None),
        ("mlp_out", POST_NORM, None),
        ("transcoder", NORM, POST_NORM),
    ],
)
def test_gemma_scope_2_without_settings_is_placed_by_its_folder(
    tmp_path: Path, site: str, reads: str, writes: str | None
) -> None:
    for size in ("small", "medium"):
        file = tmp_path / site / f"layer_3_width_16k_l0_{size}" / "params.safetensors"
        write_safetensors(file, gemma_2_state(D_IN))
    loaded = load(tmp_path, reads, "gemma3_text", select="*_l0_small")
    assert (loaded.reads, loaded.writes) == (reads, writes or reads)


@pytest.mark.parametrize("kind", ["clt", "crosscoder"])
def test_gemma_scope_2_s_coders_of_many_layers_are_refused_by_name(
    tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / kind / "width_262k_l0_medium"
    write_safetensors(folder / "params_layer_3.safetensors", gemma_2_state())
    with pytest.raises(CoderError, match=f"{kind} is not supported: one latent reads or writes"):
        load(tmp_path, "layers.3")
    with pytest.raises(CoderError, match=f"{kind} is not supported"):
        discover_hookpoints(FileCoderConfig(path=tmp_path))
    fine = tmp_path / "resid_post" / "layer_3_width_16k_l0_small"
    write_safetensors(fine / "params.safetensors", gemma_2_state(D_IN))
    assert load(tmp_path, "layers.3").reads == "layers.3"  # what is beside it does not matter
    assert discover_hookpoints(FileCoderConfig(path=tmp_path)) == ["layers.3"]
    with pytest.raises(CoderError, match=rf"no coder of 'layers\.4'.*layers\.3\. .*{kind} is not"):
        load(tmp_path, "layers.4")


def layer_norm(x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(axis=1, keepdims=True)
    return centred / (centred.std(axis=1, ddof=1, keepdims=True) + 1e-5)


@pytest.mark.parametrize(
    ("location", "reads", "writes"),
    [
        ("resid_post_mlp_v5_32k", "h.3", "h.3"),
        ("resid_delta_mlp_v4", "h.3.mlp", "h.3.mlp"),
        ("resid_delta_attn_v5_128k", "h.3.attn", "h.3.attn"),
        ("resid_post_attn_v5_32k", "h.3.ln_2.input", "h.3.attn"),
        ("mlp_post_act", "h.3.mlp.c_proj.input", "h.3.mlp.c_proj.input"),
    ],
)
def test_openai_s_top_k_layer_norms_its_input(
    tmp_path: Path, location: str, reads: str, writes: str
) -> None:
    of, x = arrays(0), inputs(1)
    state = {"activation": "TopK", "activation_state_dict": {"k": 5, "postact_fn": "ReLU"}}
    write_pt(tmp_path / location / "autoencoders" / "3.pt", openai_state(of, **state))
    loaded = load(tmp_path, reads, "gpt2")
    assert (loaded.format, loaded.reads, loaded.writes) == ("openai", reads, writes)
    assert loaded.expected_l0 == 5
    pre = (layer_norm(x) - of["b_dec"]) @ of["W_enc"] + of["b_enc"]
    agrees(loaded, x, largest(pre, 5))
    std = (x - x.mean(axis=1, keepdims=True)).std(axis=1, ddof=1, keepdims=True)
    restored = (largest(pre, 5) @ of["W_dec"] + of["b_dec"]) * std + x.mean(axis=1, keepdims=True)
    decodes(loaded, x, restored)


def test_openai_s_relu_does_not_normalise(tmp_path: Path) -> None:
    of, x = arrays(0), inputs(1)
    file = tmp_path / "resid_delta_mlp" / "autoencoders" / "11.pt"
    write_pt(file, openai_state(of, activation="ReLU"))
    expected = np.maximum((x - of["b_dec"]) @ of["W_enc"] + of["b_enc"], 0)
    agrees(load(file, "blocks.11.hook_mlp_out", "gpt2"), x, expected)
    agrees(load(file, "h.11.mlp", "gpt2"), x, expected)
    with pytest.raises(CoderError, match=r"no coder of 'h\.10\.mlp'\. There are .*h\.11\.mlp"):
        load(file, "h.10.mlp", "gpt2")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"activation": "Sparsemax"}, "activation is 'Sparsemax', wanted one of ReLU, TopK"),
        ({"activation": "TopK"}, r"activation_state_dict\.k is None, wanted 1 to 24"),
        (
            {"activation": "TopK", "activation_state_dict": {"k": 5, "postact_fn": "Identity"}},
            "TopK with Identity is not supported: its activations may be negative",
        ),
    ],
)
def test_openai_s_other_activations_are_refused(
    tmp_path: Path, state: dict[str, object], message: str
) -> None:
    write_pt(tmp_path / "autoencoders" / "3.pt", openai_state(arrays(0), **state))
    with pytest.raises(CoderError, match=message):
        load(tmp_path, "h.3", "gpt2")


def hyperparameters(**changes: object) -> dict[str, object]:
    return {
        "d_model": D_IN,
        "d_sae": N_LATENTS,
        "hook_point_in": "blocks.3.hook_resid_post",
        "hook_point_out": "blocks.3.hook_resid_post",
        "act_fn": "jumprelu",
        "jump_relu_threshold": 1.5,
        "top_k": 50,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 7.0, "out": 7.0},
        "sparsity_include_decoder_norm": True,
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        **changes,
    }


def write_llama_scope(root: Path, of: dict[str, np.ndarray], **changes: object) -> Path:
    folder = root / "Llama3_1-8B-Base-L3R-8x"
    write_json(folder / "hyperparams.json", hyperparameters(**changes))
    write_safetensors(folder / "checkpoints" / "final.safetensors", llama_state(of))
    return root


def test_llama_scope_folds_decoder_norms_before_it_compares_with_the_threshold(
    tmp_path: Path,
) -> None:
    of, x = arrays(0), inputs(1)
    loaded = load(write_llama_scope(tmp_path, of), "layers.3", "llama")
    assert (loaded.format, loaded.reads) == ("llama_scope", "layers.3")
    assert "SAELens' copies" in loaded.notes[0]
    scale = D_IN**0.5 / 7.0  # the same going in and coming out
    norm = np.linalg.norm(of["W_dec"], axis=1)
    pre = (x @ of["W_enc"] + of["b_enc"] / scale) * norm
    expected = np.where(pre > 1.5, pre, 0)
    agrees(loaded, x, expected)
    unfolded = jump(x @ of["W_enc"] + of["b_enc"] / scale, 1.5)
    assert not np.array_equal(expected > 0, unfolded > 0)
    decodes(loaded, x, expected / norm @ of["W_dec"] + of["b_dec"] / scale)


def test_llama_scope_transcoders_scale_what_comes_out_by_its_own_norm(tmp_path: Path) -> None:
    of, x = arrays(0), inputs(1)
    norms = {"in": 7.0, "out": 2.0}
    write_llama_scope(
        tmp_path, of, sparsity_include_decoder_norm=False, dataset_average_activation_norm=norms,
        hook_point_in="blocks.3.ln2.hook_normalized", hook_point_out="blocks.3.hook_mlp_out",
    )  # fmt: skip
    loaded = load(tmp_path, "layers.3.mlp", "llama")
    assert loaded.reads == "layers.3.post_attention_layernorm.normalized"
    assert loaded.writes == "layers.3.mlp"
    going_in, coming_out = D_IN**0.5 / 7.0, D_IN**0.5 / 2.0
    expected = jump(x @ of["W_enc"] + of["b_enc"] / going_in, 1.5)
    agrees(loaded, x, expected)
    decoder = of["W_dec"] * going_in / coming_out
    decodes(loaded, x, expected @ decoder + of["b_dec"] / coming_out)


def test_llama_scope_s_other_settings_are_followed(tmp_path: Path) -> None:
    of, x = arrays(0), inputs(1)
    off = {"norm_activation": "inference", "sparsity_include_decoder_norm": False}
    top = write_llama_scope(tmp_path / "topk", of, **off, act_fn="topk", top_k=5)
    loaded = load(top, "layers.3", "llama")
    assert loaded.expected_l0 == 5
    agrees(loaded, x, largest(x @ of["W_enc"] + of["b_enc"], 5))
    centred = write_llama_scope(
        tmp_path / "centred", of, **off, act_fn="relu", apply_decoder_bias_to_pre_encoder=True
    )
    expected = np.maximum((x - of["b_dec"]) @ of["W_enc"] + of["b_enc"], 0)
    agrees(load(centred, "layers.3", "llama"), x, expected)
    by_token = write_llama_scope(
        tmp_path / "token", of, act_fn="relu", norm_activation="token-wise",
        sparsity_include_decoder_norm=False,
    )  # fmt: skip
    rescaled = x * D_IN**0.5 / np.linalg.norm(x, axis=1, keepdims=True)
    expected = np.maximum(rescaled @ of["W_enc"] + of["b_enc"], 0)
    agrees(load(by_token, "layers.3", "llama"), x, expected)


def test_llama_scope_r1_compares_scores_and_keeps_values(tmp_path: Path) -> None:
    of, x = arrays(0), inputs(1)
    hook = "blocks.3.hook_resid_post"
    state = llama_state(of) | {
        "log_jumprelu_threshold": np.log(of["threshold"]),
        f"dataset_average_activation_norm.{hook}": np.array(7.0, dtype=np.float32),
    }
    settings = hyperparameters(expansion_factor=N_LATENTS / D_IN)
    for key in ("d_sae", "jump_relu_threshold", "dataset_average_activation_norm"):
        del settings[key]
    write_json(tmp_path / "L3R" / "config.json", settings)
    write_safetensors(tmp_path / "L3R" / "sae_weights.safetensors", state)
    loaded = load(tmp_path, "layers.3", "llama")
    assert loaded.format == "llama_scope"
    scale = D_IN**0.5 / 7.0
    pre = x * scale @ of["W_enc"] + of["b_enc"]
    expected = pre * (pre * np.linalg.norm(of["W_dec"], axis=1) > of["threshold"])
    agrees(loaded, x, expected)
    decodes(loaded, x, (expected @ of["W_dec"] + of["b_dec"]) / scale)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_glu_encoder": True}, "use_glu_encoder is not supported: .* no linear map"),
        ({"act_fn": "batchtopk"}, "act_fn is 'batchtopk', wanted one of relu, jumprelu, topk"),
        ({"norm_activation": "batch-wise"}, "norm_activation is 'batch-wise', wanted one of"),
        ({"d_sae": None}, "neither d_sae nor expansion_factor"),
        ({"act_fn": "topk", "top_k": 25}, "top_k 25, wanted 1 to 24"),
        ({"jump_relu_threshold": None}, "jumprelu without jump_relu_threshold"),
        ({"dataset_average_activation_norm": None}, "without dataset_average_activation_norm"),
    ],
)
def test_llama_scope_s_unusable_settings_are_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    write_llama_scope(tmp_path, arrays(0), **changes)
    with pytest.raises(CoderError, match=message):
        load(tmp_path, "layers.3", "llama")


SET = {"model_kind": "transcoder_set", "feature_input_hook": "mlp.hook_in"}


def test_circuit_tracer_s_transcoders_read_the_hook_that_their_set_names(tmp_path: Path) -> None:
    of, x = arrays(0, D_IN, D_OUT), inputs(1)
    skip = np.random.default_rng(5).normal(size=(D_OUT, D_IN)).astype(np.float32)
    settings = SET | {"feature_output_hook": "hook_mlp_out", "activation": "relu"}
    write_yaml(tmp_path / "config.yaml", settings)
    for layer in (2, 3):
        file = tmp_path / f"layer_{layer}.safetensors"
        write_safetensors(file, circuit_state(of, W_skip=skip))
    loaded = load(tmp_path, "layers.3.mlp", "llama")
    assert loaded.format == "circuit_tracer"
    assert (loaded.reads, loaded.writes) == ("layers.3.mlp.input", "layers.3.mlp")
    expected = np.maximum(x @ of["W_enc"] + of["b_enc"], 0)
    agrees(loaded, x, expected)
    decodes(loaded, x, expected @ of["W_dec"] + of["b_dec"] + x @ skip.T)
    found = discover_hookpoints(FileCoderConfig(path=tmp_path), lambda: "llama")
    assert found == ["layers.2.mlp.input", "layers.3.mlp.input"]


def test_circuit_tracer_s_activation_is_told_by_settings_or_tensors(tmp_path: Path) -> None:
    of, x = arrays(0), inputs(1)
    pre = x @ of["W_enc"] + of["b_enc"]
    thresholds = circuit_state(of, **{"activation_function.threshold": of["threshold"]})
    write_safetensors(tmp_path / "jump" / "layer_3.safetensors", thresholds)
    loaded = load(tmp_path / "jump", "layers.3.mlp", "llama")  # no config.yaml: as the study says
    assert (loaded.reads, loaded.writes) == ("layers.3.mlp.input", "layers.3.mlp")
    agrees(loaded, x, jump(pre, of["threshold"]))
    write_yaml(tmp_path / "top" / "config.yaml", SET | {"activation": "topk", "k": 5})
    write_safetensors(tmp_path / "top" / "layer_3.safetensors", circuit_state(of))
    agrees(load(tmp_path / "top", "layers.3.mlp.input", "llama"), x, largest(pre, 5))
    write_safetensors(
        tmp_path / "own" / "layer_3.safetensors", circuit_state(of) | {"k": torch.tensor(5)}
    )
    agrees(load(tmp_path / "own", "layers.3.mlp", "llama"), x, largest(pre, 5))
    negative = {"activation_function.threshold": -of["threshold"]}
    write_safetensors(tmp_path / "neg" / "layer_3.safetensors", circuit_state(of, **negative))
    with pytest.raises(CoderError, match=r"a negative activation_function\.threshold is not supp"):
        load(tmp_path / "neg", "layers.3.mlp", "llama")
    write_yaml(tmp_path / "top" / "config.yaml", SET | {"activation": "topk"})
    with pytest.raises(CoderError, match=r"topk with k None, wanted 1 to 24, in config\.yaml"):
        load(tmp_path / "top", "layers.3.mlp.input", "llama")


def test_cross_layer_transcoders_are_refused_by_name(tmp_path: Path) -> None:
    write_yaml(tmp_path / "config.yaml", {"model_kind": "cross_layer_transcoder"})
    write_safetensors(tmp_path / "W_enc_3.safetensors", {"W_enc_3": np.zeros((4, 2))})
    with pytest.raises(
        CoderError, match="cross_layer_transcoder is not supported: a latent writes"
    ):
        load(tmp_path, "layers.3")


@pytest.mark.parametrize(
    ("trainer", "buffer", "reads"),
    [
        ({"submodule_name": "resid_post_layer_3"}, {}, "layers.3"),
        ({"submodule_name": "attention_out_layer_3"}, {"io": "out"}, "layers.3.attention"),
        ({"submodule_name": "mlp_out_layer_3"}, {"io": "out"}, "layers.3.mlp"),
        ({"layer": 3}, {}, "layers.3"),
    ],
)
def test_dictionary_learning_is_placed_by_its_submodule(
    tmp_path: Path, trainer: dict[str, object], buffer: dict[str, object], reads: str
) -> None:
    of = arrays(0)
    about = {"dict_class": "JumpReluAutoEncoder", "activation_dim": D_IN, "dict_size": N_LATENTS}
    config = {"trainer": about | trainer} | ({"buffer": buffer} if buffer else {})
    write_json(tmp_path / "trainer_0" / "config.json", config)
    write_pt(tmp_path / "trainer_0" / "ae.pt", of)
    loaded = load(tmp_path, reads, "gpt_neox")
    assert (loaded.reads, loaded.writes) == (reads, reads)
    assert bool(loaded.notes) == ("layer" in trainer)
    with pytest.raises(CoderError, match=r"no coder of 'layers\.4'"):
        load(tmp_path, "layers.4", "gpt_neox")


def test_dictionary_learning_s_transcoders_read_the_input_of_the_study_s_module(
    tmp_path: Path,
) -> None:
    about = {"dict_class": "JumpReluAutoEncoder", "activation_dim": D_IN, "dict_size": N_LATENTS}
    write_json(tmp_path / "config.json", {"trainer": about, "buffer": {"io": "in_and_out"}})
    write_pt(tmp_path / "ae.pt", arrays(0))
    loaded = load(tmp_path, "layers.3.mlp", "gpt_neox")
    assert (loaded.reads, loaded.writes) == ("layers.3.mlp.input", "layers.3.mlp")


def test_dictionary_learning_s_checkpoints_are_taken_only_by_name(tmp_path: Path) -> None:
    about = {"dict_class": "JumpReluAutoEncoder", "activation_dim": D_IN, "dict_size": N_LATENTS}
    run = tmp_path / "resid_post_layer_3" / "trainer_0"
    write_json(run / "config.json", {"trainer": about})
    write_pt(run / "ae.pt", arrays(0))
    write_pt(run / "checkpoints" / "ae_100.pt", arrays(1))
    finished = load(tmp_path, "layers.3", "gpt_neox")
    earlier = load(tmp_path, "layers.3", "gpt_neox", select="ae_100.pt")
    assert finished.identity != earlier.identity
    assert torch.equal(earlier.coder.decoder_rows([0])[0], torch.from_numpy(arrays(1)["W_dec"][0]))
    (run / "ae.pt").unlink()
    assert load(tmp_path, "layers.3", "gpt_neox").identity == earlier.identity


def test_a_dictionary_of_many_layers_is_refused_by_name(tmp_path: Path) -> None:
    about = {"dict_class": "CrossCoder", "activation_dim": D_IN, "dict_size": N_LATENTS}
    write_json(tmp_path / "config.json", {"trainer": about})
    write_pt(tmp_path / "ae.pt", arrays(0))
    with pytest.raises(
        CoderError, match=r"config\.json: CrossCoder is not supported: a latent reads"
    ):
        load(tmp_path, "layers.3")
    write_json(tmp_path / "config.json", {"trainer": about | {"dict_class": "IdentityDict"}})
    with pytest.raises(CoderError, match=r"trainer\.dict_class is 'IdentityDict', wanted one of"):
        load(tmp_path, "layers.3")


def test_a_family_without_a_table_is_named_where_a_site_must_be_translated(
    tmp_path: Path,
) -> None:
    root = write_llama_scope(tmp_path, arrays(0))
    with pytest.raises(
        ModelError, match=r"'blocks\.3\.hook_resid_post': for models of type 'mamba'"
    ):
        load(root, "layers.3", "mamba")


def test_the_model_s_type_is_not_asked_for_where_no_name_depends_on_it(
    tiny_sparsify_dir: Path,
) -> None:
    def unknown() -> str:
        raise ModelError("no model here")

    config = FileCoderConfig(path=tiny_sparsify_dir)
    assert open_coder(config, "layers.0", unknown).reads == "layers.0"
