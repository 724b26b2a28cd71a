"""What recomputes by itself, and what never does."""

import dagster as dg
from bench import SMALL, Bench

from autointerp_dagster.definitions import build_definitions


def requested(bench, instance, cursor=None):
    definitions = build_definitions([bench.study])
    result = dg.evaluate_automation_conditions(definitions, instance, cursor=cursor)
    counts = {
        key.path[-1]: result.get_num_requested(key)
        for key in definitions.resolve_asset_graph().get_all_asset_keys()
    }
    return {name: n for name, n in counts.items() if n}, result.cursor


def test_layer_and_study_metrics_follow_and_nothing_that_costs_money_does(
    world, server, tmp_path, instance
):
    bench = Bench(tmp_path, world, server.base_url, instance, SMALL)
    _, cursor = requested(bench, instance)
    bench.run(until="latent_metrics")
    # The layers follow at once; the study asks for what the same tick makes anew.
    asked, cursor = requested(bench, instance, cursor)
    assert asked["layer_metrics"] == len(bench.study.layer_keys)
    assert set(asked) <= {"layer_metrics", "study_metrics"}


def test_layers_wait_until_all_their_ranges_are_there(world, server, tmp_path, instance):
    bench = Bench(tmp_path, world, server.base_url, instance, SMALL)
    _, cursor = requested(bench, instance)
    first = str(bench.study.ranges[0])
    bench.run(ranges=[first], until="latent_metrics")
    asked, _ = requested(bench, instance, cursor)
    assert asked == {}
