import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llm_requests import BLOCK
from local_models import NATS, backend_of, local, plain_logprobs, save_model, scores, text_request
from transformers import AutoModelForCausalLM

from autointerp_dagster.adapters.embedded import smollm2_dir
from autointerp_dagster.adapters.llm.backend import Reply
from autointerp_dagster.adapters.llm.local.backend import LocalBackend
from autointerp_dagster.adapters.llm.local.model import PREFIX_BLOCK, load_model
from autointerp_dagster.core.config.models import LocalLLMConfig
from autointerp_dagster.core.errors import ModelError
from autointerp_dagster.core.llm import (
    Choice,
    Continuation,
    LabelList,
    Message,
    PromptScores,
    Request,
)

WORKED = "Description: rain\nSentences: it rained. It poured.\n" * 5
SENTENCES = ("The café was wet.", "日本 🎉!", "x", "A far longer sentence, about very little.")


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory) -> Path:
    """A base model: no chat template, BOS is token 4."""
    return save_model(tmp_path_factory.mktemp("base_model"), template=None, bos="<|begin|>")


@pytest.fixture(scope="module")
def chat_dir(tmp_path_factory) -> Path:
    """A chat model without BOS."""
    return save_model(tmp_path_factory.mktemp("chat_model"))


@pytest.fixture
def base(base_dir) -> LocalBackend:
    return backend_of(base_dir)


@pytest.fixture
def chat(chat_dir) -> LocalBackend:
    return backend_of(chat_dir)


def unit_of(explanation: str, n: int = 8, **parameters) -> list[Request]:
    start = f"{WORKED}Description: {explanation}\nSentences: "
    texts = [SENTENCES[i % len(SENTENCES)] * (1 + i // 4) for i in range(n)]
    return [scores(start, text, unit=explanation, **parameters) for text in texts]


def logprobs(reply: Reply) -> list[float]:
    return [token.logprob for token in reply.tokens]


def assert_same(some: list[Reply], others: list[Reply]) -> None:
    for one, other in zip(some, others, strict=True):
        assert [token.text for token in one.tokens] == [token.text for token in other.tokens]
        assert logprobs(one) == pytest.approx(logprobs(other), abs=NATS)


def oracle(folder: Path, request: Request) -> list[float]:
    """One prompt, no cache, all logits. In the tiny tokenizer every byte is a token."""
    tokenizer = load_model(folder, "float32", "cpu").tokenizer
    ids = tokenizer(request.prompt, add_special_tokens=False, split_special_tokens=True)
    ids = [tokenizer.bos_token_id, *ids["input_ids"]]
    after = plain_logprobs(folder, ids)
    n_given = 1 + len(request.prompt[: request.answer.start].encode())
    return [float(after[place - 1, ids[place]]) for place in range(n_given, len(ids))]


def test_prompt_scores_are_those_of_one_prompt_at_a_time_without_a_cache(base, base_dir):
    requests = unit_of("cats")
    for request, reply in zip(requests, base.run_unit(requests), strict=True):
        assert logprobs(reply) == pytest.approx(oracle(base_dir, request), abs=NATS)
        assert reply.text == ""
        assert "".join(t.text for t in reply.tokens) == request.prompt[request.answer.start :]


@given(data=st.data(), text=st.text(min_size=1, max_size=12))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_scored_tokens_joined_are_the_prompts_tail(base, base_dir, data, text):
    start = data.draw(st.integers(0, len(text)))
    request = text_request(text, PromptScores(start))
    (reply,) = base.run_unit([request])
    # Every byte is a token, so a border between characters is one between tokens too.
    assert "".join(token.text for token in reply.tokens) == text[start:]
    assert len(reply.tokens) == len(text[start:].encode())
    assert logprobs(reply) == pytest.approx(oracle(base_dir, request), abs=NATS)


def test_a_letter_of_several_tokens_stands_at_the_last_of_them(base):
    (reply,) = base.run_unit([scores("a", "é!")])
    assert [token.text for token in reply.tokens] == ["", "é", "!"]


def test_the_first_token_after_the_start_is_scored(base, base_dir):
    requests = [scores(WORKED, "ab"), scores(WORKED, "ac"), scores(WORKED, "b")]
    for request, reply in zip(requests, base.run_unit(requests), strict=True):
        assert len(reply.tokens) == len(request.prompt) - len(WORKED)
        assert reply.tokens[0].logprob == pytest.approx(oracle(base_dir, request)[0], abs=NATS)


def test_prompt_scores_of_a_batch_of_one_equal_those_of_eight(base):
    requests = unit_of("cats")
    alone = [base.run_unit([request])[0] for request in requests]
    assert_same(base.run_unit(requests), alone)


def test_order_of_prompts_and_of_units_changes_no_bit_of_prompt_scores(base, base_dir):
    names = ("cats", "dogs", "a long description " * 8, "rain")
    forwards = [base.run_unit(unit_of(name)) for name in names]
    again = backend_of(base_dir)
    backwards = [again.run_unit(unit_of(name)[::-1])[::-1] for name in names[::-1]][::-1]
    assert forwards == backwards


def test_a_partial_batch_and_small_batches_give_the_results_of_large_ones(base, monkeypatch):
    requests = unit_of("cats", 7)
    large = base.run_unit(requests)
    module = "autointerp_dagster.adapters.llm.local.backend.MAX_BATCH_TOKENS"
    monkeypatch.setattr(module, 60)
    assert_same(large, base.run_unit(requests))


def test_the_kept_blocks_of_a_text_are_shared_by_units_and_never_grow(base, base_dir):
    first = base.run_unit(unit_of("cats"))
    blocks = load_model(base_dir, "float32", "cpu").blocks
    ((ids, kept),) = blocks.items()
    before = [keys.clone() for keys, _, _ in kept]
    for name in ("dogs", "cats"):
        last = base.run_unit(unit_of(name))
    assert len(ids) % PREFIX_BLOCK == 0
    assert kept.get_seq_length() == len(ids) > 0
    assert all(torch.equal(b, a) for b, (a, _, _) in zip(before, kept, strict=True))
    assert list(blocks) == [ids]
    assert last == first


def test_a_text_that_shares_the_first_block_alone_is_computed_from_there(base, base_dir):
    model = load_model(base_dir, "float32", "cpu")
    long = tuple(range(10, 10 + PREFIX_BLOCK)) + (7,) * (PREFIX_BLOCK + 9)
    other = (*long[: PREFIX_BLOCK + 3], *(8,) * PREFIX_BLOCK)
    with torch.inference_mode():
        cold = model.block_prefix(other)
        model.blocks.clear()
        model.block_prefix(long)
        warm = model.block_prefix(other)
    assert warm.get_seq_length() == len(other)
    assert all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(cold, warm, strict=True)
    )


def test_at_most_four_prefixes_of_texts_are_kept(base, base_dir):
    for letter in "abcdefg":
        base.run_unit([scores(letter * 200, "x"), scores(letter * 200, "y")])
    assert len(load_model(base_dir, "float32", "cpu").blocks) == 4


def test_named_candidates_are_told_however_improbable_they_are(base, base_dir):
    """Of a text of several tokens nothing can be told."""
    start, names = WORKED, ("0", "7", "ab")
    plain = scores(start, "?\n?", top_logprobs=20)
    named = replace(plain, answer=PromptScores(plain.answer.start, names))
    usual, reply = base.run_unit([plain, named])
    tokenizer = load_model(base_dir, "float32", "cpu").tokenizer
    ids = [4, *tokenizer(plain.prompt, add_special_tokens=False)["input_ids"]]
    after = plain_logprobs(base_dir, ids)
    for place, token in enumerate(reply.tokens, start=len(ids) - len(reply.tokens)):
        expected = {
            name: float(after[place - 1, tokenizer.convert_tokens_to_ids(name)])
            for name in ("0", "7")
        }
        assert dict(token.top) == pytest.approx(expected, abs=NATS)
        assert list(token.top) == sorted(token.top, key=lambda pair: -pair[1])
    assert logprobs(reply) == pytest.approx(logprobs(usual), abs=NATS)
    assert [len(token.top) for token in usual.tokens] == [20] * len(usual.tokens)


def test_the_candidates_at_a_place_are_the_most_probable_tokens(base, base_dir):
    given_text = WORKED + "ab"
    requests = [
        scores(given_text, "c", top_logprobs=3),
        scores(given_text, "d", top_logprobs=1),
        scores(given_text, "e"),
    ]
    replies = base.run_unit(requests)
    assert [len(reply.tokens[0].top) for reply in replies] == [3, 1, 0]
    model = load_model(base_dir, "float32", "cpu")
    ids = [4, *model.tokenizer(given_text, add_special_tokens=False)["input_ids"]]
    best = plain_logprobs(base_dir, ids)[-1].topk(3)
    top = replies[0].tokens[0].top
    assert [text for text, _ in top] == [model.text_of(i) for i in best.indices.tolist()]
    assert [logprob for _, logprob in top] == pytest.approx(best.values.tolist(), abs=NATS)


def test_prompt_scores_tell_what_they_cost(base):
    replies = base.run_unit(unit_of("cats"))
    cached = sorted({reply.usage.cached_tokens for reply in replies})
    # One prompt of the unit pays for the prefix; BOS is a token, the last token given is fed again.
    assert cached == [0, len(unit_of("cats")[0].prompt) - len(SENTENCES[0])]
    assert [r.usage.prompt_tokens for r in replies[:1]] == [1 + len(unit_of("cats")[0].prompt) + 1]
    assert {reply.usage.completion_tokens for reply in replies} == {0}


def test_nothing_is_scored_where_the_text_ends_before_the_start(base):
    (reply,) = base.run_unit([text_request("abc", PromptScores(3))])
    assert (reply.text, reply.tokens, reply.reason) == ("", (), None)


def test_without_bos_the_first_token_has_no_probability_and_the_others_do(chat):
    first, later = chat.run_unit(
        [text_request("abc", PromptScores(0)), text_request("abc", PromptScores(1))]
    )
    assert (first.tokens, first.reason) == (None, "call_failed")
    assert [token.text for token in later.tokens] == ["b", "c"]


def test_a_prompt_beyond_the_models_positions_is_too_long(base):
    long, short = base.run_unit([scores("a" * 600, "b"), scores("a", "b")])
    assert (long.reason, short.reason) == ("too_long", None)


def test_the_name_of_a_special_token_in_a_text_is_plain_text(base):
    (reply,) = base.run_unit([scores("a", "<|end|>")])
    assert len(reply.tokens) == len("<|end|>")


def test_a_base_model_refuses_a_chat_with_advice_and_scores_texts(base):
    assert base.run_unit([scores("a", "b")])[0].reason is None
    for answer in (LabelList(1), Choice(("yes", "no"))):
        question = Request((Message("user", "?"),), answer, "unit", BLOCK)
        with pytest.raises(ModelError, match="chat template"):
            base.run_unit([question])


def test_a_format_without_the_text_or_chat_that_it_wants_is_refused(base):
    with pytest.raises(ValueError, match="PromptScores wants a prompt"):
        base.run_unit([replace(scores("a", "b"), prompt=None)])
    with pytest.raises(ValueError, match="Choice wants messages"):
        base.run_unit([replace(scores("a", "b"), answer=Choice(("a", "b")))])


def test_a_local_model_says_that_it_can_answer_all_formats(base):
    assert base.capabilities == {
        "structured_outputs": True,
        "log_probabilities": True,
        "prompt_log_probabilities": True,
        "seed": True,
    }


OPTIONS = ("1", "10", "no rain", "é")


def choice(question: str, **parameters) -> Request:
    messages = (Message("system", "Choose."), Message("user", question))
    return Request(messages, Choice(OPTIONS), "unit", BLOCK, n_shared=1, **parameters)


def option_logprobs(folder: Path, request: Request) -> list[float]:
    """Each option and the end of the turn, by one forward per option."""
    tokenizer = load_model(folder, "float32", "cpu").tokenizer
    turns = [{"role": m.role, "content": m.content} for m in request.messages]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    n_given = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    totals = []
    for option in request.answer.options:
        ids = tokenizer(text + option + "<|end|>", add_special_tokens=False)["input_ids"]
        after = plain_logprobs(folder, ids)
        totals.append(sum(float(after[i - 1, ids[i]]) for i in range(n_given, len(ids))))
    return totals


def test_a_choice_is_the_most_probable_whole_answer(chat, chat_dir):
    requests = [choice("?" * (1 + 3 * i)) for i in range(5)]
    for request, reply in zip(requests, chat.run_unit(requests), strict=True):
        expected = option_logprobs(chat_dir, request)
        (token,) = reply.tokens
        assert dict(token.top) == pytest.approx(dict(zip(OPTIONS, expected, strict=True)), abs=NATS)
        assert (
            reply.text
            == token.text
            == token.top[0][0]
            == max(dict(token.top), key=dict(token.top).get)
        )
        assert token.logprob == dict(token.top)[reply.text]
        assert sum(math.exp(logprob) for _, logprob in token.top) <= 1
        assert request.answer.fault(reply.text) is None
        assert reply.usage.completion_tokens == len(reply.text.encode())
        assert 0 < reply.usage.cached_tokens < reply.usage.prompt_tokens


def test_choices_do_not_depend_on_company_or_batches(chat, monkeypatch):
    requests = [choice("?" * (1 + i)) for i in range(5)]
    together = chat.run_unit(requests)
    assert chat.run_unit(requests[::-1])[::-1] == together
    alone = [chat.run_unit([request])[0] for request in requests]
    module = "autointerp_dagster.adapters.llm.local.backend.MAX_BATCH_TOKENS"
    monkeypatch.setattr(module, 60)
    for others in (alone, chat.run_unit(requests)):
        for one, other in zip(together, others, strict=True):
            assert dict(one.tokens[0].top) == pytest.approx(dict(other.tokens[0].top), abs=NATS)


def test_choices_are_drawn_from_the_options_probabilities(chat):
    draws = [choice("?", temperature=1.0, sample=i) for i in range(400)]
    replies = chat.run_unit(draws)
    assert chat.run_unit(draws[:20])[7].text == replies[7].text
    top = dict(replies[0].tokens[0].top)
    total = sum(math.exp(logprob) for logprob in top.values())
    for option, logprob in top.items():
        share = sum(reply.text == option for reply in replies) / len(replies)
        # 400 draws: five standard errors are at most 5 * .5 / 20.
        assert share == pytest.approx(math.exp(logprob) / total, abs=0.125)


def test_all_formats_may_share_a_unit(chat):
    requests = [
        choice("?"),
        scores("ab", "cd"),
        text_request("ab", Continuation(), max_tokens=3),
        replace(choice("!"), answer=LabelList(2)),
    ]
    replies = chat.run_unit(requests)
    assert [r.answer.fault(a.text) for r, a in zip(requests, replies, strict=True)] == [None] * 4
    assert_same([replies[1]], chat.run_unit(requests[1:2]))


@pytest.mark.gpu
def test_cuda_gives_the_prompt_scores_choices_and_texts_of_the_cpu(chat, chat_dir):
    on_cuda = LocalBackend(chat_dir, local(chat_dir).model_copy(update={"device": "cuda"}))
    requests = [
        *unit_of("cats", top_logprobs=3),
        choice("?"),
        text_request(WORKED, Continuation(), max_tokens=8, top_logprobs=3, temperature=1.0),
    ]
    for one, other in zip(chat.run_unit(requests), on_cuda.run_unit(requests), strict=True):
        assert one.text == other.text
        assert [t.text for t in one.tokens] == [t.text for t in other.tokens]
        assert logprobs(one) == pytest.approx(logprobs(other), abs=NATS)


@pytest.mark.slow
def test_smollm2_scores_sentences_as_a_plain_loop_does():
    folder = smollm2_dir()
    config = LocalLLMConfig(source=str(folder), dtype="float32", device="cpu", threads=1)
    requests = [*unit_of("animals", 5), scores(WORKED, "cats and dogs"), scores(WORKED, " and 🎉")]
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = load_model(folder, "float32", "cpu").tokenizer
    for request, reply in zip(
        requests, LocalBackend(folder, config).run_unit(requests), strict=True
    ):
        ids = [0, *tokenizer(request.prompt, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            logits = whole(torch.tensor([ids]), use_cache=False).logits[0]
        after = torch.log_softmax(logits, dim=-1)
        n = len(reply.tokens)
        expected = [float(after[i - 1, ids[i]]) for i in range(len(ids) - n, len(ids))]
        assert logprobs(reply) == pytest.approx(expected, abs=NATS)
        assert request.prompt.endswith("".join(token.text for token in reply.tokens))
        assert n >= len(request.prompt[request.answer.start :].split())
