"""Coders that are not at their place: they fire too much or too little, or rebuild nothing."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from autointerp_dagster.core.checks.outcome import Outcome


class Rebuilt(NamedTuple):
    """What was measured of one layer's coder from files; null: unknown."""

    l0: float | None
    """Latents that fire on a token, on average."""
    expected_l0: float | None
    """As its files say, or its activation bounds it."""
    fvu: float | None
    """Fraction of variance unexplained; null for a transcoder, too."""

    @property
    def factor(self) -> float:
        """By how much L0 differs, >= 1; 1 where one of the two is unknown."""
        if self.l0 is None or not self.expected_l0:
            return 1.0
        ratio = self.l0 / self.expected_l0
        return max(ratio, 1 / ratio) if ratio > 0 else float("inf")


def reconstruction(
    layers: Mapping[str, Rebuilt], most_fvu: float | None, most_factor: float | None
) -> Outcome:
    """Whether coders fire as their files say, and rebuild what they read.

    Both are means over so many tokens that they count as exact.

    Args:
        layers: By layer.
        most_fvu: Null: not asked.
        most_factor: Between the L0 measured and that of the files, in either direction; null: not
            asked.
    """
    faults: dict[str, list[str]] = {}
    for layer, one in layers.items():
        if most_fvu is not None and one.fvu is not None and not one.fvu <= most_fvu:
            faults.setdefault(layer, []).append(f"fvu {one.fvu:.3g}")
        if most_factor is not None and one.factor > most_factor:
            faults.setdefault(layer, []).append(
                f"L0 {one.l0:.3g}, where its files say {one.expected_l0:g}"
            )
    bounds = [] if most_fvu is None else [f"fvu of at most {most_fvu:g}"]
    if most_factor is not None:
        bounds.append(f"L0 within {most_factor:g} times what the files say")
    fvu = {f"fvu {layer}": one.fvu for layer, one in layers.items() if one.fvu is not None}
    l0 = {f"l0 {layer}": one.l0 for layer, one in layers.items() if one.l0 is not None}
    return Outcome(
        "reconstruction",
        not faults,
        f"{_range('fvu', fvu.values())} and {_range('L0', l0.values())}, {len(layers)} coders",
        " and ".join(bounds),
        "Are these files for this model and hookpoint (reads, revision, dtype)? If so, raise "
        "checks.fvu or checks.l0.",
        {**fvu, **l0},
        {layer: ", ".join(of) for layer, of in faults.items()},
    )


def _range(name: str, values: Iterable[float]) -> str:
    known = sorted(values)
    if not known:
        return f"{name} unknown"
    same = f"{known[0]:.3g}" == f"{known[-1]:.3g}"
    return f"{name} {known[0]:.3g}" + ("" if same else f" to {known[-1]:.3g}")
