"""What is wrong with a study is said at once, with where it is and what to do."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import torch
from bench import Bench
from planted import D_MODEL, K, save_coder, write_study
from safetensors.torch import save_file

from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer
from autointerp_dagster.core.errors import (
    AutoInterpError,
    CoderError,
    CorpusError,
    LLMError,
    ModelError,
    StudyError,
)
from autointerp_dagster.resources.preflight import check_study
from autointerp_dagster.study import Study, load_study
from autointerp_dagster.study.stages import stages_of


@pytest.fixture
def copied(world: Path, tmp_path: Path) -> Path:
    """A copy of the world that a test may spoil."""
    return Path(shutil.copytree(world, tmp_path / "world"))


def study_of(folder: Path, world: Path, server: FakeLLMServer, **overrides: Any) -> Study:
    return load_study(write_study(folder, world, server.base_url, **overrides))


def check(study: Study) -> None:
    check_study(study, [stage.name for stage in stages_of(study)])


def complaint(study: Study, kind: type[AutoInterpError]) -> str:
    with pytest.raises(kind) as raised:
        check(study)
    return str(raised.value)


def test_a_study_that_fits_passes(world: Path, server: FakeLLMServer, tmp_path: Path) -> None:
    check(study_of(tmp_path, world, server))


def test_a_hookpoint_that_the_model_has_not_names_the_nearest(
    copied: Path, server: FakeLLMServer, tmp_path: Path
) -> None:
    shutil.copytree(copied / "coders" / "h.0", copied / "coders" / "h.7")
    message = complaint(study_of(tmp_path, copied, server, layers=["h.7"]), ModelError)
    assert "hookpoint 'h.7'" in message
    assert "has no module 'h.7'" in message
    assert "Nearest: h.1, h.0" in message or "Nearest: h.0, h.1" in message


def test_a_hookpoint_without_a_coder_names_those_that_have_one(
    world: Path, server: FakeLLMServer, tmp_path: Path
) -> None:
    message = complaint(study_of(tmp_path, world, server, layers=["h.7"]), CoderError)
    assert f"{world / 'coders'}: no coder of 'h.7'" in message
    assert "There are coders of: h.0, h.1." in message


def test_a_coder_of_another_width_names_both_widths(
    copied: Path, server: FakeLLMServer, tmp_path: Path
) -> None:
    save_narrow_coder(copied / "coders" / "h.1", d_in=8)
    message = complaint(study_of(tmp_path, copied, server), CoderError)
    assert "sae@h.1: the coder's d_in is 8" in message
    assert f"have width {D_MODEL}" in message
    assert str(copied / "model") in message


def save_narrow_coder(folder: Path, d_in: int) -> None:
    tensors = {
        "encoder.weight": torch.zeros(16, d_in),
        "encoder.bias": torch.zeros(16),
        "W_dec": torch.zeros(16, d_in),
        "b_dec": torch.zeros(d_in),
    }
    save_file(tensors, folder / "sae.safetensors")
    config = {"activation": "topk", "num_latents": 16, "k": K, "d_in": d_in}
    (folder / "cfg.json").write_text(json.dumps(config))


def test_a_coder_wider_than_the_grid_says_which_key_to_raise(
    world: Path, server: FakeLLMServer, tmp_path: Path
) -> None:
    study = study_of(tmp_path, world, server, max_num_latents=32)
    message = complaint(study, CoderError)
    assert "sae@h.0: the coder has 64 latents" in message
    assert "32. Raise max_num_latents" in message


def test_a_tokenizer_of_another_model_is_refused(
    copied: Path, server: FakeLLMServer, tmp_path: Path
) -> None:
    file = copied / "model" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["stranger"] = len(vocabulary) + 50
    file.write_text(json.dumps(content))
    message = complaint(study_of(tmp_path, copied, server), ModelError)
    assert str(copied / "model") in message
    assert "tokenizer's largest token id is" in message
    assert "belongs to another model" in message


def test_an_empty_text_file_is_named(copied: Path, server: FakeLLMServer, tmp_path: Path) -> None:
    (copied / "corpus" / "empty.txt").write_text(" \n")
    message = complaint(study_of(tmp_path, copied, server), CorpusError)
    assert message.startswith(str(copied / "corpus" / "empty.txt"))
    assert "empty" in message


def test_a_text_file_that_is_not_utf_8_is_named_with_the_byte(
    copied: Path, server: FakeLLMServer, tmp_path: Path
) -> None:
    (copied / "corpus" / "latin.txt").write_bytes(b"cafe \xe9t\xe9")
    message = complaint(study_of(tmp_path, copied, server), CorpusError)
    assert message.startswith(str(copied / "corpus" / "latin.txt"))
    assert "byte 5 is 0xe9, not UTF-8" in message
    assert "Convert the file to UTF-8" in message


def test_a_corpus_that_is_not_there_is_named(
    world: Path, server: FakeLLMServer, tmp_path: Path
) -> None:
    study = study_of(tmp_path, world, server, corpus={"path": str(tmp_path / "nowhere")})
    assert f"corpus {tmp_path / 'nowhere'}: no such file" in complaint(study, CorpusError)


@pytest.mark.parametrize("part", ["explainer", "judge"])
def test_a_model_that_cannot_be_reached_names_the_url_and_how_to_start_one(
    part: str, world: Path, server: FakeLLMServer, tmp_path: Path
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        overrides = {"models": {part: {"base_url": url, "model": "some/model"}}}
        message = complaint(study_of(tmp_path, world, server, **overrides), LLMError)
    assert message.startswith(f"{url}: nothing answers")
    assert "vllm serve some/model" in message
    assert "base_url" in message


def test_a_model_that_no_stage_asks_need_not_be_there(
    world: Path, server: FakeLLMServer, tmp_path: Path
) -> None:
    gone = {"explainer": {"base_url": "http://127.0.0.1:9/v1"}}
    study = study_of(tmp_path, world, server, models=gone)
    check_study(study, ["token_dataset", "activation_cache", "latent_records"])


def test_a_listed_latent_that_no_coder_has_is_named(
    world: Path, server: FakeLLMServer, tmp_path: Path
) -> None:
    message = complaint(study_of(tmp_path, world, server, latents=[1, 50]), StudyError)
    assert "latents: 50 is not a latent of sae@h.1" in message


def test_a_key_that_is_not_set_names_its_variable(
    world: Path, server: FakeLLMServer, tmp_path: Path
) -> None:
    models = {"explainer": {"api_key_env": "NO_SUCH_KEY_HERE"}}
    message = complaint(study_of(tmp_path, world, server, models=models), LLMError)
    assert "NO_SUCH_KEY_HERE is not set" in message


def test_a_coder_that_diverged_names_the_tensor(
    copied: Path, server: FakeLLMServer, tmp_path: Path
) -> None:
    folder = copied / "coders" / "h.1"
    save_coder(folder, "h.1")
    bad = {"encoder.bias": torch.full((48,), float("nan"))}
    tensors = {
        "encoder.weight": torch.zeros(48, D_MODEL), "W_dec": torch.zeros(48, D_MODEL),
        "b_dec": torch.zeros(D_MODEL), **bad,
    }  # fmt: skip
    save_file(tensors, folder / "sae.safetensors")
    message = complaint(study_of(tmp_path, copied, server), CoderError)
    assert "encoder.bias" in message
    assert "48 values that are not finite" in message


def test_nothing_is_made_of_a_study_that_does_not_fit(
    world: Path, server: FakeLLMServer, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    bench = Bench(tmp_path, world, server.base_url, instance, {"max_num_latents": 32})
    with pytest.raises(CoderError):
        bench.run()
    assert not (tmp_path / "store").exists()
    assert bench.heads() == {}


def test_a_coder_that_cannot_be_steered_is_refused_before_the_forward_pass(
    world: Path, server: FakeLLMServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random directions beside a transcoder that reads a norm write where they read."""
    monkeypatch.setenv("AUTOINTERP_CACHE", str(tmp_path / "cache"))
    study = study_of(
        tmp_path, world, server, layers=["pca@h.0.ln_1.normalized"],
        coders={"pca": {"format": "pca", "k": 2, "num_components": 3, "n_tokens": 200}},
    )  # fmt: skip
    check_study(study, ["activation_cache"])
    with pytest.raises(ModelError, match=r"'h\.0\.ln_1\.normalized': cannot be changed"):
        check_study(study, ["activation_cache", "interventions"])
