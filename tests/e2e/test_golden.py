"""What each stage made of the planted study, pinned: outputs change only together with a version.

``golden.json`` holds, per stage, the versions behind it and a hash of its tables over all places.
The hashes leave out ``call_id``, which names the endpoint, and round floats to six significant
digits, so they are the same on every machine and for every port of the fake model. After a change
that is meant, raise the version and write the file anew:

    AUTOINTERP_UPDATE_GOLDEN=1 python -m pytest tests/e2e/test_golden.py
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from bench import Bench

from autointerp_dagster.adapters.hashing import combined_hash, table_hash, tensors_hash
from autointerp_dagster.adapters.manifests import Blob, Manifest
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.study.stages import stages_of, upstream_of

GOLDEN = Path(__file__).with_name("golden.json")
UPDATE = "AUTOINTERP_UPDATE_GOLDEN"
HOW_TO_UPDATE = f"write the file anew: `{UPDATE}=1 python -m pytest tests/e2e/test_golden.py`"
DIGITS = 6
NOISE = 12
"""Decimals below which a float is nothing but rounding, e.g. 1e-17 for a difference of 0."""


class Output(NamedTuple):
    """What one stage made."""

    version: str
    """Of the stage and of the prompts, scorers and explainers it uses."""
    hash: str
    upstream: tuple[str, ...]


def outputs_of(bench: Bench) -> dict[str, Output]:
    study, store = bench.study, bench.store
    heads = bench.heads()
    outputs = {}
    for stage in stages_of(study):
        mine = {place: head for (asset, place), head in heads.items() if asset == stage.name}
        if mine:
            upstream = tuple(source.name for source in upstream_of(study, stage))
            hashes = [found for name in mine for found in hashes_at(store, name, mine[name])]
            version = version_of(next(iter(mine.values())))
            outputs[stage.name] = Output(version, combined_hash(hashes), upstream)
    return outputs


def hashes_at(store: Store, place: str, head: Manifest) -> list[tuple[str, str]]:
    blobs = [(f"{place} {blob.name}", portable_hash(store, blob)) for blob in head.blobs]
    return [(place, head.status), *blobs]


def version_of(head: Manifest) -> str:
    """The stage's version, and those that its parameters name."""
    versions = {"stage": head.stage_version}
    if "scorer" in head.parameters:
        versions["scorer"] = head.parameters["scorer"]
    if head.stage == "explanations":
        for name, parameters in head.parameters["explainers"].items():
            versions[name] = parameters["version"]
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def portable_hash(store: Store, blob: Blob) -> str:
    if blob.path.endswith(".safetensors"):
        return tensors_hash(store.tensors(blob))
    return table_hash(portable(store.table(blob)))


def portable(frame: pl.DataFrame) -> pl.DataFrame:
    """The table without what a machine or an endpoint decides."""
    floats, lists = pl.selectors.float(), pl.selectors.by_dtype(pl.List(pl.Float32))
    lists = lists | pl.selectors.by_dtype(pl.List(pl.Float64))
    return frame.drop("call_id", strict=False).with_columns(
        rounded(floats), lists.list.eval(rounded(pl.element()))
    )


def rounded(values: pl.Expr) -> pl.Expr:
    values = values.round(NOISE).round_sig_figs(DIGITS)
    # -0.0 becomes 0.0; null stays null.
    return pl.when(values != 0).then(values).when(values == 0).then(0.0)


def complaints(golden: Mapping[str, Output], found: Mapping[str, Output]) -> list[str]:
    """One line per stage that is not as pinned.

    A stage below another whose output changed is only asked to be written anew: its inputs differ.
    """
    moved = {name for name in found if name not in golden or golden[name].hash != found[name].hash}
    lines = []
    for name, now in found.items():
        before = golden.get(name)
        if before is None or before.version != now.version:
            was = "was not there" if before is None else f"was {before.version!r}"
            lines.append(f"{name}: its version is {now.version!r}, it {was}; {HOW_TO_UPDATE}.")
        elif name in moved and not moved & set(now.upstream):
            lines.append(
                f"{name}: the output changed, the version {now.version!r} did not. If this is "
                "meant, raise the stage's version in autointerp_dagster/study/stages.py (or that "
                f"of the prompt, scorer or explainer) and {HOW_TO_UPDATE}."
            )
        elif name in moved:
            lines.append(f"{name}: changed with its inputs; {HOW_TO_UPDATE}.")
    gone = [f"{name}: is gone; {HOW_TO_UPDATE}." for name in golden if name not in found]
    return lines + gone


def read(file: Path) -> dict[str, Output]:
    content = json.loads(file.read_text())
    return {name: Output(*values, upstream=()) for name, values in content.items()}


def write(file: Path, outputs: Mapping[str, Output]) -> None:
    content = {name: [output.version, output.hash] for name, output in outputs.items()}
    file.write_text(json.dumps(content, indent=1) + "\n")


def test_no_stage_changes_its_output_without_a_new_version(whole: Bench) -> None:
    found = outputs_of(whole)
    if os.environ.get(UPDATE):
        write(GOLDEN, found)
    assert complaints(read(GOLDEN), found) == []


def test_the_same_study_elsewhere_has_the_same_hashes(whole: Bench) -> None:
    """Identities of another endpoint change ``call_id`` and nothing else that is hashed."""
    verdicts = whole.table("score_detection", "verdicts")
    elsewhere = verdicts.with_columns(call_id=pl.lit("another"))
    assert verdicts["call_id"].null_count() < verdicts.height
    assert table_hash(portable(elsewhere)) == table_hash(portable(verdicts))


def test_last_bits_do_not_count_and_values_do() -> None:
    frame = pl.DataFrame({"value": [0.1 + 0.2, 0.0, None], "list": [[1 / 3], None, []]})
    other = frame.with_columns(
        value=pl.Series([0.3, -1e-17, None]), list=pl.Series([[np.nextafter(1 / 3, 1)], None, []])
    )
    changed = frame.with_columns(value=pl.Series([0.30001, 0.0, None]))
    assert table_hash(portable(frame)) == table_hash(portable(other))
    assert table_hash(portable(frame)) != table_hash(portable(changed))


PINNED = {
    "latent_records": Output("1", "a", ("activation_cache",)),
    "explanations": Output("1", "b", ("latent_records",)),
}


def test_a_changed_output_under_an_old_version_asks_for_a_new_one() -> None:
    found = {**PINNED, "explanations": Output("1", "c", ("latent_records",))}
    (line,) = complaints(PINNED, found)
    assert line.startswith("explanations: the output changed, the version '1' did not.")
    assert "study/stages.py" in line
    assert f"{UPDATE}=1" in line


def test_a_stage_whose_input_changed_is_not_blamed() -> None:
    found = {name: replace_hash(output) for name, output in PINNED.items()}
    blamed, follower = complaints(PINNED, found)
    assert blamed.startswith("latent_records: the output changed")
    assert follower.startswith("explanations: changed with its inputs")


def test_a_new_version_asks_for_a_new_file() -> None:
    found = {**PINNED, "explanations": Output("2", "c", ("latent_records",))}
    (line,) = complaints(PINNED, found)
    assert line.startswith("explanations: its version is '2', it was '1'")
    assert UPDATE in line


def replace_hash(output: Output) -> Output:
    return output._replace(hash=f"{output.hash}'")
