"""A planted direction that promotes one token, from steering to score, on the embedded model.

Its score must be far above both floors: another latent's explanation of the same steered text, and
a random direction with prompts, strength and explanation of its own.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from test_intervention_local import BLOCK, Unjournaled
from test_steering import english, planted, promote, smollm2

from autointerp_dagster.adapters.subject_models import SubjectModel
from autointerp_dagster.core.config import InterventionConfig, OutputExplainerConfig
from autointerp_dagster.core.explainers.output import OutputCase, explain_outputs
from autointerp_dagster.core.interventions import Intervention, interventions_of
from autointerp_dagster.core.metrics.nats import nats_estimates
from autointerp_dagster.core.scorers import ScoringTask, verdicts_frame
from autointerp_dagster.core.scorers.intervention import InterventionJob, verdicts
from autointerp_dagster.core.sparse_coders import LinearCoder

pytestmark = pytest.mark.slow
__all__ = ["english", "smollm2"]

HOOKPOINT, KL = "layers.29", 3.0
OTHERS = ("numbers and dates", "the names of kings and queens", "rain and storms")
"""What other latents might be said to promote."""


def steered_along(
    subject: SubjectModel, coder: LinearCoder, texts: list[np.ndarray]
) -> Intervention:
    outcome = promote(subject, coder, HOOKPOINT, texts, KL)
    ((intervention,),) = interventions_of(outcome.interventions, outcome.prompts).values()
    assert intervention.status == "ok"
    return intervention


def random_coder(coder: LinearCoder) -> LinearCoder:
    """The same coder, writing in a direction that means nothing."""
    noise = torch.randn(coder.decoder.shape, generator=torch.Generator().manual_seed(11))
    return replace(coder, decoder=torch.nn.functional.normalize(noise, dim=1))


def scores(llm: Unjournaled, intervention: Intervention, texts: Iterator[str]) -> pl.DataFrame:
    """Mean and standard error of each explanation's score, by explanation."""
    latent = intervention.latent
    tasks = tuple(ScoringTask(latent, text, "other", 100 + i, text) for i, text in enumerate(texts))
    job = InterventionJob((intervention,), tasks)
    frame = verdicts_frame(verdicts([job], InterventionConfig(), llm, lambda _: BLOCK))
    estimates = nats_estimates(frame, 0.95)
    return estimates.pivot("metric", index="explainer", values="value")


def test_a_planted_direction_scores_far_above_both_floors(
    smollm2: SubjectModel, english: list[np.ndarray]
) -> None:
    (token,) = smollm2.encode([" music"])[0]
    coder = planted(smollm2, token)
    llm = Unjournaled()
    found = scores(llm, steered_along(smollm2, coder, english), iter(("music", *OTHERS)))
    rows = {row["explainer"]: (row["mean_nats"], row["se_nats"]) for row in found.to_dicts()}
    random = steered_along(smollm2, random_coder(coder), english)
    case = OutputCase(random.latent, "ok", random)
    config = OutputExplainerConfig(kind="output", n_samples=1)
    (said,) = explain_outputs("output", config, [case], llm, lambda _: BLOCK)
    assert said.text is not None
    floor = scores(llm, random, iter((said.text,))).row(0, named=True)
    rows["a random direction's own"] = (floor["mean_nats"], floor["se_nats"])
    own, own_error = rows.pop("music")
    for mean, error in rows.values():
        assert own - mean > 3 * np.hypot(own_error, error), rows
