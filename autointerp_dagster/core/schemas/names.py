"""The closed sets of names that stand in tables: splits, kinds, statuses and reasons."""

from typing import Literal, get_args

Split = Literal["train", "select", "test"]
"""``train``: the explainer may see; ``select``: chooses between explanations; ``test``: judges."""

NegativeKind = Literal["random", "neighbour", "similar", "same_token"]
"""How a non-activating window was chosen."""

NeighbourMeasure = Literal["cofiring", "decoder", "encoder"]
"""How near two latents are: Jaccard index of the tokens they fire on, cosine of their rows."""

LatentStatus = Literal["ok", "dead", "rare", "dense"]
"""``rare``: too few firing tokens or test windows; ``dense``: fires nearly everywhere."""

ExplanationStatus = Literal["ok", "failed", "skipped"]
ExplanationReason = Literal[
    "dead",
    "rare",
    "dense",
    "unparsable",
    "refused",
    "too_long",
    "call_failed",
    "budget",
    "deadline",
    "not_recorded",
    "no_train_windows",
    "no_intervention",
]
"""Why there is no text. The first three come from the latent's record; ``no_intervention``: the
model could not be steered along the latent as wanted."""

InterventionStatus = Literal["ok", "dead", "rare", "dense", "too_few", "off_target"]
"""``too_few``: prompts on whose last token the latent fires; ``off_target``: no strength was found
whose divergence is within the tolerance of the target."""

VerdictStatus = Literal["ok", "failed"]
VerdictReason = Literal[
    "unparsable", "refused", "too_long", "no_vector", "no_logprobs", "off_target",
    "call_failed", "budget", "deadline", "not_recorded",
]  # fmt: skip
"""The first six are answers. ``too_long``: the prompt does not fit the model; ``no_vector``: an
embedding of length zero or not finite; ``no_logprobs``: log-probabilities that are missing or no
numbers; ``off_target``: an intervention whose strength is not the one wanted. The others lie with
the run and are tried again by the next; ``not_recorded``: a replay found no such call in the
journal."""

UNASKED: tuple[VerdictReason, ...] = ("budget", "deadline", "not_recorded")
"""Reasons of a row whose question was never sent."""

UNDONE: tuple[VerdictReason, ...] = (*UNASKED, "call_failed")
"""Reasons that lie with the run, not with the answer: such a cell is never taken as done."""

Subject = Literal["own", "other", "random"]
"""Whose explanation was scored: the latent's own, another latent's (a floor), a random coder's."""

MAIN_VARIANT = "all"
"""The variant of a scorer's ordinary verdicts, and of the metrics over all of them."""

MetricStatus = Literal[
    "ok", "not_run", "no_explanation", "too_few", "no_donor", "missing_class", "failed", "unasked",
    "no_score", "undefined",
]  # fmt: skip
"""Why a metric has no value, or ``ok``. ``unasked``: a budget or deadline came first; ``no_score``:
the scorer did not rank the windows (a judge without log-probabilities); ``undefined``: 0 / 0, e.g.
precision if nothing is called activating."""

LATENT_STATUSES: tuple[str, ...] = get_args(LatentStatus)
EXPLANATION_REASONS: tuple[str, ...] = get_args(ExplanationReason)
VERDICT_REASONS: tuple[str, ...] = get_args(VerdictReason)
METRIC_STATUSES: tuple[str, ...] = get_args(MetricStatus)
