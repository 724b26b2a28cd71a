"""Tokens counted before anything is sent: as the model's tokenizer counts them, or estimated."""

from pathlib import Path

import pytest
from llm_requests import BLOCK
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from autointerp_dagster.adapters.llm.counting import (
    EstimatedTokens,
    PromptCounter,
    TokenizerTokens,
    completion_tokens,
    open_tokens,
)
from autointerp_dagster.core.config.models import RemoteLLMConfig
from autointerp_dagster.core.errors import ModelError
from autointerp_dagster.core.llm import Continuation, FreeText, LabelList, Message, Request

TEMPLATE = (
    "{% for m in messages %}<start> {{ m.role }} {{ m.content }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start> assistant {% endif %}"
)
STATIC = (Message("system", "a b c"), Message("user", "d e"), Message("assistant", "[ 1 ]"))


def words(template: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template)


def ask(unit: str, question: str) -> Request:
    return Request((*STATIC, Message("user", question)), LabelList(3), unit, BLOCK, n_shared=3)


def test_with_a_chat_template_the_whole_prompt_is_counted() -> None:
    tokenizer = words(TEMPLATE)
    counter = PromptCounter(TokenizerTokens(tokenizer, "words"))
    for question in ("f g h", "x"):
        request = ask("u", question)
        turns = [{"role": m.role, "content": m.content} for m in request.messages]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert counter.count(request).total == len(str(text).split())


def test_a_cache_has_the_static_part_and_what_a_units_questions_begin_with() -> None:
    counter = PromptCounter(TokenizerTokens(words(), "words"))
    static = 3 + 2 + 3 + 3 * 4
    asked = [("u", "what is x"), ("u", "what is y"), ("v", "what is y"), ("v", "what is y")]
    found = [counter.count(ask(unit, question)) for unit, question in asked]
    assert {tokens.total for tokens in found} == {static + 3 + 4}
    # first of all; same unit; same static part alone; all but what stands around the question
    assert [tokens.shared for tokens in found] == [0, static + 2, static, static + 3]


def test_an_estimate_counts_bytes_and_messages() -> None:
    counter = PromptCounter(EstimatedTokens())
    request = Request((Message("user", "x" * 35),), FreeText(), "u", BLOCK)
    assert counter.count(request) == (14, 0)
    plain = Request((), Continuation(), "u", BLOCK, prompt="x" * 35)
    assert counter.count(plain).total == 10


def test_only_a_list_of_labels_says_how_long_its_answer_is() -> None:
    assert completion_tokens(ask("u", "q"), EstimatedTokens()) == 7
    assert completion_tokens(ask("u", "q"), TokenizerTokens(words(), "words")) == 3
    prose = Request((), FreeText(), "u", BLOCK)
    assert completion_tokens(prose, EstimatedTokens()) is None


def test_a_tokenizer_is_found_in_a_folder_or_named_as_missing(tmp_path: Path) -> None:
    words(TEMPLATE).save_pretrained(tmp_path)
    config = RemoteLLMConfig(base_url="http://x/v1", model="m", tokenizer=str(tmp_path))
    assert open_tokens(config).description == f"the tokenizer {tmp_path}"
    assert open_tokens(config).of_text("a b c") == 3
    nowhere = config.model_copy(update={"tokenizer": str(tmp_path / "none")})
    with pytest.raises(ModelError, match=r"models: tokenizer: .* leave it out for an estimate"):
        open_tokens(nowhere)
    without = config.model_copy(update={"tokenizer": None})
    assert "an estimate" in open_tokens(without).description
