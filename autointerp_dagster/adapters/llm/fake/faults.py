"""What can go wrong with a language model behind HTTP, and when it does so in a fake server."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Fault = Literal[
    "403", "429", "500", "503",
    "reset", "hang", "truncated", "malformed", "html", "html_502", "error_object",
    "prose", "short", "refusal",
]  # fmt: skip
"""First statuses, then broken responses, then answers that are none.

``truncated``: the connection ends before the announced length; ``malformed``: not JSON; ``html``: a
page with status 200, ``html_502`` with its own; ``error_object``: a server's error with status 200;
``prose``: an answer without a list; ``short``: one label too few.
"""

FAULTS: tuple[Fault, ...] = get_args(Fault)

Schedule = Callable[[int], Fault | None]
"""From the number of a request (0, 1, ... in order of arrival) to what goes wrong with it."""

Body = Mapping[str, Any]
"""A request's JSON."""

_KINDS: dict[str, Fault] = {kind: kind for kind in FAULTS}
_LABELS = re.compile(r"\[[01, ]*\]")

PROSE = "I would say that the first text fits best."
REFUSAL = "I cannot help with that."


@dataclass(frozen=True)
class SeededFaults:
    """Faults drawn by what is asked and how often it was, not by the order of arrival.

    The same request sent again is drawn anew, so it is as likely to succeed as any other.
    """

    rates: Mapping[Fault, float] = field(default_factory=dict)
    """Probability of each kind; their sum is at most 1."""
    seed: int = 0
    permanent: Callable[[Body], Fault | None] = lambda _: None
    """What goes wrong with a request however often it is sent."""

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.rates if kind not in FAULTS]
        if unknown:
            raise ValueError(f"faults: got {unknown[0]!r}, wanted one of {', '.join(FAULTS)}.")
        if not 0 <= sum(self.rates.values()) <= 1:
            raise ValueError(f"faults: the rates {dict(self.rates)} sum to more than 1.")

    def fault(self, body: Body, digest: str, n_before: int) -> Fault | None:
        """What goes wrong with a request.

        Args:
            body: The request.
            digest: Hash of the request.
            n_before: How often the same request came before.
        """
        fault = self.permanent(body)
        if fault is not None:
            return fault
        lot = uniform(f"{self.seed}/{digest}/{n_before}")
        for kind, rate in self.rates.items():
            if lot < rate:
                return kind
            lot -= rate
        return None


def uniform(address: str) -> float:
    """A number in [0, 1) that depends on ``address`` alone."""
    digest = hashlib.blake2b(address.encode(), digest_size=7).digest()
    return int.from_bytes(digest) / 2**56


def read_rates(text: str) -> dict[Fault, float]:
    """Rates as a command line names them.

    Args:
        text: E.g. ``429:0.05,reset:0.01``; empty: none.

    Raises:
        ValueError: If a kind or a rate is none.
    """
    rates: dict[Fault, float] = {}
    for item in filter(None, text.split(",")):
        name, _, rate = item.partition(":")
        if name not in _KINDS:
            raise ValueError(f"faults: got {name!r}, wanted one of {', '.join(FAULTS)}.")
        rates[_KINDS[name]] = float(rate)
    return rates


def spoiled(text: str, fault: Fault | None) -> str:
    """The text of an answer with a fault of format; as it is with any other."""
    if fault == "prose":
        return PROSE
    if fault == "short":
        return json.dumps(json.loads(text)[:-1]) if _LABELS.fullmatch(text) else ""
    return text
