"""What an explanation got wrong on the ``select`` windows, as a question for a better one.

A window counts as a mistake if detection or fuzzing judged it wrongly. A missed window is shown as
in the explainer's question, with its true marks and their activations; a false alarm is shown
plain, for nothing in it fired: which marks a scorer put on it is no business of the explainer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from autointerp_dagster.core import highlight
from autointerp_dagster.core.config import RefineExplainerConfig
from autointerp_dagster.core.explainers.default import shown_example
from autointerp_dagster.core.explainers.explanation import Explanation
from autointerp_dagster.core.latent_records import Window
from autointerp_dagster.core.llm import Request
from autointerp_dagster.core.prompts.layout import ChatPrompt
from autointerp_dagster.core.prompts.refine import REFINE_VERSION, refine_prompt
from autointerp_dagster.core.rng import hash_priority
from autointerp_dagster.core.scorers.judging import draw_key
from autointerp_dagster.core.scorers.tasks import silent_windows
from autointerp_dagster.core.selection.trials import Trial
from autointerp_dagster.core.tokens import Detokenizer

MISTAKES_VERSION = f"2.{REFINE_VERSION}.{highlight.VERSION}"
"""Of this module, the prompt and the way windows are shown."""


def better_question(
    asked: Request,
    trial: Trial,
    explanation: Explanation,
    config: RefineExplainerConfig,
    detokenizer: Detokenizer,
) -> Request | None:
    """The question for a better explanation than one of a trial's.

    Args:
        asked: The default explainer's question about the latent.
        trial: Where the explanation was judged.
        explanation: With a text.
        config: How many mistakes of each kind are shown at most, and the seed of their draw.
        detokenizer: Of the subject model.

    Returns:
        Null if nothing was judged wrongly, or nothing at all.
    """
    judgement, record = trial.judgement(explanation), trial.record
    if explanation.text is None or judgement is None or record.max_activation is None:
        return None
    key = draw_key(record.latent, config.seed, "refine-mistakes")
    missed = worst(record.activating("select"), judgement.wrong, key, config.n_mistakes)
    alarms = worst(silent_windows(record, "select"), judgement.wrong, key, config.n_mistakes)
    if not missed and not alarms:
        return None
    prompt = refine_prompt(
        ChatPrompt(asked.messages, asked.n_shared),
        highlight.shown_explanation(explanation.text),
        [shown_example(window, record.max_activation, detokenizer) for window in missed],
        [highlight.escape("".join(detokenizer.pieces(window.tokens))) for window in alarms],
        config.show_activations,
    )
    return replace(asked, messages=prompt.messages, n_shared=prompt.n_shared)


def worst(windows: Sequence[Window], wrong: Mapping[int, int], key: int, n: int) -> list[Window]:
    """At most ``n`` windows that were judged wrongly, strongest quantile first, then by rank.

    Those that both scorers got wrong are taken first; a draw decides between the others.

    Args:
        windows: Of one class.
        wrong: By how many scorers, by ``window_id``; others are absent.
        key: The address of the draw.
        n: At least 1.
    """
    mistaken = [window for window in windows if window.window_id in wrong]
    ids = np.array([window.window_id for window in mistaken], dtype=np.uint64)
    n_wrong = np.array([wrong[window.window_id] for window in mistaken], dtype=np.int64)
    order = np.lexsort((ids, hash_priority(key, ids), -n_wrong))
    taken = [mistaken[i] for i in order[:n]]
    return sorted(taken, key=lambda w: (w.quantile or 0, w.rank, w.window_id))
