"""Hand-made records for tests: state only what matters."""

import re
from collections.abc import Sequence

import numpy as np

from autointerp_dagster.core.latent_records import LatentRecord, Window
from autointerp_dagster.core.llm import Completion, JournalBlock
from autointerp_dagster.core.types import LatentId

BLOCK = JournalBlock("score_detection", "c0de", 0)
LATENT = LatentId("sae", "layers.3", 17)


class Vocabulary:
    """A detokenizer that numbers pieces of text as they come."""

    def __init__(self) -> None:
        self._pieces: list[str] = []

    def ids(self, pieces: Sequence[str]) -> np.ndarray:
        for piece in pieces:
            if piece not in self._pieces:
                self._pieces.append(piece)
        return np.array([self._pieces.index(piece) for piece in pieces], dtype=np.int32)

    def pieces(self, tokens: np.ndarray) -> list[str]:
        return [self._pieces[token] for token in tokens]


VOCABULARY = Vocabulary()


def make_window(
    text: str | Sequence[str],
    activations: Sequence[float] | None = None,
    *,
    window_id: int = 1 << 16,
    split: str = "test",
    rank: int = 0,
    quantile: int = 0,
    kind: str = "random",
) -> Window:
    """A window of words (or of the pieces given); activating exactly if activations are given."""
    pieces = re.findall(r"\s*\S+", text) if isinstance(text, str) else list(text)
    is_activating = activations is not None
    values = activations if activations is not None else [0.0] * len(pieces)
    return Window(
        window_id=window_id,
        context=window_id >> 16,
        start=window_id & 0xFFFF,
        split=split,
        is_activating=is_activating,
        negative_kind=None if is_activating else kind,
        quantile=quantile if is_activating else None,
        rank=rank,
        tokens=VOCABULARY.ids(pieces),
        activations=np.array(values, dtype=np.float32),
    )


def make_windows(n: int, *, activating: bool, split: str = "test") -> list[Window]:
    """Windows of six words, each with a word of its own; activating ones fire on the third."""
    first = {"train": 1000, "select": 2000, "test": 3000}[split] + (500 if activating else 0)
    fires = [0.0, 0.0, 4.0, 1.0, 0.0, 0.0]
    return [
        make_window(
            f"some text w{first + i} goes on here",
            fires if activating else None,
            window_id=(first + i) << 16,
            split=split,
            rank=i,
            quantile=i % 10,
        )
        for i in range(n)
    ]


def make_record(
    windows: Sequence[Window] = (),
    *,
    latent: LatentId = LATENT,
    status: str = "ok",
    n_train: int = 0,
    n_test: int = 0,
    n_negative: int = 0,
    top_tokens: Sequence[tuple[str, float]] = (),
    max_activation: float | None = 4.0,
) -> LatentRecord:
    """A record with the windows given and as many plain ones as asked for."""
    more = [
        *make_windows(n_train, activating=True, split="train"),
        *make_windows(n_test, activating=True),
        *make_windows(n_negative, activating=False),
    ]
    return LatentRecord(
        latent=latent,
        status=status,
        max_activation=max_activation,
        top_tokens=tuple(int(VOCABULARY.ids([piece])[0]) for piece, _ in top_tokens),
        top_token_shares=tuple(share for _, share in top_tokens),
        windows=(*windows, *more),
    )


def answered(text: str | None, **fields: object) -> Completion:
    return Completion("call-1", text, **fields)
