"""The embedding scorer on planted meanings: an embedder that knows the classes ranks perfectly."""

from pathlib import Path

import dagster as dg
import numpy as np
import pytest
from bench import SMALL, Bench
from planted import CLASS_OF, CLASSES, VOCABULARY

from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer

NAMES = {
    "digits": "digit", "colours": "colour", "animals": "animal", "fruits": "fruit",
    "metals": "metal", "tools": "tool", "cities": "city", "body": "body", "months": "month",
}  # fmt: skip
"""The word of an explanation that names a class."""


def build_embedder(folder: Path) -> Path:
    """Texts as the mean of their words; a word of a class, and its name, is the class's axis."""
    from sentence_transformers import SentenceTransformer, models
    from sentence_transformers.models.tokenizer import WhitespaceTokenizer

    words = [*VOCABULARY, *NAMES]
    axes = list(CLASSES)
    weights = np.zeros((len(words), len(axes)), dtype=np.float32)
    for row, word in enumerate(words):
        name = NAMES.get(word, CLASS_OF.get(word))
        if name in NAMES.values():
            weights[row, axes.index(name)] = 1.0
    tokenizer = WhitespaceTokenizer(words, stop_words=[], do_lower_case=False)
    embeddings = models.WordEmbeddings(tokenizer, weights.tolist())
    whole = SentenceTransformer(modules=[embeddings, models.Pooling(len(axes))], device="cpu")
    whole.save_pretrained(str(folder), create_model_card=False)
    return folder


@pytest.mark.slow
def test_latents_that_two_layers_share_are_matched_and_explained_alike(
    world: Path, server: FakeLLMServer, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    embedder = {"source": str(build_embedder(tmp_path / "embedder")), "device": "cpu"}
    models = {"embedder": {**embedder, "query_prefix": ""}}
    same = {"format": "sparsify", "path": str(world / "coders")}
    overrides = {**SMALL, "models": models, "coders": {"twin": same}, "scorers": {}}
    bench = Bench(tmp_path, world, server.base_url, instance, overrides)
    bench.run()
    found = bench.table("study_metrics", "study_metrics").filter(comparison="matched")
    pairs = ("sae@h.0", "twin@h.0"), ("sae@h.1", "twin@h.1"), ("sae@h.0", "sae@h.1")
    same_0, same_1, apart = (found.filter(a=a, b=b) for a, b in pairs)
    for rows in (same_0, same_1):
        values = dict(rows.select("statistic", "value").iter_rows())
        assert values["n_matched"] == 2
        assert values["median_decoder_cosine"] == pytest.approx(1)
        assert values["median_jaccard"] == 1
        assert values["mean_similarity"] == pytest.approx(1)
    # Other latents have a meaning in the other layer.
    assert apart.filter(statistic="n_matched")["value"].to_list() == [0]
    assert bench.stale() == set()


@pytest.mark.slow
def test_the_true_explanation_ranks_every_activating_window_first(
    world: Path, server: FakeLLMServer, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    models = {"embedder": {"source": str(build_embedder(tmp_path / "embedder")),
                           "query_prefix": "", "device": "cpu"}}  # fmt: skip
    overrides = {**SMALL, "models": models, "scorers": {"embedding": {}}}
    bench = Bench(tmp_path, world, server.base_url, instance, overrides)
    bench.run()
    rows = bench.table("latent_metrics", "latent_metrics").filter(
        scorer="embedding", metric="auroc", variant="all", status="ok"
    )
    own = rows.filter(subject="own")
    by_latent = dict(own.select("latent", "value").iter_rows())
    assert {latent: by_latent[latent] for latent in (0, 1, 9)} == {0: 1.0, 1: 1.0, 9: 1.0}
    other = rows.filter(subject="other")["value"].mean()
    assert isinstance(other, float)
    assert other < 0.75
    assert bench.stale() == set()
    verdicts = bench.table("score_embedding", "verdicts")
    assert verdicts["prediction"].null_count() == verdicts.height  # it only ranks
