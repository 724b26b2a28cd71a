"""Small token datasets for tests: state only what matters."""

import numpy as np
import polars as pl

from autointerp_dagster.core.schemas import CONTEXTS, DOCUMENTS
from autointerp_dagster.core.tokens import TokenDataset

BOS = 0


def make_dataset(
    documents: list[tuple[str, list[list[int]]]], bos_id: int | None = BOS
) -> TokenDataset:
    """Documents as (content hash, contexts); contexts with their BOS where there is one."""
    contexts = [c for _, document in documents for c in document]
    owner = [i for i, (_, document) in enumerate(documents) for _ in document]
    lengths = [len(c) for c in contexts]
    return TokenDataset(
        tokens=np.array([t for c in contexts for t in c], dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        contexts=CONTEXTS.conform(
            pl.DataFrame(
                {
                    "context": list(range(len(contexts))),
                    "document": owner,
                    "offset": [0] * len(contexts),
                    "n_tokens": lengths,
                },
                schema_overrides=dict.fromkeys(
                    ["context", "document", "offset", "n_tokens"], pl.Int64
                ),
            )
        ),
        documents=DOCUMENTS.conform(
            pl.DataFrame(
                {
                    "document": list(range(len(documents))),
                    "doc_id": [f"doc{i}" for i in range(len(documents))],
                    "title": [""] * len(documents),
                    "source": [""] * len(documents),
                    "content_hash": [content for content, _ in documents],
                    "n_tokens": [0] * len(documents),
                },
                schema_overrides={"document": pl.Int64, "n_tokens": pl.Int64},
            )
        ),
        bos_id=bos_id,
    )


def random_documents(
    seed: int, n: int, n_ids: int = 1000, max_contexts: int = 3, context_len: int = 16
) -> list[tuple[str, list[list[int]]]]:
    rng = np.random.default_rng(seed)
    return [
        (
            f"{seed}-{i}",
            [
                [BOS, *rng.integers(1, n_ids, context_len - 1).tolist()]
                for _ in range(rng.integers(1, max_contexts + 1))
            ],
        )
        for i in range(n)
    ]
