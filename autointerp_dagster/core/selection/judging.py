"""Testing candidate explanations by detection and fuzzing on the ``select`` windows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from autointerp_dagster.core import highlight
from autointerp_dagster.core.config import (
    BestOfNExplainerConfig,
    DetectionConfig,
    FuzzingConfig,
    RefineExplainerConfig,
)
from autointerp_dagster.core.llm import LLM, JournalBlock, Request
from autointerp_dagster.core.scorers import detection, fuzzing
from autointerp_dagster.core.scorers.judging import Prompt
from autointerp_dagster.core.scorers.tasks import ScoringTask, Verdict
from autointerp_dagster.core.selection.trials import Judgement, Trial
from autointerp_dagster.core.tokens import Detokenizer
from autointerp_dagster.core.types import LatentId

VERSION = f"1.{detection.VERSION}.{fuzzing.VERSION}"
"""Of this module and of the scorers."""

_SCORERS = {"detection": detection, "fuzzing": fuzzing}


class _Asked(NamedTuple):
    task: ScoringTask
    prompt: Prompt
    scorer: str
    verdicts: list[Verdict]
    """Of the same text and scorer; the answer's are added."""


def judge_candidates(
    name: str,
    trials: Sequence[Trial],
    config: BestOfNExplainerConfig | RefineExplainerConfig,
    detokenizer: Detokenizer,
    llm: LLM,
    block_of: Callable[[LatentId], JournalBlock],
) -> None:
    """Give every trial a judgement of each of its texts that has none.

    Args:
        name: The explainer's name in the study.
        trials: Of different latents.
        config: Windows per prompt, and the seed of the scorers' draws.
        detokenizer: Of the subject model.
        llm: The judge.
        block_of: Where the calls of a latent are kept.

    Raises:
        LLMError: If no model answers at all.
    """
    parameters = _parameters(config)
    asked: dict[int, _Asked] = {}
    said: list[tuple[Trial, str, dict[str, list[Verdict]]]] = [
        (trial, text, {scorer: [] for scorer in _SCORERS})
        for trial in trials
        for text in trial.unjudged()
    ]

    def requests() -> Iterator[Request]:
        for trial, text, verdicts in said:
            task = _task(trial, name, text)
            block = block_of(trial.record.latent)
            for scorer, module in _SCORERS.items():
                for prompt in module.prompts_of(
                    trial.record, task, parameters[scorer], detokenizer, block, split="select"
                ):
                    asked[id(prompt.request)] = _Asked(task, prompt, scorer, verdicts[scorer])
                    yield prompt.request

    for request, completion in llm.answer(requests()):
        task, prompt, scorer, verdicts = asked.pop(id(request))
        verdicts.extend(_SCORERS[scorer].verdicts_of(task, prompt, completion))
    for trial, text, by_scorer in said:
        shown = highlight.shown_explanation(text)
        trial.judgements[shown] = Judgement.of(by_scorer.values())


def _parameters(
    config: BestOfNExplainerConfig | RefineExplainerConfig,
) -> Mapping[str, DetectionConfig | FuzzingConfig]:
    """Of each scorer; only labels count, so no log-probabilities are asked for."""
    size, seed = config.windows_per_prompt, config.seed
    return {
        "detection": DetectionConfig(windows_per_prompt=size, seed=seed, top_logprobs=0),
        "fuzzing": FuzzingConfig(windows_per_prompt=size, seed=seed, top_logprobs=0),
    }


def _task(trial: Trial, name: str, text: str) -> ScoringTask:
    """Each text is a unit of its own for a local model, whatever else is on trial."""
    place = next(i for i, c in enumerate(trial.candidates) if c.text == text)
    latent = trial.record.latent
    return ScoringTask(latent, f"{name}/{place}", "own", latent.index, text)
