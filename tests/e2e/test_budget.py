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


def test_one_command_has_one_budget_however_many_runs_it_takes(world, server, tmp_path, instance):
    overrides = {"models": in_flight(AT_ONCE), "budget": {"tokens": LIMIT}}
    bench = Bench(tmp_path, world, server.base_url, instance, overrides)
    first, *between, last = [str(block) for block in bench.study.ranges]
    assert between, "the two ranges must not be neighbours, or one run takes both"
    layer = str(bench.study.layer_keys[0])
    bench.run(layers=[layer], ranges=[first, last])
    assert 0 < spent(bench.heads()) <= LIMIT


def test_what_answers_cost_is_told_whoever_paid(small):
    rows = small.table("study_metrics", "study_metrics").filter(comparison="cost")
    stages = ("explanations", "score_detection", "score_fuzzing")
    assert set(rows["a"]) == set(stages)
    for stage in stages:
        mine = rows.filter(a=stage)
        heads = {name: head for name, head in small.heads().items() if name[0] == stage}
        told = dict(mine.select("statistic", "value").iter_rows())
        assert told["prompt_tokens"] + told["completion_tokens"] == spent(heads)  # one run paid all
        table = "explanations" if stage == "explanations" else "verdicts"
        asked = small.table(stage, table).filter(pl.col("call_id").is_not_null())
        n_asked = asked.select("coder", "hookpoint", "latent").unique().height
        assert set(mine["n"]) == {n_asked}
