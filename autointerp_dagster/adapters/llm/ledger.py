"""Money: what remote models may cost, what they have cost, and the hard stop between the two.

1. Before a call its cost is estimated from above and reserved.
2. The call is made only if what was spent, what is reserved and the estimate stay in every limit.
3. The real usage takes the reservation's place; where nobody knows it (no answer came in time, or
   an unreadable one), the estimate does, for the call may have been paid.
4. What this session spent is kept in the store, so that the next run of the study knows.
"""

import json
import logging
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import ceil
from typing import Any, Literal, NamedTuple, Self

from upath import UPath

from autointerp_dagster.adapters.bulk import StoredFile, list_files, read_files
from autointerp_dagster.adapters.durable import write_durably
from autointerp_dagster.adapters.remote import is_local
from autointerp_dagster.core.config.models import RemoteLLMConfig
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.llm import Request, Usage, estimated_tokens
from autointerp_dagster.study import BudgetConfig

SAFETY = 1.3
"""Factor on estimated prompt tokens; covers text down to 2.7 bytes per token."""
WRITE_EVERY_S = (1.0, 10.0)
"""How often spending is written, to a local store and to a remote one; so the next."""
READ_EVERY_S = (10.0, 60.0)
TOKENS_PER_MESSAGE = 8
"""What a chat template puts around a message, at most as a rule."""

Grant = Literal["granted", "wait", "exhausted"]
"""``wait``: there may be room once calls under way have ended, which often cost less than was
reserved; ``exhausted``: no call is made any more."""

logger = logging.getLogger(__name__)


class Cost(NamedTuple):
    """What calls cost or may cost."""

    usd: float
    tokens: int
    """Prompt and completion together."""

    def plus(self, other: "Cost") -> "Cost":
        """The sum of both."""
        return Cost(self.usd + other.usd, self.tokens + other.tokens)


class Spent(NamedTuple):
    """What other sessions have spent, as far as the store knows."""

    run: Cost
    study: Cost
    """Those of the run included."""


NOTHING = Cost(0.0, 0)
FREE = Usage()


class SpendFile:
    """What one session spent: ``<root>/spend/<study>/<run_id>/<session>.json``."""

    def __init__(self, root: UPath, study: str, run_id: str) -> None:
        """Describe the file of a new session; nothing is read or written yet."""
        self._root, self._folder = root, f"spend/{study}"
        self._run_id = run_id
        self._path = root / self._folder / run_id / f"{uuid.uuid4().hex}.json"
        self.is_local = is_local(root)

        self._read: dict[str, tuple[StoredFile, Cost]] = {}
        """Of files as they were listed when last read: a session that ended never changes."""

    def write(self, usage: Usage) -> None:
        """Replace the file, atomically, by all that this session has spent.

        Raises:
            StoreError: If the store cannot be written.
        """
        try:
            write_durably(self._path, json.dumps(asdict(usage)).encode())
        except OSError as error:
            raise StoreError(
                f"{self._path}: what was spent cannot be written: {error}. Free space or fix the "
                "access and run again."
            ) from error

    def read_others(self) -> Spent:
        """The sums over all other sessions of the run and of the study.

        Raises:
            StoreError: If a session's file is not readable.
        """
        run = study = NOTHING
        for path, cost in self._costs().items():
            _, run_id, session = path.rsplit("/", maxsplit=2)
            if session != self._path.name:
                study = study.plus(cost)
                run = run.plus(cost) if run_id == self._run_id else run
        return Spent(run, study)

    def _costs(self) -> dict[str, Cost]:
        """By path. One listing, and one request for all files that are new or have changed."""
        listed = {
            path: file
            for path, file in list_files(self._root, self._folder).items()
            if path.endswith(".json")
        }
        known = {path: of for path, of in self._read.items() if of[0] == listed.get(path)}
        new = [path for path in listed if path not in known]
        for path, content in read_files(self._root, new):
            if content is not None:
                known[path] = (listed[path], _cost_in(f"{self._root}/{path}", content))
        self._read = known
        return {path: cost for path, (_, cost) in known.items()}


def _cost_in(path: str, content: bytes) -> Cost:
    try:
        usage = Usage(**json.loads(content))
        return Cost(float(usage.usd), int(usage.n_tokens))
    except (ValueError, TypeError, OverflowError) as error:
        raise StoreError(
            f"{path}: not a readable record of spending ({type(error).__name__}). Correct it, or "
            "delete it if what it counted should not count against the budget any more."
        ) from error


class _Limit(NamedTuple):
    """One of the budget's figures."""

    name: str
    usd: float | None
    tokens: int | None

    def excess(self, cost: Cost) -> str | None:
        """The limit that ``cost`` is above, in words; null if it is within."""
        if self.usd is not None and cost.usd > self.usd:
            return f"budget.{self.name}usd: {self.usd:.6g} USD"
        if self.tokens is not None and cost.tokens > self.tokens:
            return f"budget.{self.name}tokens: {self.tokens:,} tokens"
        return None


class Ledger:
    """The budget of a run, shared by all its models in this process; safe to use from many threads.

    Limits are never exceeded by more than estimates were too low. Other processes' spending is
    known with a delay (their writing plus this one's reading: some 12 seconds, 70 where the store
    is remote), so what they spend together in that time comes on top.
    A process that is killed (``kill -9``) has recorded its spending but for the last second
    (ten where the store is remote); calls under way at that moment are not counted.
    """

    def __init__(self, budget: BudgetConfig, spend: SpendFile | None = None) -> None:
        """Open the books; reads what other sessions spent if there is a limit.

        Args:
            budget: The limits.
            spend: Where this session's spending is kept; null: nowhere, and only it counts.

        Raises:
            StoreError: If the record of another session is not readable.
        """
        run = _Limit("", budget.usd, budget.tokens)
        study = _Limit("study_", budget.study_usd, budget.study_tokens)
        self._run, self._study = run, study
        self.has_limit = any(figure is not None for figure in (*run[1:], *study[1:]))
        """Whether anything is limited; if not, spending is only kept."""
        self._spend = spend
        self._others = Spent(NOTHING, NOTHING)
        if spend is not None and self.has_limit:
            self._others = spend.read_others()
        self._lock = threading.Lock()
        self._usage = Usage()
        self._all_reserved = NOTHING
        self._n_reservations = 0
        self._is_exhausted = False
        self._is_dirty = False
        self._end = threading.Event()
        self._keeper: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def usage(self) -> Usage:
        """What this session spent, on all models."""
        return self._usage

    @property
    def is_exhausted(self) -> bool:
        """Whether a limit has stopped all calls."""
        return self._is_exhausted

    def account(self, prices: RemoteLLMConfig) -> "Account":
        """The books as the model with these prices sees them."""
        return Account(self, prices)

    def reserve(self, cost: Cost) -> Grant:
        """Set ``cost`` aside if every limit allows for it.

        The first cost that would not fit even if nothing were reserved stops all calls, so that
        what is left out is not chosen by its size. That is logged once.
        """
        if not self.has_limit:
            return "granted"
        with self._lock:
            if self._is_exhausted:
                return "exhausted"
            excess = self._excess(cost)
            if excess is not None:
                self._is_exhausted = True
                spent = self._spent()
                logger.warning(
                    "%s would be exceeded: spent %.6g USD and %s tokens in this run, %.6g USD and "
                    "%s tokens in this study; the next call may cost %.6g USD and %s tokens. No "
                    "call is made any more. Raise the budget and run again: nothing is paid twice.",
                    *(excess, spent.run.usd, f"{spent.run.tokens:,}", spent.study.usd),
                    *(f"{spent.study.tokens:,}", cost.usd, f"{cost.tokens:,}"),
                )
                return "exhausted"
            if self._excess(self._all_reserved.plus(cost)) is not None:
                return "wait"
            self._n_reservations += 1
            self._all_reserved = self._all_reserved.plus(cost)
            return "granted"

    def release(self, cost: Cost, usage: Usage) -> None:
        """Give back what was granted, and book what was paid instead.

        Args:
            cost: As reserved.
            usage: Of the call; zeros only if it surely cost nothing, see :meth:`Account.dearest`.
        """
        with self._lock:
            if self.has_limit:
                self._n_reservations -= 1
                left = Cost(
                    self._all_reserved.usd - cost.usd, self._all_reserved.tokens - cost.tokens
                )
                self._all_reserved = left if self._n_reservations else NOTHING  # no rounding stays
            if usage == FREE:
                return
            self._usage += usage
            self._is_dirty = True
            if self._spend is not None and self._keeper is None:
                self._keeper = threading.Thread(
                    target=self._keep, args=(self._spend,), name="spend", daemon=True
                )
                self._keeper.start()

    def close(self) -> None:
        """Keep what was spent.

        Raises:
            StoreError: If the store cannot be written.
        """
        self._end.set()
        if self._keeper is not None:
            self._keeper.join()
        if self._spend is not None and self._is_dirty:
            self._write(self._spend)

    def _spent(self) -> Spent:
        own = Cost(self._usage.usd, self._usage.n_tokens)
        return Spent(self._others.run.plus(own), self._others.study.plus(own))

    def _excess(self, more: Cost) -> str | None:
        spent = self._spent()
        return self._run.excess(spent.run.plus(more)) or self._study.excess(spent.study.plus(more))

    def _keep(self, spend: SpendFile) -> None:
        """Write what was spent, and read what others spent, until the end."""
        write_every_s = WRITE_EVERY_S[not spend.is_local]
        read_every_s = READ_EVERY_S[not spend.is_local]
        read = time.monotonic()
        is_failing = False
        while not self._end.wait(write_every_s):
            try:
                if self._is_dirty:
                    self._write(spend)
                if self.has_limit and time.monotonic() - read >= read_every_s:
                    read = time.monotonic()
                    self._others = spend.read_others()
                is_failing = False
            except Exception as error:  # noqa: BLE001 the thread must live; close() raises it
                if not is_failing:
                    logger.warning("what was spent cannot be kept or read now: %s", error)
                is_failing = True

    def _write(self, spend: SpendFile) -> None:
        with self._lock:
            usage, self._is_dirty = self._usage, False
        try:
            spend.write(usage)
        except BaseException:
            self._is_dirty = True
            raise


class Account:
    """A ledger as one model uses it: costs by that model's prices."""

    def __init__(self, ledger: Ledger, prices: RemoteLLMConfig) -> None:
        self._ledger = ledger
        self._prices = prices

    @property
    def is_exhausted(self) -> bool:
        """Whether a limit has stopped all calls of all models."""
        return self._ledger.is_exhausted

    def estimate(self, requests: Sequence[Request]) -> Cost:
        """What asking these may cost at most: no prefix cache, every answer at its full length.

        Nothing if there is no limit. Prompts are estimated by their length, with a factor of
        safety: a tokenizer would take more time than all else that is done for a request.
        """
        if not self._ledger.has_limit:
            return NOTHING
        usage = self.dearest(requests)
        return Cost(usage.usd, usage.n_tokens)

    def dearest(self, requests: Sequence[Request]) -> Usage:
        """What asking these may cost at most, limit or not; what to book where nobody knows more.

        ``max_tokens`` and the number of answers in the model's ``extra_body`` count, for they win.
        """
        prompt = sum(map(_prompt_tokens, requests))
        answers = sum(_longest_answer(request, self._prices.extra_body) for request in requests)
        usd = self._prices.usd_of(prompt, 0, answers)
        return Usage(prompt, 0, answers, usd, estimated_tokens=prompt + answers)

    def reserve(self, cost: Cost) -> Grant:
        """See :meth:`Ledger.reserve`."""
        return self._ledger.reserve(cost)

    def release(self, cost: Cost, usage: Usage) -> None:
        """See :meth:`Ledger.release`."""
        self._ledger.release(cost, usage)


def _prompt_tokens(request: Request) -> int:
    texts = [message.content for message in request.messages]
    if request.prompt is not None:
        texts.append(request.prompt)
    return TOKENS_PER_MESSAGE * len(texts) + ceil(SAFETY * sum(map(estimated_tokens, texts)))


def _longest_answer(request: Request, extra: Mapping[str, Any]) -> int:
    """The most tokens that may be written, over all answers that ``extra`` asks for."""
    longest = max(
        _count(extra, "max_tokens") or request.max_tokens, _count(extra, "max_completion_tokens")
    )
    return longest * max(1, _count(extra, "n"), _count(extra, "best_of"))


def _count(extra: Mapping[str, Any], name: str) -> int:
    value = extra.get(name)
    return int(value) if isinstance(value, int | float) else 0
