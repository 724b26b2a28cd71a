from pathlib import Path

import numpy as np
import pytest
from local_models import NATS, backend_of, plain_logprobs, save_model, text_request

from autointerp_dagster.adapters.llm.local.backend import LocalBackend
from autointerp_dagster.adapters.llm.local.model import load_model
from autointerp_dagster.core.llm import Continuation, Request

TEXTS = ("Once upon", "Rain fell on the old roof, and", "é")


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("base_model"), template=None, bos="<|begin|>")


@pytest.fixture
def base(base_dir) -> LocalBackend:
    return backend_of(base_dir)


def go_on(prompt: str, stop: tuple[str, ...] = (), **parameters) -> Request:
    return text_request(prompt, Continuation(stop), **{"max_tokens": 10, **parameters})


def greedy(folder: Path, prompt: str, n: int) -> tuple[str, list[float]]:
    """The most probable token, over and over, each by one forward over the whole text."""
    model = load_model(folder, "float32", "cpu")
    ids = [4, *model.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    new: list[int] = []
    logprobs: list[float] = []
    for _ in range(n):
        after = plain_logprobs(folder, [*ids, *new])[-1]
        token = int(after.argmax())
        if token in model.special_ids:
            break
        new.append(token)
        logprobs.append(float(after[token]))
    return "".join(model.detokenizer.pieces(np.array([ids[-1], *new]))[1:]), logprobs


def test_a_greedy_continuation_is_that_of_a_plain_loop(base, base_dir):
    replies = base.run_unit([go_on(text, top_logprobs=2) for text in TEXTS])
    for text, reply in zip(TEXTS, replies, strict=True):
        expected, logprobs = greedy(base_dir, text, 10)
        assert reply.text == expected
        # A letter that has not come whole is no part of the tokens' text, but of their number.
        found = [token.logprob for token in reply.tokens]
        assert found == pytest.approx(logprobs[: len(found)], abs=NATS)
        assert "".join(token.text for token in reply.tokens) == reply.text
        assert all(token.top[0][1] == token.logprob for token in reply.tokens)
        assert all(len(token.top) == 2 for token in reply.tokens)


def test_a_continuation_is_cut_before_the_first_stop_string(base):
    (whole,) = base.run_unit([go_on(TEXTS[0], max_tokens=40, top_logprobs=1)])
    assert len(whole.text) > 6
    early, late = whole.text[2:4], whole.text[5:6]
    expected = whole.text[: min(whole.text.index(early), whole.text.index(late))]
    (cut,) = base.run_unit([go_on(TEXTS[0], (late, early), max_tokens=40, top_logprobs=1)])
    assert (cut.text, cut.finish_reason) == (expected, "stop")
    assert "".join(token.text for token in cut.tokens) == expected
    assert cut.usage.completion_tokens <= whole.usage.completion_tokens


def test_a_continuation_ends_at_its_last_token_or_at_a_special_one(base, base_dir):
    model = load_model(base_dir, "float32", "cpu")
    draws = [go_on(TEXTS[1], temperature=1.0, sample=i, max_tokens=30) for i in range(40)]
    replies = base.run_unit(draws)
    assert {reply.finish_reason for reply in replies} == {"stop", "length"}
    for reply in replies:
        assert (reply.usage.completion_tokens == 30) == (reply.finish_reason == "length")
        assert "<|" not in reply.text
    assert model.special_ids == {0, 1, 2, 3, 4}


def test_without_candidates_a_continuation_has_no_tokens(base):
    assert base.run_unit([go_on("a")])[0].tokens is None


def test_samples_of_a_text_are_the_same_in_any_company(base, base_dir):
    samples = [
        go_on(TEXTS[i % 3], temperature=0.7 + 0.1 * i, sample=i, seed=i % 2) for i in range(6)
    ]
    together = base.run_unit(samples)
    assert backend_of(base_dir).run_unit(samples[::-1])[::-1] == together
    alone = [backend_of(base_dir).run_unit([sample])[0].text for sample in samples]
    assert [reply.text for reply in together] == alone


def test_each_sample_and_each_seed_is_another_draw(base):
    texts = [
        base.run_unit([go_on(TEXTS[0], temperature=1.0, sample=sample, seed=seed)])[0].text
        for sample in range(3)
        for seed in (None, 0, 1)
    ]
    assert len(set(texts)) == len(texts)


def test_draws_follow_the_models_probabilities(base, base_dir):
    draws = [go_on("a", temperature=1.0, sample=i, max_tokens=1) for i in range(400)]
    replies = base.run_unit(draws)
    model = load_model(base_dir, "float32", "cpu")
    ids = [4, *model.tokenizer("a", add_special_tokens=False)["input_ids"]]
    probabilities = plain_logprobs(base_dir, ids)[-1].exp()
    letters = {model.text_of(i): i for i in range(5, 261) if model.text_of(i).isascii()}
    likely = max(letters, key=lambda letter: float(probabilities[letters[letter]]))
    expected = float(probabilities[letters[likely]])
    # 400 draws: five standard errors are at most 5 * .5 / 20.
    assert sum(reply.text == likely for reply in replies) / 400 == pytest.approx(
        expected, abs=0.125
    )
    ended = float(probabilities[sorted(model.special_ids)].sum())
    n_ended = sum(reply.finish_reason == "stop" for reply in replies)
    assert n_ended / 400 == pytest.approx(ended, abs=0.125)


def test_continuations_tell_what_they_cost(base):
    replies = base.run_unit([go_on("a" * 50, temperature=1.0, sample=i) for i in range(3)])
    assert [reply.usage.prompt_tokens for reply in replies] == [51] * 3
    assert sorted(reply.usage.cached_tokens for reply in replies) == [0, 50, 50]


def test_an_empty_text_is_continued_after_bos(base):
    assert base.run_unit([go_on("")])[0].reason is None
