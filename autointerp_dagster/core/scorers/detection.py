"""Detection: does the explanation tell a latent's activating windows from others?

The judge sees plain windows of both classes, shuffled together, and labels each 0 or 1.

Source:
    arXiv 2410.13928, section 3.2.
"""

from autointerp_dagster.core import highlight
from autointerp_dagster.core.config import DetectionConfig
from autointerp_dagster.core.latent_records import LatentRecord
from autointerp_dagster.core.llm import Completion, JournalBlock
from autointerp_dagster.core.prompts import DETECTION_VERSION, detection_prompt
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
from autointerp_dagster.core.scorers.tasks import (
    ScoringTask,
    Verdict,
    judged_windows,
)
from autointerp_dagster.core.tokens import Detokenizer

VERSION = f"2.{DETECTION_VERSION}.{highlight.VERSION}"
"""Of this module, the prompt and the way windows are shown."""


def prompts_of(
    record: LatentRecord,
    task: ScoringTask,
    config: DetectionConfig,
    detokenizer: Detokenizer,
    block: JournalBlock,
    split: Split = "test",
) -> list[Prompt]:
    """Prompts in which every chosen window of a split appears once; the last group may be shorter.

    Windows, groups and order do not depend on the task. Without windows there is no prompt.

    Raises:
        ValueError: If record and task name different latents.
    """
    ensure_own_windows(record, task)
    activating, silent = judged_windows(record, config.n_examples, split)
    shown = [
        ShownWindow(w, highlight.escape("".join(detokenizer.pieces(w.tokens))), w.is_activating)
        for w in (*activating, *silent)
    ]
    order = shuffled(shown, draw_key(record.latent, config.seed, "detection-shuffle"))
    groups = in_groups(order, config.windows_per_prompt)
    return label_prompts(groups, task, "detection", MAIN_VARIANT, detection_prompt, config, block)


def verdicts_of(task: ScoringTask, prompt: Prompt, completion: Completion) -> list[Verdict]:
    """One verdict per window of the prompt, in order; failed ones carry the reason."""
    return label_verdicts(task, prompt, completion)
