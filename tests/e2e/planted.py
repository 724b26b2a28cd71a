"""A tiny world whose latents have a known meaning: subject model, sparse coders, text, study.

Everything is made in code and exact, so a true explanation must score 1 and nothing is left to
chance but which documents fall into which split:

- Words belong to one class each (digits, colours, ..., commas, fillers); a text is a list of words
  joined by spaces, and every word is one token (``WordLevel``; BOS is id 0).
- The residual stream of the subject model, a GPT-2 with all-zero MLPs, has four parts: position
  (one-hot), class of this word (one-hot, times 1, 1.25 or 1.5 by word), class of the word before,
  and a bucket of this word (one-hot, by hash). Token embeddings fill the second and the fourth.
  The only attention head lives in ``h.0``: query = position i, key = position j + 1, both scaled so
  that the softmax is 1 to float precision on the word before; its value is the class part.
- A latent of a coder reads one or two of these dimensions, minus 0.5; so it fires exactly where its
  rule holds. What reads buckets has no rule in words. ``h.1`` adds nothing to the stream.
- Trigger words (a comma, ``very``) never stand last in a window, so a rule about the word before
  can always be checked in the window that is shown.
- The fake model explains by the rule that fits every word of the texts shown, and judges by rule.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from autointerp_dagster.adapters.llm.fake.rule_judge import ChatMessages
from autointerp_dagster.core.highlight import unescape
from autointerp_dagster.core.llm import FreeText
from autointerp_dagster.core.prompts import (
    DESCRIPTION_LABEL,
    asked_for,
    read_examples,
    read_question,
)
from autointerp_dagster.core.prompts.contrastive import ACTIVATING_HEADING
from autointerp_dagster.core.prompts.intruder import INTRUDER_SYSTEM, read_intruder_question
from autointerp_dagster.core.prompts.simulation import SIMULATION_SYSTEM, read_tokens

CONTEXT_LEN, WINDOW_LEN = 64, 16
N_DOCUMENTS, CONTEXTS_PER_DOCUMENT = 160, 2
N_RARE_DOCUMENTS = 12
RANGE_SIZE, MAX_NUM_LATENTS = 16, 64
K = 8
N_BUCKETS = 16
STRENGTHS = (1.0, 1.25, 1.5)

FILLERS = (
    "a the and of to in on by with from we they he she it was is had has went came said made "
    "took gave kept left found near under over again then there here now still both some many few "
    "old new long small open quiet road door house table river field window letter story summer"
)
CLASSES: dict[str, tuple[str, ...]] = {
    "digit": ("1", "2", "3", "4", "5", "6", "7", "8"),
    "colour": ("red", "blue", "green", "yellow", "black", "white", "purple", "pink"),
    "animal": ("dog", "cat", "horse", "cow", "sheep", "goat", "fox", "wolf"),
    "fruit": ("apple", "pear", "plum", "grape", "lemon", "mango", "peach", "fig"),
    "metal": ("iron", "gold", "silver", "copper", "tin", "zinc", "lead", "nickel"),
    "tool": ("hammer", "saw", "drill", "chisel", "pliers", "wrench", "axe", "file"),
    "city": ("paris", "london", "rome", "madrid", "oslo", "vienna", "cairo", "lima"),
    "body": ("hand", "foot", "knee", "elbow", "nose", "chin", "ear", "wrist"),
    "month": ("january", "april", "june", "july", "august", "october", "november", "december"),
    "comma": (",",),
    "very": ("very",),
    "rare": ("quasar",),
    "filler": tuple(FILLERS.split()),
}  # fmt: skip
CLASS_OF = {word: name for name, words in CLASSES.items() for word in words}
VOCABULARY = ("<s>", *CLASS_OF)

P_CLASS, P_TRIGGER = 0.035, 0.04
"""Chance of each class, and of each trigger word, at each place of a text."""

DIM_OF = {name: CONTEXT_LEN + i for i, name in enumerate(CLASSES)}
_PREVIOUS = {name: CONTEXT_LEN + len(CLASSES) + i for i, name in enumerate(CLASSES)}
_FIRST_BUCKET = CONTEXT_LEN + 2 * len(CLASSES)
D_MODEL = _FIRST_BUCKET + N_BUCKETS

NO_RULE = "words without any pattern"
"""What the fake model says of texts that no rule fits."""

Rule = Callable[[Sequence[str]], list[bool]]
"""Of each word of a text: whether the rule holds there."""


def of_class(*names: str) -> Rule:
    """Words of these classes."""
    return lambda words: [CLASS_OF.get(word) in names for word in words]


def after(word: str) -> Rule:
    """The word after this one."""
    return lambda words: [i > 0 and words[i - 1] == word for i in range(len(words))]


@dataclass(frozen=True, slots=True)
class Planted:
    """One latent that is not dead."""

    reads: tuple[int, ...]
    """Dimensions of the stream whose sum, minus 0.5, is its activation."""
    explanation: str | None
    """The truth about it; null where there is none in words."""
    status: str = "ok"
    """Of its record."""


def _class(explanation: str, *names: str, status: str = "ok") -> Planted:
    return Planted(tuple(DIM_OF[name] for name in names), explanation, status)


def _after(explanation: str, name: str) -> Planted:
    return Planted((_PREVIOUS[name],), explanation)


RULES: dict[str, Rule] = {
    "numbers written in digits": of_class("digit"),
    "words for colours": of_class("colour"),
    "words for animals": of_class("animal"),
    "words for fruits": of_class("fruit"),
    "words for metals": of_class("metal"),
    "words for tools": of_class("tool"),
    "names of cities": of_class("city"),
    "words for parts of the body": of_class("body"),
    "names of months": of_class("month"),
    "numbers written in digits, and words for colours": of_class("digit", "colour"),
    "the word that follows a comma": after(","),
    "the word that follows very": after("very"),
}

LATENTS: dict[str, dict[int, Planted]] = {
    "h.0": {
        1: _class("numbers written in digits", "digit"),
        3: Planted((), None, "dense"),
        5: _class("words for colours", "colour"),
        9: _class("words for animals", "animal"),
        11: Planted((_FIRST_BUCKET + 3,), None),
        14: _after("the word that follows a comma", "comma"),
        20: _class("words for fruits", "fruit"),
        22: _class("quasars", "rare", status="rare"),
        25: _class("words for metals", "metal"),
        50: _class("words for tools", "tool"),
    },
    "h.1": {
        0: _class("names of cities", "city"),
        7: _after("the word that follows very", "very"),
        12: _class("numbers written in digits, and words for colours", "digit", "colour"),
        17: _class("words for parts of the body", "body"),
        21: Planted((_FIRST_BUCKET + 5,), None),
        30: _class("names of months", "month"),
        33: _class("words for animals", "animal"),
        40: _after("the word that follows a comma", "comma"),
        47: _class("words for fruits", "fruit"),
    },
}
"""By hookpoint and index; all other latents are dead. ``h.0`` 32..47 are all dead, and latent 50 is
the only one of its range that can be explained."""

NUM_LATENTS = {"h.0": 64, "h.1": 48}
"""``h.1``'s coder is narrower than the grid: its last range lies outside of the coder."""

LAYERS = tuple(f"sae@{hookpoint}" for hookpoint in LATENTS)


def planted(status: str = "ok") -> list[tuple[str, int, Planted]]:
    """(hookpoint, latent, what it is) of a status, with a rule or without."""
    return [
        (hookpoint, latent, known)
        for hookpoint, latents in LATENTS.items()
        for latent, known in latents.items()
        if known.status == status
    ]


def truths() -> dict[tuple[str, int], str]:
    """The true explanation of every latent that has one and can be explained."""
    return {
        (hookpoint, latent): known.explanation
        for hookpoint, latent, known in planted()
        if known.explanation is not None
    }


def build_world(folder: Path) -> Path:
    """Writes ``model``, ``coders`` and ``corpus`` below ``folder``, the same every time."""
    _save_model(folder / "model")
    for hookpoint in LATENTS:
        save_coder(folder / "coders" / hookpoint, hookpoint)
    write_corpus(folder / "corpus")
    return folder


def save_coder(folder: Path, hookpoint: str) -> None:
    """The coder of one hookpoint in sparsify's format."""
    n = NUM_LATENTS[hookpoint]
    encoder, bias = torch.zeros(n, D_MODEL), torch.full((n,), -10.0)
    for latent, known in LATENTS[hookpoint].items():
        encoder[latent, list(known.reads)] = 1.0
        bias[latent] = -0.5 if known.reads else 0.5
    tensors = {
        "encoder.weight": encoder,
        "encoder.bias": bias,
        "W_dec": torch.eye(n, D_MODEL),
        "b_dec": torch.zeros(D_MODEL),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "sae.safetensors")
    config = {"activation": "topk", "num_latents": n, "k": K, "d_in": D_MODEL}
    (folder / "cfg.json").write_text(json.dumps(config))


def _save_model(folder: Path) -> None:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(VOCABULARY),
            n_positions=CONTEXT_LEN,
            n_embd=D_MODEL,
            n_layer=2,
            n_head=1,
            n_inner=4,
            bos_token_id=0,
            eos_token_id=None,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
        base = model.transformer
        base.wpe.weight.copy_(torch.eye(CONTEXT_LEN, D_MODEL))
        for token, word in enumerate(VOCABULARY):
            base.wte.weight[token] = _embedding(word)
        _wire_attention(base.h[0].attn)
    model.save_pretrained(folder)


def _embedding(word: str) -> torch.Tensor:
    digest = hashlib.blake2b(word.encode(), digest_size=2).digest()
    vector = torch.zeros(D_MODEL)
    vector[_FIRST_BUCKET + digest[0] % N_BUCKETS] = 1.0
    name = CLASS_OF.get(word)
    if name is not None:
        is_alone = len(CLASSES[name]) == 1
        vector[DIM_OF[name]] = 1.0 if is_alone else STRENGTHS[digest[1] % len(STRENGTHS)]
    return vector


def _wire_attention(attention: Any) -> None:
    """The previous word's class, at unit scale, in the dimensions meant for it.

    The layer norm before it divides by about 1/6: each stream vector has three entries near 1.
    """
    query, key, value = attention.c_attn.weight.split(D_MODEL, dim=1)
    for position in range(CONTEXT_LEN):
        query[position, position] = 5.0
        if position + 1 < CONTEXT_LEN:
            key[position, position + 1] = 5.0
    for name, source in DIM_OF.items():
        value[source, source] = 1 / 6
        attention.c_proj.weight[source, _PREVIOUS[name]] = 1.0


def write_corpus(folder: Path, n_documents: int = N_DOCUMENTS) -> None:
    """Documents of two contexts each, one line of a ``.jsonl`` file per document."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": " ".join(_words(number))}) for number in range(n_documents)]
    (folder / "texts.jsonl").write_text("\n".join(lines))


def _words(number: int) -> Iterator[str]:
    rng = np.random.default_rng([2024, number])
    stretch = CONTEXT_LEN - 1
    rare_at = 40 if number < N_RARE_DOCUMENTS else -1
    names = [name for name in CLASSES if name not in ("rare", "filler")]
    shares = [P_TRIGGER if name in ("comma", "very") else P_CLASS for name in names]
    for i in range(stretch * CONTEXTS_PER_DOCUMENT):
        name = rng.choice([*names, "filler"], p=[*shares, 1 - sum(shares)])
        is_last_of_window = (1 + i % stretch) % WINDOW_LEN == WINDOW_LEN - 1
        if name in ("comma", "very") and is_last_of_window:
            name = "filler"
        word = str(rng.choice(CLASSES[str(name)]))
        yield "quasar" if i == rare_at else word


def answer(messages: ChatMessages) -> str:
    """What an ideal explainer and judge says; it reads nothing but the prompt."""
    system = messages[0]["content"]
    if asked_for(system) == "explanation":
        asked = _last_user(messages, "1. ", ACTIVATING_HEADING)
        return f"{FreeText().marker} {_explanation(read_examples(asked))}"
    if system == INTRUDER_SYSTEM:
        return _intruder(read_intruder_question(_last_user(messages, "1. ")))
    if system == SIMULATION_SYSTEM:
        explanation, tokens = read_tokens(_last_user(messages, DESCRIPTION_LABEL))
        holds = _rule_of(unescape(explanation))([unescape(token).strip() for token in tokens])
        return json.dumps([10 * int(fires) for fires in holds])
    question = read_question(_last_user(messages, DESCRIPTION_LABEL))
    rule = _rule_of(unescape(question.explanation))
    return json.dumps([int(_fits(rule, window)) for window in question.windows])


def _explanation(windows: Sequence[str]) -> str:
    shown = [read_marks(window) for window in windows]
    for explanation, rule in RULES.items():
        if all(rule(words) == marks for words, marks in shown):
            return explanation
    return NO_RULE


def _intruder(windows: Sequence[str]) -> str:
    """The only window whose marks do not keep to a rule that all others keep to."""
    shown = [read_marks(window) for window in windows]
    for rule in RULES.values():
        wrong = [i for i, (words, marks) in enumerate(shown) if rule(words) != marks]
        if len(wrong) == 1:
            return str(wrong[0] + 1)
    return "1"


def _fits(rule: Rule, window: str) -> bool:
    words, marks = read_marks(window)
    holds = rule(words)
    return all(np.array(holds)[marks]) if any(marks) else any(holds)


def _rule_of(explanation: str) -> Rule:
    if explanation in RULES:
        return RULES[explanation]
    named = set(re.findall(r'"([^"]*)"', explanation))  # of the explainer top_tokens
    return lambda words: [word in named for word in words]


def read_marks(window: str) -> tuple[list[str], list[bool]]:
    """The words of a window as shown, and which of them are marked."""
    words, marks, is_inside = [], [], False
    for piece in window.split():
        is_inside = is_inside or piece.startswith("<<")
        words.append(unescape(piece.removeprefix("<<").removesuffix(">>")))
        marks.append(is_inside)
        is_inside = is_inside and not piece.endswith(">>")
    return words, marks


def _last_user(messages: ChatMessages, *starts: str) -> str:
    return next(
        message["content"]
        for message in reversed(messages)
        if message["role"] == "user" and message["content"].startswith(starts)
    )


def write_study(
    folder: Path, world: Path, base_url: str, name: str = "planted", **overrides: Any
) -> Path:
    """A study file over ``world`` whose store is ``folder/store``.

    Args:
        folder: Where the file and the store go.
        world: From :func:`build_world`.
        base_url: Of the fake server.
        name: Of the study and its file.
        overrides: Merged into the file's mappings; other values replace what is there, and None
            removes it.
    """
    llm = {"base_url": base_url, "model": "fake", "timeout_s": 20.0}
    content: dict[str, Any] = {
        "models": {
            "subject": {
                "source": str(world / "model"), "dtype": "float32", "device": "cpu", "threads": 1,
                "batch_size": 32,
            },
            "explainer": llm,
            "judge": dict(llm),
        },
        "corpus": {"kind": "files", "path": str(world / "corpus")},
        "tokens": {"n_tokens": 1_000_000, "context_len": CONTEXT_LEN, "min_visible": 15},
        "coders": {"sae": {"format": "sparsify", "path": str(world / "coders")}},
        "layers": list(LATENTS),
        "max_num_latents": MAX_NUM_LATENTS,
        "range_size": RANGE_SIZE,
        "sampling": {
            "window_len": WINDOW_LEN, "n_train": 12, "n_select": 4, "n_test": 10,
            "n_negative_train": 4, "n_negative_select": 4, "n_negative_test": 10,
            "n_quantiles": 5, "min_tokens": 100, "min_test_windows": 15,
        },
        "explainers": {
            "top_tokens": {"kind": "top_tokens"},
            "default": {"kind": "default", "n_examples": 12},
        },
        "scorers": {"detection": {}, "fuzzing": {}},
        "floors": {"sample": 64, "donor_block": RANGE_SIZE},
        "metrics": {"n_bootstrap": 200},
        "store": str(folder / "store"),
    }  # fmt: skip
    path = folder / "studies" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = _merged(content, overrides)
    # The coders know rules and rebuild nothing.
    merged["checks"] = {"fvu": None, "l0": None, **overrides.get("checks", {})}
    path.write_text(yaml.safe_dump(merged, sort_keys=False))
    return path


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return {key: value for key, value in merged.items() if value is not None}
