"""Several who would do the same thing: one does, and what nobody did can be claimed again."""

import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from autointerp_dagster.adapters import claims
from autointerp_dagster.adapters.bulk import list_files
from autointerp_dagster.adapters.claims import LAPSES_S, Claim
from autointerp_dagster.adapters.found_layers import FoundLayer, FoundLayers
from autointerp_dagster.adapters.storage import Store

N_CLAIMANTS, NAMES = 4, [f"sae@h.{i}" for i in range(6)]


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    where = tmp_path if request.param == "local" else request.getfixturevalue("s3").new_root()
    return Store(where).root


def test_one_of_several_is_granted_a_name_until_it_is_released(root):
    first = Claim(root, "claims", ["a", "b"])
    second = Claim(root, "claims", ["b", "c"])
    third = Claim(root, "claims", ["b"])
    assert (first.granted, second.granted, third.granted) == ({"a", "b"}, {"c"}, set())
    assert Claim(root, "elsewhere", ["a"]).granted == {"a"}
    first.release()
    first.release()
    assert Claim(root, "claims", ["a", "b", "c"]).granted == {"a", "b"}
    assert len(list_files(root, "claims")) == 2  # of those who were granted nothing, none is left


def test_who_claims_between_the_other_s_write_and_look_is_seen(root, monkeypatch):
    both_wrote = threading.Barrier(2)

    def look(*arguments):
        both_wrote.wait()
        return list_files(*arguments)

    monkeypatch.setattr(claims, "list_files", look)
    with ThreadPoolExecutor(2) as threads:
        granted = list(threads.map(lambda _: Claim(root, "claims", ["a"]).granted, range(2)))
    assert sum(map(len, granted)) <= 1  # none, or one who reads after the other gave way
    monkeypatch.undo()
    assert len(list_files(root, "claims")) == sum(map(len, granted))


def test_everything_is_done_once_by_whoever_asks(root):
    done, lock = [], threading.Lock()

    def work(seed: int) -> None:
        dice, deadline = random.Random(seed), time.monotonic() + 60
        while set(done) != set(NAMES) and time.monotonic() < deadline:
            claim = Claim(root, "claims", [name for name in NAMES if name not in done])
            for name in claim.granted - set(done):
                with lock:
                    done.append(name)
            claim.release()
            time.sleep(dice.uniform(0, 0.05))

    with ThreadPoolExecutor(N_CLAIMANTS) as threads:
        list(threads.map(work, range(N_CLAIMANTS)))
    assert sorted(done) == NAMES
    assert list_files(root, "claims") == {}


def test_a_claim_lapses_and_what_a_killed_write_left_is_swept(tmp_path):
    root = Store(tmp_path).root
    Claim(root, "claims", ["a"])
    (path,) = (tmp_path / "claims").iterdir()
    (tmp_path / "claims" / f".{path.name}.0.tmp").write_text("[")
    for age, granted in [(LAPSES_S - 30, set()), (LAPSES_S + 1, {"a"})]:
        for file in (tmp_path / "claims").iterdir():
            os.utime(file, (time.time() - age,) * 2)
        assert Claim(root, "claims", ["a"]).granted == granted
    assert len(list((tmp_path / "claims").iterdir())) == 1


def test_a_layer_that_two_looks_find_at_the_same_moment_has_one_finding(root):
    def found(when: str) -> FoundLayer:
        return FoundLayer(layer="sae@h.0", address="h.0", found=when, hookpoint="h.0")

    records = FoundLayers(Store(root), "study")
    busy = Claim(root, "discovery/study/claims/registering", ["sae@h.0"])
    assert (records.add(found("1")), records.layers()) == (None, [])
    busy.release()
    assert records.add(found("2")) == found("2")
    assert records.add(found("3")) == found("2")
    assert records.layers() == [found("2")]
