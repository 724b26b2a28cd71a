"""A budget stops a run cleanly, holds for all of its steps, and is not in the way of the next."""

import polars as pl
from bench import Bench, in_flight

LIMIT, AT_ONCE = 1500, 2


def spent(heads) -> int:
    usage = [head.provenance.usage for head in heads.values()]
    return sum(u.get("prompt_tokens", 0) + u.get("completion_tokens", 0) for u in usage)


def test_a_run_stops_at_its_budget_and_the_next_one_goes_on(
    world, server, small, tmp_path, instance
):
    overrides = {**small.overrides, "models": in_flight(AT_ONCE)}
    poor = Bench(
        tmp_path, world, server.base_url, instance, {**overrides, "budget": {"tokens": LIMIT}}
    )
    n_before = len(server.requests)
    poor.run()
    heads = poor.heads()
    assert 0 < spent(heads) <= LIMIT
    cut_short = {asset for (asset, _), head in heads.items() if not head.complete}
    assert {"score_detection", "score_fuzzing", "latent_metrics", "study_metrics"} <= cut_short
    reasons = pl.concat(
        [poor.table("score_detection", "verdicts"), poor.table("score_fuzzing", "verdicts")]
    )["reason"].unique()
    assert "budget" in reasons
    n_paid = len(server.requests) - n_before

    rich = Bench(tmp_path, world, server.base_url, instance, overrides)
    rich.run()
    assert all(head.complete for head in rich.heads().values())
    assert rich.contents() == small.contents()
    assert len(server.requests) - n_before > n_paid  # it went on; what was paid stays paid
