"""What a study's judge is good for, as tables or as JSON."""

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from autointerp_dagster.cli.report import printable
from autointerp_dagster.core.calibration.report import Figure, KindReport
from autointerp_dagster.resources.calibrating import Calibration, Cost, ScorerCalibration
from autointerp_dagster.resources.planning import model_name
from autointerp_dagster.study import Study
from autointerp_dagster.study.parameters import llm_config

_COLOURS = {"usable": "green", "weak": "yellow", "unusable": "bold red", "undecided": "bold red"}

_FIGURES = ("ceiling", "floor", "lift", "auroc", "sensitivity", "specificity", "floor_yes")
_HEADINGS = (
    "ceiling",
    "floor",
    "lift",
    "AUROC",
    "sensi-\ntivity",
    "speci-\nficity",
    "yes at\nfloor",
)


def print_calibration(study: Study, found: Calibration, console: Console) -> None:
    """Prints accuracy, failures and costs of each scorer's task, and what they mean."""
    name = printable(model_name(llm_config(study, "judge")))
    console.print(
        f"Judge {name}: {found.n_latents} latents with known rules, "
        f"{found.n_windows} activating and {found.n_windows} silent windows of {found.window_len} "
        "words each.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    for scorer in found.scorers:
        console.print(_accuracy_table(scorer, study.metrics.confidence))
    console.print(_cost_table(found))
    for line in _notes(study, found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for scorer in found.scorers:
        report = scorer.report
        colour = _COLOURS[report.usability]
        console.print(f"{report.scorer}: [{colour}]{report.usability}[/]", end="; ")
        console.print(report.why, markup=False, highlight=False, soft_wrap=True)


def calibration_as_json(study: Study, found: Calibration) -> str:
    """The same as JSON, for scripts."""
    content: dict[str, Any] = asdict(found)
    for scorer in content["scorers"]:
        for kind in scorer["report"]["kinds"]:
            kind.update({name: _as_dict(Figure(*kind[name])) for name in _FIGURES})
    return json.dumps({"study": study.name, **content}, indent=1)


def _as_dict(figure: Figure) -> dict[str, float | int | None]:
    return figure._asdict()


def _accuracy_table(scorer: ScorerCalibration, confidence: float) -> Table:
    source = "" if scorer.is_of_study else ", default parameters (the study does not use it)"
    table = Table(
        title=f"{scorer.report.scorer}: windows per prompt {scorer.windows_per_prompt}{source}; "
        f"{confidence:.0%} intervals over latents",
        padding=0,
    )
    table.add_column("rules", no_wrap=True)
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for kind in scorer.report.kinds:
        table.add_row(*_row(kind))
    return table


def _row(kind: KindReport) -> list[str]:
    with_interval = {"ceiling", "floor", "lift"}
    figures: list[tuple[str, Figure]] = [(name, getattr(kind, name)) for name in _FIGURES]
    return [kind.kind, *(_shown(figure, name in with_interval) for name, figure in figures)]


def _shown(figure: Figure, with_interval: bool) -> str:
    if figure.value is None:
        return "-"
    if not with_interval or figure.lo is None or figure.hi is None:
        return f"{figure.value:.2f}"
    return f"{figure.value:.2f}\n[{figure.lo:.2f}, {figure.hi:.2f}]"


def _cost_table(found: Calibration) -> Table:
    table = Table(title="What it cost, and what it would cost", padding=0)
    for name in ("scorer", "of"):
        table.add_column(name, no_wrap=True)
    for name in ("prompt\ntokens", "answer\ntokens", "USD", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for scorer in found.scorers:
        name = scorer.report.scorer
        table.add_row(name, "this calibration", *_cost(scorer.cost))
        table.add_row("", "one description, one latent", *_cost(scorer.per_latent))
        per = f"1,000 explanations x {scorer.n_windows_of_study} windows"
        table.add_row("", per, *_cost(scorer.per_1000))
        if scorer.of_study is not None:
            n = scorer.n_descriptions_of_study
            table.add_row("", f"the study: {n:,} explanations", *_cost(scorer.of_study))
        table.add_section()
    return table


def _cost(cost: Cost) -> list[str]:
    return [
        f"{cost.prompt_tokens:,.0f}",
        f"{cost.completion_tokens:,.0f}",
        f"{cost.usd:,.2f}",
        "-" if cost.seconds is None else f"{cost.seconds:,.0f}",
    ]


def _notes(study: Study, found: Calibration) -> list[str]:
    lines = [_failures(scorer) for scorer in found.scorers]
    if any(scorer.n_known for scorer in found.scorers):
        n_known = sum(scorer.n_known for scorer in found.scorers)
        n = sum(scorer.n_prompts for scorer in found.scorers)
        lines.append(
            f"The journal answered {n_known} of {n} prompts, so there are no times; their tokens "
            "and prices are those of the run that paid."
        )
    if any(scorer.of_study is not None for scorer in found.scorers):
        lines.append(
            "The study's explanations are counted from its file, floors included: an upper bound, "
            "for dead latents are not explained. `autointerp plan` counts the real prompts."
        )
    if study.scoring is not None:
        lines.append("The study scores adaptively, and so asks less than that.")
    return lines


def _failures(scorer: ScorerCalibration) -> str:
    report = scorer.report
    failed = ", ".join(f"{reason} {n}" for reason, n in report.failures.items()) or "none"
    return (
        f"{report.scorer}: windows without a label: {failed} (of {report.n_verdicts}); "
        f"{scorer.n_repeats} repeats for {scorer.n_prompts} prompts."
    )
