"""Running a judge's calibration: a study's judge, parameters and budget on the pack.

Questions go through the study's journal (stage ``judge_calibration``), so a second run costs
nothing; spending counts towards the study's budget, with a run's budget of its own.
"""

import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache

from autointerp_dagster.adapters.embedded import english_documents
from autointerp_dagster.adapters.llm import Ledger, SpendFile, open_journal, open_llm
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.calibration import Pack, ScorerReport, build_pack, scorer_report
from autointerp_dagster.core.calibration.pack import BLOCK_HASH
from autointerp_dagster.core.config import (
    DetectionConfig,
    FuzzingConfig,
    LabelScorerConfig,
    LatentSample,
    ScoredSample,
)
from autointerp_dagster.core.errors import StudyError
from autointerp_dagster.core.llm import LLM, Completion, JournalBlock, Request, Usage
from autointerp_dagster.core.scorers import LABEL_SCORERS, judge, verdicts_frame
from autointerp_dagster.core.types import Progress, silent
from autointerp_dagster.study import Study
from autointerp_dagster.study.parameters import llm_config

STAGE = "judge_calibration"
"""Where the answers are kept in the journal."""

N_WINDOWS = 20
"""Of each class and latent, unless asked otherwise."""

PER_LATENTS = 1000
"""What costs are extrapolated to."""

_DEFAULTS: dict[str, LabelScorerConfig] = {
    "detection": DetectionConfig(),
    "fuzzing": FuzzingConfig(),
}


@dataclass(frozen=True, slots=True)
class Cost:
    """What questions cost, whenever they were paid."""

    prompt_tokens: float
    completion_tokens: float
    usd: float
    seconds: float | None
    """Of waiting; null where the journal answered some, for then nobody knows."""

    def times(self, factor: float) -> "Cost":
        """The cost of that many times as much."""
        return Cost(
            self.prompt_tokens * factor,
            self.completion_tokens * factor,
            self.usd * factor,
            None if self.seconds is None else self.seconds * factor,
        )


@dataclass(frozen=True, slots=True)
class ScorerCalibration:
    """One scorer's task: how well the judge does, and what that costs."""

    report: ScorerReport
    windows_per_prompt: int
    is_of_study: bool
    """The study uses this scorer; else its parameters are the defaults."""
    n_prompts: int
    n_repeats: int
    """Times that a prompt was put again because the answer had a wrong format or did not come."""
    n_known: int
    """Prompts that the journal answered."""
    cost: Cost
    """Of all of it."""
    per_latent: Cost
    """Of one description of one latent of the pack."""
    n_windows_of_study: int
    """Windows of a latent that the study's own parameters ask about, at most."""
    per_1000: Cost
    """Of one explanation of each of 1,000 latents, with the study's windows."""
    n_descriptions_of_study: int | None
    """Explanations that the study has scored at most, floors included; null: it does not use this
    scorer."""
    of_study: Cost | None
    """Of these."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What is known of a study's judge."""

    judge: str
    """Its identity."""
    n_latents: int
    n_windows: int
    """Of each class, per latent."""
    window_len: int
    scorers: tuple[ScorerCalibration, ...]


def calibrate(
    study: Study,
    store: Store,
    scorers: Sequence[str] | None = None,
    n_windows: int = N_WINDOWS,
    progress: Progress = silent,
) -> Calibration:
    """Asks the study's judge about latents whose truth is known.

    Args:
        study: Names the judge, the scorers' parameters, the length of windows and the budget.
        store: Holds the journal and what was spent.
        scorers: Some of ``LABEL_SCORERS``; null: all.
        n_windows: Of each class, per latent.
        progress: Shows how far it is.

    Raises:
        StudyError: If a scorer is unknown.
        CorpusError: If there are not so many windows.
        LLMError: If the judge cannot be asked at all.
        ModelError: If a local judge cannot be found.
    """
    names = _known(study, scorers)
    pack = _pack(study.sampling.window_len, n_windows)
    hours = study.budget.hours
    spend = SpendFile(store.root, study.name, f"judge-{uuid.uuid4().hex}")
    with (
        open_journal(store.root) as journal,
        Ledger(study.budget, spend) as ledger,
        open_llm(
            llm_config(study, "judge"),
            journal=journal,
            ledger=ledger,
            deadline=None if hours is None else timedelta(hours=hours),
        ) as llm,
    ):
        found = [_calibrated(name, study, pack, llm, n_windows, progress) for name in names]
        window_len = study.sampling.window_len
        return Calibration(llm.identity, len(pack.latents), n_windows, window_len, tuple(found))


@lru_cache(maxsize=1)
def _pack(window_len: int, n_windows: int) -> Pack:
    """Kept, for the text has to be searched for every rule, which takes seconds."""
    texts = [document.text for document in english_documents()]
    return build_pack(texts, window_len, n_windows)


def _known(study: Study, scorers: Sequence[str] | None) -> list[str]:
    for name in scorers or ():
        if name not in LABEL_SCORERS:
            raise StudyError(
                f"study {study.name}: no scorer {name!r} whose judge labels windows. There are: "
                f"{', '.join(LABEL_SCORERS)}."
            )
    return [name for name in LABEL_SCORERS if not scorers or name in scorers]


class _Tally:
    """The judge, with a count of what its answers cost."""

    def __init__(self, llm: LLM) -> None:
        self.identity = llm.identity
        self._llm = llm
        self.cost = Usage()
        self.n_prompts = 0
        self.n_calls = 0
        self.n_known = 0

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Completion]]:
        """See :meth:`autointerp_dagster.core.llm.LLM.answer`."""
        for request, completion in self._llm.answer(requests):
            self.cost += completion.cost
            self.n_prompts += 1
            self.n_calls += completion.n_calls
            self.n_known += completion.from_journal
            yield request, completion


def _calibrated(
    name: str, study: Study, pack: Pack, llm: LLM, n_windows: int, progress: Progress
) -> ScorerCalibration:
    asked = getattr(study.scorers, name)
    config: LabelScorerConfig = _for_pack(asked or _DEFAULTS[name])
    tally = _Tally(llm)
    block = JournalBlock(STAGE, BLOCK_HASH, 0)
    verdicts = judge(
        LABEL_SCORERS[name], pack.jobs, config, pack.detokenizer, tally, lambda _: block
    )
    started = time.monotonic()
    shown = progress(
        verdicts,
        total=2 * pack.n_windows,
        description=name,
        unit="windows",
        note=lambda: f"${tally.cost.usd:.2f}" if tally.cost.usd else "",
    )
    frame = verdicts_frame(shown)
    seconds = time.monotonic() - started
    report = scorer_report(name, pack, frame, config, study.metrics)
    usage = tally.cost
    is_timed = tally.n_known == 0 and tally.n_prompts > 0
    cost = Cost(
        usage.prompt_tokens, usage.completion_tokens, usage.usd, seconds if is_timed else None
    )
    per_latent = cost.times(1 / (2 * len(pack.latents)))
    n_of_study = windows_of_study(study, asked or _DEFAULTS[name])
    per_description = per_latent.times(n_of_study / (2 * n_windows))
    n_descriptions = None if asked is None else descriptions_of_study(study, asked)
    return ScorerCalibration(
        report=report,
        windows_per_prompt=config.windows_per_prompt,
        is_of_study=asked is not None,
        n_prompts=tally.n_prompts,
        n_repeats=max(0, tally.n_calls - tally.n_prompts),
        n_known=tally.n_known,
        cost=cost,
        per_latent=per_latent,
        n_windows_of_study=n_of_study,
        per_1000=per_description.times(PER_LATENTS),
        n_descriptions_of_study=n_descriptions,
        of_study=None if n_descriptions is None else per_description.times(n_descriptions),
    )


def _for_pack(config: LabelScorerConfig) -> LabelScorerConfig:
    """The parameters of prompts and answers; which latents and windows is the pack's affair."""
    return config.model_copy(update={"latents": "all", "explainers": None, "n_examples": None})


def windows_of_study(study: Study, config: LabelScorerConfig) -> int:
    """Windows of both classes that a latent is judged on at most."""
    counts = (study.sampling.n_test, study.sampling.n_negative_test)
    limit = config.n_examples
    return sum(n if limit is None else min(n, limit) for n in counts)


def descriptions_of_study(study: Study, config: LabelScorerConfig) -> int:
    """Explanations that a scorer tests at most, own and floors, over layers and explainers.

    Fewer in fact: dead and rare latents are not explained, and some explanations fail.
    """
    n_latents = _n_selected(study)
    if isinstance(config.latents, ScoredSample):
        n_latents = min(n_latents, config.latents.sample)
    elif isinstance(config.latents, tuple):
        n_latents = min(n_latents, len(config.latents))
    n_floors = min(n_latents, study.floors.sample)
    explainers = study.explainers if config.explainers is None else config.explainers
    return (n_latents + n_floors) * len(study.layer_keys) * len(explainers)


def _n_selected(study: Study) -> int:
    """Latents of a layer that are to be explained at most."""
    if isinstance(study.latents, LatentSample):
        return min(study.latents.sample, study.max_num_latents)
    if isinstance(study.latents, tuple):
        return len(study.latents)
    return study.max_num_latents
