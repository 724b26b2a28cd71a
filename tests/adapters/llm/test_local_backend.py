import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llm_requests import BLOCK
from local_models import NATS, local, save_model
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache
from upath import UPath

from autointerp_dagster.adapters.llm.client import JournaledLLM
from autointerp_dagster.adapters.llm.factory import open_llm
from autointerp_dagster.adapters.llm.journal.journal import Journal
from autointerp_dagster.adapters.llm.local.backend import LocalBackend, batches_of
from autointerp_dagster.adapters.llm.local.decoding import Line
from autointerp_dagster.adapters.llm.local.model import Batch, fork, load_model
from autointerp_dagster.adapters.llm.local.prompts import Prompt, common_len, label_form
from autointerp_dagster.core.config.models import LocalLLMConfig
from autointerp_dagster.core.errors import ModelError
from autointerp_dagster.core.llm import FreeText, LabelList, Message, Request

SHOTS = (
    Message("system", "Say which texts fit."),
    Message("user", "Description: rain\n1. it rained\n2. it shone"),
    Message("assistant", "[1, 0]"),
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("chat_model"))


@pytest.fixture
def backend(model_dir) -> LocalBackend:
    load_model(model_dir, "float32", "cpu").prefixes.clear()
    return LocalBackend(model_dir, local(model_dir))


def judge(unit: str, windows: tuple[str, ...], **parameters) -> Request:
    lines = "\n".join(f"{i}. {window}" for i, window in enumerate(windows, start=1))
    return Request(
        messages=(*SHOTS, Message("user", f"Description: {unit}\n{lines}")),
        answer=LabelList(len(windows)),
        unit=unit,
        block=BLOCK,
        n_shared=len(SHOTS),
        top_logprobs=5,
        **parameters,
    )


def unit_of(name: str, n: int = 8) -> list[Request]:
    """Prompts of unlike lengths with 1, 2 or 3 labels."""
    return [judge(name, ("a cat" * (1 + i), f"dog {i}", "mice")[: 1 + i % 3]) for i in range(n)]


def explain(name: str, sample: int = 0, **parameters) -> Request:
    return Request(
        messages=(*SHOTS, Message("user", f"Texts about {name}")),
        answer=FreeText(),
        unit=name,
        block=BLOCK,
        n_shared=len(SHOTS),
        max_tokens=12,
        sample=sample,
        **parameters,
    )


def logprobs(reply) -> list[float]:
    return [logprob for token in reply.tokens for _, logprob in sorted(token.top)]


def assert_same(some, others) -> None:
    assert [reply.text for reply in some] == [reply.text for reply in others]
    for one, other in zip(some, others, strict=True):
        assert logprobs(one) == pytest.approx(logprobs(other), abs=NATS)


def naive_logprobs(model_dir: Path, request: Request, labels: str) -> list[float]:
    """Both candidates at each label, by one plain forward over the whole text per label."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = load_model(model_dir, "float32", "cpu").tokenizer
    turns = [{"role": m.role, "content": m.content} for m in request.messages]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    expected = []
    for place in range(len(labels)):
        answer = "[" + ", ".join(labels[:place]) + (", " if place else "")
        ids = tokenizer(text + answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            after = torch.log_softmax(model(ids).logits[0, -1], dim=-1)
        expected += [float(after[tokenizer.convert_tokens_to_ids(digit)]) for digit in "01"]
    return expected


def test_label_log_probabilities_are_those_of_a_plain_forward_pass(backend, model_dir):
    requests = unit_of("cats")
    for request, reply in zip(requests, backend.run_unit(requests), strict=True):
        labels = reply.text.strip("[]").replace(", ", "")
        assert logprobs(reply) == pytest.approx(
            naive_logprobs(model_dir, request, labels), abs=NATS
        )


def test_every_guided_answer_has_the_format_and_the_more_probable_label(backend):
    requests = unit_of("cats")
    for request, reply in zip(requests, backend.run_unit(requests), strict=True):
        assert request.answer.fault(reply.text) is None
        readings = request.answer.read(reply.text, reply.tokens)
        for reading, token in zip(readings, reply.tokens, strict=True):
            top = dict(token.top)
            assert reading.prediction == (top["1"] > top["0"])
            assert reading.probability == pytest.approx(
                1 / (1 + math.exp(top["0"] - top["1"])), abs=1e-9
            )


def test_a_batch_of_one_equals_a_batch_of_eight(backend):
    requests = unit_of("cats", 8)
    alone = [backend.run_unit([request])[0] for request in requests]
    assert_same(backend.run_unit(requests), alone)


def test_the_order_of_prompts_in_a_unit_changes_nothing(backend):
    requests = unit_of("cats", 8)
    backwards = backend.run_unit(requests[::-1])[::-1]
    assert [r.text for r in backend.run_unit(requests)] == [r.text for r in backwards]
    assert [r.tokens for r in backend.run_unit(requests)] == [r.tokens for r in backwards]


def test_order_and_grouping_of_units_change_nothing_to_the_bit(backend, model_dir):
    units = [unit_of(name) for name in ("cats", "dogs", "rain")]
    forwards = [backend.run_unit(unit) for unit in units]
    load_model(model_dir, "float32", "cpu").prefixes.clear()
    backwards = [backend.run_unit(unit) for unit in units[::-1]][::-1]
    assert forwards == backwards


def test_a_kept_prefix_gives_the_results_of_no_prefix_and_never_grows(backend, model_dir):
    requests = unit_of("cats")
    first = backend.run_unit(requests)
    (kept,) = load_model(model_dir, "float32", "cpu").prefixes.values()
    before = [(keys.clone(), values.clone()) for keys, values, _ in kept]
    for name in ("dogs", "rain", "cats"):
        last = backend.run_unit(unit_of(name))
    after = [(keys, values) for keys, values, _ in kept]
    assert all(
        torch.equal(b, a)
        for bs, as_ in zip(before, after, strict=True)
        for b, a in zip(bs, as_, strict=True)
    )
    assert last == first
    assert_same(first, backend.run_unit([replace(r, n_shared=0) for r in requests]))
    assert first[0].usage.cached_tokens >= kept.get_seq_length() > 0


def test_a_fork_shares_memory_until_it_grows(model_dir):
    model = load_model(model_dir, "float32", "cpu")
    with torch.inference_mode():
        kept = model.prefix((5, 6, 7))
        forked = fork(kept, 4)
        assert forked.layers[0].keys.data_ptr() == kept.layers[0].keys.data_ptr()
        assert forked.layers[0].keys.shape[0] == 4


def test_small_batches_give_the_results_of_large_ones(backend, monkeypatch):
    requests = unit_of("cats", 8)
    large = backend.run_unit(requests)
    module = "autointerp_dagster.adapters.llm.local.backend.MAX_BATCH_TOKENS"
    monkeypatch.setattr(module, 60)
    assert_same(large, backend.run_unit(requests))


def test_batches_stay_within_the_bound_and_hold_every_prompt_once():
    prompts = [
        Prompt(judge("u", ("x",)), f"{i:032x}", tuple(range(10, 20 + 13 * i)), 0) for i in range(99)
    ]
    batches = list(batches_of(prompts, 10))
    assert sorted(p.call_id for batch in batches for p in batch) == [p.call_id for p in prompts]
    assert all(
        len(batch) * max(len(p.ids) - 10 for p in batch) <= 2048 for batch in batches if batch[1:]
    )


def test_free_text_starts_with_the_marker_and_is_one_line(backend):
    for reply in backend.run_unit([explain("cats"), explain("cats", sample=1, temperature=1.0)]):
        assert FreeText().fault(reply.text) is None
        assert "\n" not in reply.text
        assert 1 <= reply.usage.completion_tokens <= 12


def test_free_text_repeats_no_run_of_three_tokens_and_does_not_end_at_once(model_dir):
    model = load_model(model_dir, "float32", "cpu")
    end, a, b = (model.tokenizer.convert_tokens_to_ids(token) for token in ("<|end|>", "a", "b"))
    logits = torch.zeros(len(model.tokenizer))
    logits[end], logits[a], logits[b] = 2.5, 3.0, 2.0
    line = Line(Prompt(explain("cats"), "0" * 32, (1, 2), 0))
    while line.finish_reason is None:
        line.grow(model, logits)
    # "aaa" would come again as the fourth letter; then the end of the turn is the likeliest.
    assert (line.ids, line.finish_reason) == ([a, a, a], "stop")
    logits[end] = 4.0
    first = Line(Prompt(explain("cats"), "0" * 32, (1, 2), 0))
    first.grow(model, logits)
    assert first.ids == [a]


def test_samples_differ_and_each_is_the_same_in_any_company(backend):
    samples = [explain("cats", sample=i, temperature=1.5) for i in range(4)]
    together = [reply.text for reply in backend.run_unit(samples)]
    alone = [backend.run_unit([sample])[0].text for sample in samples]
    assert together == alone
    assert len(set(together)) > 1


def test_another_seed_is_another_sample(backend):
    seeds = [explain("cats", temperature=1.5, seed=seed) for seed in (None, 0, 1)]
    texts = [reply.text for reply in backend.run_unit(seeds)]
    assert [backend.run_unit([seed])[0].text for seed in seeds[::-1]] == texts[::-1]
    assert len(set(texts)) == 3


def test_labels_and_free_text_may_share_a_unit(backend):
    requests = [judge("cats", ("a", "b")), explain("cats"), judge("cats", ("c",))]
    replies = backend.run_unit(requests)
    assert [r.answer.fault(a.text) for r, a in zip(requests, replies, strict=True)] == [None] * 3


def test_a_prompt_beyond_the_models_positions_is_a_row_not_an_error(backend, tmp_path):
    with Journal(UPath(tmp_path)) as journal, JournaledLLM(backend, journal) as llm:
        requests = [judge("cats", ("word " * 200,)), judge("cats", ("short",))]
        completed = [completion for _, completion in llm.answer(requests)]
    assert [completion.reason for completion in completed] == ["too_long", None]


def test_a_local_model_answers_through_the_factory_and_its_journal(model_dir, tmp_path):
    requests = unit_of("cats") + unit_of("dogs")
    with Journal(UPath(tmp_path)) as journal:
        with open_llm(local(model_dir), journal=journal) as llm:
            first = {r.messages: c for r, c in llm.answer(requests)}
        with open_llm(local(model_dir), journal=journal) as llm:
            second = {r.messages: c for r, c in llm.answer(requests)}
    assert len(first) == 16
    assert not any(c.from_journal for c in first.values())
    assert all(c.from_journal for c in second.values())
    assert {m: (c.text, c.tokens) for m, c in first.items()} == {
        m: (c.text, c.tokens) for m, c in second.items()
    }


def test_other_weights_or_another_dtype_are_another_identity(model_dir, tmp_path):
    same = LocalBackend(model_dir, local(model_dir)).identity
    assert same == LocalBackend(model_dir, local(model_dir)).identity
    other = save_model(tmp_path, seed=1)
    in_bf16 = local(model_dir).model_copy(update={"dtype": "bfloat16"})
    assert (
        len(
            {
                same,
                LocalBackend(other, local(other)).identity,
                LocalBackend(model_dir, in_bf16).identity,
            }
        )
        == 3
    )


def test_a_tokenizer_without_chat_template_is_refused_with_advice(tmp_path):
    folder = save_model(tmp_path, template=None)
    with pytest.raises(ModelError, match="instruct"):
        LocalBackend(folder, local(folder)).run_unit(unit_of("cats"))


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no weights"):
        LocalBackend(tmp_path, local(tmp_path))


def test_the_label_form_is_forced_around_single_tokens(model_dir):
    tokenizer = load_model(model_dir, "float32", "cpu").tokenizer
    form = label_form(tokenizer)
    spelled = [*form.opening, form.first[1], *form.separator, form.later[0]]
    assert tokenizer.decode(spelled) == "[1, 0"


def test_the_common_length_of_rows_is_that_of_their_longest_common_prefix():
    assert common_len([(1, 2, 3), (1, 2, 4, 5), (1, 2)]) == 2
    assert common_len([(1,), (2,)]) == 0
    assert common_len([(1, 2)]) == 2


@pytest.mark.gpu
def test_a_cuda_device_gives_the_results_of_the_cpu(backend, model_dir):
    on_cuda = local(model_dir).model_copy(update={"device": "cuda"})
    replies = LocalBackend(model_dir, on_cuda).run_unit(unit_of("cats"))
    assert_same(backend.run_unit(unit_of("cats")), replies)


@pytest.mark.slow
def test_smollm2_labels_in_bf16_hardly_depend_on_the_batch(tmp_path):
    config = LocalLLMConfig(source="embedded:smollm2-135m-instruct", threads=1)
    with Journal(UPath(tmp_path)) as journal, open_llm(config, journal=journal) as llm:
        together = [completion for _, completion in llm.answer(unit_of("animals", 6))]
    with Journal(UPath(tmp_path / "alone")) as journal, open_llm(config, journal=journal) as llm:
        alone = [next(llm.answer([request]))[1] for request in unit_of("animals", 6)]
    for one, other in zip(together, alone, strict=True):
        assert logprobs(one) == pytest.approx(logprobs(other), abs=0.3)


def test_labels_of_a_bf16_model_have_fine_probabilities(model_dir):
    """The head's product is made in fp32: logits are not multiples of a bf16 step."""
    model = load_model(model_dir, "bfloat16", "cpu")
    kept = model.extended(DynamicCache(), [1, 2, 3])
    fine = model.fine_logits(Batch(kept, 2), [(4, 5), (6, 7)])
    coarse = model.logits(Batch(kept, 2), [(4, 5), (6, 7)])
    assert torch.allclose(fine, coarse, rtol=0.02, atol=0.02)
    assert torch.equal(coarse, coarse.bfloat16().float())
    assert not torch.equal(fine, fine.bfloat16().float())
