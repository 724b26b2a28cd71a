"""A model in this process: its weights, loaded once, and forward passes over a shared prefix.

A kept cache is never written to: a batch works on a fork, whose layers are views of the kept
tensors until the first concatenation makes new ones.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicCache, DynamicLayer

from autointerp_dagster.adapters.llm.local.prompts import common_len
from autointerp_dagster.adapters.tokenizers import HFDetokenizer
from autointerp_dagster.core.config.models import Device, DType
from autointerp_dagster.core.errors import ModelError

HEAD_BLOCK = 8192
"""Rows of the output head that are turned into fp32 at a time."""
DECODING_VERSION = "2"
"""Changes when the same weights would answer differently: part of the identity."""
KEPT_PREFIXES = 4
"""Prefixes whose cache is kept between units: few-shots of chats, and again as many of texts."""
PREFIX_BLOCK = 128
"""Tokens of a plain text's prefix that are run together; units share whole blocks."""

_LOADING = threading.Lock()


@dataclass(slots=True)
class LocalModel:
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
    special_ids: frozenset[int]
    """Tokens that are no text, those that end a turn among them."""
    detokenizer: HFDetokenizer
    softcap: float | None
    """Gemma's cap on logits."""
    running: threading.Lock = field(default_factory=threading.Lock)
    """Held during a unit, so that two users of the same weights do not compete for cores."""
    prefixes: "OrderedDict[tuple[int, ...], DynamicCache]" = field(default_factory=OrderedDict)
    """Of chats: whole, as their shared messages say."""
    blocks: "OrderedDict[tuple[int, ...], DynamicCache]" = field(default_factory=OrderedDict)
    """Of plain texts: whole blocks."""
    texts: dict[int, str] = field(default_factory=dict)
    """Tokens as :meth:`text_of` reads them, looked up once."""

    def prefix(self, ids: tuple[int, ...]) -> DynamicCache:
        """The cache of a prefix that many units share; computed once while it is in use."""
        if ids not in self.prefixes:
            self.prefixes[ids] = self.extended(DynamicCache(), ids)
        return _used(self.prefixes, ids)

    def block_prefix(self, ids: tuple[int, ...]) -> DynamicCache:
        """The cache of a prefix whose beginning other units may share; nobody says how much.

        It is always computed in the same blocks, so it is the same to the bit whether its first
        blocks were there already or not.
        """
        n_whole = len(ids) // PREFIX_BLOCK * PREFIX_BLOCK
        shared = {known: common_len([known, ids]) for known in self.blocks}
        best = max(shared, key=lambda known: shared[known], default=())
        n_kept = shared.get(best, 0) // PREFIX_BLOCK * PREFIX_BLOCK
        kept = _beginning(self.blocks[best], n_kept) if n_kept > 0 else DynamicCache()
        for start in range(n_kept, n_whole, PREFIX_BLOCK):
            kept = self.extended(kept, ids[start : start + PREFIX_BLOCK])
        if n_kept < n_whole:
            best = ids[:n_whole]
            self.blocks[best] = kept
        if n_whole > 0:
            _used(self.blocks, best)
        return self.extended(kept, ids[n_whole:])

    def extended(self, kept: DynamicCache, ids: Sequence[int]) -> DynamicCache:
        """A new cache: ``kept`` (one row) and then ``ids``."""
        batch = Batch(kept, 1)
        if ids:
            self.hidden(batch, [ids])
        return batch.cache

    def states(
        self, batch: "Batch", steps: Sequence[Sequence[int]]
    ) -> Float[Tensor, "row place d_in"]:
        """Append ``steps`` to the rows of a batch; the last layer's output at each new place.

        Args:
            batch: Grows by the longest step.
            steps: New tokens of each row. Shorter ones are padded on the right, and what stands
                there is meaningless.
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
        return out.last_hidden_state

    def hidden(self, batch: "Batch", steps: Sequence[Sequence[int]]) -> Float[Tensor, "row d_in"]:
        """:meth:`states` at the last token of each row; meaningless for a row without any."""
        states = self.states(batch, steps)
        last = torch.tensor([max(len(step) - 1, 0) for step in steps], device=self.device)
        return states[torch.arange(len(steps), device=self.device), last]

    def logits(self, batch: "Batch", steps: Sequence[Sequence[int]]) -> Float[Tensor, "row token"]:
        """What follows each row after ``steps``, as fp32 on the CPU; see :meth:`hidden`."""
        return self._capped(self.head(self.hidden(batch, steps)).float().cpu())

    def fine_logits(
        self, batch: "Batch", steps: Sequence[Sequence[int]]
    ) -> Float[Tensor, "row token"]:
        """:meth:`logits` with the head computed in fp32; see :meth:`fine_head`."""
        return self.fine_head(self.hidden(batch, steps)).cpu()

    def fine_head(self, hidden: Float[Tensor, "row d_in"]) -> Float[Tensor, "row token"]:
        """The output head computed in fp32, on the model's device.

        A bf16 logit of 20 has steps of 0.125, so labels' probabilities would come in a handful of
        values and tie; they are what a scorer ranks windows by.
        """
        # In blocks, because a whole fp32 head may not fit beside the model.
        blocks = self.head.weight.split(HEAD_BLOCK)
        hidden = hidden.float()
        logits = torch.cat([functional.linear(hidden, block.float()) for block in blocks], dim=-1)
        bias = getattr(self.head, "bias", None)
        return self._capped(logits if bias is None else logits + bias.float())

    def text_of(self, token: int) -> str:
        """A token in the middle of a text; a special token's name."""
        if token not in self.texts:
            before = self.tokenizer("a", add_special_tokens=False)["input_ids"][-1]
            is_text = token not in self.special_ids
            self.texts[token] = (
                self.detokenizer.pieces(np.array([before, token]))[-1]
                if is_text
                else str(self.tokenizer.convert_ids_to_tokens(token))
            )
        return self.texts[token]

    def _capped(self, logits: Float[Tensor, "row token"]) -> Float[Tensor, "row token"]:
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

    def repeat(self, copies: Sequence[int]) -> None:
        """Let each row stand ``copies`` times from now on, copies next to each other."""
        rows = torch.arange(len(copies)).repeat_interleave(torch.tensor(copies))
        self.cache = _viewed(self.cache, lambda tensor: tensor[rows.to(tensor.device)])
        self.mask, self.lengths = self.mask[rows], self.lengths[rows]


def fork(kept: DynamicCache, n_rows: int) -> DynamicCache:
    """A cache of ``n_rows`` rows that continues ``kept`` (one row) and leaves it as it is."""
    return _viewed(kept, lambda tensor: tensor.expand(n_rows, -1, -1, -1))


def _beginning(kept: DynamicCache, n_tokens: int) -> DynamicCache:
    return _viewed(kept, lambda tensor: tensor[:, :, :n_tokens])


def _viewed(kept: DynamicCache, view: Callable[[Tensor], Tensor]) -> DynamicCache:
    """A cache whose layers are made from those of ``kept``, which stay as they are."""
    viewed = DynamicCache()
    for keys, values, _ in kept:
        assert keys is not None
        assert values is not None
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = view(keys), view(values)
        viewed.layers.append(layer)
    return viewed


def _used(kept: "OrderedDict[tuple[int, ...], DynamicCache]", ids: tuple[int, ...]) -> DynamicCache:
    """One of the caches, which is now the last to be given up for another."""
    kept.move_to_end(ids)
    while len(kept) > KEPT_PREFIXES:
        kept.popitem(last=False)
    return kept[ids]


def load_model(folder: Path, dtype: DType, device: Device) -> LocalModel:
    """The model in ``folder``, loaded at most once in this process.

    Raises:
        ModelError: If there is no causal language model.
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
def _load(folder: Path, dtype: DType, device: Device) -> LocalModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: not a causal language model ({error}).") from error
    has_cuda = torch.cuda.is_available()
    place = torch.device(("cuda" if has_cuda else "cpu") if device == "auto" else device)
    model.eval().to(place)
    config = model.config.get_text_config()
    stop_ids = _stop_ids(model, tokenizer)
    return LocalModel(
        decoder=model.get_decoder(),
        head=model.get_output_embeddings(),
        tokenizer=tokenizer,
        device=place,
        max_len=config.max_position_embeddings,
        stop_ids=stop_ids,
        special_ids=stop_ids | _special_ids(tokenizer),
        detokenizer=HFDetokenizer(tokenizer),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def _stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    declared = model.generation_config.eos_token_id
    ids = declared if isinstance(declared, list) else [declared]
    return frozenset(i for i in [*ids, tokenizer.eos_token_id] if i is not None)


def _special_ids(tokenizer: Any) -> frozenset[int]:
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {i for i, token in added if token.special}
