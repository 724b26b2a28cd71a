"""What Dagster calls stale, and what is computed again: only what an input's content changed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest
import torch
from bench import Bench, Name, in_flight
from planted import DIM_OF, build_world
from safetensors.torch import load_file, save_file

from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer
from autointerp_dagster.adapters.subject_models import open_subject_model
from autointerp_dagster.core.scorers import fuzzing

RIGHT_BELOW_CODERS = ("activation_cache", "explanations")


@pytest.fixture
def linked(small: Bench, instance: dg.DagsterInstance, tmp_path: Path) -> Bench:
    """The small study once more, its results linked from a copy of the store."""
    bench = small.copied_to(tmp_path, instance)
    bench.run()
    assert bench.heads() == small.heads()
    return bench


@contextmanager
def forward_passes(bench: Bench) -> Iterator[list[int]]:
    """Contexts of every batch that the subject model runs inside the block.

    One context of three tokens, by which a hookpoint's width is found, does not count.
    """
    batches: list[int] = []

    def count(module: torch.nn.Module, args: object, inputs: dict[str, torch.Tensor]) -> None:
        if inputs["input_ids"].shape[1] > 3:
            batches.append(len(inputs["input_ids"]))

    base_model = open_subject_model(bench.study.models.subject).base_model
    hook = base_model.register_forward_pre_hook(count, with_kwargs=True)
    yield batches
    hook.remove()


def read_another_class(coder: Path, latent: int, name: str) -> None:
    """Changes the weights of one latent so that it fires on this class."""
    tensors = load_file(coder / "sae.safetensors")
    tensors["encoder.weight"][latent] = 0.0
    tensors["encoder.weight"][latent, DIM_OF[name]] = 1.0
    save_file(tensors, coder / "sae.safetensors")


def changed(before: Bench | dict[Name, str], after: Bench) -> set[Name]:
    """Places whose present manifest is another one."""
    old = before if isinstance(before, dict) else paths(before)
    return {name for name, path in paths(after).items() if old[name] != path}


def paths(bench: Bench) -> dict[Name, str]:
    return {name: str(head.path) for name, head in bench.heads().items()}


def test_a_finished_study_is_fresh(linked: Bench) -> None:
    assert linked.stale() == set()


def test_an_identical_rerun_makes_and_marks_nothing(
    linked: Bench, server: FakeLLMServer, small: Bench
) -> None:
    n_asked = len(server.requests)
    with forward_passes(linked) as batches:
        linked.run()
    assert changed(small, linked) == set()
    assert linked.stale() == set()
    assert (batches, len(server.requests) - n_asked) == ([], 0)


def test_a_single_cell_run_again_leaves_everything_fresh(linked: Bench) -> None:
    cell = linked.study.cells[1]
    linked.run([str(cell.layer)], [str(cell.range)], until="latent_metrics")
    assert linked.stale() == set()


def test_changed_weights_make_only_their_layer_stale_and_new(
    small: Bench, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    world = build_world(tmp_path / "world")
    bench = replace(small.copied_to(tmp_path, instance), world=world)
    bench.run()
    assert bench.stale() == set()
    before = paths(bench)
    read_another_class(world / "coders" / "h.1", latent=7, name="colour")
    bench.observe("sparse_coders")
    cells = [str(cell) for cell in bench.study.cells if cell.layer.hookpoint == "h.1"]
    assert bench.stale() == {(asset, cell) for asset in RIGHT_BELOW_CODERS for cell in cells}
    assert {one.name for one in bench.out_of_date()} == {
        (asset, place)
        for asset, place in before
        if place in (*cells, "sae@h.1", "all") and asset != "token_dataset"
    }

    bench.run_stale()
    assert bench.stale() == set()
    moved = changed(before, bench)
    assert {place for _, place in moved} <= {*cells, "sae@h.1", "all"}
    assert {asset for asset, _ in moved} == {
        asset for asset, _ in before if asset != "token_dataset"
    }
    texts = bench.table("explanations", "explanations").filter(hookpoint="h.1", latent=7)
    assert texts["text"].to_list() == ["words for colours"]


def test_weights_copied_elsewhere_are_the_same_coder(linked: Bench, tmp_path: Path) -> None:
    """Defect 14 the other way round: the content counts, not the path or the time of a file."""
    shutil.copytree(linked.world, tmp_path / "elsewhere")
    moved = replace(linked, world=tmp_path / "elsewhere")
    before = paths(linked)
    with forward_passes(moved) as batches:
        moved.run()
    assert (batches, changed(before, moved)) == ([], set())
    assert moved.stale() == set()


def test_a_new_judge_scores_again_and_changes_nothing_above(
    linked: Bench, small: Bench, server: FakeLLMServer
) -> None:
    judge = {"judge": {"model": "fake-2", "max_in_flight": 32}}
    other = replace(linked, overrides={**linked.overrides, "models": {**in_flight(1), **judge}})
    n_asked = len(server.requests)
    # Stale before anything is run, so that the UI's badges say what an edit will cost.
    assert {asset for asset, _ in other.stale()} == {"score_detection", "score_fuzzing"}
    with forward_passes(other) as batches:
        other.run()
    assert batches == []
    assert {body["model"] for body in server.requests[n_asked:]} == {"fake-2"}
    # This judge answers as the other one did, so the metrics are the same and nothing follows them.
    assert {asset for asset, _ in changed(small, other)} == {
        "score_detection", "score_fuzzing", "latent_metrics",
    }  # fmt: skip
    assert other.stale() == set()


def test_a_new_prompt_scores_again_in_its_scorer_alone(
    linked: Bench, small: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzzing, "VERSION", "another wording")
    cells = {("score_fuzzing", str(cell)) for cell in linked.study.cells}
    assert linked.stale() == cells
    before = linked.n_events()
    linked.run_stale()
    n_new = {name: n - before[name] for name, n in linked.n_events().items()}
    looked_at = {"score_fuzzing", "latent_metrics", "layer_metrics", "study_metrics"}
    assert {name for name, n in n_new.items() if n} == looked_at
    moved = {asset for asset, _ in changed(small, linked)}
    assert "score_fuzzing" in moved
    assert not moved & {"score_detection", "explanations", "latent_records", "activation_cache"}
    # The same answers: the metrics' inputs have not changed, so nothing below is computed again.
    assert moved == {"score_fuzzing"}
    assert linked.stale() == set()


def test_an_edited_parameter_makes_its_stage_stale(linked: Bench) -> None:
    metrics = {**linked.overrides["metrics"], "interpretable_cut": 0.7}
    edited = replace(linked, overrides={**linked.overrides, "metrics": metrics})
    assert {asset for asset, _ in edited.stale()} == {"layer_metrics", "study_metrics"}


def test_execution_only_parameters_make_nothing_stale_or_new(
    linked: Bench, small: Bench, server: FakeLLMServer
) -> None:
    models = {**in_flight(16), "subject": {"batch_size": 3}}
    faster = replace(linked, overrides={**linked.overrides, "models": models})
    n_asked = len(server.requests)
    assert faster.stale() == set()
    with forward_passes(faster) as batches:
        faster.run()
    assert (batches, len(server.requests) - n_asked) == ([], 0)
    assert changed(small, faster) == set()
    assert faster.stale() == set()


def test_a_second_study_links_what_the_first_has_made(
    linked: Bench, server: FakeLLMServer, small: Bench
) -> None:
    """The other study differs in the judge alone; its own events and heads are its own."""
    judge = {"judge": {"model": "fake-3", "max_in_flight": 32}}
    overrides = {**linked.overrides, "models": {**in_flight(1), **judge}}
    second = replace(linked, overrides=overrides, name="second")
    n_asked = len(server.requests)
    with forward_passes(second) as batches:
        second.run()
    assert batches == []
    shared = ("token_dataset", "activation_cache", "latent_records", "explanations")
    mine, theirs = paths(second), paths(small)
    assert {mine[name] == theirs[name] for name in mine if name[0] in shared} == {True}
    assert {body["model"] for body in server.requests[n_asked:]} == {"fake-3"}
    assert second.stale() == set()
    assert linked.stale() == set()


def test_a_new_explainer_leaves_the_others_part_alone(
    linked: Bench, server: FakeLLMServer, small: Bench
) -> None:
    """One blob per explainer: adding one asks the judge about its texts only."""
    explainers = {"top_tokens": {"kind": "top_tokens"}}
    both = replace(linked, overrides={**linked.overrides, "explainers": explainers})
    n_asked = len(server.requests)
    both.run()
    questions = {body["messages"][-1]["content"] for body in server.requests[n_asked:]}
    assert all("the token" in question.split("\n")[0] for question in questions)
    name = "explanations/default"
    for cell in both.study.cells[:4]:
        old, new = (b.heads()["explanations", str(cell)] for b in (small, both))
        assert old.blob(name) == new.blob(name)
