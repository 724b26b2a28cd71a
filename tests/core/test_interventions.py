"""Prompts are drawn right, strengths are found or flagged, and what is stored is what happened."""

from collections.abc import Callable

import numpy as np
import polars as pl
import pytest
import torch
from dataset_builders import make_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autointerp_dagster.core.config import InterventionsConfig, SamplingConfig
from autointerp_dagster.core.errors import ModelError
from autointerp_dagster.core.hooks import captured
from autointerp_dagster.core.interventions import interventions_of
from autointerp_dagster.core.interventions.directions import ablated, activations_of
from autointerp_dagster.core.interventions.experiment import (
    Outcome,
    Rises,
    Writer,
    intervene,
    untried,
)
from autointerp_dagster.core.interventions.prompts import prompts_of
from autointerp_dagster.core.interventions.strength import (
    Divergence,
    divergence_between,
    find_strengths,
)
from autointerp_dagster.core.interventions.texts import (
    continuation_text,
    promoted_texts,
    prompt_text,
)
from autointerp_dagster.core.schemas import ACTIVATIONS
from autointerp_dagster.core.sparse_coders import LinearCoder, TopK
from autointerp_dagster.core.sparse_coders.protocol import PlacedCoder
from autointerp_dagster.core.types import LayerKey
from autointerp_dagster.core.windows import SPLITS as SPLIT_NAMES
from autointerp_dagster.core.windows import context_splits, window_grid

LAYER = LayerKey("sae", "layers.1")
CONFIG = InterventionsConfig(n_prompts=20, n_for_explainer=5, min_len=4, prompt_len=10, n_tokens=3)
SPLITS = np.tile(np.array([0, 2, 2, 2, 2, 0, 2, 2, 1, 2], dtype=np.int8), 100)
"""Of the contexts: a fifth train, a tenth select, the others test."""


def cached(*rows: tuple[int, int, int, float]) -> pl.DataFrame:
    frame = pl.DataFrame(
        list(rows), schema=["latent", "context", "position", "activation"], orient="row"
    )
    return ACTIVATIONS.conform(frame)


def many(n_contexts: int, latent: int = 7, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    return cached(
        *(
            (latent, c, int(rng.integers(3, 10)), float(rng.uniform(0.1, 9)))
            for c in range(n_contexts)
        )
    )


def drawn(activations: pl.DataFrame, *latents: int, **changes: object) -> pl.DataFrame:
    config = CONFIG.model_copy(update=changes)
    return prompts_of(activations, LAYER, np.array(latents, dtype=np.int64), config, SPLITS)


def test_a_prompt_ends_with_the_first_token_on_which_the_latent_fires() -> None:
    rows = cached(
        (7, 0, 5, 1.0), (7, 0, 8, 9.0),  # the first, not the strongest
        (7, 1, 2, 1.0), (7, 1, 5, 9.0),  # the first is too early, so the context gives none
        (7, 2, 10, 1.0),                 # too late: 11 tokens
        (7, 3, 9, 2.0), (7, 4, 3, 3.0),  # 10 and 4 tokens are just right
        (7, 5, 0, 4.0), (7, 5, 6, 5.0),  # position 0 is ignored
        (8, 6, 5, 1.0),                  # another latent
    )  # fmt: skip
    found = drawn(rows, 7)
    assert found.select("context", "position", "activation").rows() == [
        (0, 5, 1.0), (3, 9, 2.0), (4, 3, 3.0), (5, 6, 5.0),
    ]  # fmt: skip
    assert found["window_id"].to_list() == [5, (3 << 16) + 9, (4 << 16) + 3, (5 << 16) + 6]


def test_quintiles_of_the_activation_are_drawn_evenly_for_both_kinds() -> None:
    found = drawn(many(500), 7)
    both = found.group_by("quintile", "is_for_explainer").len().sort("quintile", "is_for_explainer")
    assert both.rows() == [
        (q, shown, 1 if shown else 3) for q in range(5) for shown in (False, True)
    ]
    means = found.group_by("quintile").agg(pl.col("activation").mean()).sort("quintile")
    assert means["activation"].is_sorted(descending=True)


def test_neither_kind_makes_up_for_the_other_where_there_are_few() -> None:
    found = {n: drawn(many(n), 7)["is_for_explainer"] for n in (1, 2, 6, 9, 30, 100)}
    counts = {n: (int(shown.sum()), int((~shown).sum())) for n, shown in found.items()}
    assert counts == {1: (1, 0), 2: (1, 1), 6: (2, 4), 9: (2, 6), 30: (5, 15), 100: (5, 15)}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(4, 12), st.floats(0.1, 0.8))
def test_no_explainers_prompt_overlaps_a_test_window_and_no_scoring_one_a_train_window(
    seed: int, window_len: int, train_share: float
) -> None:
    rng = np.random.default_rng(seed)
    documents = [
        (f"d{i}", [rng.integers(1, 250, rng.integers(2, 40)).tolist() for _ in range(n)])
        for i, n in enumerate(rng.integers(1, 6, 30).tolist())
    ]
    dataset = make_dataset(documents)
    sampling = SamplingConfig(
        window_len=window_len, train_share=train_share, split_block=2, seed=seed
    )
    splits = context_splits(dataset, sampling)
    rows = [(7, c, int(rng.integers(3, 10)), 1.0) for c in range(len(splits))]
    found = prompts_of(cached(*rows), LAYER, np.array([7]), CONFIG, splits)
    grid = window_grid(dataset, sampling)
    for context, position, shown in found.select(
        "context", "position", "is_for_explainer"
    ).iter_rows():
        covered = (grid.context == context) & (grid.start <= position)
        assert set(grid.split[covered]) <= {SPLIT_NAMES.index("train" if shown else "test")}


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 60), st.integers(0, 5), st.randoms(use_true_random=False))
def test_a_latents_prompts_depend_on_nothing_but_itself(n: int, seed: int, shuffle: object) -> None:
    alone = many(n, 7, seed)
    together = pl.concat([alone, many(30, 3, 1), many(50, 4000, 2)])
    order = list(range(together.height))
    shuffle.shuffle(order)  # type: ignore[attr-defined]
    found = drawn(together[order], 4000, 7, 3)
    assert found.filter(pl.col("latent") == 7).equals(drawn(alone, 7))
    assert found.group_by("latent").len()["len"].max() <= 20


def test_another_seed_draws_other_prompts() -> None:
    assert not drawn(many(200), 7).equals(drawn(many(200), 7, seed=1))


def test_a_latent_without_contexts_has_no_prompts() -> None:
    assert drawn(many(0), 7).height == 0
    assert drawn(many(9), 5).height == 0


# -- strengths --------------------------------------------------------------------------------


def curve(*of: Callable[[float], float], seen: list[int] | None = None) -> Callable:
    def divergence_of(items: np.ndarray, strengths: np.ndarray) -> Divergence:
        if seen is not None:
            seen.append(len(items))
        kl = np.array([of[i](s) for i, s in zip(items, strengths, strict=True)], dtype=np.float64)
        return Divergence(kl, 2 * kl)

    return divergence_of


def saturating(scale: float, top: float = 8.0) -> Callable[[float], float]:
    return lambda s: top * (1 - np.exp(-((s / scale) ** 2) / top))


@pytest.mark.parametrize("target", [0.1, 0.33, 1.0, 3.0])
@pytest.mark.parametrize("scale", [0.02, 1.0, 7.0, 300.0])
def test_a_smooth_curve_is_met_within_ten_steps(target: float, scale: float) -> None:
    (found,) = find_strengths(curve(saturating(scale)), 1, target, 0.1, 10)
    assert found.is_on_target
    assert found.kl is not None
    assert found.strength is not None
    assert abs(found.kl - target) <= 0.1 * target
    assert found.kl == saturating(scale)(found.strength)
    assert found.reverse_kl == 2 * found.kl


def test_many_latents_are_searched_in_the_same_calls_and_do_not_disturb_each_other() -> None:
    curves, seen = [saturating(scale) for scale in (0.1, 3.0, 500.0)], []
    together = find_strengths(curve(*curves, seen=seen), 3, 1.0, 0.1, 10)
    alone = [find_strengths(curve(c), 1, 1.0, 0.1, 10)[0] for c in curves]
    assert together == alone
    assert len(seen) == max(found.n_steps for found in alone)
    assert sum(seen) == sum(found.n_steps for found in alone)


def test_a_target_out_of_reach_is_off_target_with_the_nearest_strength() -> None:
    (found,) = find_strengths(curve(saturating(1.0, top=0.5)), 1, 1.0, 0.1, 10)
    assert not found.is_on_target
    assert found.kl is not None
    assert found.kl == pytest.approx(0.5)
    assert found.n_steps <= 10


def test_a_jump_over_the_target_is_off_target() -> None:
    (found,) = find_strengths(curve(lambda s: 0.2 if s < 5 else 2.0), 1, 1.0, 0.1, 40)
    assert not found.is_on_target
    assert found.kl == 2.0  # a factor of 2 is nearer than one of 5
    assert found.n_steps < 40  # no use looking inside a bracket that has closed


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), 0.0, -1e-9])
def test_a_curve_without_a_use_is_off_target_and_no_error(odd: float) -> None:
    (found,) = find_strengths(curve(lambda s: odd), 1, 1.0, 0.1, 10)
    assert not found.is_on_target
    assert (found.strength is None) == (not np.isfinite(odd))
    assert found.n_steps == 10


def test_what_is_not_a_number_is_taken_as_too_strong() -> None:
    of = saturating(1.0)
    (found,) = find_strengths(curve(lambda s: of(s) if s < 4 else float("nan")), 1, 1.0, 0.1, 10)
    assert found.is_on_target


def test_a_curve_that_falls_again_is_met_or_flagged() -> None:
    hill = lambda s: 3 * np.exp(-((np.log10(s) - 1) ** 2))  # noqa: E731
    for target in (0.1, 1.0, 2.9, 5.0):
        (found,) = find_strengths(curve(hill), 1, target, 0.1, 10)
        assert found.kl is not None
        assert found.is_on_target == (abs(found.kl - target) <= 0.1 * target)


@settings(max_examples=50, deadline=None)
@given(st.floats(-2, 3), st.floats(0.5, 3), st.sampled_from([0.1, 0.33, 1.0, 3.0]))
def test_power_laws_are_met(log_scale: float, power: float, target: float) -> None:
    (found,) = find_strengths(
        curve(lambda s: min((s / 10**log_scale) ** power, 1e6)), 1, target, 0.1, 10
    )
    reachable = 1e-3**power < target * 10 ** (log_scale * power) < 1e4**power
    assert found.is_on_target or not reachable


def test_the_divergence_is_that_of_the_definition() -> None:
    clean, steered = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.5, 0.25]])
    forward, reverse = divergence_between(clean.log(), steered.log())
    # .5 log(.5/.25); the reverse has a token that the clean model never writes
    assert forward.item() == pytest.approx(0.5 * np.log(2))
    assert reverse.item() == float("inf")
    assert divergence_between(clean.log(), clean.log())[0].item() == 0


# -- texts ------------------------------------------------------------------------------------


class Bytes:
    """A detokenizer whose tokens are bytes; 0 is no text."""

    def pieces(self, tokens: np.ndarray) -> list[str]:
        pieces, rest = [""] * len(tokens), b""
        for i, token in enumerate(tokens.tolist()):
            rest += bytes([token]) if token else b""
            if rest.decode(errors="ignore") or i == len(tokens) - 1:
                pieces[i], rest = rest.decode(errors="replace") if rest else "", b""
        return pieces


def ids(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)


def test_a_character_cut_by_the_end_of_the_prompt_stands_in_the_continuation() -> None:
    tokens = ids("a café au lait")
    for cut in range(1, len(tokens)):
        prompt, rest = tokens[:cut], tokens[cut:]
        text = continuation_text(Bytes(), prompt, rest, frozenset())
        assert prompt_text(Bytes(), prompt) + text == "a café au lait"


def test_a_continuation_ends_with_the_text() -> None:
    rest = np.concatenate([ids("b."), [0], ids("next")])
    assert continuation_text(Bytes(), ids("a"), rest, frozenset([0])) == "b."
    assert continuation_text(Bytes(), ids("a"), rest[2:], frozenset([0])) == ""


def test_promoted_tokens_are_texts_that_rose() -> None:
    tokens, rises = [ord("x"), 0, ord("y"), ord("z")], [0.5, 0.3, 0.1, 0.0]
    assert promoted_texts(Bytes(), ids("a"), tokens, rises, 5) == (["x", "y"], [0.5, 0.1])
    assert promoted_texts(Bytes(), ids("a"), tokens, rises, 1) == (["x"], [0.5])


# -- the experiment ---------------------------------------------------------------------------


class Toy:
    """KL is strength squared times the row's factor; writes ``s`` if steered, else ``c``."""

    def __init__(self, fires: list[bool], factor: np.ndarray) -> None:
        self.fires, self.factor = fires, factor

    def activations(self) -> np.ndarray:
        return np.array(self.fires, dtype=np.float32)

    def divergence(self, rows: np.ndarray, strengths: np.ndarray) -> Divergence:
        kl = self.factor[rows] * strengths**2
        return Divergence(kl, kl / 2)

    def rises(self, rows: np.ndarray, strengths: np.ndarray, n: int) -> Rises:
        tokens = np.array([[ord("p"), ord("q")]] * len(rows))
        return Rises(tokens, np.array([[0.4, 0.1]] * len(rows)))

    def continuations(
        self, rows: np.ndarray, strengths: np.ndarray, draws: np.ndarray, temperature: float
    ) -> np.ndarray:
        letters = np.where(strengths == 0, ord("c"), ord("s"))
        return np.where(draws < 0.5, letters[:, None], letters[:, None] - 32).astype(np.int64)


def run(prompts: pl.DataFrame, toy: Toy, config: InterventionsConfig = CONFIG) -> Outcome:
    tokens = [ids("abc") for _ in range(prompts.height)]
    found = intervene(prompts, tokens, toy, LAYER, config, Writer(Bytes(), frozenset([0])))
    return Outcome.concat(list(found.values()), LAYER)


def everything_fires(prompts: pl.DataFrame) -> Toy:
    n = prompts.height
    return Toy([True] * n, np.linspace(0.5, 2, n))


def test_a_latent_has_a_row_per_target_whose_divergence_is_the_mean_of_its_scoring_prompts() -> (
    None
):
    prompts = drawn(many(40), 7)
    toy = everything_fires(prompts)
    found = run(prompts, toy, CONFIG.model_copy(update={"kl": (1.0, 0.1)}))
    assert found.interventions["kl_target"].to_list() == [0.1, 1.0]
    assert found.interventions["status"].to_list() == ["ok", "ok"]
    factor = toy.factor[~prompts["is_for_explainer"].to_numpy()].mean()
    for row in found.interventions.iter_rows(named=True):
        assert row["kl"] == pytest.approx(factor * row["strength"] ** 2)
        assert row["reverse_kl"] == pytest.approx(row["kl"] / 2)
        assert row["n_prompts"] == 20
        assert row["n_dropped"] == 0
    assert found.prompts.height == 40


def test_scoring_prompts_are_continued_and_the_explainers_show_what_is_promoted() -> None:
    prompts = drawn(many(40), 7)
    (intervention,) = interventions_of(*run(prompts, everything_fires(prompts)))[7]
    shown = [p for p in intervention.prompts if p.is_for_explainer]
    scoring = [p for p in intervention.prompts if not p.is_for_explainer]
    assert (len(shown), len(scoring)) == (5, 15)
    assert {(p.promoted, p.rises) for p in shown} == {(("p", "q"), (0.4, 0.1))}
    assert all(p.clean is None and p.steered is None for p in shown)
    assert all(not p.promoted and p.clean and p.steered for p in scoring)
    # the same random numbers: where one is a capital, so is the other
    assert all(str(p.steered).isupper() == str(p.clean).isupper() for p in scoring)
    assert all(str(p.steered).replace("s", "c").replace("S", "C") == p.clean for p in scoring)
    assert len({p.clean for p in scoring}) > 1


def test_prompts_on_which_the_latent_no_longer_fires_are_dropped_and_counted() -> None:
    prompts = drawn(many(40), 7)
    fires = [i % 4 != 0 for i in range(20)]
    found = run(prompts, Toy(fires, np.ones(20)))
    assert found.interventions.select("n_prompts", "n_dropped").row(0) == (15, 5)
    kept = prompts.filter(pl.Series(fires))["window_id"].to_list()
    assert found.prompts["window_id"].to_list() == kept


def test_a_latent_with_too_few_prompts_left_has_a_row_that_says_so() -> None:
    prompts = pl.concat([drawn(many(40), 7), drawn(many(40, 9), 9)])
    is_seven = prompts["latent"].to_numpy() == 7
    shown = prompts["is_for_explainer"].to_numpy()
    first = np.flatnonzero(is_seven & ~shown)[0]
    fires = ~is_seven | shown | (np.arange(prompts.height) == first)  # one scoring prompt is left
    found = run(prompts, Toy(fires.tolist(), np.ones(prompts.height)))
    seven, nine = found.interventions.iter_rows(named=True)
    assert (seven["status"], seven["n_prompts"], seven["n_dropped"]) == ("too_few", 6, 14)
    assert seven["strength"] is None
    assert nine["status"] == "ok"
    assert set(found.prompts["latent"]) == {9}


def test_an_unreachable_divergence_is_flagged_and_shown_all_the_same() -> None:
    prompts = drawn(many(40), 7)
    found = run(prompts, Toy([True] * 20, np.full(20, 1e-12)))
    row = found.interventions.row(0, named=True)
    assert row["status"] == "off_target"
    assert row["kl"] < 1e-3
    assert row["n_steps"] == 10
    assert found.prompts.height == 20


def test_a_model_that_gives_no_numbers_is_off_target_without_strength() -> None:
    prompts = drawn(many(40), 7)
    found = run(prompts, Toy([True] * 20, np.full(20, np.nan)))
    assert found.interventions.select("status", "strength", "kl").row(0) == (
        "off_target",
        None,
        None,
    )
    assert found.prompts.is_empty()


def test_an_outcome_does_not_depend_on_the_group() -> None:
    parts = [drawn(many(40, latent, latent), latent) for latent in (2, 7, 9)]
    alone = [
        run(part, Toy([True] * 20, np.full(20, 0.3 * i + 0.1))) for i, part in enumerate(parts)
    ]
    factor = np.repeat([0.1, 0.4, 0.7], 20)
    together = run(pl.concat(parts), Toy([True] * 60, factor))
    assert together.interventions.equals(pl.concat([one.interventions for one in alone]))
    assert together.prompts.equals(pl.concat([one.prompts for one in alone]))


def test_a_latent_that_is_not_tried_has_its_status_at_every_target() -> None:
    config = CONFIG.model_copy(update={"kl": (1.0, 3.0)})
    found = Outcome.concat([untried(4, "dead", config)], LAYER)
    assert found.interventions.select("latent", "kl_target", "status", "n_prompts").rows() == [
        (4, 1.0, "dead", 0), (4, 3.0, "dead", 0),
    ]  # fmt: skip
    assert found.prompts.is_empty()


# -- directions -------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = nn.Identity(), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(x))


def make_coder() -> LinearCoder:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 4, generator=generator)
    return LinearCoder(rows, torch.zeros(6), rows.clone(), torch.zeros(4), TopK(3))


def test_ablation_takes_away_what_each_rows_latent_adds() -> None:
    coder, model = make_coder(), Residual()
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    with (
        ablated(model, PlacedCoder(coder, "block", "block"), torch.tensor([1, 4])),
        captured(model, ["head"]) as outputs,
    ):
        model(x)
    dense = coder.encode_dense(x.flatten(0, 1)).view(2, 5, 6)
    for row, latent in enumerate([1, 4]):
        expected = x[row] - dense[row, :, latent, None] * coder.decoder[latent]
        assert torch.allclose(outputs["head"][row], expected, atol=1e-6)
        assert (dense[row, :, latent] > 0).any()
        untouched = dense[row, :, latent] == 0
        assert torch.equal(outputs["head"][row][untouched], x[row][untouched])
    assert not model.block._forward_hooks


def test_a_transcoders_latent_is_taken_from_where_it_writes() -> None:
    coder, model = make_coder(), Residual()
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    placed = PlacedCoder(coder, "block.input", "head")
    with ablated(model, placed, torch.tensor([1, 4])):
        found, again = model(x), model(2 * x)
    dense = coder.encode_dense(x.flatten(0, 1)).view(2, 5, 6)
    for row, latent in enumerate([1, 4]):
        added = dense[row, :, latent, None] * coder.decoder[latent]
        assert torch.allclose(found[row], x[row] - added, atol=1e-6)
        assert torch.allclose(again[row], 2 * (x[row] - added), atol=1e-6)  # it has no bias


def test_what_is_written_before_it_is_read_cannot_be_ablated() -> None:
    placed = PlacedCoder(make_coder(), "head", "block")
    model = Residual()
    with (
        pytest.raises(ModelError, match=r"at 'block': it runs before 'head'"),
        ablated(model, placed, torch.tensor([1])),
    ):
        model(torch.ones(1, 2, 4))


def test_the_activation_of_one_latent_per_token_is_the_dense_one() -> None:
    coder = make_coder()
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(2))
    latents = torch.arange(20) % 6
    dense = coder.encode_dense(x)[torch.arange(20), latents]
    assert torch.allclose(activations_of(coder, x, latents), dense)
