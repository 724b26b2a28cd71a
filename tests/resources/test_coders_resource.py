"""A study's coders by layer: names in their files are translated for the study's subject model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from autointerp_dagster.adapters.coder_files import check_fits
from autointerp_dagster.core.errors import CoderError
from autointerp_dagster.core.types import LayerKey
from autointerp_dagster.resources.coders import Coders
from autointerp_dagster.resources.models import SubjectModels
from autointerp_dagster.study import Study, load_study

STUDY = """\
models:
  subject: {{source: {model}, dtype: float32, device: cpu}}
  explainer: {{source: {model}}}
corpus: {{kind: files, path: texts}}
coders:
  sae: {{path: {sparsify}}}
  lens: {{path: lens}}
layers: [sae@layers.1, lens@layers.1.input, lens@layers.2.mlp]
max_num_latents: 64
explainers: {{top_tokens: {{kind: top_tokens}}}}
"""


@pytest.fixture
def study(tmp_path: Path, tiny_subject_model_dir: Path, tiny_sparsify_dir: Path) -> Study:
    """sparsify's SAE at one place, and SAELens' SAE and transcoder, each of its own width."""
    generator = torch.Generator().manual_seed(0)
    for hook, out, n_latents in (
        ("blocks.1.hook_resid_pre", None, 20),
        ("blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out", 12),
    ):
        folder = tmp_path / "lens" / f"v1_{n_latents}"
        folder.mkdir(parents=True)
        config = {
            "architecture": "transcoder" if out else "standard",
            "d_in": 16, "d_out": 16, "d_sae": n_latents, "dtype": "float32",
            "apply_b_dec_to_input": out is None,
            "metadata": {"hook_name": hook, "hook_name_out": out, "sae_lens_version": "6.5.0"},
        }  # fmt: skip
        (folder / "cfg.json").write_text(json.dumps(config))
        sizes = {"W_enc": (16, n_latents), "W_dec": (n_latents, 16)}
        sizes |= {"b_enc": (n_latents,), "b_dec": (16,)}
        tensors = {k: torch.randn(*size, generator=generator) for k, size in sizes.items()}
        save_file(tensors, folder / "sae_weights.safetensors")
    text = STUDY.format(model=tiny_subject_model_dir, sparsify=tiny_sparsify_dir)
    (tmp_path / "many.yaml").write_text(text)
    return load_study(tmp_path / "many.yaml")


def test_coders_of_one_study_have_their_own_formats_places_and_widths(study: Study) -> None:
    """Defect 15 of the reference: one transcode flag and one width for all hookpoints."""
    coders, model = Coders(), SubjectModels().of(study)
    found = {str(layer): coders.of(study, layer) for layer in study.layer_keys}
    assert {
        key: (loaded.format, loaded.reads, loaded.writes, loaded.coder.num_latents)
        for key, loaded in found.items()
    } == {
        "sae@layers.1": ("sparsify", "layers.1", "layers.1", 64),
        "lens@layers.1.input": ("saelens", "layers.1.input", "layers.1.input", 20),
        "lens@layers.2.mlp": ("saelens", "layers.2.mlp.input", "layers.2.mlp", 12),
    }
    for layer in study.layer_keys:
        check_fits(found[str(layer)], model, layer, study.max_num_latents)
        assert coders.identity(study, layer) == found[str(layer)].identity


def test_a_place_without_a_coder_is_named_with_those_that_have_one(study: Study) -> None:
    with pytest.raises(
        CoderError, match=r"no coder of 'layers\.0'.*layers\.1\.input, layers\.2\.mlp\.input\."
    ):
        Coders().of(study, LayerKey("lens", "layers.0"))


def test_what_was_found_can_be_recorded(study: Study) -> None:
    record = Coders().of(study, LayerKey("lens", "layers.2.mlp")).record
    assert json.loads(json.dumps(record)) == record
    assert str(record["about"]).startswith(
        "saelens: ReLU transcoder of 12 latents, layers.2.mlp.in"
    )
    assert (record["reads"], record["writes"]) == ("layers.2.mlp.input", "layers.2.mlp")
