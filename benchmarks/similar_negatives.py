"""Windows near the activating ones: embedded once for all latents, or again for each of them.

The plain version embeds, for each latent, its activating and its silent windows, and compares
them. Ours embeds every distinct window of the corpus once, as the stage does, and searches among
all; windows in which the latent is active are passed over. Both find the same silent windows.
"""

import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from autointerp_dagster.adapters.datasets import write_dataset
from autointerp_dagster.adapters.embedded import english_documents, minilm_dir
from autointerp_dagster.adapters.embedders import SentenceEmbedder
from autointerp_dagster.adapters.manifests import Manifest, Provenance, content_hash_of
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.adapters.window_vectors import NearestWindows
from autointerp_dagster.core.config import EmbedderConfig, TokenConfig
from autointerp_dagster.core.tokens import Document, TokenDataset, build_token_dataset
from autointerp_dagster.core.types import WholeStudy
from autointerp_dagster.core.windows import WindowGrid, window_grid
from autointerp_dagster.resources.embedding_windows import WindowEmbedding
from autointerp_dagster.resources.stage_inputs import StageInputs
from autointerp_dagster.resources.store import Commit
from autointerp_dagster.study import Study
from benchmarks.measure import Result, by_turns

WINDOW_LEN = 24
N_WINDOWS, N_COPIES = 216, 40
"""Windows with a text of their own; and windows that repeat one of them."""
N_LATENTS, N_ACTIVATING, N_FOUND = 6, 8, 5
RATIO_BAR = 4.0
"""Of at most 6, one per latent; it grows with their number."""


class _Words:
    """A detokenizer whose tokens are words of the corpus."""

    def __init__(self) -> None:
        documents = (document.text for document in islice(english_documents(), 20))
        self.words = " ".join(documents).split()[: N_WINDOWS * WINDOW_LEN]

    def pieces(self, tokens: np.ndarray) -> list[str]:
        return [f" {self.words[token]}" for token in tokens]

    def dataset(self) -> TokenDataset:
        """Every word in turn, a window per context, then copies of the first windows."""
        starts = [*range(N_WINDOWS), *range(N_COPIES)]
        texts = [Document(f"{i}", f"{i}") for i in range(len(starts))]
        config = TokenConfig(n_tokens=10**9, context_len=WINDOW_LEN, min_visible=8)
        ids = np.arange(N_WINDOWS * WINDOW_LEN).reshape(-1, WINDOW_LEN)
        return build_token_dataset(
            texts, lambda batch: [ids[starts[int(t)]].tolist() for t in batch], None, config
        )


def run() -> list[Result]:
    """Texts embedded per distinct text, and CPU seconds as a ratio."""
    torch.set_num_threads(1)
    words, config = _Words(), EmbedderConfig(source=str(minilm_dir()), device="cpu")
    dataset, study = words.dataset(), _study(config)
    grid = window_grid(dataset, study.sampling)
    texts = ["".join(words.pieces(dataset.context_tokens(c))) for c in range(grid.n_windows)]
    rng = np.random.default_rng(0)
    active = [
        np.sort(rng.choice(np.flatnonzero(grid.split == 2), N_ACTIVATING, replace=False))
        for _ in range(N_LATENTS)
    ]
    model = SentenceTransformer(str(minilm_dir()), device="cpu", local_files_only=True)
    SentenceEmbedder(config).embed(["warm"])

    embedded: list[Commit] = []

    def ours() -> list[np.ndarray]:
        with tempfile.TemporaryDirectory() as folder:
            store = Store(folder)
            embedded.append(_embedded(store, study, dataset, words, config))
            manifest = _manifest("window_embeddings", tuple(embedded[-1].blobs))
            search = NearestWindows.read(store, manifest, grid)
        return [_silent_among(search.nearest(windows, 2), windows) for windows in active]

    def plain() -> list[np.ndarray]:
        return [_nearest_of(model, texts, windows, grid) for windows in active]

    pair = by_turns(ours, plain, repeats=1)
    _check_same(pair.ours, pair.plain, active, model.encode(texts))
    summary = embedded[0].summary
    assert summary["n_distinct"] == N_WINDOWS, summary
    per_text = summary["n_embedded"] / summary["n_distinct"]
    return [
        Result("similar negatives: texts embedded per distinct window", per_text, 1.0, "x", True),
        Result(
            f"similar negatives: windows of {N_LATENTS} latents per CPU-second, "
            "each window embedded once over each latent its own",
            pair.ratio,
            RATIO_BAR,
            "x",
        ),
    ]


def _study(config: EmbedderConfig) -> Study:
    return Study.model_validate(
        {
            "name": "benchmark",
            "models": {
                "subject": {"source": "none"},
                "explainer": {"source": "none"},
                "embedder": config.model_dump(),
            },
            "corpus": {"kind": "embedded"},
            "coders": {"sae": {"path": "none"}},
            "layers": ["h.0"],
            "max_num_latents": 10,
            "explainers": {"default": {"kind": "default"}},
            "tokens": {"context_len": WINDOW_LEN},
            "sampling": {"window_len": WINDOW_LEN, "negative_kinds": ["similar"]},
        }
    )


def _embedded(
    store: Store, study: Study, dataset: TokenDataset, words: _Words, config: EmbedderConfig
) -> Commit:
    """The stage's work, with an embedder that has seen nothing."""
    embedder = SentenceEmbedder(config)
    stage = StageInputs.of(
        store, study, "window_embeddings", models={"embedder": embedder.identity}
    )
    source = _manifest("token_dataset", tuple(write_dataset(store, dataset)))
    stage.take("token_dataset", WholeStudy(), source)

    def silently(items: Iterable[Any], **_: Any) -> Iterator[Any]:
        return iter(items)

    return WindowEmbedding(stage, study, words, embedder, silently).made()


def _manifest(stage: str, blobs: tuple[Any, ...]) -> Manifest:
    return Manifest(
        stage=stage, stage_version="1", cell="all", input_fingerprint="f",
        content_hash=content_hash_of(blobs, "ok"), complete=True, parameters={}, upstream=(),
        blobs=blobs,
        provenance=Provenance(study="s", run_id="r", started="", finished="", seconds=0),
    )  # fmt: skip


def _silent_among(found: np.ndarray, active: np.ndarray) -> np.ndarray:
    """The first windows of each row in which the latent is silent."""
    return np.array([row[~np.isin(row, active)][:N_FOUND] for row in found])


def _nearest_of(
    model: SentenceTransformer, texts: list[str], active: np.ndarray, grid: WindowGrid
) -> np.ndarray:
    """The same for one latent from nothing."""
    silent = np.setdiff1d(np.flatnonzero(grid.split == 2), active)
    silent = silent[[_is_first(texts, w, grid) for w in silent]]
    every = np.setdiff1d(np.arange(grid.n_windows), active)
    vectors = model.encode([texts[w] for w in every], normalize_embeddings=True)
    asked = model.encode([texts[w] for w in active], normalize_embeddings=True)
    cosine = asked @ vectors[np.isin(every, silent)].T
    cosine[[[texts[a] == texts[w] for w in silent] for a in active]] = -np.inf
    return silent[np.argsort(-cosine, axis=1, kind="stable")[:, :N_FOUND]]


def _is_first(texts: list[str], window: int, grid: WindowGrid) -> bool:
    """Whether no test window before it has the same text."""
    return not any(texts[w] == texts[window] and grid.split[w] == 2 for w in range(window))


def _check_same(
    ours: list[np.ndarray], plain: list[np.ndarray], active: list[np.ndarray], vectors: np.ndarray
) -> None:
    """Raise unless both found windows of the same cosines: equal texts may change places."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for mine, theirs, windows in zip(ours, plain, active, strict=True):
        near = [np.einsum("ad,afd->af", unit[windows], unit[found]) for found in (mine, theirs)]
        np.testing.assert_allclose(*near, atol=1e-3)
