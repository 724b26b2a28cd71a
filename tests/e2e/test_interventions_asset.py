"""The interventions asset on the planted world: a row for every latent asked, true to itself."""

from pathlib import Path

import dagster as dg
import polars as pl
from bench import SMALL, Bench

from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer
from autointerp_dagster.core.interventions import interventions_of

INTERVENTIONS = {"kl": [0.1, 0.02], "n_prompts": 8, "n_for_explainer": 3, "n_tokens": 4}


def test_every_latent_asked_about_has_a_row_per_target_and_prompts_it_fires_on(
    world: Path, server: FakeLLMServer, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    base_lm = {"base_url": server.base_url, "model": "fake", "tokenizer": str(world / "model")}
    overrides = {
        **SMALL,
        "latents": [0, 1, 7, 9, 40],
        "models": {"base_lm": base_lm},
        "interventions": INTERVENTIONS,
        "scorers": {"intervention": {}},
    }
    bench = Bench(tmp_path, world, server.base_url, instance, overrides)
    bench.run(layers=["sae@h.0"], until="interventions")
    found = bench.table("interventions", "interventions")
    assert found.group_by("latent").len().sort("latent").rows() == [
        (latent, 2) for latent in (0, 1, 7, 9, 40)
    ]
    records = dict(bench.table("latent_records", "latents").select("latent", "status").iter_rows())
    for row in found.iter_rows(named=True):
        expected = {records[row["latent"]]}
        assert row["status"] in (expected if expected != {"ok"} else {"ok", "off_target"})
        if row["status"] == "ok":
            assert abs(row["kl"] - row["kl_target"]) <= 0.1 * row["kl_target"]
    prompts = bench.table("interventions", "intervention_prompts")
    fired = bench.table("activation_cache", "activations").select(
        "latent", window_id=pl.col("context").cast(pl.UInt64) * 65_536 + pl.col("position")
    )
    assert prompts.join(fired, on=["latent", "window_id"], how="anti").is_empty()
    seen = bench.table("latent_records", "windows").select(
        pl.col("window_id") // 65_536, split=pl.col("split").cast(pl.String)
    )
    for shown, wanted in ((True, "train"), (False, "test")):
        contexts = prompts.filter(pl.col("is_for_explainer") == shown)["window_id"] // 65_536
        judged = seen.filter(pl.col("window_id").is_in(contexts.implode()))
        assert set(judged["split"]) == {wanted}
    steered = {row["latent"] for row in found.iter_rows(named=True) if row["status"] == "ok"}
    assert steered
    assert found["n_dropped"].sum() == 0
    for latent in steered:
        first, second = interventions_of(found, prompts)[latent]
        assert [p.window_id for p in first.prompts] == [p.window_id for p in second.prompts]
        assert [p.clean for p in first.prompts] == [p.clean for p in second.prompts]
        assert sum(p.is_for_explainer for p in first.prompts) == 3
        assert len(first.prompts) == 8
