"""What a sparse autoencoder leaves unexplained, on a few contexts of a real dataset."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cache_pass import LAYER, OTHER, coders_in, dataset_of, subject_model_at

from autointerp_dagster.adapters.rebuilding import fractions_unexplained
from autointerp_dagster.core.errors import CoderError
from autointerp_dagster.core.hooks import captured
from autointerp_dagster.core.sparse_coders import LinearCoder, PlacedCoder, TopK


def test_fractions_are_those_of_dense_encodings_of_whole_contexts_without_bos(
    tiny_subject_model_dir: Path, tiny_sparsify_dir: Path
) -> None:
    model = subject_model_at(tiny_subject_model_dir)
    dataset = dataset_of(model, n_documents=4)
    placed = coders_in(tiny_sparsify_dir)
    found = fractions_unexplained(model, dataset, placed)
    assert found.keys() == {LAYER, OTHER}
    tokens = torch.from_numpy(dataset.context_tokens(0).astype(np.int64))  # one in a hundred: one
    for layer, (coder, reads, _) in placed.items():
        with torch.inference_mode(), captured(model.base_model, [reads]) as seen:
            model.base_model(input_ids=tokens[None], use_cache=False)
        x = seen[reads][0, 1:].double()
        rebuilt = coder.decode(coder.encode(x.float()), x.float()).double()
        wanted = (x - rebuilt).square().sum() / (x - x.mean(dim=0)).square().sum()
        assert found[layer] == pytest.approx(float(wanted), rel=1e-6)


def test_more_contexts_are_taken_of_a_larger_dataset_and_no_more_than_eight(
    tiny_subject_model_dir: Path, tiny_sparsify_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = subject_model_at(tiny_subject_model_dir)
    dataset = dataset_of(model, n_documents=1200)
    n_contexts = dataset.contexts.height
    assert n_contexts > 900
    asked: list[int] = []
    read = type(dataset).context_tokens

    def counted(self: object, context: int) -> np.ndarray:
        asked.append(context)
        return read(dataset, context)

    monkeypatch.setattr(type(dataset), "context_tokens", counted)
    fractions_unexplained(model, dataset, coders_in(tiny_sparsify_dir))
    assert len(asked) == len(set(asked)) == 8
    assert (asked[0], asked[-1]) == (0, n_contexts - 1)


def test_a_transcoder_is_left_out_and_a_coder_of_another_width_refused(
    tiny_subject_model_dir: Path,
) -> None:
    model = subject_model_at(tiny_subject_model_dir)
    width = model.width_of(LAYER.hookpoint)
    dataset = dataset_of(model)

    def coder(d_in: int) -> LinearCoder:
        rows = torch.ones(4, d_in)
        return LinearCoder(rows, torch.zeros(4), rows, torch.zeros(d_in), TopK(1))

    across = PlacedCoder(coder(width), f"{LAYER.hookpoint}.mlp.input", f"{LAYER.hookpoint}.mlp")
    assert fractions_unexplained(model, dataset, {LAYER: across}) == {}
    wrong = PlacedCoder(coder(width + 1), LAYER.hookpoint, LAYER.hookpoint)
    with pytest.raises(CoderError, match=str(width + 1)):
        fractions_unexplained(model, dataset, {LAYER: wrong})
