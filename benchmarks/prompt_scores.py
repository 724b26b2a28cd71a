"""Log-probabilities of sentences by a local model: the prompt's prefix kept, against a plain loop.

The embedded SmolLM2-135M in float32, prompts as the surprisal scorer asks them: nine worked blocks
and an explanation (about 650 tokens) that all prompts of a unit share, then a sentence of about 40
tokens. Ours starts cold: the prefix is computed inside the clock. The plain loop runs one whole
prompt at a time and the output head at all its places. Both read the log-probabilities of the
sentence's tokens, the first included.
"""

from collections.abc import Iterator

import torch
from transformers import AutoModelForCausalLM

from autointerp_dagster.adapters.embedded import english_documents, smollm2_dir
from autointerp_dagster.adapters.llm.backend import Reply
from autointerp_dagster.adapters.llm.local.backend import LocalBackend
from autointerp_dagster.adapters.llm.local.model import LocalModel, load_model
from autointerp_dagster.core.config import LocalLLMConfig
from autointerp_dagster.core.llm import JournalBlock, PromptScores, Request
from benchmarks.measure import Result, by_turns

N_BLOCKS = 9
SENTENCES_PER_BLOCK = 2
N_SENTENCES = 12
WORDS = 30
WORDS_WORKED = 20
NATS = 1e-4
BAR = 3.0
"""A unit of the surprisal scorer has some 100 to 200 sentences and gains more."""


def run() -> list[Result]:
    """Sentences per CPU-second, as a ratio."""
    torch.set_num_threads(1)
    folder = smollm2_dir()
    config = LocalLLMConfig(source=str(folder), dtype="float32", device="cpu", threads=1)
    backend, model = LocalBackend(folder, config), load_model(folder, "float32", "cpu")
    unit = unit_of(N_SENTENCES)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def ours() -> list[Reply]:
        model.blocks.clear()
        return backend.run_unit(unit)

    pair = by_turns(ours, lambda: [plain(whole, model, request) for request in unit], repeats=1)
    for reply, expected in zip(pair.ours, pair.plain, strict=True):
        assert reply.tokens is not None
        found = [token.logprob for token in reply.tokens]
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < NATS
    name = "prompt scores with a kept prefix against whole prompts"
    return [Result(name, pair.ratio, BAR, "x sentences/CPU-s")]


def unit_of(n_sentences: int) -> list[Request]:
    """The prompts of one latent, in English of the embedded corpus."""
    stretches = _stretches()
    blocks = [
        "Description: English prose\nSentences:\n"
        + "".join(f"- {_cut(next(stretches), WORDS_WORKED)}\n" for _ in range(SENTENCES_PER_BLOCK))
        for _ in range(N_BLOCKS)
    ]
    given = "\n".join([*blocks, "Description: names of rivers and towns\nSentences:\n-"])
    return [
        Request(
            messages=(),
            prompt=f"{given} {_cut(next(stretches), WORDS)}",
            answer=PromptScores(len(given)),
            unit="latent",
            block=JournalBlock("score_surprisal", "benchmark", 0),
        )
        for _ in range(n_sentences)
    ]


def plain(whole: torch.nn.Module, model: LocalModel, request: Request) -> list[float]:
    """The log-probabilities of the tokens after the start, by one forward over the whole prompt."""
    assert isinstance(request.answer, PromptScores)
    tokens = model.tokenizer(request.prompt, add_special_tokens=False, return_offsets_mapping=True)
    ids = torch.tensor([model.tokenizer.bos_token_id, *tokens["input_ids"]])
    with torch.inference_mode():
        logits = whole(input_ids=ids[None], use_cache=False).logits[0]
    logprobs = torch.log_softmax(logits, dim=-1)[:-1].gather(1, ids[1:, None])[:, 0]
    spans = zip(logprobs.tolist(), tokens["offset_mapping"], strict=True)
    return [logprob for logprob, (_, end) in spans if end > request.answer.start]


def _stretches() -> Iterator[list[str]]:
    """The first words of each document that is long enough."""
    for document in english_documents():
        words = document.text.split()
        if len(words) >= WORDS:
            yield words


def _cut(words: list[str], n_words: int) -> str:
    return " ".join(words[:n_words])
