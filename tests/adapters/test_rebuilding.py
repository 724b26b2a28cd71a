"""What coders from files make of a sample of a real dataset: how often they fire, and how well."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cache_pass import LAYER, OTHER, coders_in, dataset_of, subject_model_at

from autointerp_dagster.adapters import rebuilding
from autointerp_dagster.adapters.rebuilding import rebuilt_by
from autointerp_dagster.core.errors import CoderError
from autointerp_dagster.core.hooks import captured
from autointerp_dagster.core.sparse_coders import LinearCoder, PlacedCoder, Threshold, TopK


def sampled(dataset: object, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Contexts that are read from now on."""
    asked: list[int] = []
    read = type(dataset).context_tokens

    def counted(self: object, context: int) -> np.ndarray:
        asked.append(context)
        return read(dataset, context)

    monkeypatch.setattr(type(dataset), "context_tokens", counted)
    return asked


def test_all_visible_tokens_of_a_small_dataset_are_measured_by_dense_encodings(
    tiny_subject_model_dir: Path, tiny_sparsify_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = subject_model_at(tiny_subject_model_dir)
    dataset = dataset_of(model, n_documents=10)
    n_contexts = dataset.contexts.height
    n_tokens = dataset.tokens.size - n_contexts
    assert 256 <= n_tokens <= 1024
    assert n_contexts <= 64
    monkeypatch.setattr(rebuilding, "_OUTLIER", 1e9)
    placed = coders_in(tiny_sparsify_dir)
    found = rebuilt_by(model, dataset, placed)
    assert found.keys() == {LAYER, OTHER}
    for layer, (coder, reads, _) in placed.items():
        parts = []
        for context in range(n_contexts):
            tokens = torch.from_numpy(dataset.context_tokens(context).astype(np.int64))
            with torch.inference_mode(), captured(model.base_model, [reads]) as seen:
                model.base_model(input_ids=tokens[None], use_cache=False)
            parts.append(seen[reads][0, 1:].double())
        x = torch.cat(parts)
        dense = coder.encode_dense(x.float())
        rebuilt = coder.decode(coder.encode(x.float()), x.float()).double()
        wanted = (x - rebuilt).square().sum() / (x - x.mean(dim=0)).square().sum()
        one = found[layer]
        assert (one.n_tokens, one.n_outliers) == (n_tokens, 0)
        assert one.fvu == pytest.approx(float(wanted), rel=1e-6)
        assert one.l0 == pytest.approx(float((dense > 0).sum()) / n_tokens)


def test_of_a_larger_dataset_a_thousand_tokens_are_drawn_evenly(
    tiny_subject_model_dir: Path, tiny_sparsify_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = subject_model_at(tiny_subject_model_dir)
    dataset = dataset_of(model, n_documents=1200)
    asked = sampled(dataset, monkeypatch)
    found = rebuilt_by(model, dataset, coders_in(tiny_sparsify_dir))
    assert len(asked) == len(set(asked)) == 64
    assert (asked[0], asked[-1]) == (0, dataset.contexts.height - 1)
    assert 256 <= found[LAYER].n_tokens + found[LAYER].n_outliers <= 1024
    again = rebuilt_by(model, dataset, coders_in(tiny_sparsify_dir))
    assert again == found


def test_positions_are_drawn_each_as_often_as_another_and_never_bos() -> None:
    times = np.zeros(20)
    for context in range(2000):
        at = rebuilding._positions(context, 1, 20, 5)
        assert at == sorted(set(at))
        assert len(at) == 5
        times[at] += 1
    assert times[0] == 0
    assert times[1:] / 2000 == pytest.approx(5 / 19, abs=0.05)  # a standard error is .01
    assert rebuilding._positions(0, 1, 4, 5) == [1, 2, 3]


def test_a_token_of_a_norm_beyond_all_others_decides_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, generator=generator)
    eye = torch.cat([torch.eye(8), -torch.eye(8)])
    limits = torch.full((16,), 0.01)
    coder = LinearCoder(eye, torch.zeros(16), eye * 0.9, torch.zeros(8), Threshold(limits))
    placed = PlacedCoder(coder, "h.0", "h.0")
    plain = rebuilding._rebuilt(placed, x)
    sink = torch.full((2, 8), 1e4)
    assert rebuilding._rebuilt(placed, torch.cat([x, sink])) == plain._replace(n_outliers=2)
    assert plain.fvu == pytest.approx(0.01, rel=0.05)
    assert rebuilding._rebuilt(placed, x[:255]).fvu is None  # too few to tell
    assert rebuilding._rebuilt(placed, x[:255]).l0 is not None


def test_of_a_transcoder_l0_alone_is_told_and_a_coder_of_another_width_refused(
    tiny_subject_model_dir: Path,
) -> None:
    model = subject_model_at(tiny_subject_model_dir)
    width = model.width_of(LAYER.hookpoint)
    dataset = dataset_of(model, n_documents=60)

    def coder(d_in: int) -> LinearCoder:
        rows = torch.ones(4, d_in)
        return LinearCoder(rows, torch.ones(4), rows, torch.zeros(d_in), TopK(1))

    across = PlacedCoder(coder(width), f"{LAYER.hookpoint}.mlp.input", f"{LAYER.hookpoint}.mlp")
    found = rebuilt_by(model, dataset, {LAYER: across})[LAYER]
    assert found.fvu is None
    assert found.n_tokens >= 256
    assert 0 < (found.l0 or 0.0) <= 1
    wrong = PlacedCoder(coder(width + 1), LAYER.hookpoint, LAYER.hookpoint)
    with pytest.raises(CoderError, match=str(width + 1)):
        rebuilt_by(model, dataset, {LAYER: wrong})
