import pytest

from autointerp_dagster.core.llm import Usage
from autointerp_dagster.core.metrics.costs import StageCost, cost_rows

USAGE = Usage(1000, 400, 50, 0.25, estimated_tokens=30)


def test_a_stage_has_a_row_for_each_kind_of_token_and_its_price_per_latent():
    rows = cost_rows({"score_detection": StageCost(USAGE, n_latents=5)})
    assert dict(rows.select("statistic", "value").iter_rows()) == {
        "prompt_tokens": 1000,
        "cached_tokens": 400,
        "completion_tokens": 50,
        "estimated_tokens": 30,
        "usd": 0.25,
        "usd_per_latent": 0.05,
    }
    assert set(rows["comparison"]) == {"cost"}
    assert set(rows["a"]) == {"score_detection"}
    assert set(rows["n"]) == {5}


@pytest.mark.parametrize("costs", [{}, {"explanations": StageCost(Usage(), n_latents=0)}])
def test_without_latents_there_is_no_price_per_latent(costs):
    rows = cost_rows(costs)
    assert rows.filter(statistic="usd_per_latent")["value"].drop_nulls().is_empty()
    assert rows.height == 6 * len(costs)
