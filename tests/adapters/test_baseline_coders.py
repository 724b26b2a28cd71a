"""Baselines of a subject model: what they read, what they are made of, and what they are called."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import config_of
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from autointerp_dagster.adapters.baseline_coders import (
    Materials,
    baseline_identity,
    mlp_of,
    open_baseline,
)
from autointerp_dagster.adapters.coder_files import LoadedCoder, check_fits
from autointerp_dagster.adapters.subject_models import SubjectModel, open_subject_model
from autointerp_dagster.core.activations import chunks_of
from autointerp_dagster.core.config import (
    BaselineCoderConfig,
    NeuronsCoderConfig,
    PCACoderConfig,
    RandomCoderConfig,
    SubjectModelConfig,
    TokenConfig,
)
from autointerp_dagster.core.errors import CoderError, ModelError
from autointerp_dagster.core.sparse_coders import (
    Computing,
    LinearCoder,
    PlacedCoder,
    ReLU,
    TopK,
)
from autointerp_dagster.core.tokens import Document, TokenDataset, build_token_dataset
from autointerp_dagster.core.types import LayerKey

CPU = torch.device("cpu")
DOCUMENTS = [
    Document(str(i), f"Text {i} says that {i * 7} cats sat on a mat. " * 4) for i in range(9)
]
D_MODEL, D_MLP = 16, 24
DOWN = {
    "gpt2": ("h.1.mlp.c_proj", "h.1.mlp"),
    "gpt_neox": ("layers.1.mlp.dense_4h_to_h", "layers.1.mlp"),
    "llama": ("layers.1.mlp.down_proj", "layers.1.mlp"),
    "gemma2": ("layers.1.mlp.down_proj", "layers.1.mlp"),
}
"""The down projection of the middle layer, and its MLP."""
LAYER = {"gpt2": "h.1"}


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTOINTERP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def subject_of(
    tiny_subject_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], SubjectModel]:
    """A random model of a family with the tiny model's tokenizer; biases are random, too."""

    def make(family: str) -> SubjectModel:
        folder = tmp_path_factory.mktemp(family)
        for file in tiny_subject_model_dir.glob("*token*"):
            shutil.copy(file, folder)
        config = config_of(family)
        config.vocab_size = 400
        config.max_position_embeddings = 128
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        model.save_pretrained(folder)
        return open_subject_model(
            SubjectModelConfig(source=str(folder), dtype="float32", device="cpu", batch_size=4)
        )

    made: dict[str, SubjectModel] = {}
    return lambda family: made.setdefault(family, make(family))


@pytest.fixture(scope="module")
def llama(subject_of: Callable[[str], SubjectModel]) -> SubjectModel:
    return subject_of("llama")


def nothing(*_: object) -> object:
    pytest.fail("this is not to be asked for")


def dataset_of(model: SubjectModel, n_tokens: int = 10_000, context_len: int = 20) -> TokenDataset:
    config = TokenConfig(n_tokens=n_tokens, context_len=context_len, min_visible=4)
    return build_token_dataset(DOCUMENTS, model.encode, model.bos_id, config)


def materials_of(model: SubjectModel, like: LoadedCoder | None = None) -> Materials:
    return Materials(
        subject_model=model,
        coder=nothing if like is None else lambda name: like,
        coder_identity=nothing if like is None else lambda name: like.identity,
        published_l0=nothing if like is None else lambda name: like.expected_l0,
        dataset=lambda n: dataset_of(model, n),
        dataset_identity=lambda: "the corpus in contexts of 20",
    )


def hidden_by_hand(
    model: SubjectModel, module: str, dataset: TokenDataset, takes_input: bool
) -> Iterator[tuple[int, Tensor]]:
    """Context by context, what goes into a module or comes out of it, with a hook placed here."""
    seen: list[Tensor] = []

    def see(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor]) -> None:
        hidden = args[0] if takes_input else output
        seen.append(hidden if isinstance(hidden, Tensor) else hidden[0])

    handle = model.base_model.get_submodule(module).register_forward_hook(see)
    for context in range(dataset.contexts.height):
        tokens = torch.from_numpy(dataset.context_tokens(context))[None].long()
        with torch.inference_mode():
            model.base_model(input_ids=tokens, use_cache=False)
        yield context, seen.pop()[0, dataset.first_visible :]
    handle.remove()


@pytest.mark.parametrize("family", DOWN)
@pytest.mark.parametrize("k", [3, D_MLP])
def test_the_neurons_found_are_those_of_a_plain_loop_with_a_hook(
    family: str, k: int, subject_of: Callable[[str], SubjectModel]
) -> None:
    model = subject_of(family)
    config = NeuronsCoderConfig(format="neurons", k=k)
    layer = LayerKey("neurons", LAYER.get(family, "layers.1"))
    loaded = open_baseline(config, layer.hookpoint, materials_of(model))
    down, mlp = DOWN[family]
    assert (loaded.reads, loaded.writes) == (f"{down}.input", mlp)
    check_fits(loaded, model, layer)
    dataset = dataset_of(model)
    found: set[tuple[int, int, int]] = set()
    for chunk in chunks_of(model.base_model, dataset, {layer: loaded.placed}, 4, CPU):
        nonzeros = chunk.nonzeros[layer]
        found |= set(
            zip(
                nonzeros.context.tolist(),
                nonzeros.position.tolist(),
                nonzeros.latent.tolist(),
                strict=True,
            )
        )
    expected: set[tuple[int, int, int]] = set()
    for context, hidden in hidden_by_hand(model, down, dataset, takes_input=True):
        for token, row in enumerate(hidden):
            largest = row.sort(descending=True).indices[:k].tolist()
            place = context, token + dataset.first_visible
            expected |= {(*place, neuron) for neuron in largest if row[neuron] > 0}
    assert len(expected) > 500
    assert found == expected


@pytest.mark.parametrize("family", DOWN)
@pytest.mark.parametrize("rotation_seed", [None, 3])
def test_all_neurons_write_what_the_mlp_gives(
    family: str, rotation_seed: int | None, subject_of: Callable[[str], SubjectModel]
) -> None:
    model = subject_of(family)
    config = NeuronsCoderConfig(
        format="neurons", k=D_MLP, by="magnitude", rotation_seed=rotation_seed
    )
    loaded = open_baseline(config, LAYER.get(family, "layers.1"), materials_of(model))
    assert loaded.coder.num_latents == 2 * D_MLP
    assert loaded.expected_l0 == D_MLP
    down, mlp = DOWN[family]
    dataset = dataset_of(model)
    pairs = zip(
        hidden_by_hand(model, down, dataset, takes_input=True),
        hidden_by_hand(model, mlp, dataset, takes_input=False),
        strict=True,
    )
    for (_, hidden), (_, output) in pairs:
        decoded = loaded.coder.decode(loaded.coder.encode(hidden), hidden)
        torch.testing.assert_close(decoded, output, rtol=1e-4, atol=1e-4)


def test_a_rotation_is_kept_and_each_seed_and_layer_has_its_own(
    llama: SubjectModel, cache_dir: Path
) -> None:
    def rotation(seed: int, hookpoint: str) -> Tensor:
        config = NeuronsCoderConfig(format="neurons", k=3, rotation_seed=seed)
        coder = open_baseline(config, hookpoint, materials_of(llama)).coder
        assert isinstance(coder, LinearCoder)
        return coder.encoder

    first = rotation(0, "layers.1")
    (kept,) = (cache_dir / "rotation").iterdir()
    shutil.rmtree(kept)
    assert torch.equal(rotation(0, "layers.1"), first)  # made again
    torch.testing.assert_close(first @ first.T, torch.eye(D_MLP), atol=1e-5, rtol=0)
    for other in (rotation(1, "layers.1"), rotation(0, "layers.2")):
        assert (other - first).abs().max() > 0.1
    assert len(list((cache_dir / "rotation").iterdir())) == 3


@pytest.mark.parametrize(
    ("hookpoint", "model_type", "expected"),
    [
        ("layers.9", "gemma2", ("layers.9.mlp.down_proj.input", "layers.9.mlp")),
        ("layers.9.mlp", "llama", ("layers.9.mlp.down_proj.input", "layers.9.mlp")),
        ("blocks.9.hook_resid_post", "gpt2", ("h.9.mlp.c_proj.input", "h.9.mlp")),
        ("h.9.mlp.c_proj.input", "gpt2", ("h.9.mlp.c_proj.input", "h.9.mlp")),
        ("layers.9.ffn.out.input", "new", ("layers.9.ffn.out.input", "layers.9.ffn")),
    ],
)
def test_any_hookpoint_of_a_layer_names_its_mlp(
    hookpoint: str, model_type: str, expected: tuple[str, str]
) -> None:
    assert mlp_of(hookpoint, model_type) == expected


def test_a_hookpoint_that_names_no_mlp_is_refused() -> None:
    with pytest.raises(CoderError, match=r"at norm: no number of a layer in it.*'layers\.9'"):
        mlp_of("norm", "llama")
    with pytest.raises(CoderError, match=r"'new' are is not known.*down_proj\.input'"):
        mlp_of("layers.9", "new")


@pytest.mark.parametrize(
    ("k", "hookpoint", "error", "message"),
    [
        (25, "layers.1", CoderError, r"neurons coder at layers\.1: .*k is 25, wanted 1 to 24"),
        (3, "layers.7", ModelError, r"no module 'layers\.7\.mlp\.down_proj'.*Nearest"),
    ],
)
def test_neurons_that_there_are_not_are_refused(
    k: int, hookpoint: str, error: type[Exception], message: str, llama: SubjectModel
) -> None:
    config = NeuronsCoderConfig(format="neurons", k=k)
    with pytest.raises(error, match=message):
        open_baseline(config, hookpoint, materials_of(llama))


def trained(expected_l0: float | None = 4.4, **changes: object) -> LoadedCoder:
    """A coder to be compared with, from layers.1 to a narrower place."""
    generator = torch.Generator().manual_seed(0)
    encoder = torch.randn(64, D_MODEL, generator=generator)
    coder = LinearCoder(encoder, torch.zeros(64), encoder[:, :5], torch.zeros(5), ReLU())
    placed = PlacedCoder(coder, "layers.1", "layers.2.mlp")
    return replace(LoadedCoder(placed, "trained", "sparsify", "", expected_l0), **changes)


def test_random_directions_are_as_many_and_fire_as_often_as_in_the_coder_compared_with(
    llama: SubjectModel,
) -> None:
    config = RandomCoderConfig(format="random", like="sae", precision="bfloat16")
    loaded = open_baseline(config, "layers.1", materials_of(llama, trained()))
    assert isinstance(loaded.coder, LinearCoder)
    assert (loaded.coder.num_latents, loaded.coder.d_in, loaded.coder.d_out) == (64, 16, 16)
    assert loaded.coder.activation == TopK(4)
    assert loaded.expected_l0 == 4
    assert (loaded.reads, loaded.writes) == ("layers.1", "layers.1")
    assert loaded.coder.computing == Computing(precision="bfloat16")
    other = open_baseline(
        config.model_copy(update={"k": 9}), "layers.1", materials_of(llama, trained())
    )
    assert isinstance(other.coder, LinearCoder)
    assert other.coder.activation == TopK(9)
    assert torch.equal(other.coder.encoder, loaded.coder.encoder)


def test_random_directions_differ_by_seed_and_place(llama: SubjectModel) -> None:
    def rows(seed: int, reads: str) -> Tensor:
        like = trained()
        like = replace(like, placed=like.placed._replace(reads=reads))
        config = RandomCoderConfig(format="random", like="sae", seed=seed)
        coder = open_baseline(config, reads, materials_of(llama, like)).coder
        return coder.encoder_rows(range(64))

    assert torch.equal(rows(0, "layers.1"), rows(0, "layers.1"))
    for other in (rows(1, "layers.1"), rows(0, "layers.2")):
        assert (other - rows(0, "layers.1")).abs().max() > 0.1


def test_without_a_published_l0_a_random_coder_says_what_to_write(llama: SubjectModel) -> None:
    config = RandomCoderConfig(format="random", like="sae")
    with pytest.raises(CoderError, match=r"at layers\.1: how many latents of 'sae'.*Write .* as k"):
        open_baseline(config, "layers.1", materials_of(llama, trained(expected_l0=None)))


def counted(model: SubjectModel) -> list[int]:
    """One entry for each forward pass from now on."""
    passes: list[int] = []
    model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    return passes


def test_principal_components_are_those_of_the_vectors_at_the_hookpoint(
    llama: SubjectModel,
) -> None:
    config = PCACoderConfig(format="pca", k=2, num_components=5, n_tokens=200)
    loaded = open_baseline(config, "blocks.1.hook_resid_post", materials_of(llama))
    assert (loaded.reads, loaded.writes) == ("layers.1", "layers.1")
    dataset = dataset_of(llama, 200)
    assert 200 <= len(dataset.tokens) - dataset.contexts.height < 220
    hidden = torch.cat([h for _, h in hidden_by_hand(llama, "layers.1", dataset, False)])
    centred = (hidden.double() - hidden.double().mean(dim=0)).numpy()
    rows = np.linalg.svd(centred, full_matrices=False).Vh[:5]
    coder = loaded.coder
    assert isinstance(coder, LinearCoder)
    signs = np.sign(rows[range(5), np.abs(rows).argmax(axis=1)])[:, None]
    np.testing.assert_allclose(coder.encoder[::2].numpy(), rows * signs, atol=1e-4)
    assert torch.equal(coder.encoder[1::2], -coder.encoder[::2])
    assert coder.centre is not None
    np.testing.assert_allclose(coder.centre, hidden.mean(dim=0), atol=1e-5)
    assert loaded.expected_l0 == 2


def test_principal_components_are_kept_and_made_again_where_they_are_missing(
    llama: SubjectModel, cache_dir: Path
) -> None:
    config = PCACoderConfig(format="pca", k=2, num_components=4, n_tokens=100)
    first = open_baseline(config, "layers.1", materials_of(llama)).coder
    passes = counted(llama)
    assert isinstance(first, LinearCoder)
    for k in (2, 3):  # the same components
        again = open_baseline(
            config.model_copy(update={"k": k}), "layers.1", materials_of(llama)
        ).coder
        assert isinstance(again, LinearCoder)
        assert torch.equal(again.encoder, first.encoder)
    assert not passes
    (kept,) = (cache_dir / "principal_components").iterdir()
    shutil.rmtree(kept)
    again = open_baseline(config, "layers.1", materials_of(llama)).coder
    assert isinstance(again, LinearCoder)
    assert torch.equal(again.encoder, first.encoder)
    assert passes
    (file,) = kept.iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CoderError, match=r"unreadable .*Remove the folder, and it is made again"):
        open_baseline(config, "layers.1", materials_of(llama))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_components": 17}, r"pca coder at layers\.1: .*17 of \d+ vectors of width 16"),
        ({"n_tokens": 5}, r"16 of 9 vectors of width 16, wanted 1 to 8"),
        ({"num_components": 2, "k": 5}, r"TopK: k is 5, wanted 1 to 4"),
    ],
)
def test_components_that_there_are_not_are_refused(
    changes: dict[str, int], message: str, llama: SubjectModel
) -> None:
    config = PCACoderConfig(format="pca", n_tokens=100).model_copy(update=changes)
    materials = replace(materials_of(llama), dataset=lambda n: dataset_of(llama, n, 10))
    with pytest.raises(CoderError, match=message):
        open_baseline(config, "layers.1", materials)


def test_vectors_that_are_not_finite_are_refused(llama: SubjectModel) -> None:
    handle = llama.base_model.get_submodule("layers.0").register_forward_hook(
        lambda module, args, output: (
            output * torch.inf if isinstance(output, Tensor) else (output[0] * torch.inf,)
        )
    )
    config = PCACoderConfig(format="pca", n_tokens=100)
    with pytest.raises(
        ModelError, match=r"hookpoint 'layers\.0', contexts 0 to 3: NaN or infinity"
    ):
        open_baseline(config, "layers.0", materials_of(llama))
    handle.remove()


CONFIGS: list[BaselineCoderConfig] = [
    NeuronsCoderConfig(format="neurons", k=3),
    NeuronsCoderConfig(format="neurons", k=4),
    NeuronsCoderConfig(format="neurons", k=3, by="magnitude"),
    NeuronsCoderConfig(format="neurons", k=3, rotation_seed=0),
    NeuronsCoderConfig(format="neurons", k=3, rotation_seed=1),
    RandomCoderConfig(format="random", like="sae"),
    RandomCoderConfig(format="random", like="sae", k=5),
    RandomCoderConfig(format="random", like="sae", seed=1),
    PCACoderConfig(format="pca", k=3, n_tokens=100),
    PCACoderConfig(format="pca", k=4, n_tokens=100),
    PCACoderConfig(format="pca", k=3, n_tokens=150),
    PCACoderConfig(format="pca", k=3, n_tokens=100, num_components=3),
    PCACoderConfig(format="pca", k=3, n_tokens=100, precision="bfloat16"),
]


def test_an_identity_is_known_without_making_the_coder_and_is_the_coders_own(
    llama: SubjectModel,
) -> None:
    known = replace(materials_of(llama, trained()), dataset=nothing, coder=nothing)
    passes = counted(llama)
    identities = [baseline_identity(config, "layers.1", known) for config in CONFIGS]
    assert not passes
    assert len(set(identities)) == len(CONFIGS)
    for config, identity in zip(CONFIGS, identities, strict=True):
        loaded = open_baseline(config, "layers.1", materials_of(llama, trained()))
        assert loaded.identity == identity
        assert loaded.format == config.format
        assert loaded.about.startswith(f"{config.format}: ")
        assert loaded.coder.encode(torch.randn(2, loaded.coder.d_in)).value.numel() > 0


def test_an_identity_depends_on_what_the_coder_is_made_of_and_on_nothing_else(
    llama: SubjectModel, subject_of: Callable[[str], SubjectModel]
) -> None:
    neurons, random, pca = CONFIGS[0], CONFIGS[5], CONFIGS[8]
    materials = materials_of(llama, trained())

    def identity(config: BaselineCoderConfig, hookpoint: str = "layers.1", **of: object) -> str:
        return baseline_identity(config, hookpoint, replace(materials, **of))

    gemma = subject_of("gemma2")
    assert identity(neurons, subject_model=gemma) != identity(neurons)
    assert identity(pca, subject_model=gemma) != identity(pca)
    assert identity(random, subject_model=gemma) == identity(random)
    assert identity(pca, dataset_identity=lambda: "another") != identity(pca)
    assert identity(neurons, dataset_identity=lambda: "another") == identity(neurons)
    assert identity(random, coder_identity=lambda name: "other") != identity(random)
    # What is published of the coder beside what it is decides how many directions fire.
    assert identity(random, published_l0=lambda name: 7.0) != identity(random)
    assert identity(random, published_l0=lambda name: 3.9) == identity(random)  # 4 of either
    told = random.model_copy(update={"k": 4})
    assert identity(told, published_l0=nothing) == identity(random)
    assert identity(pca, "layers.2") != identity(pca)
    # Any hookpoint of a layer names its MLP, and a name does not make a coder another.
    assert identity(neurons, "layers.1.mlp") == identity(neurons)
    assert identity(neurons, "layers.2") != identity(neurons)
    renamed = random.model_copy(update={"like": "the same by another name"})
    assert identity(renamed) == identity(random)
    quick = pca.model_copy(update={"screen": "float32", "compiled": True})
    assert identity(quick) == identity(pca)


def test_a_down_projection_that_is_not_linear_is_refused(tmp_path: Path) -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"out": nn.ReLU()})])

    config = NeuronsCoderConfig(format="neurons", k=1)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    model = SubjectModel(SubjectModelConfig(source=str(tmp_path), device="cpu"))
    wrapped = _WithBase(model.config, Opaque())
    with pytest.raises(ModelError, match=r"'layers\.0\.out' is a ReLU, wanted a linear layer"):
        open_baseline(config, "layers.0.out.input", materials_of(wrapped))


class _WithBase(SubjectModel):
    """A subject model around a module that no file holds."""

    def __init__(self, config: SubjectModelConfig, base: nn.Module) -> None:
        super().__init__(config)
        self._base = base

    @property
    def base_model(self) -> nn.Module:
        return self._base
