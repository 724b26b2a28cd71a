"""What a study will cost, as tables or as JSON."""

import json
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from autointerp_dagster.cli.report import asks_nobody, printable
from autointerp_dagster.core.config import RemoteLLMConfig
from autointerp_dagster.resources.pending import before_asking, stages_that_ask
from autointerp_dagster.resources.planning import StagePlan, StudyPlan
from autointerp_dagster.study import Study
from autointerp_dagster.study.parameters import llm_configs


def print_plan(study: Study, plan: StudyPlan, console: Console) -> None:
    """Prints requests, tokens and money per stage and in all, and what they rest on."""
    console.print(_stages_table(study, plan))
    if plan.budgets:
        console.print(_budgets_table(plan))
    for line in _notes(study, plan):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def plan_as_json(study: Study, plan: StudyPlan) -> str:
    """The same as JSON, for scripts."""
    content = {
        "study": study.name,
        "stages": [asdict(stage) for stage in plan.stages],
        "total": _totals(plan),
        "budgets": [{**asdict(b), "suffices": b.suffices} for b in plan.budgets],
        "cells_without_records": [str(cell) for cell in plan.without_records],
        "notes": list(plan.notes),
    }
    return json.dumps(content, indent=1)


def missing_records(study: Study, plan: StudyPlan) -> str:
    """How to get what is missing; for the case that there is something."""
    n = len(plan.without_records)
    return (
        f"{n} of {len(study.cells)} cells have no up-to-date {before_asking(study)}, so nothing is "
        f"known of them. `autointerp run {study.name} --until {before_asking(study)}` makes them; "
        "it asks no language model."
    )


def _stages_table(study: Study, plan: StudyPlan) -> Table:
    table = Table(title=f"{study.name}: what is still to be asked", padding=0)
    table.add_column("stage", no_wrap=True)
    for name in (
        "open\ncells",
        "calls\nknown",
        "calls\nto ask",
        "prompt\ntokens",
        "thereof\nshared",
        "answer\ntokens",
        "USD",
        "cached\nUSD",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for stage in plan.stages:
        table.add_row(*_row(stage))
    total = _totals(plan)
    table.add_section()
    table.add_row(
        "all",
        "",
        *(_short(total[name]) for name in _SUMMED),
        f"{total['usd']:,.2f}",
        "" if total["usd_cached"] is None else f"{total['usd_cached']:,.2f}",
    )
    return table


_SUMMED = ("n_known", "n_requests", "prompt_tokens", "shared_tokens", "completion_tokens")


def _short(n: float | None) -> str:
    """A count in at most six characters; the JSON has it exactly."""
    value = float(n or 0)
    for unit in ("", "k", "M", "G"):
        if value < 1000 or unit == "G":
            break
        value /= 1000
    return f"{value:.0f}{unit}" if not unit or value >= 100 else f"{value:.3g}{unit}"


def _row(stage: StagePlan) -> list[str]:
    return [
        stage.stage,
        f"{stage.n_pending_cells}/{stage.n_cells}",
        *(_short(getattr(stage, name)) for name in _SUMMED),
        f"{stage.usd:,.2f}",
        "" if stage.usd_cached is None else f"{stage.usd_cached:,.2f}",
    ]


def _totals(plan: StudyPlan) -> dict[str, int | float | None]:
    totals: dict[str, int | float | None] = {
        name: sum(getattr(stage, name) for stage in plan.stages) for name in _SUMMED
    }
    totals["usd"] = sum(stage.usd for stage in plan.stages)
    is_known = any(stage.usd_cached is not None for stage in plan.stages)
    cheapest = [s.usd if s.usd_cached is None else s.usd_cached for s in plan.stages]
    totals["usd_cached"] = sum(cheapest) if is_known else None
    return totals


def _budgets_table(plan: StudyPlan) -> Table:
    table = Table("budget", "limit", "spent before", "needed", "")
    for budget in plan.budgets:
        verdict = "[green]suffices[/]" if budget.suffices else "[bold red]too small[/]"
        figures = (budget.limit, budget.spent, budget.needed)
        shown = [f"{x:,.2f}" if "usd" in budget.name else f"{x:,.0f}" for x in figures]
        table.add_row(budget.name, *shown, verdict)
    return table


def _notes(study: Study, plan: StudyPlan) -> list[str]:
    lines = [] if stages_that_ask(study) else [asks_nobody(study)]
    lines += [missing_records(study, plan)] if plan.without_records else []
    asked = {s.model for s in plan.stages if s.n_requests}
    lines += [f"{s.stage} asks {s.model}." for s in plan.stages if len(asked) > 1 and s.n_requests]
    lines += [
        f"The study names no price of {config.model}: its calls count as 0 USD."
        for config in llm_configs(study, stages_that_ask(study))
        if isinstance(config, RemoteLLMConfig) and not config.has_price
    ]
    counted = {s.model: s.counted_by for s in plan.stages if s.n_requests}
    lines += [f"Tokens of {model}: by {how}." for model, how in counted.items()]
    lines += [
        f"Completion tokens of {s.stage}: {s.completions_by}." for s in plan.stages if s.n_requests
    ]
    lines += plan.notes
    if any(s.n_requests for s in plan.stages):
        lines.append(
            "Shared tokens are an upper bound of what a prefix cache serves. Answers in a wrong "
            "format are asked again and are not counted here."
        )
    return [printable(line) for line in lines]
