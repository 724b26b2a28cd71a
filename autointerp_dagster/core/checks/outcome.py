"""What a check found: enough for one line on a terminal and for a page in the UI."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

CheckName = Literal[
    "schema", "splits_disjoint", "failed_rate", "share_scored", "judge_floor", "reconstruction"
]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One check of one stage, over all places of a run."""

    name: CheckName
    passed: bool
    found: str
    """Of all places together, in words."""
    wanted: str
    advice: str
    """What to do if it did not pass."""
    numbers: Mapping[str, int | float] = field(default_factory=dict)
    """What the words say, for plots over time."""
    offenders: Mapping[str, str] = field(default_factory=dict)
    """By place (and scorer, where a stage measures several) that is itself beyond the bound: what
    was found there; the worst first."""

    @property
    def line(self) -> str:
        """Everything in one line: found, where, wanted, what to do."""
        where = ""
        if self.offenders:
            place, found = next(iter(self.offenders.items()))
            more = len(self.offenders) - 1
            where = f"; {place}: {found}" + (f", and {more} more" if more else "")
        return f"{self.name}: found {self.found}{where}; wanted {self.wanted}. {self.advice}"
