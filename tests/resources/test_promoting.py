"""Promoted tokens: which they are, and that explainers are shown those of the cache's table."""

import logging
import shutil
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import cast

import dagster as dg
import polars as pl
import pytest
import torch
from bench import Bench
from transformers import GPT2Config, GPT2LMHeadModel

from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer
from autointerp_dagster.adapters.subject_models import SubjectModel, open_subject_model
from autointerp_dagster.core.config import SubjectModelConfig
from autointerp_dagster.core.llm import Completion, Request
from autointerp_dagster.core.schemas import LATENT_STATISTICS
from autointerp_dagster.core.sparse_coders import LinearCoder, TopK
from autointerp_dagster.core.types import LayerKey, silent
from autointerp_dagster.resources import promoting
from autointerp_dagster.resources.coders import Coders
from autointerp_dagster.resources.explaining import ExplainingWork
from autointerp_dagster.resources.models import SubjectModels
from autointerp_dagster.resources.promoting import N_TOKENS, promoted_by_decoder
from autointerp_dagster.resources.stage_inputs import External, StageInputs

LAYER = LayerKey("sae", "layers.0")
WIDTH = 16


def model_at(folder: Path) -> SubjectModel:
    content = {"source": str(folder), "dtype": "float32", "device": "cpu"}
    return open_subject_model(SubjectModelConfig.model_validate(content))


def coder_of(decoder: torch.Tensor) -> LinearCoder:
    n_latents, width = decoder.shape
    encoder, bias = torch.zeros(n_latents, width), torch.zeros(n_latents)
    return LinearCoder(encoder, bias, decoder, torch.zeros(width), TopK(1))


def random_rows(n_latents: int, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(n_latents, width, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def gpt2_dir(tiny_subject_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose final norm takes the mean off; random weights, the norm's too."""
    folder = tmp_path_factory.mktemp("gpt2")
    for file in tiny_subject_model_dir.glob("*token*"):
        shutil.copy(file, folder)
    sizes = GPT2Config(
        vocab_size=320, n_embd=WIDTH, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=None
    )
    model = GPT2LMHeadModel(sizes)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    model.save_pretrained(folder)
    return folder


def logit_slopes(model: SubjectModel, rows: torch.Tensor, norm_name: str) -> torch.Tensor:
    """How fast each logit rises along each row, through the model's own last norm and head.

    The mean over streams in opposite directions: what shifts all tokens or depends on where one
    stands (the norm's division) drops out.
    """
    norm = deepcopy(getattr(model.base_model, norm_name)).double()
    head = deepcopy(model.model.get_output_embeddings()).double()
    stream = 1e3 * torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(3)).double()
    stream -= stream.mean(dim=1, keepdim=True)
    # Streams at right angles to the row: along it the size of the stream does not change.
    slopes = []
    for row in rows.double():
        flat = row - row.mean() if norm_name == "ln_f" else row
        across = stream - (stream @ flat / flat.dot(flat))[:, None] * flat
        across *= 1e3 / across.norm(dim=1, keepdim=True)
        slopes.append((head(norm(across + row)) - head(norm(across - row))).mean(0))
    return torch.stack(slopes)


@pytest.mark.parametrize("kind", ["norm", "ln_f"])
@torch.inference_mode()
def test_a_step_along_the_row_raises_these_tokens_most(
    tiny_subject_model_dir: Path, gpt2_dir: Path, kind: str
) -> None:
    model = model_at(tiny_subject_model_dir if kind == "norm" else gpt2_dir)
    rows = random_rows(9)
    found = promoted_by_decoder(model, coder_of(rows), LAYER, range(2, 7))
    assert found is not None
    promoted, suppressed = found
    order = logit_slopes(model, rows[2:7], kind).argsort(dim=1, descending=True)
    assert promoted == order[:, :N_TOKENS].tolist()
    assert suppressed == order.flip(1)[:, :N_TOKENS].tolist()


def test_latents_get_the_same_tokens_however_many_are_asked_for(
    tiny_subject_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, coder = model_at(tiny_subject_model_dir), coder_of(random_rows(11))
    whole = promoted_by_decoder(model, coder, LAYER, range(11))
    assert whole is not None
    monkeypatch.setattr(promoting, "_LATENTS_AT_ONCE", 3)
    assert promoted_by_decoder(model, coder, LAYER, range(11)) == whole
    one = promoted_by_decoder(model, coder, LAYER, range(4, 5))
    assert one == (whole[0][4:5], whole[1][4:5])


def test_a_decoder_that_writes_elsewhere_promotes_nothing_known(
    tiny_subject_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, coder = model_at(tiny_subject_model_dir), coder_of(random_rows(5, width=32))
    with caplog.at_level(logging.INFO):
        assert promoted_by_decoder(model, coder, LAYER, range(5)) is None
    assert "sae@layers.0: decoder rows are 32 wide and the residual stream 16" in caplog.text


def test_a_row_without_a_direction_promotes_nothing(
    tiny_subject_model_dir: Path, gpt2_dir: Path
) -> None:
    rows = random_rows(3)
    rows[0], rows[1] = 0, 0.1
    lengths = []
    for folder in (tiny_subject_model_dir, gpt2_dir):
        found = promoted_by_decoder(model_at(folder), coder_of(rows), LAYER, range(3))
        assert found is not None
        lengths.append([[len(tokens) for tokens in side] for side in found])
    assert lengths == [[[0, 8, 8]] * 2, [[0, 0, 8]] * 2]


def test_no_latents_load_no_model() -> None:
    model = model_at(Path("/nowhere"))
    assert promoted_by_decoder(model, coder_of(random_rows(1)), LAYER, range(0)) == ([], [])


def test_a_coder_in_another_type_gives_the_same_tokens(tiny_subject_model_dir: Path) -> None:
    model, coder = model_at(tiny_subject_model_dir), coder_of(random_rows(4).bfloat16())
    exact = replace(coder, decoder=coder.decoder.float())
    expected = promoted_by_decoder(model, exact, LAYER, range(4))
    assert promoted_by_decoder(model, coder, LAYER, range(4)) == expected


class Listening:
    """A language model that never answers and remembers what it was asked."""

    identity = "listening"

    def __init__(self) -> None:
        self.questions: list[str] = []

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Completion]]:
        for request in requests:
            self.questions.append(request.messages[-1].content)
            yield request, Completion(f"call {len(self.questions)}", None, reason="call_failed")


@pytest.fixture(scope="module")
def cached(
    world: Path, server: FakeLLMServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    """A study up to its records. Do not run it again."""
    overrides = {
        "latents": [1, 5],
        "layers": ["h.0"],
        "explainers": {
            "default": {"kind": "default", "n_examples": 3, "show_promoted": True},
            "plain": {"kind": "default", "n_examples": 3},
            "top_tokens": None,
        },
    }
    with dg.DagsterInstance.ephemeral() as kept:
        folder = tmp_path_factory.mktemp("cached")
        bench = Bench(folder, world, server.base_url, kept, overrides)
        bench.run(until="latent_records")
        yield bench


def working(bench: Bench, llm: Listening) -> ExplainingWork:
    """As the stage explains."""
    study, coders = bench.study, Coders()
    external: External = {
        "sparse_coders": lambda layer: coders.identity(study, cast("LayerKey", layer))
    }
    stage = StageInputs.of(bench.store, study, "explanations", external=external)
    subject = SubjectModels().of(study)
    return ExplainingWork(stage, study, {"explainer": llm}, coders, subject, silent)


def questions(bench: Bench, explainer: str, promoted: list[list[int]] | None) -> list[str]:
    """What an explainer asks about latents 1 and 5, if these tokens stand in the cache's table.

    Args:
        bench: With a cache.
        explainer: Of its study.
        promoted: Of latents 0, 2, 4 ... and of latents 1, 3, 5 ...
    """
    work = working(bench, llm := Listening())
    cell = work.study.cells[0]
    cache = work.stage.input("activation_cache", cell)
    blobs = {blob.name: blob for blob in cache.blobs}
    table = bench.store.table(blobs["latent_statistics"])
    other = [None] * table.height if promoted is None else promoted * (table.height // 2)
    table = table.with_columns(pl.Series("promoted_tokens", other, dtype=pl.List(pl.UInt32)))
    blobs["latent_statistics"] = bench.store.put_table(LATENT_STATISTICS, table)
    changed = cache.model_copy(update={"blobs": (*blobs.values(),)})
    work.stage.take("activation_cache", cell, changed)
    assert len(list(work.explanations(cell, explainer, [1, 5]))) == 2
    return llm.questions


def test_an_explainer_is_shown_the_tokens_of_the_caches_table(cached: Bench) -> None:
    ids = open_subject_model(cached.study.models.subject).encode(["goat river gold"])[0]
    shown = [[7], [*ids[:2], 0, ids[2]]]  # 0 is BOS, which is no text
    for question in questions(cached, "default", shown):
        assert question.endswith('"goat", "river", "gold"')


def test_without_known_tokens_an_explainer_is_shown_none(cached: Bench) -> None:
    plain = questions(cached, "plain", [[3], [4]])
    assert questions(cached, "default", None) == plain
    assert questions(cached, "default", [[], [0]]) == plain


def test_the_table_decides_a_part_of_a_cell_that_shows_its_tokens(cached: Bench) -> None:
    work = working(cached, Listening())
    cell = work.study.cells[0]
    table = work.stage.input("activation_cache", cell).blob("latent_statistics")
    assert work.part_parameters(cell, "default", [1])["statistics"] == table.content_hash
    assert "statistics" not in work.part_parameters(cell, "plain", [1])


def test_a_study_without_the_logit_lens_knows_no_promoted_tokens(
    world: Path, server: FakeLLMServer, tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    overrides = {"layers": ["h.0"], "explainers": {"top_tokens": None}, "logit_lens": False}
    bench = Bench(tmp_path, world, server.base_url, instance, overrides)
    bench.run(until="activation_cache")
    table = bench.table("activation_cache", "latent_statistics")
    assert table.height > 0
    assert table["promoted_tokens"].is_null().all()
    assert table["suppressed_tokens"].is_null().all()
