"""A chat model in this process: its weights, loaded once, and forward passes over a shared prefix.

A kept cache is never written to: a batch works on a fork, whose layers are views of the kept
tensors until the first concatenation makes new ones.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicCache, DynamicLayer

from autointerp_dagster.core.config.models import Device, DType
from autointerp_dagster.core.errors import ModelError

HEAD_BLOCK = 8192
"""Rows of the output head that are turned into fp32 at a time."""
DECODING_VERSION = "2"
"""Changes when the same weights would answer differently: part of the identity."""
KEPT_PREFIXES = 4
"""Few-shot prefixes whose cache is kept between units."""

_LOADING = threading.Lock()


@dataclass(slots=True)
class ChatModel:
    """Weights and tokenizer, with what was computed once for them."""

    decoder: Any
    """The model without its output head."""
    head: Any
    tokenizer: Any
    device: torch.device
    max_len: int
    """Positions the model knows."""
    stop_ids: frozenset[int]
    """Tokens that end a turn."""
    softcap: float | None
    """Gemma's cap on logits."""
    running: threading.Lock = field(default_factory=threading.Lock)
    """Held during a unit, so that two users of the same weights do not compete for cores."""
    prefixes: "OrderedDict[tuple[int, ...], DynamicCache]" = field(default_factory=OrderedDict)

    def prefix(self, ids: tuple[int, ...]) -> DynamicCache:
        """The cache of a prefix that many units share; computed once while it is in use."""
        if ids not in self.prefixes:
            self.prefixes[ids] = self.extended(DynamicCache(), ids)
        self.prefixes.move_to_end(ids)
        while len(self.prefixes) > KEPT_PREFIXES:
            self.prefixes.popitem(last=False)
        return self.prefixes[ids]

    def extended(self, kept: DynamicCache, ids: Sequence[int]) -> DynamicCache:
        """A new cache: ``kept`` (one row) and then ``ids``."""
        batch = Batch(kept, 1)
        if ids:
            self.hidden(batch, [ids])
        return batch.cache

    def hidden(self, batch: "Batch", steps: Sequence[Sequence[int]]) -> Float[Tensor, "row d_in"]:
        """Append ``steps`` to the rows of a batch; the last hidden state of each row.

        Args:
            batch: Grows by the longest step.
            steps: New tokens of each row. A row without any is padded, and its hidden state is
                meaningless.
        """
        longest = max(map(len, steps))
        ids = torch.tensor([[*step, *[0] * (longest - len(step))] for step in steps])
        lengths = torch.tensor([len(step) for step in steps])
        offsets = torch.arange(longest)
        positions = batch.lengths[:, None] + offsets
        batch.mask = torch.cat([batch.mask, (offsets < lengths[:, None]).long()], dim=1)
        batch.lengths = batch.lengths + lengths
        out = self.decoder(
            input_ids=ids.to(self.device),
            attention_mask=batch.mask.to(self.device),
            position_ids=positions.to(self.device),
            past_key_values=batch.cache,
            use_cache=True,
        )
        last = (lengths - 1).clamp(min=0)
        rows = torch.arange(len(steps), device=self.device)
        return out.last_hidden_state[rows, last.to(self.device)]

    def logits(self, batch: "Batch", steps: Sequence[Sequence[int]]) -> Float[Tensor, "row token"]:
        """What follows each row after ``steps``, as fp32 on the CPU; see :meth:`hidden`."""
        return self._capped(self.head(self.hidden(batch, steps)))

    def fine_logits(
        self, batch: "Batch", steps: Sequence[Sequence[int]]
    ) -> Float[Tensor, "row token"]:
        """:meth:`logits` with the head computed in fp32.

        A bf16 logit of 20 has steps of 0.125, so labels' probabilities would come in a handful of
        values and tie; they are what a scorer ranks windows by.
        """
        hidden = self.hidden(batch, steps).float()
        # In blocks, because a whole fp32 head may not fit beside the model.
        blocks = self.head.weight.split(HEAD_BLOCK)
        logits = torch.cat([functional.linear(hidden, block.float()) for block in blocks], dim=-1)
        bias = getattr(self.head, "bias", None)
        return self._capped(logits if bias is None else logits + bias.float())

    def _capped(self, logits: Float[Tensor, "row token"]) -> Float[Tensor, "row token"]:
        logits = logits.float().cpu()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class Batch:
    """Rows that continue one kept prefix, right-padded to a common length."""

    mask: Int[Tensor, "row position"]
    """1 where a position of the cache holds a token of the row, 0 for padding."""
    lengths: Int[Tensor, " row"]
    """Tokens of each row so far, padding not counted: the position of its next token."""

    def __init__(self, kept: DynamicCache, n_rows: int) -> None:
        prefix_len = int(kept.get_seq_length())
        self.cache = fork(kept, n_rows)
        self.mask = torch.ones(n_rows, prefix_len, dtype=torch.long)
        self.lengths = torch.full((n_rows,), prefix_len)


def fork(kept: DynamicCache, n_rows: int) -> DynamicCache:
    """A cache of ``n_rows`` rows that continues ``kept`` (one row) and leaves it as it is."""
    forked = DynamicCache()
    for keys, values, _ in kept:
        assert keys is not None
        assert values is not None
        copy = DynamicLayer()
        copy.lazy_initialization(keys, values)
        copy.keys = keys.expand(n_rows, -1, -1, -1)
        copy.values = values.expand(n_rows, -1, -1, -1)
        forked.layers.append(copy)
    return forked


def load_chat_model(folder: Path, dtype: DType, device: Device) -> ChatModel:
    """The model in ``folder``, loaded at most once in this process.

    Raises:
        ModelError: If there is no causal language model with a chat template.
    """
    with _LOADING:
        return _load(folder.resolve(), dtype, device)


@cache
def identity_of(folder: Path, dtype: DType) -> str:
    """SHA-256 over weights, tokenizer and configuration files and the dtype; once per process.

    Raises:
        ModelError: If ``folder`` holds no weights.
    """
    files = sorted(path for path in folder.iterdir() if _decides(path))
    if not any(path.suffix in (".safetensors", ".bin") for path in files):
        raise ModelError(f"{folder}: got no weights, wanted *.safetensors. Check the model's path.")
    digest = hashlib.sha256(f"{DECODING_VERSION}\0{dtype}\0".encode())
    for path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name}\0{content}\0".encode())
    return digest.hexdigest()


def _decides(path: Path) -> bool:
    suffixes = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
    return path.is_file() and path.suffix in suffixes and not path.name.startswith(".")


@cache
def _load(folder: Path, dtype: DType, device: Device) -> ChatModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: not a causal language model ({error}).") from error
    if not tokenizer.chat_template:
        raise ModelError(
            f"{folder}: its tokenizer has no chat template, wanted a chat model. "
            "Use an instruct variant as explainer and judge."
        )
    has_cuda = torch.cuda.is_available()
    place = torch.device(("cuda" if has_cuda else "cpu") if device == "auto" else device)
    model.eval().to(place)
    config = model.config.get_text_config()
    return ChatModel(
        decoder=model.get_decoder(),
        head=model.get_output_embeddings(),
        tokenizer=tokenizer,
        device=place,
        max_len=config.max_position_embeddings,
        stop_ids=_stop_ids(model, tokenizer),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def _stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    declared = model.generation_config.eos_token_id
    ids = declared if isinstance(declared, list) else [declared]
    return frozenset(i for i in [*ids, tokenizer.eos_token_id] if i is not None)
