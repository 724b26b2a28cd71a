"""Label judgements by a local model: shared prefixes kept, against one whole prompt at a time.

The embedded SmolLM2-135M in float32, detection prompts with one window each, as the demo asks
them: all prompts share system text and worked turns, all of a unit (a latent) the explanation too.
Ours starts cold: the shared prefix is computed inside the clock. The plain version runs each prompt
from its first token, which is what a scorer does without a cache. Both read the log-probabilities
of the labels 0 and 1.
"""

import torch
from transformers import AutoModelForCausalLM

from autointerp_dagster.adapters.embedded import english_documents, smollm2_dir
from autointerp_dagster.adapters.llm.backend import Reply
from autointerp_dagster.adapters.llm.local.backend import LocalBackend
from autointerp_dagster.adapters.llm.local.model import LocalModel, load_model
from autointerp_dagster.adapters.llm.local.prompts import encoded, label_form
from autointerp_dagster.core.config import LocalLLMConfig
from autointerp_dagster.core.llm import JournalBlock, LabelList, Request
from autointerp_dagster.core.prompts import detection_prompt
from benchmarks.measure import Result, by_turns

EXPLANATIONS = ("names of rivers and towns", "verbs of motion in the past tense")
N_WINDOWS = 5
WORDS_PER_WINDOW = 24
NATS = 1e-3
BAR = 3.0
"""Measured: 4.1 with five windows per unit; real units have more and gain more."""


def run() -> list[Result]:
    """Judgements per CPU-second, as a ratio."""
    torch.set_num_threads(1)
    folder = smollm2_dir()
    config = LocalLLMConfig(source=str(folder), dtype="float32", device="cpu", threads=1)
    backend, model = LocalBackend(folder, config), load_model(folder, "float32", "cpu")
    units = [_unit(explanation) for explanation in EXPLANATIONS]
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def ours() -> list[Reply]:
        model.prefixes.clear()
        return [reply for unit in units for reply in backend.run_unit(unit)]

    pair = by_turns(ours, lambda: [_plain(whole, model, r) for u in units for r in u], repeats=1)
    for reply, expected in zip(pair.ours, pair.plain, strict=True):
        assert reply.tokens is not None
        found = [logprob for _, logprob in sorted(reply.tokens[0].top)]
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < NATS
    name = "judge with kept prefixes against whole prompts"
    return [Result(name, pair.ratio, BAR, "x judgements/CPU-s")]


def _unit(explanation: str) -> list[Request]:
    """The prompts of one latent, in English of the embedded corpus."""
    requests = []
    for document in english_documents():
        words = document.text.split()[:WORDS_PER_WINDOW]
        chat = detection_prompt(explanation, [" ".join(words)], 1)
        requests.append(
            Request(
                messages=chat.messages,
                answer=LabelList(1),
                unit=explanation,
                block=JournalBlock("score_detection", "benchmark", 0),
                n_shared=chat.n_shared,
                top_logprobs=5,
            )
        )
        if len(requests) == N_WINDOWS:
            break
    return requests


def _plain(whole: torch.nn.Module, model: LocalModel, request: Request) -> list[float]:
    """Log-probabilities of 0 and 1 after ``[``, by one forward pass over the whole text."""
    form = label_form(model.tokenizer)
    turns = [{"role": m.role, "content": m.content} for m in request.messages]
    text = model.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([[*encoded(model.tokenizer, text), *form.opening]])
    with torch.inference_mode():
        logits = whole(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1]
    return torch.log_softmax(logits, dim=-1)[list(form.first)].tolist()
