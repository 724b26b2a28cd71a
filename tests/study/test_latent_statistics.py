"""What `why` says of a latent's activations; no study is run."""

import io
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from rich.console import Console
from rich.tree import Tree
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from autointerp_dagster.adapters.manifests import Manifest, Provenance, content_hash_of
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.cli.latent_statistics import (
    add_statistics,
    read_statistics,
    sparkline,
    statistics_lines,
)
from autointerp_dagster.core.activation_statistics import N_BINS
from autointerp_dagster.core.schemas import CONTEXTS, DOCUMENTS, LATENT_STATISTICS
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.study import Study

ROW = {
    "coder": "sae", "hookpoint": "layers.0", "latent": 5, "n_tokens": 3, "n_contexts": 2,
    "max_activation": 4.0, "mean_activation": 2.0,
    "activation_histogram": [2 if i == 27 else 1 if i == 31 else 0 for i in range(N_BINS)],
    "top_tokens": [7, 9], "top_token_shares": [0.75, 0.25], "single_token_share": 2 / 3,
    "position_information": 0.00116, "promoted_tokens": [1, 2], "suppressed_tokens": None,
}  # fmt: skip
DEAD = ROW | {
    "n_tokens": 0, "n_contexts": 0, "max_activation": None, "mean_activation": None,
    "activation_histogram": [], "top_tokens": [], "top_token_shares": [],
    "single_token_share": None, "position_information": None, "promoted_tokens": [],
}  # fmt: skip


def named(token):
    return f"<{token}>"


def test_a_latent_in_words():
    assert list(statistics_lines(ROW, 12_000, named)) == [
        "fires on 3 of 12,000 tokens (0.025%), in 2 contexts",
        "activation: mean 2, max 4",
        "histogram: 1 |█   ▄| 6, 2 bins per factor of 2",
        "tokens with the most activation: <7> 75%, <9> 25%",
        "the most frequent token has 67% of the firing tokens",
        # H(1/4000) = .002323
        "the position tells 0.0012 nats of whether it fires (50% of what there is to tell)",
        "promoted by the decoder: <1>, <2>",
        "suppressed by the decoder: not known",
    ]


def test_a_latent_that_always_fires_leaves_nothing_to_tell():
    lines = statistics_lines(ROW | {"position_information": 0.0}, 3, named)
    assert "the position tells 0 nats of whether it fires" in list(lines)


def test_a_dead_latent_in_words():
    assert list(statistics_lines(DEAD, 12_000, named)) == [
        "never fires on 12,000 tokens",
        "promoted by the decoder: none",
        "suppressed by the decoder: not known",
    ]


@pytest.mark.parametrize(
    ("filled", "shown"),
    [
        ({0: 5}, "0 |█| 0.000122, "),
        ({N_BINS - 1: 1}, "2.62e+05 |█| inf, "),
        ({26: 1, 27: 10**9}, "0.75 |▁█| 1.5, "),
    ],
)
def test_a_bin_with_a_token_is_never_blank_and_edges_stand_on_both_sides(filled, shown):
    assert sparkline([filled.get(i, 0) for i in range(N_BINS)]).startswith(shown)


def cache_of(store, *frames):
    blobs = tuple(store.put_table(LATENT_STATISTICS, frame) for frame in frames)
    provenance = Provenance(study="s", run_id="r", started="", finished="", seconds=0)
    return Manifest(
        stage="activation_cache", stage_version="2", cell="sae@layers.0/0000000-0000009",
        input_fingerprint="f", content_hash=content_hash_of(blobs, "ok"), complete=True,
        parameters={}, upstream=(), blobs=blobs, provenance=provenance,
    )  # fmt: skip


@pytest.fixture
def shown(tmp_path, tiny_subject_model_dir):
    """What is printed of a latent, given the cache's tables and a model's folder."""
    tokens = np.zeros(20, dtype=np.int32)
    dataset = TokenDataset(tokens, np.array([0, 12, 20]), CONTEXTS.empty(), DOCUMENTS.empty(), 0)

    def show(*frames, latent=5, source=str(tiny_subject_model_dir)):
        study = Study.model_validate(
            {
                "name": "s",
                "models": {"subject": {"source": source}, "explainer": {"source": "none"}},
                "corpus": {"kind": "embedded"},
                "coders": {"sae": {"path": "none"}},
                "layers": ["layers.0"],
                "max_num_latents": 10,
                "explainers": {"default": {"kind": "default"}},
            }
        )
        store, tree, out = Store(tmp_path), Tree("root"), io.StringIO()
        known = read_statistics(store, cache_of(store, *frames), dataset, latent)
        if known is not None:
            add_statistics(tree, study, known)
        Console(file=out, width=200).print(tree)
        return out.getvalue()

    return show


@pytest.fixture
def hostile_dir(tmp_path, tiny_subject_model_dir):
    """A model whose token 2 is a closing tag of the terminal's markup."""
    folder = Path(shutil.copytree(tiny_subject_model_dir, tmp_path / "hostile"))
    vocabulary = {"<s>": 0, "a": 1, "[/bold]": 2, "[red]": 3}
    words = Tokenizer(WordLevel(vocabulary, unk_token="a"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>").save_pretrained(folder)
    return folder


def test_tokens_are_shown_as_text_that_cannot_be_markup(shown, hostile_dir):
    frame = LATENT_STATISTICS.conform(pl.DataFrame([ROW | {"promoted_tokens": [2, 3]}]))
    said = shown(frame, source=str(hostile_dir))
    assert "fires on 3 of 18 tokens" in said  # 12 + 8 less a BOS each
    assert "promoted by the decoder: '[/bold]', '[red]'" in said


def test_only_the_latent_asked_for_is_shown(shown):
    other = ROW | {"latent": 6, "n_tokens": 17}
    frame = LATENT_STATISTICS.conform(pl.DataFrame([ROW, other]))
    assert "17 of" in shown(frame, latent=6)
    assert "17 of" not in shown(frame, latent=5)
    assert shown(frame, latent=4) == "root\n"


def test_without_the_tokenizer_ids_are_shown(shown):
    frame = LATENT_STATISTICS.conform(pl.DataFrame([ROW]))
    assert "token 7 75%, token 9 25%" in shown(frame, source="/no/such/folder")


def test_a_cache_from_before_there_were_statistics_shows_none(shown):
    assert shown() == "root\n"


def test_promoted_tokens_without_a_text_are_left_out():
    row = ROW | {"promoted_tokens": [0, 4, 1], "suppressed_tokens": [1]}
    texts = {0: " a", 1: "", 4: "b"}
    *_, promoted, suppressed = statistics_lines(row, 3, lambda t: repr(texts.get(t, "c")))
    assert promoted == "promoted by the decoder: ' a', 'b'"
    assert suppressed == "suppressed by the decoder: none"
