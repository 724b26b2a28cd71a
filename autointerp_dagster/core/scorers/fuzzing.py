"""Fuzzing: does the explanation tell apart true marks and false marks?

Activating windows are marked by the rule of ``core.highlight``. False marks must not be told from
true ones by where they stand, so they are copied:

1. variant ``all``: each silent window gets the marks of an activating test window of the same
   latent, drawn for it;
2. variant ``active`` (if asked for): each activating window is shown twice, in different prompts,
   once marked truly and once with as many marks on tokens where the latent is silent.

Source:
    arXiv 2410.13928, section 3.2. There, all false marks stand at the same positions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, UInt64

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
    """Prompts in which every chosen test window appears once per variant and marking.

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


def silent_marks(
    activations: Float32[np.ndarray, " position"],
    donors: Sequence[Bool[np.ndarray, " _"]],
    priorities: UInt64[np.ndarray, " draw"],
) -> Bool[np.ndarray, " position"] | None:
    """As many marks as an activating window has, on tokens where the latent is silent.

    The first donor pattern, in drawn order, that has as many marks and falls on silent tokens only;
    else the window's own marks moved along it, round its end; else silent tokens drawn at random.

    Args:
        activations: Of the window's visible tokens, some > 0.
        donors: True marks of the latent's activating test windows.
        priorities: At least one per donor and per position, uint64; order what is drawn.

    Returns:
        The marks; null where fewer tokens are silent than marked.
    """
    own = highlight.marks_of(activations)
    n, silent = int(own.sum()), activations == 0
    if n == 0 or int(silent.sum()) < n:
        return None
    for i in np.argsort(priorities[: len(donors)], kind="stable"):
        pattern = copied_marks(donors[i], own.size)
        if int(pattern.sum()) == n and not bool((pattern & ~silent).any()):
            return pattern
    for shift in np.argsort(priorities[: own.size], kind="stable"):
        pattern = np.roll(own, int(shift))
        if not bool((pattern & ~silent).any()):
            return pattern
    drawn = np.zeros(own.size, dtype=np.bool_)
    places = np.flatnonzero(silent)
    drawn[places[np.argsort(priorities[places], kind="stable")[:n]]] = True
    return drawn


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
    """Groups of true and false copies; each half holds one copy of every window.

    Windows that are too active for as many false marks are left out, both copies.
    """
    marks_key = draw_key(latent, config.seed, "fuzzing-active-marks")
    false_of = _active_copies(marked, marks_key)
    true_copies = [_shown_truly(m) for m in marked if m.window.window_id in false_of]
    halves: tuple[list[ShownWindow], list[ShownWindow]] = ([], [])
    split_key = draw_key(latent, config.seed, "fuzzing-active-halves")
    for i, true in enumerate(shuffled(true_copies, split_key)):
        halves[i % 2].append(true)
        halves[1 - i % 2].append(false_of[true.window.window_id])
    groups: list[Sequence[ShownWindow]] = []
    for i, half in enumerate(halves):
        key = draw_key(latent, config.seed, f"fuzzing-active-shuffle-{i}")
        groups += in_groups(shuffled(half, key), config.windows_per_prompt)
    return groups


def _active_copies(marked: Sequence[_Marked], key: int) -> dict[int, ShownWindow]:
    """The falsely marked copy of each activating window that has room for one, by window id."""
    donors = [m.marks for m in marked]
    copies: dict[int, ShownWindow] = {}
    for window, visible, _ in marked:
        address = int(hash_priority(key, np.array([window.window_id], dtype=np.uint64))[0])
        n_drawn = max(len(donors), len(visible.pieces))
        marks = silent_marks(
            visible.activations, donors, hash_priority(address, np.arange(n_drawn))
        )
        if marks is not None:
            text = highlight.mark_text(visible.pieces, marks)
            copies[window.window_id] = ShownWindow(window, text, is_activating=False)
    return copies
