from pathlib import Path

import pytest

from autointerp_dagster.core.errors import StudyError
from autointerp_dagster.core.types import Cell, LatentRange, LayerKey, WholeStudy
from autointerp_dagster.study import find_studies, load_study
from autointerp_dagster.study.parameters import parameters_of
from autointerp_dagster.study.stages import (
    STAGES,
    inputs_at,
    places_of,
    stages_of,
    upstream_of,
)

MINIMAL = """\
models:
  subject: {source: ./model}
  explainer: {base_url: "http://127.0.0.1:1/v1", model: m}
corpus: {kind: files, path: texts}
coders:
  sae: {path: saes}
layers: [layers.0, layers.1]
max_num_latents: 100
range_size: 40
floors: {donor_block: 40}
explainers:
  default: {kind: default}
scorers:
  detection: {}
"""


def write(folder, text=MINIMAL, name="tiny.yaml"):
    path = Path(folder) / name
    path.write_text(text)
    return path


def test_a_study_is_named_after_its_file_and_its_paths_count_from_there(tmp_path):
    study = load_study(write(tmp_path))
    assert study.name == "tiny"
    assert study.coders["sae"].path == tmp_path / "saes"
    assert study.models.subject.source == str(tmp_path / "model")


def test_the_last_range_ends_with_the_widest_coder(tmp_path):
    ranges = load_study(write(tmp_path)).ranges
    assert ranges == (LatentRange(0, 40), LatentRange(40, 80), LatentRange(80, 100))
    assert [str(r) for r in ranges] == ["0000000-0000039", "0000040-0000079", "0000080-0000099"]


def test_the_judge_is_the_explainer_unless_named(tmp_path):
    models = load_study(write(tmp_path)).models
    assert models.judge == models.explainer


def test_a_hookpoint_is_taken_for_every_coder_and_a_key_for_one(tmp_path):
    text = MINIMAL.replace("  sae: {path: saes}", "  a: {path: saes}\n  b: {path: saes}")
    text = text.replace("[layers.0, layers.1]", "[layers.0, b@layers.1]")
    keys = load_study(write(tmp_path, text)).layer_keys
    assert [str(key) for key in keys] == ["a@layers.0", "b@layers.0", "b@layers.1"]


@pytest.mark.parametrize(
    ("found", "replacement", "message"),
    [
        ("range_size", "rangesize", r"tiny.yaml:9: rangesize: unknown key. Did you mean 'range_"),
        ("model: m", "modle: m", r":3: models.explainer.modle: unknown key. Did you mean 'model'"),
        ("detection: {}", "detecton: {}", r":14: scorers.detecton: .*'detection'"),
        ("max_num_latents: 100\n", "", r"tiny.yaml: max_num_latents: missing"),
        ("100", "many", r":8: max_num_latents: .*integer.*'many'"),
        (
            "sae: {path: saes}",
            "sae: {path: saes}\n  sae: {path: b}",
            r":7: coders.sae: given twice",
        ),
        ("layers.1]", "nn@layers.1]", r"layers: nn@layers.1 names coder 'nn'; declared are"),
        ("donor_block: 40", "donor_block: 30", r"range_size: 40 is no multiple of.*30"),
        ("detection: {}", "embedding: {}", r"scorers.embedding: needs models.embedder"),
        ("range_size: 40", "range_size: 1", r"100 ranges, wanted at most 99. Use 2 or more"),
        ("models:", "models: [", r"tiny.yaml: no valid YAML"),
        ("kind: files", "kind: disk", r":4: corpus: .*'disk'.*'files'"),
        ("sae: {path", "s/ae: {path", r"coders: name 's/ae': wanted letters, digits"),
        ("default: {kind", "de|fault: {kind", r"explainers: name 'de|fault': wanted letters"),
        ("layers.0,", "../x,", r"layers: hookpoint '\.\./x': wanted a dotted module path"),
        ("scorers:", "budget: {usd: 1}\nscorers:", r"budget.usd: models.explainer has no price"),
        ("100", "!!nonsense 100", r"tiny.yaml: a value cannot be read"),
        (
            "default: {kind: default}",
            "a: {kind: default, chain_of_thought: true}",
            r":12: explainers.a.chain_of_thought: max_tokens is 200, wanted 300 or more",
        ),
        (
            "default: {kind: default}",
            "a: {kind: best_of_n, temperature: 0}",
            r":12: explainers.a.temperature: .*greater than 0",
        ),
    ],
)
def test_a_mistake_is_named_with_file_line_key_and_remedy(tmp_path, found, replacement, message):
    with pytest.raises(StudyError, match=message):
        load_study(write(tmp_path, MINIMAL.replace(found, replacement, 1)))


def test_steps_of_thought_are_refused_where_no_model_would_write_them(tmp_path):
    text = MINIMAL.replace(
        "kind: default", "kind: default, chain_of_thought: true, max_tokens: 400"
    )
    assert load_study(write(tmp_path, text)).explainers["default"].max_tokens == 400
    local = text.replace('{base_url: "http://127.0.0.1:1/v1", model: m}', "{source: ./model}")
    with pytest.raises(
        StudyError, match=r"explainers.default.chain_of_thought: .*base_url or serve"
    ):
        load_study(write(tmp_path, local))


def test_every_mistake_of_a_file_is_named_at_once(tmp_path):
    text = MINIMAL.replace("range_size", "rangesize").replace("detection", "detecton")
    with pytest.raises(StudyError) as caught:
        load_study(write(tmp_path, text))
    assert len(str(caught.value).splitlines()) == 2


def test_a_missing_and_a_non_utf8_file_are_named(tmp_path):
    with pytest.raises(StudyError, match=r"nowhere.yaml: no such study file"):
        load_study(tmp_path / "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes("é".encode("latin-1"))
    with pytest.raises(StudyError, match=r"not UTF-8 at byte 0"):
        load_study(tmp_path / "latin.yaml")


def test_a_study_that_extends_another_changes_only_what_it_says(tmp_path):
    write(tmp_path)
    (tmp_path / "sweeps").mkdir()
    text = "extends: ../tiny.yaml\nsampling: {n_train: 10}\n"
    child, base = load_study(write(tmp_path / "sweeps", text, "fewer.yaml")), None
    base = load_study(tmp_path / "tiny.yaml")
    assert child.name == "fewer"
    assert child.sampling.n_train == 10
    assert child.coders == base.coders
    assert child.sampling.n_test == base.sampling.n_test


def test_null_takes_out_a_mapping_of_the_study_below(tmp_path):
    write(tmp_path, MINIMAL + "interventions: {max_steps: 3}\n")
    text = "extends: tiny.yaml\nexplainers: {default: null, b: {kind: top_tokens}}\n"
    child = load_study(write(tmp_path, text + "interventions: null\n", "child.yaml"))
    assert list(child.explainers) == ["b"]
    assert child.interventions == type(child.interventions)()
    strange = write(tmp_path, "extends: tiny.yaml\nexplainers: {c: null}\n", "child.yaml")
    with pytest.raises(StudyError, match=r"child.yaml:2: explainers.c: .*got None"):
        load_study(strange)


def test_a_mistake_in_an_extended_file_is_placed_there(tmp_path):
    write(tmp_path, MINIMAL.replace("range_size", "rangesize"))
    with pytest.raises(StudyError, match=r"tiny.yaml:9: rangesize"):
        load_study(write(tmp_path, "extends: tiny.yaml\n", "child.yaml"))


def test_a_study_to_extend_that_is_missing_is_placed_where_it_is_named(tmp_path):
    with pytest.raises(StudyError, match=r"a.yaml:1: extends: no such study file .*b.yaml"):
        load_study(write(tmp_path, "extends: b.yaml\n", "a.yaml"))


@pytest.mark.parametrize("address", ["host/v1?key=canary", "me:canary@host/v1", "canary@host"])
def test_an_address_that_may_hold_a_key_is_refused_and_not_repeated(tmp_path, address):
    text = MINIMAL.replace("127.0.0.1:1/v1", address)
    with pytest.raises(StudyError, match=r"models\.explainer\.base_url") as caught:
        load_study(write(tmp_path, text))
    assert "canary" not in str(caught.value)


def test_a_missing_folder_of_studies_is_named(tmp_path):
    with pytest.raises(StudyError, match="no such folder of studies"):
        find_studies(tmp_path / "nowhere")


def test_an_alias_stands_for_the_address(tmp_path):
    here = MINIMAL.replace("model: m", "model: m, alias: ours")
    there = here.replace("127.0.0.1:1", "127.0.0.1:2")
    one = load_study(write(tmp_path, here)).models.identity()
    assert one == load_study(write(tmp_path, there)).models.identity()


def test_a_study_cannot_extend_itself(tmp_path):
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    with pytest.raises(StudyError, match="extends itself"):
        load_study(write(tmp_path, "extends: a.yaml\n", "b.yaml"))


def test_two_studies_of_one_name_are_refused(tmp_path):
    write(tmp_path, "name: same\n" + MINIMAL, "a.yaml")
    write(tmp_path, "name: same\n" + MINIMAL, "b.yaml")
    with pytest.raises(StudyError, match="two studies are named 'same'"):
        find_studies(tmp_path)


def test_how_fast_a_model_runs_is_no_part_of_its_identity(tmp_path):
    slow = load_study(write(tmp_path))
    text = MINIMAL.replace("model: m", "model: m, max_in_flight: 7, timeout_s: 3")
    fast = load_study(write(tmp_path, text))
    assert fast.models.explainer.max_in_flight == 7
    assert fast.models.identity() == slow.models.identity()


def test_inputs_of_a_cell_of_a_layer_and_of_the_study(tmp_path):
    study = load_study(write(tmp_path))
    layer = LayerKey("sae", "layers.1")
    cell = Cell(layer, LatentRange(40, 80))
    records, cache = STAGES["latent_records"], STAGES["activation_cache"]
    assert inputs_at(study, records, cell, cache) == [cell]
    assert inputs_at(study, records, cell, STAGES["sparse_coders"]) == [layer]
    assert inputs_at(study, records, cell, STAGES["token_dataset"]) == [WholeStudy()]
    assert [str(p) for p in inputs_at(study, STAGES["layer_metrics"], layer, records)] == [
        f"sae@layers.1/{block}" for block in study.ranges
    ]
    assert len(inputs_at(study, STAGES["study_metrics"], WholeStudy(), records)) == 6
    assert len(list(places_of(study, "cell"))) == 6


DISCOVER = MINIMAL.replace("[layers.0, layers.1]", "discover")


def test_a_study_that_discovers_has_the_layers_that_it_is_given(tmp_path):
    study = load_study(write(tmp_path, DISCOVER))
    assert (study.discovers, study.layer_keys, study.cells) == (True, (), ())
    layers = (LayerKey("sae", "layers.1"), LayerKey("sae", "b:layers.0"))
    found = study.with_found({layers[0]: "a/layers.1", layers[1]: "b/layers.0"})
    assert (found.layer_keys, study.layer_keys) == (layers, ())
    assert [found.address_of(layer) for layer in layers] == ["a/layers.1", "b/layers.0"]
    assert len(found.cells) == 2 * len(study.ranges)
    assert load_study(write(tmp_path)).address_of(layers[0]) == "layers.1"


def test_the_graph_of_a_study_that_discovers_does_not_change_with_its_layers(tmp_path):
    embedder = "  embedder: {source: e, query_prefix: ''}\ncorpus:"
    study = load_study(write(tmp_path, DISCOVER.replace("corpus:", embedder)))
    one = study.with_found({LayerKey("sae", "layers.1"): "layers.1"})
    whole = STAGES["study_metrics"]
    assert upstream_of(study, whole) == upstream_of(one, whole)
    assert STAGES["explanations"] in upstream_of(one, whole)


@pytest.mark.parametrize(
    ("found", "replacement", "message"),
    [
        ("max_num_latents: 100\n", "", r"tiny\.yaml: max_num_latents: missing.* It is: Width"),
        ("layers: discover", "layers: [discover, layers.1]", "discover stands alone"),
        ("{path: saes}", "{format: neurons}", "looks among the files of coders, and none has any"),
        ("range_size", "discovery: {nightly: {cron: '0 25 * * *'}}\nrange_size",
         r"tiny.yaml:9: discovery.nightly.cron: hour '25': wanted \* or numbers from 0 to 23"),
        ("range_size", "discovery: {nightly: {cron: '0 2 * *'}}\nrange_size", "five fields"),
        ("range_size", "discovery: {nightly: {cron: '0 2 * JAN *'}}\nrange_size", "month 'JAN'"),
        ("range_size", "discovery: {nightly: {timezone: Mars}}\nrange_size", "no such timezone"),
        ("range_size", "discovery: {nightly: {usd: 3}}\nrange_size",
         r"discovery\.nightly\.usd: models\.explainer has no price"),
    ],
)  # fmt: skip
def test_what_discovery_cannot_do_is_said(tmp_path, found, replacement, message):
    with pytest.raises(StudyError, match=message):
        load_study(write(tmp_path, DISCOVER.replace(found, replacement)))


def test_a_scorer_that_is_not_asked_for_is_no_stage_and_no_input(tmp_path):
    study = load_study(write(tmp_path))
    names = [stage.name for stage in stages_of(study)]
    assert "score_detection" in names
    assert "score_fuzzing" not in names
    inputs = [stage.name for stage in upstream_of(study, STAGES["latent_metrics"])]
    assert inputs == ["latent_records", "explanations", "score_detection"]


@pytest.mark.parametrize(
    ("explainers", "scorer", "asked"),
    [
        ("default: {kind: default}", "{}", None),
        ("{a: {kind: default}, b: {kind: output}, c: {kind: output}}", "{}", ("b", "c")),
        ("{a: {kind: default}, b: {kind: output}}", "{explainers: [a]}", ("a",)),
    ],
)
def test_intervention_is_asked_about_what_explains_outputs_unless_told_otherwise(
    tmp_path, explainers, scorer, asked
):
    explainers = explainers if explainers.startswith("{") else f"{{{explainers}}}"
    text = (
        MINIMAL.replace("explainers:\n  default: {kind: default}", f"explainers: {explainers}")
        .replace("detection: {}", f"detection: {{}}\n  intervention: {scorer}")
        .replace("corpus:", "  base_lm: {source: ./model}\ncorpus:")
    )
    study = load_study(write(tmp_path, text))
    assert study.scorer_config("intervention").explainers == asked
    assert study.scorer_config("detection").explainers is None


def test_the_demo_study_is_valid():
    study = load_study(Path(__file__).parents[2] / "studies" / "demo.yaml")
    assert len(study.cells) == 4


def test_a_study_that_moves_a_model_elsewhere_takes_nothing_of_where_it_was(tmp_path):
    write(tmp_path)  # its explainer is behind a base_url
    text = "extends: tiny.yaml\nmodels: {explainer: {source: somewhere, dtype: float32}}\n"
    moved = load_study(write(tmp_path, text, "moved.yaml")).models.explainer
    assert (moved.source, moved.dtype) == ("somewhere", "float32")
    text = "extends: moved.yaml\nmodels: {explainer: {source: elsewhere}}\n"
    same_kind = load_study(write(tmp_path, text, "again.yaml")).models.explainer
    assert (same_kind.source, same_kind.dtype) == ("elsewhere", "float32")


def test_a_study_that_takes_a_coder_from_elsewhere_takes_nothing_of_the_other(tmp_path):
    write(tmp_path, MINIMAL.replace("{path: saes}", "{path: saes, select: seed1}"))
    text = "extends: tiny.yaml\ncoders: {sae: {repo: me/saes, revision: v1}}\n"
    coder = load_study(write(tmp_path, text, "hub.yaml")).coders["sae"]
    assert (coder.path, coder.repo, coder.revision, coder.select) == (None, "me/saes", "v1", None)
    text = "extends: tiny.yaml\ncoders: {sae: {precision: bfloat16}}\n"
    coder = load_study(write(tmp_path, text, "fast.yaml")).coders["sae"]
    assert (coder.path, coder.select, coder.precision) == (tmp_path / "saes", "seed1", "bfloat16")


@pytest.mark.parametrize(
    ("coder", "message"),
    [
        ("{}", r"tiny\.yaml:6: .*wanted either path \(a folder or file\) or repo"),
        ("{path: a, repo: b/c}", "wanted either path"),
        ("{path: a, revision: main}", "only a repo has revisions"),
        ("{repo: just-a-name}", r"coders\.sae\.repo: String should match pattern"),
        ("{path: a, writes: layers.1}", "wanted reads, too"),
        ("{path: a, format: sealens}", r"tiny\.yaml:6: coders\.sae\.format: .*'saelens'"),
        ("{path: a, sellect: seed1}", "unknown key. Did you mean 'select'"),
    ],
)
def test_a_coder_s_mistake_is_named_with_its_place(tmp_path, coder, message):
    text = MINIMAL.replace("{path: saes}", coder)
    with pytest.raises(StudyError, match=message):
        load_study(write(tmp_path, text))


def test_layers_are_matched_where_there_are_two_and_an_embedder(tmp_path):
    with_embedder = MINIMAL.replace(
        "corpus:", "  embedder: {source: ./embedder, query_prefix: ''}\ncorpus:"
    )
    one_layer = with_embedder.replace("[layers.0, layers.1]", "[layers.0]")
    wanted = {"sparse_coders", "activation_cache", "explanations"}
    for text, matches in ((MINIMAL, False), (with_embedder, True), (one_layer, False)):
        study = load_study(write(tmp_path, text))
        upstream = {stage.name for stage in upstream_of(study, STAGES["study_metrics"])}
        assert study.matches_layers is matches
        assert (wanted <= upstream) is matches


def test_scorers_that_stop_when_sure_are_known_to_the_layers_metrics(tmp_path):
    fixed = load_study(write(tmp_path))
    adaptive = load_study(write(tmp_path, MINIMAL + "scoring: {target_halfwidth: 0.18}\n"))
    assert (fixed.adaptive_scorers, adaptive.adaptive_scorers) == ((), ("detection",))
    one, other = (parameters_of(study, "layer_metrics") for study in (fixed, adaptive))
    assert one != other


def refused(tmp_path, more: str) -> str:
    with pytest.raises(StudyError) as error:
        load_study(write(tmp_path, MINIMAL.replace("scorers:\n  detection: {}\n", "") + more))
    return str(error.value)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ("n_test: 65536, max_windows: 100000", "n_test"),
        ("n_negative_test: 65536", "n_negative_test"),
        ("negative_kinds: [random, same_token], n_negative_train: 1", "n_negative_train: 1 for 2"),
        ("negative_kinds: [random, same_token], n_negative_test: 1", "at least 2."),
        ("n_test: 941, max_windows: 1000", "n_train + n_select + n_test = 1001"),
    ],
)
def test_windows_that_could_not_be_drawn_or_numbered_are_refused(tmp_path, sampling, message):
    assert message in refused(tmp_path, f"sampling: {{{sampling}}}\n")


def test_no_negatives_are_fine_with_any_number_of_kinds(tmp_path):
    sampling = (
        "sampling: {negative_kinds: [random, same_token], n_negative_train: 0, n_test: 940}\n"
    )
    assert load_study(write(tmp_path, MINIMAL + sampling)).sampling.n_negative_train == 0


def test_marks_cannot_be_exchanged_between_centred_windows(tmp_path):
    fuzzing = "scorers: {fuzzing: {variants: [active]}}\n"
    message = refused(tmp_path, fuzzing + "sampling: {window_mode: centred}\n")
    assert "scorers.fuzzing.variants" in message
    assert "sampling.window_mode" in message
    load_study(write(tmp_path, MINIMAL + "sampling: {window_mode: centred}\n"))


def differ(tmp_path, stage: str, one: str, other: str) -> bool:
    a, b = (parameters_of(load_study(write(tmp_path, MINIMAL + t)), stage) for t in (one, other))
    return a != b


@pytest.mark.parametrize(
    ("stage", "one", "other", "expected"),
    [
        ("latent_metrics", "sampling: {n_quantiles: 5}", "", True),
        ("latent_metrics", "sampling: {silent_scope: context}", "", True),
        ("window_embeddings", "sampling: {seed: 1}", "", False),
        (
            "window_embeddings",
            "window_embeddings: {max_windows: 9}\nsampling: {seed: 1}",
            "window_embeddings: {max_windows: 9}",
            True,
        ),
        (
            "neighbours",
            "neighbours: {measures: [decoder], max_tokens: 9}",
            "neighbours: {measures: [decoder]}",
            False,
        ),
        ("neighbours", "neighbours: {max_tokens: 9}", "neighbours: {}", True),
    ],
)
def test_the_parameters_of_a_stage_are_those_that_can_change_it(
    tmp_path, stage, one, other, expected
):
    assert differ(tmp_path, stage, one, other) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sampling: {negative_kinds: [near]}", r"sampling.negative_kinds.0: .*'random'.*'near'"),
        ("neighbours: {measures: [near]}", r"neighbours.measures.0: .*'cofiring'.*'near'"),
        ("neighbours: {measures: []}", r"neighbours.measures: .*at least 1 item"),
        ("neighbours: {measures: [decoder, decoder]}", r"measures: .*names a measure twice"),
    ],
)
def test_a_kind_or_measure_that_does_not_fit_is_one_mistake(tmp_path, text, message):
    with pytest.raises(StudyError, match=message) as caught:
        load_study(write(tmp_path, MINIMAL + text))
    assert len(str(caught.value).splitlines()) == 1


def test_a_study_may_leave_out_the_logit_lens(tmp_path):
    whole = load_study(write(tmp_path))
    without = load_study(write(tmp_path, MINIMAL + "logit_lens: false"))
    assert parameters_of(whole, "activation_cache")["logit_lens"] is not None
    assert parameters_of(without, "activation_cache") == {"logit_lens": None}


def test_promoted_tokens_that_are_not_known_cannot_be_shown(tmp_path):
    text = MINIMAL.replace("kind: default", "kind: default, show_promoted: true")
    assert load_study(write(tmp_path, text)).explainers["default"].show_promoted
    with pytest.raises(StudyError, match=r"default.show_promoted: with logit_lens: false"):
        load_study(write(tmp_path, text + "logit_lens: false"))
