"""A run from the UI asks what could fail later before its forward pass, like the command."""

import dagster as dg
import pytest
from bench import SMALL, Bench

from autointerp_dagster.core.errors import LLMError
from autointerp_dagster.definitions import build_resources, build_study
from autointerp_dagster.partitions import partition_key
from autointerp_dagster.resources.events import asset_key
from autointerp_dagster.study.stages import STAGES

QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


def run_in_the_ui(bench, stages):
    study = bench.study
    cell = study.cells[0]
    tags = {
        "dagster/asset_partition_range_start": str(partition_key(cell)),
        "dagster/asset_partition_range_end": str(partition_key(cell)),
    }
    dg.materialize(
        build_study(study),
        selection=[asset_key(study, STAGES[name]) for name in stages],
        instance=bench.instance,
        resources=build_resources(),
        tags=tags,
        run_config=QUIET,
    )


def test_no_forward_pass_is_run_when_no_language_model_answers(world, tmp_path, instance):
    bench = Bench(tmp_path, world, "http://127.0.0.1:9/v1", instance, SMALL)
    with pytest.raises(LLMError, match=r"http://127\.0\.0\.1:9/v1: nothing answers"):
        run_in_the_ui(bench, ["token_dataset", "activation_cache", "latent_records", "explanations",
                              "score_detection"])  # fmt: skip
    assert {asset for asset, _ in bench.heads()} == {"token_dataset"}


def test_a_run_that_asks_no_language_model_needs_none(world, tmp_path, instance):
    bench = Bench(tmp_path, world, "http://127.0.0.1:9/v1", instance, SMALL)
    run_in_the_ui(bench, ["token_dataset", "activation_cache", "latent_records"])
    assert {"latent_records", "activation_cache"} <= {asset for asset, _ in bench.heads()}
