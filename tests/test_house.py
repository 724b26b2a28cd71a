"""The rules of the house: which way imports run, how long things get, what the graph looks like."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
import yaml

from autointerp_dagster.core.config import Parameters
from autointerp_dagster.definitions import BUILDERS, build_definitions, defs
from autointerp_dagster.study import Study, load_study
from autointerp_dagster.study.stages import STAGES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "autointerp_dagster"
MODULES = sorted(PACKAGE.rglob("*.py"))

MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 50
"""Without the docstring."""
MAX_ASSET_LINES = 30

SELF_EXPLANATORY = {
    # Keys of a study whose value is a documented model of its own.
    "models", "corpus", "tokens", "sampling", "scorers", "floors", "metrics", "budget", "subject",
    "explainer", "detection", "fuzzing", "surprisal", "embedding", "simulation", "intruder",
    "example_embedding", "intervention",
    # Tags, and what is documented beside a sister field.
    "kind", "format", "n_negative_train", "n_negative_select", "train_share",
    "revision", "dtype", "device", "threads", "batch_size",
    # Well-known names.
    "seed", "temperature", "max_tokens", "n_tokens",
}  # fmt: skip
"""Parameters that need no sentence. Do not add to it: write the sentence."""


def functions_of(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement after the docstring to the end."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def signature_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return function.body[0].lineno - function.lineno


def parameter_models(model: type[Parameters] = Parameters) -> Iterator[type[Parameters]]:
    for child in model.__subclasses__():
        if child.__module__.startswith("autointerp_dagster."):
            yield child
        yield from parameter_models(child)


@pytest.fixture(scope="module")
def demo() -> Study:
    return load_study(ROOT / "studies" / "demo.yaml")


def test_imports_run_one_way() -> None:
    # In a process of its own: import-linter switches off every logger that there is.
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_no_module_is_too_long() -> None:
    lengths = {f.relative_to(ROOT): len(f.read_text().splitlines()) for f in MODULES}
    assert {f: n for f, n in lengths.items() if n > MAX_MODULE_LINES} == {}


def test_no_function_is_too_long() -> None:
    too_long = {
        f"{file.relative_to(ROOT)}:{function.lineno} {function.name}"
        for file in MODULES
        for function in functions_of(file)
        if signature_lines(function) + body_lines(function) > MAX_FUNCTION_LINES
    }
    assert too_long == set()


def test_every_stage_has_a_thin_module_of_its_own_name() -> None:
    files = {file.stem: file for file in (PACKAGE / "assets").glob("*.py") if file.stem[0] != "_"}
    assert files.keys() == STAGES.keys() == BUILDERS.keys()
    for name, file in files.items():
        functions = list(functions_of(file))
        assert BUILDERS[name].__name__ in [function.name for function in functions]
        for function in functions:
            if function.name == name or len(functions) == 1:
                assert body_lines(function) <= MAX_ASSET_LINES, name


def test_nothing_is_printed() -> None:
    """Commands write to a rich console, everything else to the log."""
    printing = {
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in MODULES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    }
    assert printing == set()


def test_what_is_left_to_do_has_an_issue_number() -> None:
    loose = {
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in MODULES
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(r"\b(TODO|FIXME|XXX)\b(?!.*#\d+)", line)
    }
    assert loose == set()


def test_every_parameter_says_what_it_means() -> None:
    silent = {
        f"{model.__name__}.{name}"
        for model in parameter_models()
        for name, field in model.model_fields.items()
        if field.description is None and name not in SELF_EXPLANATORY
    }
    assert silent == set()


def test_every_parameter_model_says_what_it_is() -> None:
    models = list(parameter_models())
    assert Study in models
    assert [model.__name__ for model in models if not model.__dict__.get("__doc__")] == []


def test_a_folder_without_studies_gives_definitions_without_assets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOINTERP_STUDIES", str(tmp_path))
    empty = defs()
    dg.Definitions.validate_loadable(empty)
    assert empty.resolve_asset_graph().get_all_asset_keys() == set()


def test_the_studies_that_come_along_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOINTERP_STUDIES", str(ROOT / "studies"))
    loaded = defs()
    dg.Definitions.validate_loadable(loaded)
    keys = loaded.resolve_asset_graph().get_all_asset_keys()
    assert {key.path[1] for key in keys if key.path[0] == "demo"} == (
        STAGES.keys() - {"window_embeddings"}  # ten minutes of embedding are too much for a demo
    )


GRAPH = """
activation_cache        cell   parquet,pytorch gpu  sparse_coders subject_model token_dataset
corpus                  study  -               -
explanations            cell   openai,parquet  llm  activation_cache interventions latent_records sparse_coders token_dataset
interventions           cell   parquet,pytorch gpu  activation_cache latent_records sparse_coders subject_model token_dataset
latent_metrics          cell   parquet,polars  -    explanations latent_records score_detection score_embedding score_example_embedding score_fuzzing score_intervention score_intruder score_simulation score_surprisal
latent_records          cell   parquet,polars  -    activation_cache neighbours token_dataset
layer_metrics           layer  parquet,polars  -    latent_metrics latent_records
neighbours              cell   parquet,polars  -    activation_cache token_dataset
score_detection         cell   openai,parquet  llm  explanations latent_records token_dataset
score_embedding         cell   parquet,pytorch gpu  explanations latent_records token_dataset
score_example_embedding cell   parquet,pytorch gpu  activation_cache latent_records token_dataset
score_fuzzing           cell   openai,parquet  llm  explanations latent_records token_dataset
score_intervention      cell   openai,parquet  llm  explanations interventions
score_intruder          cell   openai,parquet  llm  activation_cache latent_records token_dataset
score_simulation        cell   openai,parquet  llm  explanations latent_records token_dataset
score_surprisal         cell   openai,parquet  llm  explanations latent_records token_dataset
sparse_coders           layer  pytorch         -
study_metrics           study  parquet,polars  -    activation_cache explanations latent_metrics layer_metrics sparse_coders
subject_model           study  huggingface     -
token_dataset           study  parquet         -    corpus subject_model
"""  # noqa: E501
"""Asset, partitions, kinds, pool, inputs."""


def test_the_graph_of_the_demo_study_is_the_one_drawn(demo: Study) -> None:
    graph = build_definitions([demo]).resolve_asset_graph()
    scopes = {0: "study", 1: "layer", 2: "cell"}
    rows = []
    for key in sorted(graph.get_all_asset_keys()):
        node = graph.get(key)
        assert node.group_name == demo.name
        assert key.path[0] == demo.name
        inputs = sorted(parent.path[1] for parent in node.parent_keys)
        kinds, pools = ",".join(sorted(node.kinds)), ",".join(sorted(node.pools or ()))
        row = [key.path[1], scopes[n_dimensions(node.partitions_def)], kinds or "-", pools or "-"]
        rows.append(" ".join([*row, *inputs]))
    assert rows == [" ".join(line.split()) for line in GRAPH.strip().splitlines()]


def n_dimensions(partitions: dg.PartitionsDefinition | None) -> int:
    if partitions is None:
        return 0
    return len(getattr(partitions, "partitions_defs", [partitions]))


def test_the_partitions_of_the_demo_study_are_its_layers_and_ranges(demo: Study) -> None:
    graph = build_definitions([demo]).resolve_asset_graph()
    layers = graph.get(dg.AssetKey(["demo", "layer_metrics"])).partitions_def
    cells = graph.get(dg.AssetKey(["demo", "latent_metrics"])).partitions_def
    assert layers is not None
    assert layers.get_partition_keys() == ["sae@layers.9", "sae@layers.14"]
    assert isinstance(cells, dg.MultiPartitionsDefinition)
    assert [dimension.name for dimension in cells.partitions_defs] == ["layer", "range"]
    assert cells.get_partition_keys() == [
        f"{layer}|{block}"
        for layer in ("sae@layers.9", "sae@layers.14")
        for block in ("0000000-0002047", "0002048-0004095")
    ]


def test_only_cheap_stages_run_by_themselves(demo: Study) -> None:
    graph = build_definitions([demo]).resolve_asset_graph()
    follow = {
        key.path[1] for key in graph.get_all_asset_keys() if graph.get(key).automation_condition
    }
    assert follow == {"layer_metrics", "study_metrics"}


def test_every_pool_has_a_limit_in_the_settings_that_come_along() -> None:
    settings = yaml.safe_load((ROOT / "dagster_home" / "dagster.yaml").read_text())
    assert {stage.pool for stage in STAGES.values()} == {None, "gpu", "llm"}
    assert settings["concurrency"]["pools"]["default_limit"] >= 1
    assert settings["telemetry"]["enabled"] is False
