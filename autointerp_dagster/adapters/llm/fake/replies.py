"""Response bodies in OpenAI's form, with made-up probabilities and token counts."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autointerp_dagster.adapters.llm.fake.faults import REFUSAL, Fault, spoiled, uniform

CACHE_WORDS = 16
"""Words of a block that a prefix cache keeps as a whole."""

_ANSWER_TOKEN = re.compile(r"[01]|[^01]+")
_TEXT_TOKEN = re.compile(r"\s*\S+|\s+$")

Json = dict[str, Any]


@dataclass
class PrefixCache:
    """Which beginnings of prompts were seen, by blocks of words, as servers keep them."""

    _seen: set[bytes] = field(default_factory=set)

    def cached(self, words: Sequence[str]) -> int:
        """How many leading words an earlier prompt shares; the prompt is remembered."""
        chain, n_cached, is_known = b"", 0, True
        for start in range(0, len(words) - CACHE_WORDS + 1, CACHE_WORDS):
            block = " ".join(words[start : start + CACHE_WORDS]).encode()
            chain = hashlib.blake2b(chain + block, digest_size=8).digest()
            is_known = is_known and chain in self._seen
            n_cached += CACHE_WORDS * is_known
            self._seen.add(chain)
        return n_cached


@dataclass(frozen=True)
class Voice:
    """How a fake server puts what it says."""

    p_answer: float
    """Probability given to each label answered; the other label gets the rest."""
    has_usage: bool
    """Whether tokens are reported."""
    cache: PrefixCache | None
    """Null: no cached tokens are reported."""

    def chat(self, body: Json, text: str, fault: Fault | None) -> Json:
        """A chat completion that says ``text``, or a version of it with a fault of format."""
        text = chosen(text, body) if fault is None else spoiled(text, fault)
        tokens = _ANSWER_TOKEN.findall(text)[: body.get("max_tokens")]
        message: Json = {"role": "assistant", "content": "".join(tokens)}
        if fault == "refusal":
            message |= {"content": None, "refusal": REFUSAL}
        choice: Json = {"index": 0, "message": message, "finish_reason": "stop"}
        if body.get("logprobs"):
            choice["logprobs"] = {"content": [self._label_logprobs(token) for token in tokens]}
        words = [word for turn in body["messages"] for word in turn["content"].split()]
        return self._envelope("chat.completion", body, choice, words, len(tokens))

    def text(self, body: Json, continuation: str, fault: Fault | None) -> Json:
        """A text completion: the prompt, if its echo is wanted, and ``continuation``."""
        prompt = _TEXT_TOKEN.findall(body["prompt"])
        said = _TEXT_TOKEN.findall(chosen(spoiled(continuation, fault), body))
        written = said[: body.get("max_tokens", 16)]
        shown = [*prompt, *written] if body.get("echo") else written
        choice: Json = {"index": 0, "text": "".join(shown), "finish_reason": "stop"}
        if body.get("logprobs") is not None:
            scores = token_logprobs([*prompt, *written])[len(prompt) + len(written) - len(shown) :]
            choice["logprobs"] = _completion_logprobs(shown, scores)
        words = body["prompt"].split()
        return self._envelope("text_completion", body, choice, words, len(written))

    def _envelope(
        self, kind: str, body: Json, choice: Json, words: Sequence[str], n_written: int
    ) -> Json:
        reply: Json = {"id": "fake", "object": kind, "created": 0}
        reply |= {"model": body.get("model"), "choices": [choice]}
        if self.has_usage:
            n = len(words)
            usage: Json = {"prompt_tokens": n, "completion_tokens": n_written}
            reply["usage"] = {**usage, "total_tokens": n + n_written}
            if self.cache is not None:
                cached = {"cached_tokens": self.cache.cached(words)}
                reply["usage"]["prompt_tokens_details"] = cached
        return reply

    def _label_logprobs(self, token: str) -> Json:
        if token not in ("0", "1"):
            return {"token": token, "logprob": 0.0, "top_logprobs": []}
        other = "1" if token == "0" else "0"
        said = {"token": token, "logprob": _log(self.p_answer)}
        declined = {"token": other, "logprob": _log(1 - self.p_answer)}
        return {**said, "top_logprobs": [said, declined]}


def chosen(text: str, body: Json) -> str:
    """``text``, or one of the options that the request allows if it is none of them."""
    wrapper = (body.get("response_format") or {}).get("json_schema") or {}
    options = (wrapper.get("schema") or {}).get("enum")
    if options is not None:
        return json.dumps(_option(text, options))
    guided = (body.get("structured_outputs") or {}).get("choice") or body.get("guided_choice")
    return text if guided is None else _option(text, guided)


def token_logprobs(tokens: Sequence[str]) -> list[float | None]:
    """A made-up log-probability of each token given those before it; null for the first.

    They depend on the text alone, and a text's beginning has the same ones as the text.
    """
    scores: list[float | None] = []
    before = ""
    for token in tokens:
        before += token
        scores.append(-12 * uniform(before) if scores else None)
    return scores


def error_body(message: str, key: str) -> bytes:
    """A server's error. It repeats the caller's key, as some servers do."""
    error = {"message": f"{message} (your key: {key})", "type": "fake", "code": None}
    return json.dumps({"error": error}).encode()


def _option(text: str, options: Sequence[str]) -> str:
    said = text.strip().strip('"')
    return said if said in options else options[int(uniform(text) * len(options))]


def _completion_logprobs(tokens: Sequence[str], scores: Sequence[float | None]) -> Json:
    offsets = [0]
    for token in tokens:
        offsets.append(offsets[-1] + len(token))
    top: list[Mapping[str, float] | None] = [
        None if score is None else {token: score}
        for token, score in zip(tokens, scores, strict=True)
    ]
    return {
        "tokens": list(tokens),
        "token_logprobs": list(scores),
        "top_logprobs": top,
        "text_offset": offsets[:-1],
    }


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0 else -9999.0
