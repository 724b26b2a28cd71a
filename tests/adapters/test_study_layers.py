"""A study's layers as patterns and TransformerLens names: what the partitions are made of."""

from pathlib import Path

import pytest

from autointerp_dagster.adapters.study_layers import with_plain_layers
from autointerp_dagster.core.errors import StudyError
from autointerp_dagster.study import Study, load_study

STUDY = """\
models:
  subject: {{source: "{model}"}}
  explainer: {{base_url: "http://127.0.0.1:1/v1", model: m}}
corpus: {{kind: files, path: texts}}
coders:
  sae: {{format: sparsify, path: saes}}
layers: {layers}
max_num_latents: 100
explainers: {{top_tokens: {{kind: top_tokens}}}}
"""


@pytest.fixture
def study(tmp_path: Path, tiny_subject_model_dir: Path):
    """Makes a study; its coders are folders with a ``cfg.json`` and weights that nobody reads."""

    def make(layers: str, hookpoints: tuple[str, ...] = (), coders: str = "") -> Study:
        for name in hookpoints:
            (tmp_path / "saes" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "saes" / name / "cfg.json").write_text('{"d_in": 4}')
            (tmp_path / "saes" / name / "sae.safetensors").touch()
        file = tmp_path / "tiny.yaml"
        text = STUDY.format(model=tiny_subject_model_dir, layers=layers)
        file.write_text(text.replace("\nlayers:", f"\n{coders}layers:"))
        return load_study(file)

    return make


def test_plain_layers_ask_neither_model_nor_coders(study) -> None:
    plain = study("[layers.0, sae@layers.1.mlp.input]")  # there is no folder of coders
    assert with_plain_layers(plain) is plain


def test_a_pattern_means_the_coders_that_lie_there_in_natural_order(study) -> None:
    made = study("['layers.*']", ("layers.10", "layers.9", "layers.9.mlp", "embed_tokens"))
    assert with_plain_layers(made).layers == ("layers.9", "layers.10")


def test_each_layer_comes_once_and_patterns_mix_with_plain_names(study) -> None:
    made = study("[layers.9, 'sae@layers.*.mlp', 'layers.*']", ("layers.9", "layers.9.mlp"))
    layers = with_plain_layers(made).layers
    assert layers == ("layers.9", "sae@layers.9.mlp")
    assert [str(key) for key in with_plain_layers(made).layer_keys] == [
        "sae@layers.9",
        "sae@layers.9.mlp",
    ]


def test_a_transformer_lens_name_is_the_models_own_hookpoint(study) -> None:
    made = study("[blocks.1.hook_resid_post, 'sae@blocks.0.hook_mlp_out']")
    assert with_plain_layers(made).layers == ("layers.1", "sae@layers.0.mlp")


def test_a_transformer_lens_pattern_is_translated_before_it_is_matched(study) -> None:
    made = study("['blocks.*.hook_resid_post']", ("layers.0", "layers.1"))
    assert with_plain_layers(made).layers == ("layers.0", "layers.1")


def test_a_pattern_that_matches_no_coder_names_what_is_there(study) -> None:
    made = study("['layer.*']", ("layers.0",))
    with pytest.raises(StudyError, match=r"tiny: layers: coders\.sae: .*'layer\.\*'.*layers\.0"):
        with_plain_layers(made)


def test_a_site_that_does_not_exist_is_an_error_of_the_study(study) -> None:
    with pytest.raises(StudyError, match=r"study tiny: layers: hookpoint 'blocks.0.hook_nothing'"):
        with_plain_layers(study("[blocks.0.hook_nothing]"))


def test_more_layers_than_dagster_tracks_are_refused(study) -> None:
    made = study("['layers.*']", tuple(f"layers.{i}" for i in range(100)))
    with pytest.raises(StudyError, match=r"patterns expanded: layers: 100 in all, .* at most 99"):
        with_plain_layers(made)


def test_a_path_of_the_whole_model_counts_from_the_base_model(study) -> None:
    made = study("[model.layers.1.output, 'model.layers.*.mlp']", ("layers.0.mlp", "layers.2.mlp"))
    assert with_plain_layers(made).layers == ("layers.1", "layers.0.mlp", "layers.2.mlp")


BASELINES = """\
  random: {format: random, like: sae, k: 2}
  neurons: {format: neurons, k: 2}
"""


def test_baselines_stand_where_the_study_s_coders_do(study) -> None:
    lying = ("layers.1", "layers.2")
    together = study("['layers.*']", lying, BASELINES)
    assert with_plain_layers(together).layers == lying
    each = study("['random@layers.*', 'sae@layers.*', 'neurons@layers.*']", lying, BASELINES)
    assert with_plain_layers(each).layers == tuple(
        f"{coder}@{place}" for coder in ("random", "sae", "neurons") for place in lying
    )


def test_neurons_stand_also_where_no_coder_of_the_study_does(study) -> None:
    made = study("['neurons@layers.*.mlp']", ("layers.1",), BASELINES)
    layers = with_plain_layers(made).layers
    assert layers[:2] == ("neurons@layers.0.mlp", "neurons@layers.1.mlp")
    with pytest.raises(StudyError, match=r"layers: coders\.sae: .*matches nothing"):
        with_plain_layers(study("['random@layers.*.mlp']", ("layers.1",), BASELINES))
