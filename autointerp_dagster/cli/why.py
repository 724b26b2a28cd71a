"""A latent's walk on the terminal, or as JSON."""

import json
from collections.abc import Iterator
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from autointerp_dagster.adapters.lineage import Made
from autointerp_dagster.cli.latent_statistics import add_statistics
from autointerp_dagster.cli.lineage import (
    Call,
    Explained,
    JudgedWindow,
    LatentWalk,
    ScoreWalk,
)
from autointerp_dagster.study import Study

_SHOWN_CHARACTERS = 600


def print_walk(study: Study, walk: LatentWalk, console: Console) -> None:
    """Prints a tree per score; of prompts the part that says what is asked."""
    for score in walk.scores:
        tree = Tree(f"[bold]{score.made.asset}[/] {escape(walk.layer)} latent {walk.latent}")
        if score.activations is not None:
            add_statistics(tree, study, score.activations)
        if score.why_unscored is not None:
            tree.add(score.why_unscored)
        for explained in score.explained:
            _add_explained(tree, explained)
        _add_manifests(tree, score)
        console.print(tree)


def walk_as_json(walk: LatentWalk) -> str:
    """The same as JSON, with whole prompts; the shape is :class:`.lineage.LatentWalk`."""
    return json.dumps(asdict(walk), indent=1)


def _add_explained(tree: Tree, explained: Explained) -> None:
    if explained.explainer is None:
        branch = tree.add("no explanation needed")
    else:
        branch = tree.add(
            f"explainer [bold]{escape(explained.explainer)}[/], explanation of latent "
            f"{explained.explanation_of} ({explained.subject}): "
            f"{escape(repr(explained.explanation))}"
        )
    _add_call(branch, explained.written_by, "written by")
    for window in explained.windows:
        _add_call(
            branch.add(escape(verdict_line(window, explained.explainer))),
            window.judged_by,
            "judged by",
        )
    n_left = explained.n_windows - len(explained.windows)
    if n_left:
        branch.add(f"... and {n_left} more windows in the table")


def verdict_line(window: JudgedWindow, explainer: str | None) -> str:
    """A verdict in words; plain text, not escaped.

    Args:
        window: The verdict.
        explainer: Whose explanation it is on; null for a scorer that needs none.
    """
    said = f"judge said {window.prediction}"
    if explainer is None and window.prediction is not None:
        said = "intruder found" if window.prediction else "intruder not found"
    if window.score is not None:
        said = f"score {window.score:.3g}"
    elif window.predicted is not None:
        said = f"predicted {[round(x, 1) for x in window.predicted]}"
    outcome = said if window.status == "ok" else f"failed: {window.reason}"
    return (
        f"window {window.window_id} (context {window.context}, position {window.position}) of "
        f"document {window.document!r} (text {window.text_hash}): "
        f"activating {window.is_activating}{_kind_of(window)}, {outcome}"
    )


def _kind_of(window: JudgedWindow) -> str:
    if window.negative_kind is None:
        return ""
    fires = "" if window.neighbour is None else f": latent {window.neighbour} fires here"
    return f" ({window.negative_kind}{fires})"


def _add_call(tree: Tree, call: Call | None, how: str) -> None:
    if call is None:
        return
    branch = tree.add(f"{how} call {call.call_id}")
    if not call.is_known:
        branch.add("[yellow]not in the journal any more[/]")
        return
    branch.add(f"model {escape(str(call.model))}, {call.time}")
    branch.add(f"asked: {escape(_asked(call))}")
    branch.add(f"answered: {escape(repr(call.answer))}")


def _asked(call: Call) -> str:
    if call.prompt is not None:  # what was asked for stands at the end, after worked examples
        end = repr(call.prompt[-_SHOWN_CHARACTERS:])
        return f"a plain text of {len(call.prompt)} characters, the end: {end}"
    last = repr(call.messages[-1].content)
    shown = last if len(last) <= _SHOWN_CHARACTERS else last[:_SHOWN_CHARACTERS] + "..."
    return f"{len(call.messages)} messages, the last: {shown}"


def _add_manifests(tree: Tree, score: ScoreWalk) -> None:
    branch = tree.add("made from")
    for asset, manifests in _by_asset([score.made, *score.made_from]):
        several = len(manifests) > 1
        what = "ranges" if "/" in manifests[0].cell else "places"
        below = branch.add(f"{asset}: {len(manifests)} {what}") if several else branch
        for made in manifests:
            step = below.add(
                f"{made.manifest} version {made.version}, run {made.run_id}, {made.finished}"
            )
            for name, value in made.models.items():
                step.add(f"model: {name} {escape(value)}")
            for name, value in made.prompts.items():
                step.add(f"prompt: {escape(name)} {escape(value)}")
    for name, version in score.external.items():
        branch.add(f"{escape(name)}: hash {version}")
    for key, value in score.text.items():
        branch.add(f"text: {key} {escape(str(value))}")


def _by_asset(manifests: list[Made]) -> Iterator[tuple[str, list[Made]]]:
    for asset in dict.fromkeys(made.asset for made in manifests):
        yield asset, [made for made in manifests if made.asset == asset]
