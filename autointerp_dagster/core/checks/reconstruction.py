"""Coders that are not at their place: they fire too much or too little, or rebuild nothing."""

from collections.abc import Iterable, Mapping

from autointerp_dagster.core.checks.findings import Findings, Rebuilt
from autointerp_dagster.core.checks.outcome import Outcome
from autointerp_dagster.core.types import Cell


def reconstruction(
    places: Mapping[Cell, Findings], most_fvu: float | None, most_factor: float | None
) -> Outcome:
    """Whether coders fire as their files say, and rebuild what they read.

    Both are means over some hundred tokens, so bounds should leave room; every cell of a layer says
    the same. A cell that says nothing (an older version made it, its coder is not from files, or
    there were too few tokens) passes.

    Args:
        places: What was measured.
        most_fvu: Null: not asked.
        most_factor: Between the L0 measured and the one wanted; in either direction where the files
            say what it is, only upwards where it is a bound; null: not asked.
    """
    layers = {str(cell.layer): one.rebuilt for cell, one in places.items() if one.rebuilt}
    faults: dict[str, list[str]] = {}
    for layer, one in layers.items():
        if most_fvu is not None and one.fvu is not None and not one.fvu <= most_fvu:
            faults.setdefault(layer, []).append(f"fvu {one.fvu:.3g}")
        if most_factor is not None and one.factor > most_factor:
            faults.setdefault(layer, []).append(f"L0 {one.l0:.3g}, where {_wanted(one)}")
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


def _wanted(one: Rebuilt) -> str:
    if one.expected_l0 is None:
        return f"it can be {one.most_l0:g}"
    return f"its files say {one.expected_l0:g}"


def _range(name: str, values: Iterable[float]) -> str:
    known = sorted(values)
    if not known:
        return f"{name} unknown"
    same = f"{known[0]:.3g}" == f"{known[-1]:.3g}"
    return f"{name} {known[0]:.3g}" + ("" if same else f" to {known[-1]:.3g}")
