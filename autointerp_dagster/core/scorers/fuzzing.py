"""Fuzzing: does the explanation tell apart true marks and false marks?

Activating windows are marked by the rule of ``core.highlight``. False marks must not be told from
true ones by where they stand, so they are copied:

1. variant ``all``: each silent window gets the marks of an activating test window of the same
   latent, drawn for it;
2. variant ``active`` (if asked for): each activating window is shown twice, in different prompts,
   once marked truly and once with as many marks on tokens where the latent is silent. Two windows
   exchange their marks for that, so true and false marks stand at the same positions as often.

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
from autointerp_dagster.core.schemas import MAIN_VARIANT
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
from autointerp_dagster.core.scorers.tasks import (
    ScoringTask,
    Verdict,
    judged_windows,
)
from autointerp_dagster.core.tokens import Detokenizer
from autointerp_dagster.core.types import LatentId

VERSION = f"1.{FUZZING_VERSION}.{highlight.VERSION}"
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
) -> list[Prompt]:
    """Prompts in which every chosen test window appears once, in variant ``active`` twice or never.

    Windows, marks, groups and order do not depend on the task. Without activating test windows
    there are no marks to copy, and no prompt.

    Raises:
        ValueError: If record and task name different latents, or a window's kind has no rule for
            false marks.
    """
    ensure_own_windows(record, task)
    activating, silent = judged_windows(record, config.n_examples)
    if not activating:
        return []
    marked = [_mark_truly(window, detokenizer) for window in activating]
    key = draw_key(record.latent, config.seed, "fuzzing-marks")
    falsely = [_mark_falsely(w, [m.marks for m in marked], key, detokenizer) for w in silent]
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


def copied_marks(marks: Bool[np.ndarray, " _"], n_positions: int) -> Bool[np.ndarray, " position"]:
    """The marks of one window put on another: same positions, same run lengths, same number.

    Where the other window is shorter the pattern moves left as far as it must and can; marks that
    still stand beyond the end take the last free positions. A window with fewer positions than
    there are marks is marked all over.

    Args:
        marks: Of the window copied from.
        n_positions: Visible tokens of the window to be marked.
    """
    places = np.flatnonzero(marks)
    if places.size == 0 or places.size >= n_positions:
        return np.full(n_positions, places.size > 0)
    places = places - min(max(int(places[-1]) - (n_positions - 1), 0), int(places[0]))
    copied = np.zeros(n_positions, dtype=np.bool_)
    copied[places[places < n_positions]] = True
    n_lost = int((places >= n_positions).sum())
    if n_lost:
        copied[np.flatnonzero(~copied)[-n_lost:]] = True
    return copied


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
    donors: Sequence[Bool[np.ndarray, " _"]],
    key: int,
    detokenizer: Detokenizer,
) -> ShownWindow:
    if window.negative_kind not in ("random", "similar"):
        raise ValueError(
            f"fuzzing: window {window.window_id} is of kind {window.negative_kind!r}, wanted "
            "'random' or 'similar'. Other kinds need marks of their own."
        )
    pieces, _ = highlight.visible_tokens(detokenizer.pieces(window.tokens), window.activations)
    priority = int(hash_priority(key, np.array([window.window_id], dtype=np.uint64))[0])
    marks = copied_marks(donors[priority % len(donors)], len(pieces))
    return ShownWindow(window, highlight.mark_text(pieces, marks), is_activating=False)


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
