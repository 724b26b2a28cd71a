import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st
from llm_requests import ask, remote
from upath import UPath

from autointerp_dagster.adapters.llm import ledger as ledger_module
from autointerp_dagster.adapters.llm.ledger import Cost, Ledger, SpendFile
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.llm import Usage
from autointerp_dagster.study import BudgetConfig

PRICES = remote("http://host/v1", usd_per_1m_prompt=1.0, usd_per_1m_completion=2.0)


def paid(usd: float, tokens: int) -> Usage:
    return Usage(prompt_tokens=tokens, usd=float(usd))


def spend(store: Path, run: str = "run", study: str = "study") -> SpendFile:
    return SpendFile(UPath(store), study, run)


def test_an_estimate_counts_the_whole_prompt_and_the_longest_answer():
    # "Count." is 6 bytes = 2 tokens, "question 0" 10 bytes = 3 tokens: 5 * 1.3 = 6.5, so 7, and 8
    # for each of 2 messages make 23 prompt tokens; 64 for the answer.
    account = Ledger(BudgetConfig(tokens=10)).account(PRICES)
    assert account.estimate([ask("question 0")]) == (pytest.approx(151e-6), 23 + 64)
    assert account.estimate([ask("question 0"), ask("question 1")]).tokens == 2 * 87


@pytest.mark.parametrize(
    ("extra", "answers"),
    [
        ({"max_tokens": 4096}, 4096),
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 300}, 300),
        ({"max_completion_tokens": 30}, 64),  # which of both counts is the server's choice
        ({"n": 3}, 3 * 64),
        ({"max_tokens": 10, "n": 2, "best_of": 4}, 4 * 10),
        ({"max_tokens": None, "n": "many"}, 64),
    ],
)
def test_an_estimate_counts_what_the_body_will_really_ask_for(extra, answers):
    prices = PRICES.model_copy(update={"extra_body": extra})
    account = Ledger(BudgetConfig(tokens=10)).account(prices)
    assert account.estimate([ask("question 0")]).tokens == 23 + answers


def test_what_nobody_knows_is_booked_as_estimated_at_the_highest_price_limit_or_not():
    for budget in (BudgetConfig(), BudgetConfig(tokens=10)):
        usage = Ledger(budget).account(PRICES).dearest([ask("question 0")])
        assert (usage.prompt_tokens, usage.completion_tokens, usage.estimated_tokens) == (
            23,
            64,
            87,
        )
        assert usage.usd == pytest.approx(151e-6)


def test_without_a_limit_nothing_is_estimated_and_everything_granted():
    ledger = Ledger(BudgetConfig())
    account = ledger.account(PRICES)
    assert account.estimate([ask("question 0")]) == Cost(0.0, 0)
    assert account.reserve(Cost(1e9, 10**12)) == "granted"
    account.release(Cost(1e9, 10**12), paid(3.0, 5))
    assert ledger.usage == paid(3.0, 5)


def test_a_call_waits_for_reservations_and_is_refused_only_if_they_cannot_matter():
    ledger = Ledger(BudgetConfig(tokens=100))
    assert ledger.reserve(Cost(0, 60)) == "granted"
    assert ledger.reserve(Cost(0, 60)) == "wait"
    assert ledger.reserve(Cost(0, 40)) == "granted"
    ledger.release(Cost(0, 60), paid(0, 10))  # cheaper than feared
    assert ledger.reserve(Cost(0, 50)) == "granted"  # 10 + 40 + 50
    ledger.release(Cost(0, 40), Usage())  # refused: nothing paid
    assert ledger.reserve(Cost(0, 91)) == "exhausted"  # 10 + 91
    assert ledger.reserve(Cost(0, 1)) == "exhausted"  # else small calls would be preferred
    assert ledger.is_exhausted


@pytest.mark.parametrize(
    ("budget", "name"),
    [
        ({"usd": 1.0}, "budget.usd: 1 USD"),
        ({"tokens": 1000}, "budget.tokens: 1,000 tokens"),
        ({"study_usd": 2.5}, "budget.study_usd: 2.5 USD"),
        ({"study_tokens": 1500}, "budget.study_tokens: 1,500 tokens"),
    ],
)
def test_each_limit_stops_alone_and_says_so_once_with_the_amounts(tmp_path, caplog, budget, name):
    for run, usd, tokens in [("run", 0.5, 500), ("earlier", 1.0, 400)]:
        spend(tmp_path, run).write(paid(usd, tokens))
    caplog.set_level(logging.WARNING)
    with Ledger(BudgetConfig(**budget), spend(tmp_path)) as ledger:
        assert ledger.reserve(Cost(0.4, 400)) == "granted"
        ledger.release(Cost(0.4, 400), paid(0.4, 400))
        # 0.9 USD and 900 tokens in this run, 1.9 USD and 1,300 tokens in the study.
        assert ledger.reserve(Cost(0.7, 300)) == "exhausted"
        assert ledger.reserve(Cost(0.7, 300)) == "exhausted"
    (said,) = caplog.messages
    assert said.startswith(name)
    assert "spent 0.9 USD and 900 tokens in this run, 1.9 USD and 1,300 tokens in this" in said


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


class Books:
    """A ledger, and calls that are granted and not yet ended."""

    def __init__(self, budget: BudgetConfig) -> None:
        self.ledger = Ledger(budget)
        self.under_way: list[Cost] = []

    def ask(self, cost: Cost) -> None:
        if self.ledger.reserve(cost) == "granted":
            self.under_way.append(cost)

    def end(self, place: int, share: float) -> None:
        if self.under_way:
            cost = self.under_way.pop(place % len(self.under_way))
            self.ledger.release(cost, paid(cost.usd * share, int(cost.tokens * share)))


COSTS = st.builds(Cost, st.floats(0, 50), st.integers(0, 50))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), COSTS),
        st.tuples(st.just("end"), st.integers(0, 20), st.floats(0, 1)),
    ),
    max_size=60,
)


@given(st.floats(0, 200), st.integers(0, 200), STEPS)
def test_no_interleaving_of_calls_exceeds_a_limit(usd, tokens, steps):
    books = Books(BudgetConfig(usd=usd, tokens=tokens))
    for name, *arguments in steps:
        getattr(books, name)(*arguments)
        assert books.ledger.usage.usd <= usd + 1e-9
        assert books.ledger.usage.n_tokens <= tokens
    while books.under_way:
        books.end(0, 1.0)
    assert books.ledger.usage.usd <= usd + 1e-9
    assert books.ledger.usage.n_tokens <= tokens


def test_many_threads_together_stay_within_a_limit():
    ledger = Ledger(BudgetConfig(tokens=1000))

    def work() -> None:
        while (grant := ledger.reserve(Cost(0, 10))) != "exhausted":
            if grant == "granted":
                ledger.release(Cost(0, 10), paid(0, 7))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # The last call is made at 990 or less, and only the next would be too many.
    assert 990 < ledger.usage.n_tokens <= 997


def test_what_was_spent_is_there_for_the_next_run_of_the_study_only(tmp_path):
    with Ledger(BudgetConfig(), spend(tmp_path, "first")) as ledger:
        ledger.release(Cost(0, 0), paid(1.0, 100))
        ledger.release(Cost(0, 0), paid(2.0, 200))
    with Ledger(BudgetConfig(), spend(tmp_path, "other", "elsewhere")) as ledger:
        ledger.release(Cost(0, 0), paid(50.0, 5000))
    found = spend(tmp_path, "second").read_others()
    assert (found.run, found.study) == (Cost(0.0, 0), Cost(3.0, 300))
    assert spend(tmp_path, "first").read_others().run == Cost(3.0, 300)
    (path,) = (tmp_path / "spend" / "study").rglob("*.*")
    assert path.parent.name == "first"
    assert json.loads(path.read_bytes())["usd"] == 3.0


def test_a_session_that_paid_nothing_leaves_no_file(tmp_path):
    with Ledger(BudgetConfig(usd=1.0), spend(tmp_path)) as ledger:
        ledger.release(Cost(0, 0), Usage())
    assert not (tmp_path / "spend").exists()


def test_a_remote_store_keeps_what_was_spent():
    root = UPath("memory://store-of-spending")
    with Ledger(BudgetConfig(), SpendFile(root, "study", "run")) as ledger:
        ledger.release(Cost(0, 0), paid(1.5, 10))
    assert SpendFile(root, "study", "run").read_others().study == Cost(1.5, 10)


class OddError(Exception):
    """Of a kind that only the client of a remote store knows."""


class OddStore:
    """What a store in memory is asked; it fails while ``is_down``, as some remote stores do."""

    def __init__(self) -> None:
        self.root = UPath(f"memory://odd-{uuid.uuid4().hex}")
        self.read: list[str] = []
        self.is_down = False

    def note(self, path: str, mode: str) -> None:
        if self.is_down:
            raise OddError("no endpoint")
        if mode == "rb":
            self.read.append(Path(path).parent.name)


@pytest.fixture
def odd_store(monkeypatch) -> OddStore:
    store = OddStore()
    open_, find, cat = MemoryFileSystem._open, MemoryFileSystem.find, MemoryFileSystem.cat_file

    def opened(self, path, mode="rb", **options):
        store.note(path, mode)
        return open_(self, path, mode, **options)

    def found(self, path, **options):
        store.note(path, "list")
        return find(self, path, **options)

    def read(self, path, **options):
        store.note(path, "rb")
        return cat(self, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", read)
    monkeypatch.setattr(MemoryFileSystem, "_open", opened)
    monkeypatch.setattr(MemoryFileSystem, "find", found)
    return store


def test_only_what_is_new_or_has_changed_is_read_again(odd_store):
    files = [SpendFile(odd_store.root, "study", run) for run in ("a", "b", "c")]
    for file in files:
        file.write(paid(1.0, 10))
    mine = SpendFile(odd_store.root, "study", "mine")
    assert mine.read_others().study == Cost(3.0, 30)
    odd_store.read.clear()
    files[1].write(paid(2.0, 20))
    SpendFile(odd_store.root, "study", "d").write(paid(4.0, 40))
    assert mine.read_others().study == Cost(1.0 + 2.0 + 1.0 + 4.0, 80)
    assert sorted(odd_store.read) == ["b", "d"]
    assert mine.read_others().study == Cost(8.0, 80)
    assert len(odd_store.read) == 2


def test_errors_of_a_remote_stores_own_kind_are_store_errors(odd_store):
    file = SpendFile(odd_store.root, "study", "run")
    file.write(paid(1.0, 1))
    assert SpendFile(odd_store.root, "study", "next").read_others().study == Cost(1.0, 1)
    odd_store.is_down = True
    with pytest.raises(StoreError, match="cannot be written: the store failed with OddError"):
        file.write(paid(1.0, 1))
    with pytest.raises(StoreError, match="cannot be looked at: the store failed with OddError"):
        SpendFile(odd_store.root, "study", "next").read_others()


def test_the_keeper_outlives_a_store_that_fails_and_says_so_each_time_anew(
    odd_store, monkeypatch, caplog
):
    monkeypatch.setattr(ledger_module, "WRITE_EVERY_S", (0.01, 0.01))
    ledger = Ledger(BudgetConfig(), SpendFile(odd_store.root, "study", "run"))
    for n_said in (1, 2):
        odd_store.is_down = True
        ledger.release(Cost(0, 0), paid(1.0, 1))
        wait_until(lambda n_said=n_said: caplog.text.count("cannot be kept") == n_said)
        odd_store.is_down = False
        found = SpendFile(odd_store.root, "study", "next")
        wait_until(lambda n_said=n_said, found=found: found.read_others().study.usd == n_said)
    ledger.close()
    assert caplog.text.count("cannot be kept") == 2


def test_a_damaged_record_of_spending_is_named(tmp_path):
    path = tmp_path / "spend" / "study" / "run" / "session.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"usd": 1')
    with pytest.raises(StoreError, match=r"session\.json: not a readable record"):
        Ledger(BudgetConfig(usd=1.0), spend(tmp_path))


def test_a_store_that_cannot_be_written_is_said_at_the_end(tmp_path):
    (tmp_path / "spend").write_text("a file in the way")
    ledger = Ledger(BudgetConfig(), spend(tmp_path))
    ledger.release(Cost(0, 0), paid(1.0, 1))
    with pytest.raises(StoreError, match="cannot be written"):
        ledger.close()


SPENDS = """
import sys, time
from upath import UPath
from autointerp_dagster.adapters.llm.ledger import Cost, Ledger, SpendFile
from autointerp_dagster.core.llm import Usage
from autointerp_dagster.study import BudgetConfig
ledger = Ledger(BudgetConfig(), SpendFile(UPath(sys.argv[1]), "study", "run"))
for _ in range(5):
    ledger.release(Cost(0, 0), Usage(prompt_tokens=10, usd=1.0))
time.sleep(60)
"""


def test_a_killed_process_has_recorded_what_it_spent_before_the_last_second(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SPENDS, str(tmp_path)])
    while not list((tmp_path / "spend").rglob("*.json")):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert spend(tmp_path, "next").read_others().study == Cost(5.0, 50)
