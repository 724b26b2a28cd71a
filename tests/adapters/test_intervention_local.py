"""The intervention scorer and the output explainer on the embedded model."""

import math
from collections.abc import Iterable, Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM

from autointerp_dagster.adapters.embedded import smollm2_dir
from autointerp_dagster.adapters.llm.local.backend import LocalBackend
from autointerp_dagster.adapters.llm.local.model import load_model
from autointerp_dagster.core.config import InterventionConfig, OutputExplainerConfig
from autointerp_dagster.core.config.models import LocalLLMConfig
from autointerp_dagster.core.explainers.output import OutputCase, explain_outputs
from autointerp_dagster.core.interventions.record import Intervention, SteeredPrompt
from autointerp_dagster.core.llm import Completion, JournalBlock, Request
from autointerp_dagster.core.scorers.intervention import InterventionJob, verdicts
from autointerp_dagster.core.scorers.tasks import ScoringTask
from autointerp_dagster.core.types import LatentId

pytestmark = pytest.mark.slow

LATENT = LatentId("sae", "layers.3", 17)
BLOCK = JournalBlock("score_intervention", "c0de", 0)
NATS = 1e-4
"""Per token, between a batch over a kept prefix and one text at a time without a cache, fp32."""

TEXTS = (
    ("The museum opens at nine and closes when the", " last visitor has left it.",
     " fish, trout, salmon and other fish"),
    ("Our train was late again, so we", " took the bus into town", " caught fish and ate fish"),
    ("Prices rose by 4 % in", " May, and by more in June", " salmon, cod, tuna and fish"),
    ("Ünder the old bridge 🌉 there\nwas a", " sign in red letters", " pond full of fish, fish"),
)  # fmt: skip
"""Scoring prompts with a clean and a steered continuation."""

EXPLANATIONS = ("fish", "kings and queens", 'the word "fish" (in any form)', "(é) 🐟")


class Unjournaled:
    """The local model asked directly, unit by unit."""

    def __init__(self) -> None:
        folder = smollm2_dir()
        config = LocalLLMConfig(source=str(folder), dtype="float32", device="cpu", threads=1)
        self.backend = LocalBackend(folder, config)
        self.identity = self.backend.identity
        self.done: list[tuple[Request, Completion]] = []

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Completion]]:
        for unit in self.backend.groups(requests):
            for request, reply in zip(unit, self.backend.run_unit(unit), strict=True):
                call_id = request.call_id(self.identity)
                completion = Completion(call_id, reply.text, reply.tokens, cost=reply.usage)
                self.done.append((request, completion))
                yield request, completion


def prompt_of(number: int, *, is_for_explainer: bool) -> SteeredPrompt:
    prompt, clean, steered = TEXTS[number]
    return SteeredPrompt(
        window_id=number << 16 | 9,
        is_for_explainer=is_for_explainer,
        quintile=0,
        activation=1.0,
        prompt=prompt,
        clean=None if is_for_explainer else clean,
        steered=None if is_for_explainer else steered,
        promoted=(" fish", " trout", " sea") if is_for_explainer else (),
        rises=(0.4, 0.1, 0.05) if is_for_explainer else (),
    )


def intervention(*, is_for_explainer: bool = False) -> Intervention:
    prompts = (prompt_of(i, is_for_explainer=is_for_explainer) for i in range(len(TEXTS)))
    return Intervention(LATENT, 1.0, "ok", 8.0, 1.0, tuple(prompts))


def tasks() -> tuple[ScoringTask, ...]:
    return tuple(
        ScoringTask(LATENT, f"output-{i}", "other", 100 + i, text)
        for i, text in enumerate(EXPLANATIONS)
    )


def plain_surprisals(requests: Iterable[Request]) -> dict[str, tuple[float, int]]:
    """-sum log p of each text's scored end, and its tokens: one text at a time, no cache."""
    folder = smollm2_dir()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = load_model(folder, "float32", "cpu").tokenizer
    found = {}
    for request in requests:
        encoded = tokenizer(request.prompt, add_special_tokens=False, return_offsets_mapping=True)
        ids = [tokenizer.bos_token_id, *encoded["input_ids"]]
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        after = torch.log_softmax(logits.double(), dim=-1)
        ends = [end for _, end in encoded["offset_mapping"]]
        wanted = [i for i, end in enumerate(ends, start=1) if end > request.answer.start]
        found[request.prompt] = -sum(float(after[i - 1, ids[i]]) for i in wanted), len(wanted)
    return found


@pytest.fixture(scope="module")
def scored():
    llm = Unjournaled()
    job = InterventionJob((intervention(),), tasks())
    rows = list(verdicts([job], InterventionConfig(), llm, lambda latent: BLOCK))
    return llm, rows, plain_surprisals(request for request, _ in llm.done)


def test_surprisals_are_those_of_one_text_at_a_time_without_a_cache(scored):
    llm, _, expected = scored
    for request, completion in llm.done:
        surprisal, n_tokens = expected[request.prompt]
        assert len(completion.tokens) == n_tokens
        found = -math.fsum(token.logprob for token in completion.tokens)
        assert found == pytest.approx(surprisal, abs=NATS * n_tokens)


def test_the_worked_passages_are_read_once_in_every_prompt(scored):
    """In the cache or in the text: the tokens read are those of one text and of BOS."""
    llm, _, _ = scored
    tokenizer = load_model(smollm2_dir(), "float32", "cpu").tokenizer
    for request, completion in llm.done:
        n_tokens = len(tokenizer(request.prompt, add_special_tokens=False)["input_ids"])
        assert completion.cost.prompt_tokens == 1 + n_tokens
    cached = [completion.cost.cached_tokens for _, completion in llm.done]
    n_static = len(tokenizer(llm.done[0][0].prompt.rsplit("Passage: ", 1)[0])["input_ids"])
    assert cached.count(0) == len(EXPLANATIONS)  # one prompt of each unit pays
    assert all(n >= n_static for n in cached if n)


def test_scores_are_the_differences_and_the_planted_explanation_scores_highest(scored):
    llm, rows, expected = scored
    requests = iter(request for request, _ in llm.done)
    means = {}
    for row in rows:
        (clean, n_tokens), (steered, _) = (expected[next(requests).prompt] for _ in "cs")
        assert row.status == "ok"
        assert row.score == pytest.approx(clean - steered, abs=2 * NATS * n_tokens)
        means.setdefault(row.explainer, []).append(row.score)
    assert sum(means["output-0"]) / len(TEXTS) > 1
    assert sum(means["output-0"]) > sum(means["output-1"])


def test_an_output_explanation_is_one_line_and_the_same_in_every_run():
    case = OutputCase(LATENT, "ok", intervention(is_for_explainer=True))
    config = OutputExplainerConfig(kind="output", n_samples=3)
    runs = [
        list(explain_outputs("output", config, [case], Unjournaled(), lambda latent: BLOCK))
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert sum(row.selected for row in runs[0]) == 1
    assert [row.candidate for row in runs[0]] == [0, 1, 2]
    assert all("\n" not in row.text for row in runs[0] if row.status == "ok")
