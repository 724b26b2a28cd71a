"""A look for new sparse coders: what lies there is checked, and what is sound becomes a layer.

1. List the coders of every folder and repository that the study names, with a stamp of each.
2. What is known by its stamp, or is not all there yet, is left alone; the rest is loaded and
   checked: tensors, widths in the subject model, number of latents.
3. A sound one is registered in the store, a broken one is remembered with the reason. A coder that
   changed keeps its layer and gets another identity.
4. Baselines of the study (neurons, random, pca) get the places of the coders that were found.

No subject model's weights are loaded, and no Dagster is needed.
"""

import logging
import re
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from autointerp_dagster.adapters.baseline_coders import mlp_of
from autointerp_dagster.adapters.coder_files import (
    Candidate,
    NotFetchedError,
    check_fits,
    list_candidates,
    look_again,
    open_coder,
)
from autointerp_dagster.adapters.found_layers import FoundLayer, FoundLayers, Refused
from autointerp_dagster.adapters.hashing import json_hash
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.adapters.subject_models import SubjectModel
from autointerp_dagster.core.config import (
    FileCoderConfig,
    NeuronsCoderConfig,
    RandomCoderConfig,
)
from autointerp_dagster.core.errors import AutoInterpError, CoderError, ModelError
from autointerp_dagster.core.types import LayerKey
from autointerp_dagster.resources.models import SubjectModels
from autointerp_dagster.resources.preflight import check_listed
from autointerp_dagster.study import Study
from autointerp_dagster.study.model import MAX_KEYS

_KEY = re.compile(r"[\w-]+(?:[.:][\w-]+)*")

logger = logging.getLogger(__name__)


@dataclass
class Findings:
    """What a look found. Names are layers, or ``<coder>@<place among its files>``."""

    layers: dict[LayerKey, FoundLayer]
    """All of the study, after the look, in the order of their finding."""
    new: list[FoundLayer] = field(default_factory=list)
    changed: list[FoundLayer] = field(default_factory=list)
    """Those whose coder is another one now."""
    waiting: dict[str, str] = field(default_factory=dict)
    """What for, by name."""
    broken: dict[str, str] = field(default_factory=dict)
    """Why, by name."""
    newly_broken: dict[str, str] = field(default_factory=dict)
    """Those of ``broken`` that no look has said before."""


def look_for_coders(study: Study, store: Store, seconds: float) -> Findings:
    """Looks once at everything that a study names, and registers what is new.

    Args:
        study: One with ``layers: discover``.
        store: Where its records are.
        seconds: After so long no further coder is begun with; the next look goes on.

    Raises:
        StoreError: If the store cannot be read or written.
    """
    look = _Look(study, FoundLayers(store, study.name), time.monotonic() + seconds)
    look.at_everything()
    return look.findings


class _Look:
    """One look. Findings are written as they are made, so a look that is cut short loses none."""

    def __init__(self, study: Study, records: FoundLayers, deadline: float) -> None:
        self._study = study
        self._records = records
        self._deadline = deadline
        self._refused = {one.name: one for one in records.refused()}
        self._seen: set[str] = set()
        """Names of coders that lie there, broken ones included."""
        self.findings = Findings({one.key: one for one in records.layers()})

    def at_everything(self) -> None:
        """See :func:`look_for_coders`."""
        model = SubjectModels().of(self._study)
        try:
            _ = model.model_type
        except ModelError as error:
            self.findings.waiting["subject model"] = str(error)
            return
        look_again()
        for coder, config in self._study.coders.items():
            if isinstance(config, FileCoderConfig):
                self._at(coder, config, model)
        for found in list(self.findings.layers.values()):  # also of a look that was cut short
            self._add_baselines(found)

    def _at(self, coder: str, config: FileCoderConfig, model: SubjectModel) -> None:
        settle_s = self._study.discovery.settle_s
        try:
            candidates = list_candidates(config, lambda: model.model_type, time.time(), settle_s)
        except CoderError as error:
            self.findings.waiting[coder] = str(error)
            return
        n_at = Counter(candidate.hookpoint for candidate in candidates)
        mine = {one.address: one for one in self.findings.layers.values() if one.key.coder == coder}
        for bare in candidates:
            candidate = replace(bare, stamp=self._stamp(config, bare.stamp))
            known = mine.pop(candidate.address, None)
            self._consider(coder, candidate, known, is_alone=n_at[candidate.hookpoint] == 1)
        for gone in mine.values():
            self.findings.waiting[gone.layer] = "its files are gone; its results stay"
        self._forget_refused(coder)

    def _stamp(self, config: FileCoderConfig, files: str) -> str:
        """Of everything that a check rests on: with another study the same files may be sound."""
        study = self._study
        rests_on = [config.identity(), study.models.subject.identity()]
        return json_hash([files, *rests_on, study.max_num_latents, study.latents_identity])

    def _consider(
        self, coder: str, candidate: Candidate, known: FoundLayer | None, *, is_alone: bool
    ) -> None:
        name = f"{coder}@{candidate.address or '.'}"
        self._seen.add(name)
        refused = self._refused.get(name)
        if candidate.waits_for is not None:
            self.findings.waiting[name] = candidate.waits_for
        elif refused is not None and refused.stamp == candidate.stamp:
            self.findings.broken[name] = refused.reason
        elif known is not None and known.stamp == candidate.stamp:
            pass
        elif time.monotonic() > self._deadline:
            self.findings.waiting[name] = "the next look checks it: this one took long enough"
        elif known is None and len(self.findings.layers) >= MAX_KEYS:
            self.findings.waiting[name] = (
                f"the study has {MAX_KEYS} layers, and Dagster tracks no more. Take some out "
                "(autointerp discover --forget), or make another study."
            )
        else:
            self._check(name, coder, candidate, known, is_alone=is_alone)

    def _check(
        self,
        name: str,
        coder: str,
        candidate: Candidate,
        known: FoundLayer | None,
        *,
        is_alone: bool,
    ) -> None:
        try:
            layer = self._key(coder, candidate, is_alone) if known is None else known.key
            found = self._checked(layer, candidate)
        except NotFetchedError as error:
            self.findings.waiting[name] = str(error)
        except AutoInterpError as error:
            self._refuse(name, candidate.stamp, str(error))
        except Exception as error:
            logger.exception("%s", name)
            reason = f"{name}: cannot be read ({type(error).__name__}: {error})"
            self._refuse(name, candidate.stamp, reason)
        else:
            if name in self._refused:
                self._records.accept(self._refused.pop(name))
            self._take(found, known)

    def _key(self, coder: str, candidate: Candidate, is_alone: bool) -> LayerKey:
        """The hookpoint, for the only coder that is there; else the place among the files."""
        if candidate.hookpoint is None:
            raise CoderError(candidate.fault)
        layer = LayerKey(coder, candidate.hookpoint)
        if not is_alone or layer in self.findings.layers:
            layer = LayerKey(coder, candidate.address.replace("/", ":") or ".")
        if not _KEY.fullmatch(layer.hookpoint):
            raise CoderError(
                f"{coder}: {layer.hookpoint!r} cannot be a layer's name: wanted letters, digits, "
                "'_' and '-', parted by dots or folders. Rename the folder."
            )
        if layer in self.findings.layers:
            taken = self.findings.layers[layer].address
            raise CoderError(
                f"{layer}: {taken!r} has this name already. Rename the folder "
                f"{candidate.address!r}."
            )
        return layer

    def _checked(self, layer: LayerKey, candidate: Candidate) -> FoundLayer:
        if candidate.fault is not None:
            raise CoderError(candidate.fault)
        study, config = self._study, self._study.coders[layer.coder]
        assert isinstance(config, FileCoderConfig)
        model = SubjectModels().of(study)
        loaded = open_coder(config, candidate.address, lambda: model.model_type)
        check_fits(loaded, model, layer, study.max_num_latents, model.width_from_config)
        check_listed(study, layer, loaded)
        return FoundLayer(
            layer=str(layer),
            address=candidate.address,
            hookpoint=candidate.hookpoint or loaded.reads,
            found=_now(),
            stamp=candidate.stamp,
            identity=loaded.identity,
            num_latents=loaded.coder.num_latents,
            about=loaded.about,
        )

    def _take(self, found: FoundLayer, known: FoundLayer | None) -> None:
        if known is None:
            there = self._records.add(found)
            if there is None:
                self.findings.waiting[found.layer] = "another look is just registering it"
                return
            if there == found:
                self.findings.new.append(found)
            found = there
        else:
            is_other = found.identity != known.identity
            changed = found.found if is_other else known.changed
            found = found.model_copy(update={"found": known.found, "changed": changed})
            if is_other:
                self.findings.changed.append(found)
            self._records.put(found)
        self.findings.layers[found.key] = found
        self._add_baselines(found)

    def _refuse(self, name: str, stamp: str, reason: str) -> None:
        self._records.refuse(Refused(name=name, stamp=stamp, reason=reason, since=_now()))
        self.findings.broken[name] = self.findings.newly_broken[name] = reason

    def _forget_refused(self, coder: str) -> None:
        """Broken coders that nobody finds any more need no mention."""
        for name, refused in self._refused.items():
            if name.partition("@")[0] == coder and name not in self._seen:
                self._records.accept(refused)

    def _add_baselines(self, found: FoundLayer) -> None:
        """The study's baselines at the place of a coder that was found, where they can be made."""
        if found.identity is None:
            return
        for layer in self._baselines_beside(found):
            if layer not in self.findings.layers and len(self.findings.layers) < MAX_KEYS:
                self._add_baseline(layer, found.hookpoint)

    def _baselines_beside(self, found: FoundLayer) -> list[LayerKey]:
        beside: list[LayerKey] = []
        for name, config in self._study.coders.items():
            if isinstance(config, FileCoderConfig):
                continue
            if isinstance(config, RandomCoderConfig) and config.like == found.key.coder:
                beside.append(LayerKey(name, found.key.hookpoint))
            elif not isinstance(self._study.coders[getattr(config, "like", name)], FileCoderConfig):
                beside.append(LayerKey(name, found.hookpoint))
        return beside

    def _add_baseline(self, layer: LayerKey, hookpoint: str) -> None:
        name, stamp = str(layer), json_hash(self._study.models.subject.identity())
        if name in self._refused and self._refused[name].stamp == stamp:
            self.findings.broken[name] = self._refused[name].reason
            return
        try:
            if isinstance(self._study.coders[layer.coder], NeuronsCoderConfig):
                mlp_of(hookpoint, SubjectModels().of(self._study).model_type)
        except CoderError as error:
            self._refuse(name, stamp, str(error))
            return
        self._take(
            FoundLayer(
                layer=name,
                address=layer.hookpoint,
                hookpoint=hookpoint,
                found=_now(),
                about="a baseline, made when it is run",
            ),
            None,
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
