"""Negatives of every kind, by hand and against plain loops."""

import itertools
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from dataset_builders import BOS, make_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from autointerp_dagster.core.config import SamplingConfig
from autointerp_dagster.core.negatives import (
    NegativeRequest,
    Negatives,
    NegativeSources,
    draw_negatives,
    shown_tokens,
    token_windows,
)
from autointerp_dagster.core.negatives.permuting import permuted
from autointerp_dagster.core.rng import hash_priority
from autointerp_dagster.core.schemas import NEIGHBOUR_WINDOWS, NEIGHBOURS
from autointerp_dagster.core.types import LayerKey
from autointerp_dagster.core.windows import SPLITS, window_grid

LAYER = LayerKey("sae", "h.0")
KINDS = ("random", "neighbour", "similar", "same_token")
TEST = SPLITS.index("test")
N_IDS = 12


def make_corpus(seed: int, n_documents: int = 24, n_places: int = 3):
    """Contexts of ``n_places`` windows of 4 tokens; few ids, so that tokens come often."""
    rng = np.random.default_rng(seed)
    documents = [
        (f"{seed}-{i}", [[BOS, *rng.integers(1, N_IDS, 4 * n_places - 1).tolist()]])
        for i in range(n_documents)
    ]
    config = SamplingConfig(window_len=4, train_share=0.3, select_share=0.3)
    dataset = make_dataset(documents)
    return dataset, window_grid(dataset, config)


class Given:
    """A block of latents in which each is active in some windows; what the draw is made from."""

    def __init__(
        self,
        seed: int,
        n_latents: int = 5,
        share: float = 0.25,
        n_places: int = 3,
        n_documents: int = 24,
    ):
        rng = np.random.default_rng([seed, 1])
        self.dataset, self.grid = make_corpus(seed, n_documents, n_places)
        n = self.grid.n_windows
        self.first = 40
        self.active = [set(np.flatnonzero(rng.random(n) < share).tolist()) for _ in range(50)]
        self.repeat = {
            (latent, int(w)) for latent in range(50) for w in np.flatnonzero(rng.random(n) < 0.1)
        }
        self.latents = range(self.first, self.first + n_latents)
        self.near = rng.permuted(np.tile(np.arange(n), (n, 1)), axis=1)
        self.top = rng.integers(-1, N_IDS, 50)
        self.neighbours = {
            latent: rng.choice(30, size=rng.integers(0, 6), replace=False).tolist()
            for latent in range(50)
        }

    def nearest(self, window, split):
        """Six windows of the split, by a fixed order, padded."""
        found = np.full((len(window), 6), -1, dtype=np.int64)
        for row, w in enumerate(window.tolist()):
            near = [v for v in self.near[w].tolist() if v != w and self.grid.split[v] == split][:6]
            found[row, : len(near)] = near
        return found

    def sources(self, latents: range) -> NegativeSources:
        rows = [
            (latent, "cofiring", rank, other, 0.5)
            for latent in latents
            for rank, other in enumerate(self.neighbours[latent])
        ]
        fires = [
            (other, int(self.grid.window_id[w]), [float(other), 0.0, 0.0, float(w)])
            for other in range(30)
            for w in sorted(self.active[other])
        ]
        neighbours = pl.DataFrame(
            rows, schema=["latent", "measure", "rank", "neighbour", "value"], orient="row"
        )
        windows = pl.DataFrame(fires, schema=["latent", "window_id", "activations"], orient="row")
        return NegativeSources(
            neighbours=NEIGHBOURS.conform(neighbours, LAYER) if rows else NEIGHBOURS.empty(),
            neighbour_windows=NEIGHBOUR_WINDOWS.conform(windows, LAYER),
            similar=self,
            token_windows=token_windows(self.dataset, self.grid),
            first_latent=latents.start,
        )

    def chosen(self, latent: int, split: int) -> list[int]:
        """Activating windows of a split, at most 7, in order of rank; every fifth latent: none."""
        mine = [w for w in sorted(self.active[latent]) if self.grid.split[w] == split]
        return [] if latent % 5 == 4 else mine[::-1][:7]

    def request(self, latents: range, n_wanted: int, split: int = TEST) -> NegativeRequest:
        rows = [
            (latent - latents.start, w, rank)
            for latent in latents
            for rank, w in enumerate(self.chosen(latent, split))
        ]
        latent, window, rank = (np.array([r[i] for r in rows], dtype=np.int64) for i in range(3))

        def asks(has):
            return lambda a, b: np.array(
                [has(latents[i], w) for i, w in zip(a.tolist(), b.tolist(), strict=True)],
                dtype=bool,
            )

        return NegativeRequest(
            grid=self.grid,
            split=split,
            n_wanted=n_wanted,
            latent=latent,
            window=window,
            rank=rank,
            top_token=self.top[list(latents)].astype(np.int64),
            key=self.keys(latents),
            active=asks(lambda f, w: w in self.active[f]),
            repeats=asks(lambda f, w: (f, w) in self.repeat),
        )

    def keys(self, latents: range):
        return hash_priority(7, np.array(latents, dtype=np.int64))

    def draw(self, kinds, n_wanted, latents=None, split=TEST) -> Negatives:
        latents = self.latents if latents is None else latents
        return draw_negatives(kinds, self.request(latents, n_wanted, split), self.sources(latents))

    # ---- plain loops ----

    def key(self, latent: int, kind: str, split: int) -> int:
        purpose = (1 << 40) + KINDS.index(kind) * 3 + split
        return int(hash_priority(self.keys(range(latent, latent + 1)), np.array([purpose]))[0])

    def shuffled(self, items: list[int], key: int) -> list[int]:
        n = len(items)
        at = permuted(np.arange(n), np.full(n, n), np.full(n, key, dtype=np.uint64))
        return [items[i] for i in at.tolist()]

    def lanes(self, latent: int, kind: str, split: int) -> list[list[int]]:
        key, chosen = self.key(latent, kind, split), self.chosen(latent, split)
        if not chosen:
            return []
        in_split = [w for w in range(self.grid.n_windows) if self.grid.split[w] == split]
        if kind == "similar":
            found = self.nearest(np.array(chosen), split).tolist()
            return [[w for w in row if w >= 0] for row in found]
        if kind == "same_token":
            top = int(self.top[latent])
            shown = [w for w in in_split if top >= 0 and top in self.tokens(w)]
            return [self.shuffled(shown, key)]
        return [
            self.shuffled(
                [w for w in in_split if w in self.active[other]],
                int(hash_priority(key, np.array([other]))[0]),
            )
            for other in self.neighbours[latent]
        ]

    def tokens(self, window: int) -> list[int]:
        start = int(self.grid.start[window])
        context = self.dataset.context_tokens(int(self.grid.context[window])).tolist()
        return context[max(start, 1) : start + 4]

    def by_loops(self, latent: int, kind: str, quota: int, split: int = TEST):
        """Windows drawn, and how many near-duplicates were passed over."""
        lanes = self.lanes(latent, kind, split)
        longest = max(map(len, lanes), default=0)
        step = -(-quota * 4 // max(1, len(lanes)))
        chosen = self.chosen(latent, split)
        place = self.grid.place
        wanted = Counter(int(place[chosen[i % len(chosen)]]) for i in range(quota * bool(chosen)))

        def is_short(offers) -> bool:
            at = Counter(int(place[o[2]]) for o in offers if not o[3])
            n_fit = (at & wanted).total()
            return n_fit < quota and at.total() < 16 * quota

        until, asked, offers = 0, 0, []
        while until < longest and is_short(offers):
            until += step
            step *= 2
            seen = {o[2] for o in offers}
            for turn in range(asked, until):
                for number, lane in enumerate(lanes):
                    if turn < len(lane) and lane[turn] not in seen:
                        window = lane[turn]
                        seen.add(window)
                        if window not in self.active[latent]:
                            is_repeat = (latent, window) in self.repeat
                            offers.append((turn, number, window, is_repeat))
            asked = until
        usable = [o for o in offers if not o[3]]
        turns = {o: sum(p[1] == o[1] and p[0] < o[0] for p in usable) for o in usable}
        usable.sort(key=lambda o: (turns[o], o[1]))
        lacking = Counter(wanted)
        taken = []
        for o in usable:
            if lacking[int(place[o[2]])] > 0:
                lacking[int(place[o[2]])] -= 1
                taken.append(o)
        taken += [o for o in usable if o not in taken][: quota - len(taken)]
        last = max((o[:2] for o in taken), default=(0, 0)) if len(taken) == quota else (1e9, 0)
        return {o[2] for o in taken}, sum(o[3] and o[:2] < last for o in offers)


def by_latent(drawn: Negatives, kind: int = 0) -> dict[int, list[int]]:
    found = defaultdict(list)
    for latent, window, of in zip(*(x.tolist() for x in drawn[:3]), strict=True):
        if of == kind:
            found[latent].append(window)
    return found


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 200),
    kind=st.sampled_from(KINDS[1:]),
    quota=st.integers(0, 12),
    split=st.integers(0, 2),
    share=st.sampled_from([0.05, 0.3, 0.8]),
)
def test_a_hard_kind_is_drawn_as_by_plain_loops(seed, kind, quota, split, share):
    world = Given(seed, share=share)
    drawn = world.draw((kind,), quota, split=split)
    found = by_latent(drawn)
    for i, latent in enumerate(world.latents):
        windows, n_repeats = world.by_loops(latent, kind, quota, split)
        assert sorted(found[i]) == sorted(windows)
        assert drawn.n_near_duplicates[i] == n_repeats


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 200),
    kinds=st.permutations(KINDS).flatmap(lambda k: st.sampled_from([k[:n] for n in range(1, 5)])),
    n_wanted=st.integers(0, 30),
    split=st.integers(0, 2),
)
def test_every_negative_is_silent_of_the_split_new_and_distinct(seed, kinds, n_wanted, split):
    world = Given(seed)
    drawn = world.draw(kinds, n_wanted, split=split)
    sources = world.sources(world.latents)
    shown = set()
    for i, window, kind, source in zip(*(x.tolist() for x in drawn[:4]), strict=True):
        latent = world.latents[i]
        assert world.grid.split[window] == split
        assert window not in world.active[latent]
        assert (latent, window) not in world.repeat
        assert (i, window, kind) not in shown
        shown.add((i, window, kind))
        if kinds[kind] != "neighbour":
            assert source == -1
        else:
            row = sources.neighbour_windows.row(source, named=True)
            assert row["latent"] in world.neighbours[latent]
            assert row["window_id"] == world.grid.window_id[window]
    for i, latent in enumerate(world.latents):
        n = [len(by_latent(drawn, kind)[i]) for kind in range(len(kinds))]
        quotas = [n_wanted // len(kinds) + (k < n_wanted % len(kinds)) for k in range(len(kinds))]
        assert all(has <= most for has, most in zip(n, quotas, strict=True))
        if not world.chosen(latent, split):
            assert sum(n) == 0


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 200), n_wanted=st.integers(1, 20), start=st.integers(0, 4))
def test_a_draw_depends_on_no_other_latent_and_no_other_kind(seed, n_wanted, start):
    world = Given(seed)
    whole = world.draw(KINDS, 4 * n_wanted)
    alone = range(world.latents[start], world.latents[start] + 1)
    part = world.draw(KINDS[::-1], 4 * n_wanted, alone)
    for number, kind in enumerate(KINDS):
        mine = by_latent(whole, number)[start]
        assert sorted(by_latent(part, 3 - number)[0]) == sorted(mine)
        assert sorted(by_latent(world.draw((kind,), n_wanted, alone))[0]) == sorted(mine)


def lone_latent(world: Given, **changes) -> Given:
    """One latent that is active in the first windows of the test split and nowhere else."""
    world.active[40] = set(np.flatnonzero(world.grid.split == TEST)[:6].tolist())
    world.repeat = set()
    world.latents = range(40, 41)
    vars(world).update(changes)
    return world


def test_neighbours_take_turns_from_the_nearest_on():
    world = lone_latent(Given(3, n_places=1, n_documents=80), neighbours={40: [5, 6, 7, 8]})
    test = np.flatnonzero(world.grid.split == TEST)[6:]
    for i, other in enumerate((5, 6, 7, 8)):
        world.active[other] = set(test[i::4].tolist())  # each window is one neighbour's
    drawn = world.draw(("neighbour",), 6)
    owner = world.sources(world.latents).neighbour_windows["latent"].gather(drawn.source)
    assert Counter(owner.to_list()) == {5: 2, 6: 2, 7: 1, 8: 1}


def test_a_window_in_which_two_neighbours_fire_is_the_nearer_ones_and_drawn_once():
    world = lone_latent(Given(3, n_places=1, n_documents=80), neighbours={40: [9, 2]})
    (window, *_) = np.flatnonzero(world.grid.split == TEST)[6:]
    world.active[9] = world.active[2] = {int(window)}
    drawn = world.draw(("neighbour",), 6)
    assert drawn.window.tolist() == [window]
    row = world.sources(world.latents).neighbour_windows.row(int(drawn.source[0]), named=True)
    assert row["latent"] == 9


def test_similar_windows_are_everybodys_nearest_before_anybodys_second():
    world = lone_latent(Given(3, n_places=1, n_documents=80))
    asked, test = world.chosen(40, TEST), np.flatnonzero(world.grid.split == TEST)[6:].tolist()
    near = {w: [test[2 * i], test[2 * i + 1]] for i, w in enumerate(asked[:3])}
    world.nearest = lambda windows, split: np.array(
        [near.get(w, [-1, -1]) for w in windows.tolist()], dtype=np.int64
    )
    drawn = world.draw(("similar",), 4)
    firsts = [near[w][0] for w in asked[:3]]
    assert sorted(drawn.window.tolist()) == sorted([*firsts, near[asked[0]][1]])


def test_places_in_the_context_are_those_of_the_activating_windows_where_candidates_allow():
    world = lone_latent(Given(8, n_places=6, n_documents=40), top={})
    test = np.flatnonzero(world.grid.split == TEST)
    second = test[world.grid.place[test] == 1]
    world.active[40] = set(second[:3].tolist())
    world.top = np.full(50, 3)
    shows = [w for w in test.tolist() if 3 in world.tokens(w) and w not in world.active[40]]
    at_place = [w for w in shows if world.grid.place[w] == 1]
    drawn = world.draw(("same_token",), len(at_place))
    assert 0 < len(at_place) < len(shows)
    assert sorted(drawn.window.tolist()) == at_place
    more = world.draw(("same_token",), len(shows) + 5)
    assert sorted(more.window.tolist()) == shows  # then the others; and no more than there are


def test_the_remainder_goes_to_the_kinds_named_first():
    world = Given(5, share=0.2)
    drawn = world.draw(("similar", "random", "same_token"), 5)
    counts = [Counter(by_latent(drawn, k)) and len(by_latent(drawn, k)[0]) for k in range(3)]
    assert counts == [2, 2, 1]


def test_without_a_top_token_or_neighbours_there_are_fewer_and_no_other_kind_makes_them_up():
    world = lone_latent(Given(5), top=np.full(50, -1), neighbours={40: []})
    drawn = world.draw(("neighbour", "same_token", "random"), 9)
    assert set(drawn.kind.tolist()) == {2}
    assert len(drawn.window) == 3


def test_a_token_that_no_window_shows_has_no_windows():
    world = lone_latent(Given(5), top=np.full(50, 10_000))
    assert not len(world.draw(("same_token",), 9).window)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_kind_without_its_source_is_an_error_that_names_it(kind):
    world = Given(5)
    with pytest.raises(ValueError, match=kind):
        draw_negatives((kind,), world.request(world.latents, 4), NegativeSources())


@pytest.mark.parametrize(("context", "start"), [(0, 2), (0, 12), (999, 0)])
def test_a_neighbours_window_that_is_not_on_the_grid_is_an_error(context, start):
    world = Given(5)
    sources = world.sources(world.latents)
    wrong = sources.neighbour_windows[:1].with_columns(
        window_id=pl.lit(context << 16 | start, dtype=pl.UInt64)
    )
    with pytest.raises(ValueError, match=f"context {context}, start {start}"):
        draw_negatives(
            ("neighbour",),
            world.request(world.latents, 4),
            replace(sources, neighbour_windows=wrong),
        )


def test_a_block_without_activating_windows_draws_nothing():
    world = Given(5, share=0.0)
    drawn = world.draw(KINDS, 8)
    assert [len(column) for column in drawn] == [0, 0, 0, 0, len(world.latents)]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 100), has_bos=st.booleans())
def test_the_windows_of_a_token_are_those_that_show_it(seed, has_bos):
    rng = np.random.default_rng(seed)
    contexts = [[BOS, *rng.integers(0, 6, rng.integers(1, 14)).tolist()] for _ in range(5)]
    dataset = make_dataset(
        [(str(i), [c]) for i, c in enumerate(contexts)], BOS if has_bos else None
    )
    grid = window_grid(dataset, SamplingConfig(window_len=4))
    index = token_windows(dataset, grid)
    shown = shown_tokens(dataset, grid.context, grid.start, 4)
    for token, split in itertools.product(range(-1, 9), range(3)):
        (start,), (stop,) = index.bounds(np.array([token]), split)
        holds = [
            w
            for w, (a, b) in enumerate(zip(shown.first, shown.stop, strict=True))
            if token in dataset.tokens[a:b] and grid.split[w] == split
        ]
        assert index.window[start:stop].tolist() == holds
    for w in range(grid.n_windows):
        text = dataset.context_tokens(int(grid.context[w])).tolist()
        start = int(grid.start[w])
        expected = text[max(start, int(has_bos)) : start + 4]
        assert dataset.tokens[shown.first[w] : shown.stop[w]].tolist() == expected
