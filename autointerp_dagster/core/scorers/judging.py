"""What detection and fuzzing share: groups of shown windows, requests for labels, their verdicts.

Which windows stand together in which order depends on the latent and the scorer alone, so every
explanation of a latent, its own or another's, is judged on the same prompts but for the first line.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from autointerp_dagster.core import highlight
from autointerp_dagster.core.config import DetectionConfig, FuzzingConfig
from autointerp_dagster.core.latent_records import LatentRecord, Window
from autointerp_dagster.core.llm import (
    Completion,
    JournalBlock,
    LabelList,
    LabelReading,
    Request,
)
from autointerp_dagster.core.prompts import ChatPrompt
from autointerp_dagster.core.rng import address_key, hash_priority
from autointerp_dagster.core.schemas import VerdictReason
from autointerp_dagster.core.scorers.tasks import ScoringTask, Verdict, layer_of
from autointerp_dagster.core.tokens import Detokenizer
from autointerp_dagster.core.types import LatentId

T = TypeVar("T")

PromptBuilder = Callable[[str, Sequence[str], int], ChatPrompt]
"""Explanation, windows, windows per prompt: one of ``core.prompts``."""


@dataclass(frozen=True, slots=True)
class ShownWindow:
    """A window as the judge sees it, with the right answer."""

    window: Window
    text: str
    """Escaped; marked in fuzzing."""
    is_activating: bool
    """The right answer; in fuzzing: whether the marks are true."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question about a group of windows."""

    request: Request
    windows: tuple[ShownWindow, ...]
    """In the order of the labels asked for."""
    variant: str
    turn: int
    """Place in the order in which the prompts of its latent and variant are asked, from 0."""


@runtime_checkable
class LabelScorer(Protocol):
    """A scorer module whose judge labels groups of windows."""

    @property
    def VERSION(self) -> str:
        """Changes whenever the same record could get other prompts or verdicts."""
        ...

    def prompts_of(
        self,
        record: LatentRecord,
        task: ScoringTask,
        config: Any,  # the scorer's own parameter model
        detokenizer: Detokenizer,
        block: JournalBlock,
    ) -> list[Prompt]:
        """The questions that test one explanation."""
        ...

    def verdicts_of(
        self, task: ScoringTask, prompt: Prompt, completion: Completion
    ) -> list[Verdict]:
        """One verdict per window of a prompt."""
        ...


def shuffled(windows: Sequence[ShownWindow], key: int) -> list[ShownWindow]:
    """The windows in an order drawn under an address; their given order does not matter."""
    ids = np.array([shown.window.window_id for shown in windows], dtype=np.uint64)
    order = np.lexsort((ids, hash_priority(key, ids)))
    return [windows[i] for i in order]


def in_groups(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Consecutive groups; the last may be shorter, none is dropped."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def draw_key(latent: LatentId, seed: int, purpose: str) -> int:
    """The address of a scorer's draw: it names no explainer and no subject."""
    return address_key(seed, layer_of(latent), latent.index, purpose)


def ensure_own_windows(record: LatentRecord, task: ScoringTask) -> None:
    """Check that a task is asked about its own latent's windows.

    Raises:
        ValueError: If the two name different latents.
    """
    if record.latent != task.latent:
        raise ValueError(
            f"task for {task.latent}: got the record of {record.latent}. Pass the record of the "
            "latent whose windows are shown; the explanation may be another's."
        )


def label_prompts(
    groups: Sequence[Sequence[ShownWindow]],
    task: ScoringTask,
    scorer: str,
    variant: str,
    build: PromptBuilder,
    config: DetectionConfig | FuzzingConfig,
    block: JournalBlock,
) -> list[Prompt]:
    """One prompt per group, in order; all of a latent's under one explanation form a unit."""
    explanation = highlight.shown_explanation(task.text)
    prompts = []
    for turn, group in enumerate(groups):
        chat = build(explanation, [shown.text for shown in group], config.windows_per_prompt)
        request = Request(
            messages=chat.messages,
            answer=LabelList(len(group)),
            unit=f"{task.latent}/{task.explainer}/{task.subject}/{scorer}",
            block=block,
            n_shared=chat.n_shared,
            max_tokens=_max_tokens(len(group)),
            top_logprobs=config.top_logprobs,
        )
        prompts.append(Prompt(request, tuple(group), variant, turn))
    return prompts


def label_verdicts(task: ScoringTask, prompt: Prompt, completion: Completion) -> list[Verdict]:
    """One verdict per window of the prompt, in order; failed ones carry the reason.

    Source:
        probability = P(1) / (P(0) + P(1)) at the window's label, see ``llm.LabelList``.
    """
    answer = LabelList(len(prompt.windows))
    readings, reason = None, completion.reason
    if reason is None and completion.text is not None:
        readings = answer.read(completion.text, completion.tokens)
    if readings is None:
        reason = reason or ("call_failed" if completion.text is None else "unparsable")
        readings = [None] * len(prompt.windows)
    return [
        _verdict(task, prompt, shown, reading, reason, completion.call_id)
        for shown, reading in zip(prompt.windows, readings, strict=True)
    ]


def _verdict(
    task: ScoringTask,
    prompt: Prompt,
    shown: ShownWindow,
    reading: LabelReading | None,
    reason: VerdictReason | None,
    call_id: str,
) -> Verdict:
    probability = None if reading is None else reading.probability
    return Verdict.of_window(
        task,
        shown.window,
        variant=prompt.variant,
        reason=reason,
        call_id=call_id,
        is_activating=shown.is_activating,
        prediction=None if reading is None else reading.prediction,
        probability=probability,
        score=probability,
        turn=prompt.turn,
    )


def _max_tokens(n_labels: int) -> int:
    return 16 + 4 * n_labels  # digit, comma and spaces per label, brackets, a code fence
