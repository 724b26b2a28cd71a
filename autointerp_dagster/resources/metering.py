"""What the language model behind a step was paid, what its answers cost, and what it offers."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, Protocol

from autointerp_dagster.adapters.manifests import Part
from autointerp_dagster.core.llm import Usage
from autointerp_dagster.core.metrics import StageCost
from autointerp_dagster.core.types import Place
from autointerp_dagster.resources.stage_inputs import StageInputs
from autointerp_dagster.study.stages import STAGES

COST = "cost"
"""Key of a manifest's summary: what the answers behind it cost, whichever run paid for them."""


class Meter(Protocol):
    """A model that counts; a ``JournaledLLM`` is one."""

    @property
    def usage(self) -> Usage:
        """What was paid so far in this step."""
        ...

    @property
    def cost(self) -> Usage:
        """What all answers so far cost, whichever run paid for them."""
        ...

    @property
    def capabilities(self) -> Mapping[str, bool] | None:
        """What it was seen to offer; null before its first answer."""
        ...


class Unmetered:
    """No language model is asked, or nobody wants to know."""

    usage = Usage()
    cost = Usage()
    capabilities: Mapping[str, bool] | None = None


UNMETERED = Unmetered()


class Together:
    """Several models as one :class:`Meter`; a model that is named twice counts once."""

    def __init__(self, meters: Iterable[Meter]) -> None:
        self._meters = tuple({id(meter): meter for meter in meters}.values())

    @property
    def usage(self) -> Usage:
        """Of all together."""
        return sum((meter.usage for meter in self._meters), start=Usage())

    @property
    def cost(self) -> Usage:
        """Of all together."""
        return sum((meter.cost for meter in self._meters), start=Usage())

    @property
    def capabilities(self) -> Mapping[str, bool] | None:
        """What all that have answered offer; null before the first answer."""
        known = [m.capabilities for m in self._meters if m.capabilities is not None]
        if not known:
            return None
        return {name: all(c.get(name, False) for c in known) for c in known for name in c}


def spent(meter: Meter) -> str:
    """Spend in a few characters, for a progress bar."""
    usage = meter.usage
    return f"{usage.n_tokens / 1000:.0f}k tokens ${usage.usd:.2f}" if usage.n_tokens else ""


def cost_of(parts: Iterable[Part]) -> dict[str, Any]:
    """The costs of a cell's parts together, as its summary keeps them; empty if there are none."""
    total = sum((Usage(**part.cost) for part in parts), start=Usage())
    return {COST: asdict(total)} if total != Usage() else {}


def costs_behind(stage: StageInputs, place: Place) -> dict[str, StageCost]:
    """What the answers behind all latent metrics cost, by the stage that asked, in graph order."""
    usages: dict[str, Usage] = {}
    latents: dict[str, int] = {}
    for metrics in stage.inputs("latent_metrics", place):
        for up in metrics.upstream:
            if up.manifest is None:
                continue
            summary = stage.store.manifest(up.manifest).summary
            usages[up.asset] = usages.get(up.asset, Usage()) + Usage(**summary.get(COST, {}))
            latents[up.asset] = latents.get(up.asset, 0) + summary.get("n_asked", 0)
    return {
        name: StageCost(usages[name], latents[name])
        for name in STAGES
        if name in usages and usages[name] != Usage()
    }


def offered(meter: Meter) -> dict[str, Any]:
    """What a model was seen to offer, as a manifest's ``execution`` keeps it."""
    return {} if meter.capabilities is None else {"llm": dict(meter.capabilities)}
