"""Steering at kept prefixes, latents batched, against whole prompts one at a time without a cache.

The embedded SmolLM2-135M in float32 and the demo coder at its hookpoint, prompts of 8 to 64 tokens.
As the stage asks it: divergences at a few strengths, then a clean and a steered continuation of 8
tokens. Ours starts cold: prefixes and the clean distributions are computed inside the clock. The
plain version runs every whole text alone, with the output head at its last place only; its clean
distributions are computed once, too.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from autointerp_dagster.adapters.coder_files import open_coder
from autointerp_dagster.adapters.embedded import english_documents
from autointerp_dagster.adapters.steering import SteeredModel, gumbel_noise
from autointerp_dagster.adapters.subject_models import SubjectModel, open_subject_model
from autointerp_dagster.core.config import FileCoderConfig, SubjectModelConfig
from autointerp_dagster.core.interventions.strength import divergence_between
from autointerp_dagster.core.sparse_coders import SparseCoder
from benchmarks.measure import Result, by_turns

DEMO_SAES = Path(__file__).parents[1] / "studies" / "demo-sae"
HOOKPOINT = "layers.9"
N_LATENTS, PROMPTS_PER_LATENT = 3, 4
STRENGTHS = (3.0, 10.0, 20.0, 30.0)
N_TOKENS = 8
PROMPT_LEN = 64
NATS = 1e-4
BAR = 5.0


class Done(NamedTuple):
    """What both versions give."""

    kl: np.ndarray
    """``[strength, prompt]``."""
    written: np.ndarray
    """``[clean or steered, prompt, token]``."""


def run() -> list[Result]:
    """Prompts per CPU-second, as a ratio."""
    torch.set_num_threads(1)
    config = SubjectModelConfig(
        source="embedded:smollm2-135m-instruct", dtype="float32", device="cpu", threads=1
    )
    subject = open_subject_model(config)
    placed = open_coder(FileCoderConfig(path=DEMO_SAES), HOOKPOINT).placed
    prompts = prompts_of(subject)
    latents = [17 * (i // PROMPTS_PER_LATENT) for i in range(len(prompts))]
    _ = subject.model  # loaded outside the clock

    rows = np.arange(len(prompts))
    draws = np.random.default_rng(0).random((len(rows), N_TOKENS))

    def ours() -> Done:
        model = SteeredModel(subject, placed, prompts, latents, PROMPT_LEN)
        kl = [model.divergence(rows, np.full(len(rows), s)).kl for s in STRENGTHS]
        written = [
            model.continuations(rows, np.full(len(rows), s), draws, 1.0)
            for s in (0.0, STRENGTHS[-1])
        ]
        return Done(np.stack(kl), np.stack(written))

    pair = by_turns(ours, lambda: plain(subject, placed.coder, prompts, latents, draws), repeats=1)
    assert np.abs(pair.ours.kl - pair.plain.kl).max() < NATS
    assert np.array_equal(pair.ours.written, pair.plain.written)
    name = "steering at kept prefixes, latents batched, against whole prompts one at a time"
    return [Result(name, pair.ratio, BAR, "x prompts/CPU-s")]


def prompts_of(subject: SubjectModel) -> list[np.ndarray]:
    """Beginnings of English documents, of 8 to 64 tokens with BOS."""
    n = N_LATENTS * PROMPTS_PER_LATENT
    lengths = np.linspace(8, PROMPT_LEN, n).round().astype(int)
    texts = [document.text for document in english_documents() if len(document.text) > 600][:n]
    tokens = subject.encode([text[:600] for text in texts])
    bos = [] if subject.bos_id is None else [subject.bos_id]
    return [
        np.array([*bos, *of][:length], dtype=np.int32)
        for of, length in zip(tokens, lengths, strict=True)
    ]


def plain(
    subject: SubjectModel,
    coder: SparseCoder,
    prompts: list[np.ndarray],
    latents: list[int],
    draws: np.ndarray,
) -> Done:
    """Every text whole and alone."""
    kl = np.empty((len(STRENGTHS), len(prompts)))
    written = np.empty((2, *draws.shape), dtype=np.int64)
    for j, (prompt, latent) in enumerate(zip(prompts, latents, strict=True)):
        direction, at = coder.decoder_rows([latent])[0], len(prompt) - 1
        clean = _logprobs(subject, prompt, at, 0 * direction)
        for i, strength in enumerate(STRENGTHS):
            moved = _logprobs(subject, prompt, at, strength * direction)
            kl[i, j] = divergence_between(clean[None], moved[None])[0].item()
        for i, strength in enumerate((0.0, STRENGTHS[-1])):
            text = prompt
            for draw in draws[j]:
                logprobs = _logprobs(subject, text, at, strength * direction)
                drawn = (logprobs.double().numpy() + gumbel_noise(draw, len(logprobs))).argmax()
                text = np.append(text, drawn)
            written[i, j] = text[len(prompt) :]
    return Done(kl, written)


def _logprobs(
    subject: SubjectModel, tokens: np.ndarray, n_before: int, vector: torch.Tensor
) -> torch.Tensor:
    model: Any = subject.model

    def add(_module: object, _inputs: object, output: Any) -> Any:
        moved = output.clone()
        moved[:, n_before:] += vector
        return moved

    handle = model.base_model.get_submodule(HOOKPOINT).register_forward_hook(add)
    ids = torch.from_numpy(tokens).long()[None]
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    handle.remove()
    return torch.log_softmax(logits[0, -1].float(), dim=-1)
