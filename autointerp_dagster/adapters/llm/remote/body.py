"""From a request to the path and the JSON body that OpenAI-compatible servers take."""

from collections.abc import Collection, Mapping
from typing import Any, Literal

from autointerp_dagster.core.config.models import RemoteLLMConfig
from autointerp_dagster.core.llm import (
    Choice,
    Continuation,
    IntegerList,
    LabelList,
    PromptScores,
    Request,
)

CHAT = "/chat/completions"
TEXT = "/completions"

Feature = Literal[
    "response_format",
    "json_object",
    "structured_outputs",
    "guided_choice",
    "seed",
    "logprobs",
    "max_tokens",
    "temperature",
]
"""What a server may lack. All but ``json_object`` are the names of the body's fields."""

STRUCTURED: tuple[Feature, ...] = (
    "response_format",  # OpenAI's, with a JSON schema
    "json_object",  # llama_cpp.server's: the schema within another kind of response_format
    "structured_outputs",  # vLLM's from 0.12 on
    "guided_choice",  # vLLM's before
)
"""Ways to bind an answer to its format, in the order in which they are tried; the latter two are
for choices only."""

_CHAT_ONLY = frozenset({"chat_template_kwargs", "reasoning_effort"})
"""Of ``extra_body``, what means nothing for a plain text, and which strict servers refuse there."""

_NAMES: Mapping[type, str] = {LabelList: "labels", IntegerList: "integers", Choice: "choice"}
"""Of the schemas."""

Body = dict[str, Any]


def body_of(
    request: Request, config: RemoteLLMConfig, lacks: Collection[Feature] = ()
) -> tuple[str, Body]:
    """The path below ``base_url`` and the body of the POST that asks ``request``.

    Args:
        request: With a ``prompt`` it goes to the text endpoint, else to the chat endpoint.
        config: Model and ``extra_body``, whose fields win.
        lacks: What the server is known to refuse; left away, or put in another way.

    Raises:
        ValueError: If a plain text's answer is wanted and there is no ``prompt``.
    """
    if request.prompt is None and isinstance(request.answer, Continuation | PromptScores):
        raise ValueError(
            f"Request.prompt: got none, wanted a plain text for {type(request.answer).__name__}."
        )
    body: Body = {"model": config.model}
    if "temperature" not in lacks:
        body["temperature"] = request.temperature
    # The latter is what OpenAI's models that reason want instead.
    longest = "max_tokens" if "max_tokens" not in lacks else "max_completion_tokens"
    body[longest] = request.max_tokens
    if request.seed is not None and "seed" not in lacks:
        body["seed"] = request.seed
    if request.top_logprobs > 0 and "logprobs" not in lacks:
        body |= _logprob_fields(request)
    body |= _answer_fields(request, config, lacks)
    if request.prompt is None:
        body["messages"] = [{"role": m.role, "content": m.content} for m in request.messages]
        return CHAT, body | config.extra_body
    extra = {name: value for name, value in config.extra_body.items() if name not in _CHAT_ONLY}
    return TEXT, body | {"prompt": request.prompt} | extra


def features_in(body: Mapping[str, Any]) -> list[Feature]:
    """The features that a body makes use of, in the order in which to try without."""
    found: list[Feature] = []
    if "response_format" in body:
        is_object = body["response_format"].get("type") == "json_object"
        found.append("json_object" if is_object else "response_format")
    others: tuple[Feature, ...] = (*STRUCTURED[2:], "seed", "logprobs", "max_tokens", "temperature")
    return [*found, *(feature for feature in others if feature in body)]


def _logprob_fields(request: Request) -> Body:
    if request.prompt is None:
        return {"logprobs": True, "top_logprobs": request.top_logprobs}
    return {"logprobs": request.top_logprobs}


def _answer_fields(request: Request, config: RemoteLLMConfig, lacks: Collection[Feature]) -> Body:
    """What binds the answer to its format."""
    answer = request.answer
    if isinstance(answer, Continuation):
        return {"stop": list(answer.stop)} if answer.stop else {}
    if isinstance(answer, PromptScores):
        # Servers score a prompt only where they write at least one token after it.
        return {"echo": True, "logprobs": max(1, request.top_logprobs), "max_tokens": 1}
    if not isinstance(answer, LabelList | IntegerList | Choice) or not config.structured_outputs:
        return {}
    ways = STRUCTURED if isinstance(answer, Choice) else STRUCTURED[:2]
    usable: list[Feature] = [way for way in ways if way not in lacks]
    return _binding(usable[0], answer) if usable else {}


def _binding(way: Feature, answer: LabelList | IntegerList | Choice) -> Body:
    if way == "response_format":
        schema = {"name": _NAMES[type(answer)], "strict": True, "schema": answer.json_schema}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    if way == "json_object":
        return {"response_format": {"type": "json_object", "schema": answer.json_schema}}
    assert isinstance(answer, Choice)
    options = list(answer.options)
    return {way: {"choice": options} if way == "structured_outputs" else options}
