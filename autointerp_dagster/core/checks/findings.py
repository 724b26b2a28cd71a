"""What the tables of one place say to the checks: measured once, when the place is made.

A manifest keeps it, so whoever reads the place can judge it against bounds of his own.
"""

from collections.abc import Mapping
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from autointerp_dagster.core.checks.shares import Counts
from autointerp_dagster.core.types import Cell


class Rebuilt(NamedTuple):
    """What was measured of one layer's coder from files; null: unknown."""

    l0: float | None = None
    """Latents that fire on a token, on average."""
    expected_l0: float | None = None
    """As its files say."""
    most_l0: float | None = None
    """What its activation bounds L0 by, such as the k of TopK, where the files do not say more."""
    fvu: float | None = None
    """Fraction of variance unexplained; null for a transcoder, too."""
    n_tokens: int = 0
    """What it was measured on, without outliers."""
    n_outliers: int = 0
    """Tokens left out because of their norm."""

    @property
    def factor(self) -> float:
        """By how much L0 is not what it should be, >= 1; 1 where one of the two is unknown."""
        wanted = self.expected_l0 or self.most_l0
        if self.l0 is None or not wanted:
            return 1.0
        ratio = self.l0 / wanted
        if self.expected_l0 is None:
            return max(ratio, 1.0)
        return max(ratio, 1 / ratio) if ratio > 0 else float("inf")


class Findings(BaseModel):
    """Of one place of a stage."""

    model_config = ConfigDict(
        frozen=True, use_attribute_docstrings=True, ser_json_inf_nan="strings"
    )

    n_tables: int = 0
    table_fault: str | None = None
    """The first table that is not as declared; then nothing else was measured."""
    n_windows: int = 0
    n_wrong_splits: int = 0
    """Windows in a split that is not their document's."""
    split_fault: str | None = None
    failed: dict[str, Counts] = {}
    """By explainer (empty: without one): answers that are unusable among those asked for."""
    reasons: dict[str, int] = {}
    """Of those, by reason."""
    scored: dict[str, Counts] = {}
    """By scorer and explainer: latents with a score."""
    floor: dict[str, Counts] = {}
    """By explainer: what the judge gets right under another latent's explanation."""
    rebuilt: Rebuilt | None = None


def grouped(by_place: Mapping[Cell, Mapping[str, Counts]]) -> dict[str, dict[Cell, Counts]]:
    """Turned round: by explainer or scorer, what was counted at each place."""
    names = dict.fromkeys(name for of in by_place.values() for name in of)
    return {
        name: {place: of[name] for place, of in by_place.items() if name in of} for name in names
    }
