"""A subject model says what it is, loads once, and refuses what does not belong to it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autointerp_dagster.adapters.subject_models import (
    SubjectModel,
    open_subject_model,
    resolve_folder,
)
from autointerp_dagster.core.config import SubjectModelConfig
from autointerp_dagster.core.errors import ModelError


def subject_model_at(folder: Path, **parameters: object) -> SubjectModel:
    content = {"source": str(folder), "dtype": "float32", "device": "cpu", **parameters}
    return open_subject_model(SubjectModelConfig.model_validate(content))


@pytest.fixture
def copied_dir(tiny_subject_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_subject_model_dir, tmp_path / "model"))


def test_hookpoints_count_from_the_base_model(tiny_subject_model_dir: Path) -> None:
    subject_model = subject_model_at(tiny_subject_model_dir)
    assert {"layers.0", "layers.2.mlp.down_proj", "embed_tokens"} <= set(subject_model.hookpoints)


def test_the_width_is_each_hookpoints_own(tiny_subject_model_dir: Path) -> None:
    subject_model = subject_model_at(tiny_subject_model_dir)
    widths = {name: subject_model.width_of(name) for name in ("layers.1", "layers.0.mlp.up_proj")}
    assert widths == {"layers.1": 16, "layers.0.mlp.up_proj": 32}


def test_an_unknown_hookpoint_names_the_nearest(tiny_subject_model_dir: Path) -> None:
    with pytest.raises(ModelError, match=r"'layer\.1'.*Nearest: layers\.1"):
        subject_model_at(tiny_subject_model_dir).width_of("layer.1")


def test_bos_0_is_a_token_and_no_bos_is_none(
    tiny_subject_model_dir: Path, copied_dir: Path
) -> None:
    assert subject_model_at(tiny_subject_model_dir).bos_id == 0
    file = copied_dir / "tokenizer_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in content.items() if k != "bos_token"}))
    assert subject_model_at(copied_dir).bos_id is None


def test_texts_are_encoded_without_special_tokens_even_if_they_name_one(
    tiny_subject_model_dir: Path,
) -> None:
    subject_model = subject_model_at(tiny_subject_model_dir)
    ids = subject_model.encode(["the <s> mill", ""])
    assert 0 not in ids[0]
    assert ids[1] == []
    assert subject_model.tokenizer.decode(ids[0]) == "the <s> mill"


def test_weights_are_loaded_once_for_configurations_that_only_run_differently(
    tiny_subject_model_dir: Path,
) -> None:
    one, other = (subject_model_at(tiny_subject_model_dir, batch_size=n) for n in (1, 4))
    assert one.model is other.model
    assert subject_model_at(tiny_subject_model_dir, batch_size=1) is one


def test_the_forward_pass_has_the_dtype_asked_for(tiny_subject_model_dir: Path) -> None:
    subject_model = subject_model_at(tiny_subject_model_dir, dtype="bfloat16")
    assert {p.dtype for p in subject_model.model.parameters()} == {torch.bfloat16}
    assert not subject_model.model.training


def test_the_identity_is_that_of_the_content(
    tiny_subject_model_dir: Path, copied_dir: Path
) -> None:
    identity = subject_model_at(tiny_subject_model_dir).identity()
    assert subject_model_at(copied_dir, batch_size=3).identity() == identity
    assert subject_model_at(copied_dir, dtype="bfloat16").identity() != identity


def test_a_changed_weight_is_another_model_in_the_same_process(copied_dir: Path) -> None:
    subject_model = subject_model_at(copied_dir)
    identity, norm = (
        subject_model.identity(),
        subject_model.model.get_parameter("model.norm.weight"),
    )
    file = copied_dir / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.norm.weight": norm.detach() + 1}, file, metadata={"format": "pt"})
    assert subject_model.identity() != identity
    changed = subject_model.model.get_parameter("model.norm.weight")
    assert torch.equal(changed, norm + 1)


def test_a_changed_tokenizer_is_another_model(copied_dir: Path) -> None:
    identity = subject_model_at(copied_dir).identity()
    file = copied_dir / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    assert subject_model_at(copied_dir).identity() != identity


def test_a_tokenizer_with_ids_beyond_the_embedding_is_refused(copied_dir: Path) -> None:
    subject_model = subject_model_at(copied_dir)
    subject_model.tokenizer.add_tokens(["<extra>"])
    with pytest.raises(ModelError, match="The tokenizer belongs to another model"):
        _ = subject_model.model


def test_a_folder_without_weights_is_refused(copied_dir: Path) -> None:
    (copied_dir / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"cannot be loaded.*safetensors weights"):
        _ = subject_model_at(copied_dir).model


def test_opening_reads_nothing(tmp_path: Path) -> None:
    subject_model = subject_model_at(tmp_path / "later")
    with pytest.raises(ModelError, match=r"later': no such folder"):
        _ = subject_model.folder


def test_a_hub_model_that_cannot_be_fetched_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"'nobody/nothing' .*unset HF_HUB_OFFLINE"):
        resolve_folder("nobody/nothing", None)


def test_an_unknown_embedded_model_names_the_known_ones() -> None:
    with pytest.raises(ModelError, match="embedded:smollm2-135m-instruct"):
        resolve_folder("embedded:gpt-5", None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_cuda_without_a_device_is_an_error(tiny_subject_model_dir: Path) -> None:
    with pytest.raises(ModelError, match="no CUDA device"):
        _ = subject_model_at(tiny_subject_model_dir, device="cuda").device
