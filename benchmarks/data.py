"""Token datasets that cost nothing to make."""

import numpy as np

from autointerp_dagster.core.config import TokenConfig
from autointerp_dagster.core.tokens import Document, TokenDataset, build_token_dataset

BOS = 0
CONTEXTS_PER_DOCUMENT = 4
REPEATED_SHARE = 0.02
"""Of the documents: copies of an earlier one but for its first words, as corpora have them."""


def zipf_dataset(n_contexts: int, context_len: int, vocab: int, seed: int = 0) -> TokenDataset:
    """Full contexts of Zipf-distributed tokens, BOS first."""
    rng = np.random.default_rng(seed)
    n_documents = -(-n_contexts // CONTEXTS_PER_DOCUMENT)
    length = (context_len - 1) * CONTEXTS_PER_DOCUMENT
    chances = 1 / np.arange(1, vocab)
    texts: list[np.ndarray] = []
    for number in range(n_documents):
        words = rng.choice(np.arange(1, vocab), size=length, p=chances / chances.sum())
        if number and rng.random() < REPEATED_SHARE:
            words = np.concatenate([words[:8], texts[rng.integers(number)][8:]])
        texts.append(words)
    return build_token_dataset(
        (Document(f"{i}", " ".join(map(str, words))) for i, words in enumerate(texts)),
        lambda batch: [[int(word) for word in text.split()] for text in batch],
        BOS,
        TokenConfig(n_tokens=n_contexts * (context_len - 1), context_len=context_len),
    )
