"""SAE latents, principal components, neurons and random directions in one study: one forward pass,
all of the pipeline, and a comparison with intervals."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
import torch
from bench import Bench
from planted import LATENTS

from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer
from autointerp_dagster.core.types import LatentRange, LayerKey
from autointerp_dagster.resources.coders import Coders
from autointerp_dagster.resources.models import SubjectModels

OVERRIDES = {
    "coders": {
        "neurons": {"format": "neurons", "k": 4},
        "pca": {"format": "pca", "k": 4, "num_components": 8, "n_tokens": 2000},
        "random": {"format": "random", "like": "sae"},
    },
    "layers": ["h.0"],
    "range_size": 64,
    "explainers": {"top_tokens": None},
    "scorers": {"fuzzing": None},
    "floors": {"sample": 0},
    "metrics": {"n_bootstrap": 100},
}


@pytest.fixture(scope="module")
def compared(
    world: Path, server: FakeLLMServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("baselines")
    with (
        pytest.MonkeyPatch.context() as patch,
        dg.DagsterInstance.ephemeral() as kept,
    ):
        patch.setenv("AUTOINTERP_CACHE", str(folder / "cache"))
        bench = Bench(folder, world, server.base_url, kept, OVERRIDES)
        bench.run()
        yield bench


def rows(bench: Bench, coder: str) -> pl.DataFrame:
    return bench.table("latent_records", "latents").filter(pl.col("coder") == coder)


def test_all_coders_share_one_forward_pass(compared: Bench, tmp_path: Path) -> None:
    again = replace(compared, folder=tmp_path)  # another store; principal components are kept
    n_contexts: list[int] = []

    def count(_: object, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        n_contexts.append(len(kwargs["input_ids"]))

    base_model = SubjectModels().of(again.study).base_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOINTERP_CACHE", str(compared.folder / "cache"))
        hook = base_model.register_forward_pre_hook(count, with_kwargs=True)
        again.run(until="activation_cache")
        hook.remove()
    wanted = again.heads()["token_dataset", "all"].summary["n_contexts"]
    assert sum(n for n in n_contexts if n > 1) == wanted  # one alone asks how wide a hookpoint is
    assert again.contents().items() <= compared.contents().items()


def test_every_latent_of_every_coder_is_accounted_for(compared: Bench) -> None:
    widths = {"sae": 64, "neurons": 4, "pca": 16, "random": 64}
    assert {coder: rows(compared, coder).height for coder in widths} == widths
    # The MLP's weights are zero: no neuron ever fires, and each says so.
    assert set(rows(compared, "neurons")["status"]) == {"dead"}
    explained = compared.table("explanations", "explanations")
    assert set(explained.filter(pl.col("coder") == "neurons")["reason"]) == {"dead"}


def test_latents_with_a_meaning_beat_random_directions(compared: Bench) -> None:
    found = compared.table("study_metrics", "study_metrics").row(
        by_predicate=(pl.col("comparison") == "coder")
        & (pl.col("a") == "random")
        & (pl.col("b") == "sae")
        & (pl.col("scorer") == "detection"),
        named=True,
    )
    assert found["value"] < -0.2
    assert found["hi"] < 0
    assert found["p"] < 0.05


def test_a_baselines_identity_is_known_before_it_is_made_and_follows_what_it_is_made_of(
    compared: Bench, tmp_path: Path
) -> None:
    study, coders = compared.study, Coders()
    before = {name: coders.identity(study, LayerKey(name, "h.0")) for name in study.coders}
    assert len(set(before.values())) == len(before)
    for name, identity in before.items():
        if name != "pca":  # kept in a cache folder of the fixture
            assert coders.of(study, LayerKey(name, "h.0")).identity == identity
    other = Bench(
        tmp_path, compared.world, compared.base_url, compared.instance,
        OVERRIDES | {"coders": {"random": {"format": "random", "like": "sae", "seed": 1}}},
    ).study  # fmt: skip
    assert coders.identity(other, LayerKey("random", "h.0")) != before["random"]


def test_what_fires_is_what_the_coder_says(compared: Bench) -> None:
    study = compared.study
    layer = LayerKey("random", "h.0")
    loaded = Coders().of(study, layer)
    assert (loaded.coder.num_latents, loaded.expected_l0) == (64, 8)
    block = LatentRange(0, 64)
    counts = compared.store.table(
        compared.heads()["activation_cache", f"{layer}/{block}"].blob("firing_counts")
    )
    tokens = compared.heads()["token_dataset", "all"].summary
    n_visible = tokens["n_tokens"] - tokens["n_contexts"]  # without BOS
    assert counts["n_tokens"].sum() <= 8 * n_visible
    assert counts["n_tokens"].sum() > 4 * n_visible
    assert len(LATENTS["h.0"]) < (counts["n_tokens"] > 0).sum()
