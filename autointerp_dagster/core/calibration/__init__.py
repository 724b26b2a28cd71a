"""Calibration of a judge: latents whose truth is known, and what a judge makes of them.

1. :mod:`.rules`: what the latents fire on, each with its true description.
2. :mod:`.pack`: windows of real text on which each rule holds or does not, as latents' records.
3. :mod:`.report`: the judge's verdicts as ceiling, floor, lift and failures, and what they mean.

The verdicts come from the real scorers, so this package stands above them and above the metrics.
"""

from autointerp_dagster.core.calibration.pack import Pack, build_pack
from autointerp_dagster.core.calibration.report import (
    KindReport,
    ScorerReport,
    Usability,
    scorer_report,
)
from autointerp_dagster.core.calibration.rules import RULES, Rule, RuleKind

__all__ = [
    "RULES",
    "KindReport",
    "Pack",
    "Rule",
    "RuleKind",
    "ScorerReport",
    "Usability",
    "build_pack",
    "scorer_report",
]
