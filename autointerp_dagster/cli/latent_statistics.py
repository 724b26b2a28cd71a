"""What is known of one latent's activations, as a few lines."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow.compute as pc
from rich.markup import escape
from rich.tree import Tree
from scipy import stats

from autointerp_dagster.adapters.manifests import Manifest
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.adapters.subject_models import open_subject_model
from autointerp_dagster.core.activation_statistics import HISTOGRAM_EDGES
from autointerp_dagster.core.errors import ModelError
from autointerp_dagster.core.schemas import LATENT_STATISTICS
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.study import Study

_NO_TEXT = repr("")
"""Of a special token or a part of a letter."""
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class LatentStatistics:
    """How one latent fires."""

    manifest: str
    """Path of the activation cache's manifest."""
    n_kept: int
    """Tokens that activations are kept for."""
    row: dict[str, Any]
    """Of ``schemas.LATENT_STATISTICS``; tokens are ids."""


def read_statistics(
    store: Store, cache: Manifest, dataset: TokenDataset, latent: int
) -> LatentStatistics | None:
    """The statistics that the activation cache holds of a latent.

    Null for a latent beyond the coder's width, or a cache from before there were statistics.

    Args:
        store: Where the cache is.
        cache: The manifest of the latent's cell.
        dataset: What the activations were computed on.
        latent: In the cell's range.
    """
    blobs = [blob for blob in cache.blobs if blob.name == LATENT_STATISTICS.name]
    tables = [store.table(blob, pc.field("latent") == latent) for blob in blobs]
    rows = pl.concat([LATENT_STATISTICS.empty(), *tables]).to_dicts()
    return LatentStatistics(str(cache.path), _n_kept(dataset), rows[0]) if rows else None


def add_statistics(tree: Tree, study: Study, known: LatentStatistics) -> None:
    """Adds a branch with what is known of how a latent fires.

    Tokens are shown as the study's present tokenizer reads them, or as ids where it cannot be had.
    """
    branch = tree.add("activations")
    for line in statistics_lines(known.row, known.n_kept, _text_of(study)):
        branch.add(escape(line))


def statistics_lines(
    row: dict[str, Any], n_kept: int, text_of: Callable[[int], str]
) -> Iterator[str]:
    """A row of ``schemas.LATENT_STATISTICS`` in words; plain text, not escaped.

    Args:
        row: With every column of the table.
        n_kept: Tokens that activations are kept for.
        text_of: What to show for a token.
    """
    if not row["n_tokens"]:
        yield f"never fires on {n_kept:,} tokens"
    else:
        rate = row["n_tokens"] / max(n_kept, 1)
        yield (
            f"fires on {row['n_tokens']:,} of {n_kept:,} tokens ({rate:.3%}), in "
            f"{row['n_contexts']:,} contexts"
        )
        yield f"activation: mean {row['mean_activation']:.3g}, max {row['max_activation']:.3g}"
        yield f"histogram: {sparkline(row['activation_histogram'])}"
        shares = zip(row["top_tokens"], row["top_token_shares"], strict=True)
        top = ", ".join(f"{text_of(token)} {share:.0%}" for token, share in shares)
        yield f"tokens with the most activation: {top}"
        yield f"the most frequent token has {row['single_token_share']:.0%} of the firing tokens"
        known, entropy = row["position_information"], float(stats.entropy([rate, 1 - rate]))
        share = f" ({min(known / entropy, 1):.0%} of what there is to tell)" if entropy else ""
        yield f"the position tells {known:.2g} nats of whether it fires{share}"
    for name in ("promoted", "suppressed"):
        tokens = row[f"{name}_tokens"]
        texts = [text for text in map(text_of, tokens or ()) if text not in ("", _NO_TEXT)]
        shown = "not known" if tokens is None else ", ".join(texts) or "none"
        yield f"{name} by the decoder: {shown}"


def sparkline(histogram: Sequence[int]) -> str:
    """The bins from the first to the last with a token in them, with the edges around them.

    A bin with a token in it is never blank. Bars are as high as the share of the fullest bin.

    Args:
        histogram: A count for each interval of ``HISTOGRAM_EDGES``, one of them above 0.
    """
    filled = np.flatnonzero(histogram)
    first, last = int(filled[0]), int(filled[-1])
    most = max(histogram)
    bars = "".join(
        _BARS[(len(_BARS) - 1) * count // most] if count else " "
        for count in histogram[first : last + 1]
    )
    edges = ("0", *(f"{edge:.3g}" for edge in HISTOGRAM_EDGES), "inf")
    return f"{edges[first]} |{bars}| {edges[last + 1]}, 2 bins per factor of 2"


def _n_kept(dataset: TokenDataset) -> int:
    return int(np.maximum(np.diff(dataset.offsets) - dataset.first_visible, 0).sum())


def _text_of(study: Study) -> Callable[[int], str]:
    try:
        pieces = open_subject_model(study.models.subject).detokenizer.pieces
    except ModelError:
        return lambda token: f"token {token}"
    return lambda token: repr("".join(pieces(np.array([token]))))
