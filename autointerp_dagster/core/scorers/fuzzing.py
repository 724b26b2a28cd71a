"""Fuzzing: does the explanation tell apart true marks and false marks?

Activating windows are marked by the rule of ``core.highlight``. False marks are of the kind of the
negative:

1. ``random`` and ``similar`` windows get the marks of an activating window of the same latent and
   split, drawn for each, so that they cannot be told from true ones by where they stand;
2. ``neighbour`` windows are marked by the activations of the neighbour that fires in them, under
   the same rule;
3. ``same_token`` windows are marked on every occurrence of the token that the latent fires on most;
4. variant ``active`` (if asked for): each activating window is shown twice, in different prompts,
   once marked truly and once with as many marks on tokens where the latent is silent. Two windows
   exchange their marks for that, so true and false marks stand at the same positions as often.
   Peaks of centred windows all stand at one place, where hardly any two can: a study refuses it.

A window of kind 2 or 3 in which its rule finds nothing to mark is treated as in 1. Marks of these
two kinds stand where another latent fires, or the token is, and so may differ from true marks in
position and number: that is what the judge has to see through, but a judge that knows the usual
number of marks has a clue. Read their slices apart. With ``sampling.window_mode: centred`` the
clue is plain: true marks stand at three quarters of the window, these marks anywhere.

Source:
    arXiv 2410.13928, section 3.2. There, all false marks stand at the same positions.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32

from autointerp_dagster.core import highlight
from autointerp_dagster.core.config import FuzzingConfig
from autointerp_dagster.core.highlight import VisibleTokens
from autointerp_dagster.core.latent_records import LatentRecord, Window
from autointerp_dagster.core.llm import Completion, JournalBlock
from autointerp_dagster.core.prompts import FUZZING_VERSION, fuzzing_prompt
from autointerp_dagster.core.rng import hash_priority
from autointerp_dagster.core.schemas import MAIN_VARIANT, Split
from autointerp_dagster.core.scorers.judging import (
    Prompt,
    ShownWindow,
    draw_key,
    ensure_own_windows,
    in_groups,
    label_prompts,
    label_verdicts,
    shuffled,
)
from autointerp_dagster.core.scorers.marks import copied_marks
from autointerp_dagster.core.scorers.tasks import (
    ScoringTask,
    Verdict,
    judged_windows,
)
from autointerp_dagster.core.tokens import Detokenizer
from autointerp_dagster.core.types import LatentId

VERSION = f"2.{FUZZING_VERSION}.{highlight.VERSION}"
"""Of this module, the prompt and the way windows are shown."""

ACTIVE_VARIANT = "active"


class _Marked(NamedTuple):
    """An activating window with its true marks."""

    window: Window
    visible: VisibleTokens
    marks: Bool[np.ndarray, " position"]


def prompts_of(
    record: LatentRecord,
    task: ScoringTask,
    config: FuzzingConfig,
    detokenizer: Detokenizer,
    block: JournalBlock,
    split: Split = "test",
) -> list[Prompt]:
    """Prompts with every chosen window of a split once, in variant ``active`` twice or never.

    Windows, marks, groups and order do not depend on the task. Without activating windows
    there are no marks to copy, and no prompt.

    Raises:
        ValueError: If record and task name different latents, or a window of kind ``neighbour``
            has no ``other_activations``.
    """
    ensure_own_windows(record, task)
    activating, silent = judged_windows(record, config.n_examples, split)
    if not activating:
        return []
    marked = [_mark_truly(window, detokenizer) for window in activating]
    key = draw_key(record.latent, config.seed, "fuzzing-marks")
    donors = [m.marks for m in marked]
    top_token = next(iter(record.top_tokens), None)
    falsely = [_mark_falsely(w, top_token, donors, key, detokenizer) for w in silent]
    shuffle_key = draw_key(record.latent, config.seed, "fuzzing-shuffle")
    order = shuffled([*map(_shown_truly, marked), *falsely], shuffle_key)
    groups = in_groups(order, config.windows_per_prompt)
    prompts = label_prompts(groups, task, "fuzzing", MAIN_VARIANT, fuzzing_prompt, config, block)
    if ACTIVE_VARIANT in config.variants:
        groups = _active_groups(marked, record.latent, config)
        prompts += label_prompts(
            groups, task, "fuzzing", ACTIVE_VARIANT, fuzzing_prompt, config, block
        )
    return prompts


def verdicts_of(task: ScoringTask, prompt: Prompt, completion: Completion) -> list[Verdict]:
    """One verdict per window of the prompt, in order; failed ones carry the reason.

    ``is_activating`` says whether the marks are true. In variant ``active`` a window has two rows,
    one for each value, both with its quantile and without a ``negative_kind``.
    """
    return label_verdicts(task, prompt, completion)


def exchange_partners(
    activations: Sequence[Float32[np.ndarray, " _"]],
) -> dict[int, int]:
    """Pairs of windows that can take each other's marks: as many, each on silent tokens only.

    Greedy in the given order. A window that finds no partner is absent, e.g. where the latent
    always fires at the same position: there, false marks would give themselves away.

    Args:
        activations: Of each activating window's visible tokens.

    Returns:
        The partner of each window that has one, both ways; no window is its own.
    """
    marks = [highlight.marks_of(window) for window in activations]
    partners: dict[int, int] = {}
    for i, j in combinations(range(len(activations)), 2):
        if i in partners or j in partners or marks[i].sum() != marks[j].sum():
            continue
        if _all_silent(marks[i], activations[j]) and _all_silent(marks[j], activations[i]):
            partners[i], partners[j] = j, i
    return partners


def _all_silent(marks: Bool[np.ndarray, " _"], activations: Float32[np.ndarray, " _"]) -> bool:
    places = np.flatnonzero(marks)
    if places.size == 0 or places[-1] >= activations.size:
        return False
    return not bool(activations[places].any())


def _mark_truly(window: Window, detokenizer: Detokenizer) -> _Marked:
    visible = highlight.visible_tokens(detokenizer.pieces(window.tokens), window.activations)
    return _Marked(window, visible, highlight.marks_of(visible.activations))


def _shown_truly(marked: _Marked) -> ShownWindow:
    text = highlight.mark_text(marked.visible.pieces, marked.marks)
    return ShownWindow(marked.window, text, is_activating=True)


def _mark_falsely(
    window: Window,
    top_token: int | None,
    donors: Sequence[Bool[np.ndarray, " _"]],
    key: int,
    detokenizer: Detokenizer,
) -> ShownWindow:
    """A silent window, marked by the rule of its kind; by copied marks where that marks nothing."""
    reason = _reason_to_mark(window, top_token)
    pieces, reason = highlight.visible_tokens(detokenizer.pieces(window.tokens), reason)
    marks = highlight.marks_of(reason)
    if not marks.any():
        priority = int(hash_priority(key, np.array([window.window_id], dtype=np.uint64))[0])
        marks = copied_marks(donors[priority % len(donors)], len(pieces))
    return ShownWindow(window, highlight.mark_text(pieces, marks), is_activating=False)


def _reason_to_mark(window: Window, top_token: int | None) -> Float32[np.ndarray, " position"]:
    """What the false marks show, one per token; all 0 for a window that gets copied marks."""
    if window.negative_kind == "neighbour":
        if window.other_activations is None:
            raise ValueError(
                f"fuzzing: window {window.window_id} is of kind 'neighbour', got no "
                "other_activations, wanted those of the neighbour that fires in it. Read the "
                "records with their neighbours' activations."
            )
        return window.other_activations
    if window.negative_kind == "same_token" and top_token is not None:
        return (window.tokens == top_token).astype(np.float32)
    return np.zeros(len(window.tokens), dtype=np.float32)


def _active_groups(
    marked: Sequence[_Marked], latent: LatentId, config: FuzzingConfig
) -> list[Sequence[ShownWindow]]:
    """Groups of true and false copies; each half holds one copy of every window with a partner."""
    exchanged = _exchanged(marked, draw_key(latent, config.seed, "fuzzing-active-marks"))
    halves: tuple[list[ShownWindow], list[ShownWindow]] = ([], [])
    for i, (true, false) in enumerate(exchanged):
        halves[i % 2].append(true)
        halves[1 - i % 2].append(false)
    groups: list[Sequence[ShownWindow]] = []
    for i, half in enumerate(halves):
        key = draw_key(latent, config.seed, f"fuzzing-active-shuffle-{i}")
        groups += in_groups(shuffled(half, key), config.windows_per_prompt)
    return groups


def _exchanged(marked: Sequence[_Marked], key: int) -> list[tuple[ShownWindow, ShownWindow]]:
    """True and false copy of each window that has a partner, windows in drawn order."""
    ids = np.array([m.window.window_id for m in marked], dtype=np.uint64)
    drawn = [marked[i] for i in np.lexsort((ids, hash_priority(key, ids)))]
    copies: list[tuple[ShownWindow, ShownWindow]] = []
    for i, j in sorted(exchange_partners([m.visible.activations for m in drawn]).items()):
        pieces = drawn[i].visible.pieces
        text = highlight.mark_text(pieces, copied_marks(drawn[j].marks, len(pieces)))
        false = ShownWindow(drawn[i].window, text, is_activating=False)
        copies.append((_shown_truly(drawn[i]), false))
    return copies
