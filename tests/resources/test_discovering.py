"""A look for coders: what becomes a layer, what waits, what is refused and said once."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from autointerp_dagster.adapters.coder_files import open_coder
from autointerp_dagster.adapters.found_layers import FoundLayers
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.adapters.study_layers import with_found_layers
from autointerp_dagster.resources.coders import Coders
from autointerp_dagster.resources.discovering import Findings, look_for_coders
from autointerp_dagster.study import Study


@dataclass
class Place:
    """A folder of coders that a study watches; ``apart`` holds sound ones to be dropped there."""

    folder: Path
    apart: Path
    model: Path
    settle_s: float = 0.0
    others: dict[str, dict[str, object]] | None = None
    """Further coders of the study."""
    changes: dict[str, object] | None = None
    """Of the study."""
    source: dict[str, object] | None = None
    """Where the coder ``sae`` is, instead of the folder."""

    @property
    def study(self) -> Study:
        source = self.source or {"path": self.folder / "coders"}
        return Study.model_validate(
            {
                "name": "watching",
                "models": {
                    "subject": {"source": str(self.model), "dtype": "float32", "device": "cpu"},
                    "explainer": {"base_url": "http://127.0.0.1:1/v1", "model": "m"},
                },
                "corpus": {"kind": "embedded"},
                "coders": {"sae": source, **(self.others or {})},
                "layers": "discover",
                "discovery": {"settle_s": self.settle_s},
                "max_num_latents": 64,
                "range_size": 32,
                "explainers": {"top_tokens": {"kind": "top_tokens"}},
                "floors": {"donor_block": 32},
                **(self.changes or {}),
            }
        )

    @property
    def store(self) -> Store:
        return Store(self.folder / "store")

    def drop(self, hookpoint: str, place: str | None = None) -> Path:
        """Copies a sound coder to where the study looks."""
        target = self.folder / "coders" / (place or hookpoint)
        return Path(shutil.copytree(self.apart / hookpoint, target))

    def look(self, seconds: float = 60.0) -> Findings:
        return look_for_coders(self.study, self.store, seconds)

    def layers(self) -> list[str]:
        """Those that every command sees."""
        study = with_found_layers(self.study, FoundLayers(self.store, "watching"))
        return [str(layer) for layer in study.layer_keys]


@pytest.fixture
def place(tmp_path: Path, tiny_sparsify_dir: Path, tiny_subject_model_dir: Path) -> Place:
    return Place(tmp_path, tiny_sparsify_dir, tiny_subject_model_dir)


def change(folder: Path, **tensors: torch.Tensor) -> None:
    file = folder / "sae.safetensors"
    save_file({**load_file(file), **tensors}, file)


def test_a_sound_coder_becomes_a_layer_once(place: Place) -> None:
    place.drop("layers.0")
    found = place.look()
    assert [one.layer for one in found.new] == ["sae@layers.0"] == place.layers()
    loaded = open_coder(place.study.coders["sae"], "layers.0")
    assert (found.new[0].identity, found.new[0].num_latents) == (loaded.identity, 64)
    again = place.look()
    assert (again.new, again.changed, again.waiting, again.broken) == ([], [], {}, {})
    assert list(map(str, again.layers)) == ["sae@layers.0"]


def test_layers_keep_the_order_in_which_they_came(place: Place) -> None:
    place.drop("layers.1")
    place.look()
    place.drop("layers.0")
    place.look()
    assert place.layers() == ["sae@layers.1", "sae@layers.0"]


def test_nothing_to_look_at_yet_is_waited_for(place: Place) -> None:
    assert "no such folder" in place.look().waiting["sae"]
    (place.folder / "coders").mkdir()
    assert "no coder here" in place.look().waiting["sae"]


def test_files_that_were_just_written_are_left_alone(place: Place) -> None:
    place.settle_s = 3600.0
    place.drop("layers.0")
    found = place.look()
    assert "was written to in the last 3600 s" in found.waiting["sae@layers.0"]
    assert found.layers == {}
    place.settle_s = 0.0
    assert len(place.look().new) == 1


@pytest.mark.parametrize("missing", ["cfg.json", "sae.safetensors"])
def test_half_a_coder_waits_for_the_other_half(place: Place, missing: str) -> None:
    folder = place.drop("layers.0")
    (folder / missing).unlink()
    place.drop("layers.1")
    found = place.look()
    assert found.waiting == {
        "sae@layers.0": f"{place.folder}/coders/layers.0/{missing} is not there yet"
    }
    assert place.layers() == ["sae@layers.1"]
    shutil.copy(place.apart / "layers.0" / missing, folder)
    assert [one.layer for one in place.look().new] == ["sae@layers.0"]


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_file_of_tensors_that_ends_too_early_waits(place: Place, kept: int) -> None:
    folder = place.drop("layers.0")
    file = folder / "sae.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:kept])
    assert "is cut off" in place.look().waiting["sae@layers.0"]
    file.write_bytes(whole)
    assert len(place.look().new) == 1


def test_an_archive_of_arrays_that_ends_too_early_waits(place: Place) -> None:
    folder = place.folder / "coders" / "layer_0" / "width_64" / "average_l0_4"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    arrays = {
        "W_enc": generator.normal(size=(16, 64)),
        "W_dec": generator.normal(size=(64, 16)),
        "b_enc": np.zeros(64),
        "b_dec": np.zeros(16),
        "threshold": np.ones(64),
    }
    file = folder / "params.npz"
    np.savez(file, **{name: array.astype(np.float32) for name, array in arrays.items()})
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    place.source = {"path": place.folder / "coders", "reads": "layers.{layer}"}
    assert list(place.look().waiting) == ["sae@layer_0/width_64/average_l0_4"]
    file.write_bytes(whole)
    assert [one.layer for one in place.look().new] == ["sae@layers.0"]


def test_an_index_waits_for_the_files_that_it_names(place: Place) -> None:
    folder = place.drop("layers.0")
    index = {"weight_map": {"encoder.weight": "sae-00002.safetensors", "b": "sae.safetensors"}}
    (folder / "sae.safetensors.index.json").write_text(json.dumps(index))
    assert "sae-00002.safetensors, which" in place.look().waiting["sae@layers.0"]
    shutil.copy(folder / "sae.safetensors", folder / "sae-00002.safetensors")
    assert len(place.look().new) == 1


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("nan", r"has 1 values that are not finite"),
        ("width", r"d_in is 8, the vectors of .* have width 16"),
        ("latents", r"has 64 latents, the study's ranges cover 32"),
        ("settings", r"cfg\.json: no JSON"),
        ("place", r"no module 'layers\.7'"),
        ("name", r"cannot be a layer's name"),
        ("listed", r"latents: 70 is not a latent of"),
    ],
)
def test_a_broken_coder_is_said_once_and_blocks_no_other(
    place: Place, case: str, reason: str
) -> None:
    folder = place.drop("layers.0", "layers.7" if case == "place" else None)
    match case:
        case "nan":
            bias = torch.zeros(64)
            bias[3] = torch.nan
            change(folder, **{"encoder.bias": bias})
        case "width":
            change(folder, **{
                "encoder.weight": torch.zeros(64, 8), "W_dec": torch.zeros(64, 8),
                "b_dec": torch.zeros(8),
            })  # fmt: skip
            config = json.loads((folder / "cfg.json").read_text())
            (folder / "cfg.json").write_text(json.dumps(config | {"d_in": 8}))
        case "latents":
            place.changes = {"max_num_latents": 32}
        case "settings":
            (folder / "cfg.json").write_text("{")
        case "name":
            folder.rename(folder.with_name("a b,c"))
        case "listed":
            place.changes = {"latents": [1, 70]}
    found = place.look()
    ((name, said),) = found.newly_broken.items()
    assert name.startswith("sae@")
    assert found.broken == {name: said}
    assert re.search(reason, said)
    again = place.look()
    assert (again.newly_broken, again.broken) == ({}, {name: said})
    if case in ("nan", "width", "settings", "place"):
        place.drop("layers.1")
        assert [one.layer for one in place.look().new] == ["sae@layers.1"]


def test_a_study_that_changes_has_its_broken_coders_checked_again(place: Place) -> None:
    place.drop("layers.0")
    place.changes = {"max_num_latents": 32}
    assert len(place.look().newly_broken) == 1
    place.changes = {"max_num_latents": 128}
    assert len(place.look().new) == 1


def test_a_broken_coder_that_is_mended_is_taken_and_one_that_is_gone_is_forgotten(
    place: Place,
) -> None:
    folder = place.drop("layers.0")
    sound = load_file(folder / "sae.safetensors")
    change(folder, **{"encoder.bias": torch.full((64,), torch.inf)})
    assert len(place.look().newly_broken) == 1
    change(folder, **sound)
    found = place.look()
    assert ([one.layer for one in found.new], found.broken) == (["sae@layers.0"], {})
    change(place.drop("layers.1"), **{"encoder.bias": torch.full((64,), torch.nan)})
    assert len(place.look().newly_broken) == 1
    shutil.rmtree(place.folder / "coders" / "layers.1")
    assert place.look().broken == {}
    assert FoundLayers(place.store, "watching").refused() == []


def test_another_coder_at_the_same_place_is_a_new_version_of_the_layer(place: Place) -> None:
    folder = place.drop("layers.0")
    first = place.look().new[0]
    change(folder, b_dec=torch.ones(16))
    found = place.look()
    assert [one.layer for one in found.changed] == ["sae@layers.0"]
    assert (found.new, found.changed[0].found) == ([], first.found)
    assert found.changed[0].identity != first.identity
    (folder / "sae.safetensors").touch()
    again = place.look()
    assert again.changed == []
    (kept,) = again.layers.values()
    assert (kept.identity, kept.changed) == (found.changed[0].identity, found.changed[0].changed)


def test_a_layer_whose_files_are_spoilt_stays_with_its_reason(place: Place) -> None:
    folder = place.drop("layers.0")
    identity = place.look().new[0].identity
    change(folder, **{"encoder.bias": torch.full((64,), torch.nan)})
    found = place.look()
    assert list(found.newly_broken) == ["sae@layers.0"] == place.layers()
    assert [one.identity for one in found.layers.values()] == [identity]
    place.drop("layers.1")
    shutil.rmtree(folder)
    found = place.look()
    assert found.waiting == {"sae@layers.0": "its files are gone; its results stay"}
    assert place.layers() == ["sae@layers.0", "sae@layers.1"]


def test_coders_of_one_place_are_layers_named_after_their_folders(place: Place) -> None:
    place.drop("layers.0", "week_1/layers.0")
    assert [one.layer for one in place.look().new] == ["sae@layers.0"]
    second = place.drop("layers.0", "week_2/layers.0")
    change(second, b_dec=torch.ones(16))
    found = place.look()
    assert [one.layer for one in found.new] == ["sae@week_2:layers.0"]
    study = with_found_layers(place.study, FoundLayers(place.store, "watching"))
    coders = {str(layer): Coders().of(study, layer) for layer in study.layer_keys}
    assert {coder.reads for coder in coders.values()} == {"layers.0"}
    assert coders["sae@layers.0"].identity != coders["sae@week_2:layers.0"].identity
    assert [Coders().identity(study, one.key) for one in found.new] == [found.new[0].identity]


def test_coders_that_come_together_at_one_place_are_both_named_after_their_folders(
    place: Place,
) -> None:
    place.drop("layers.0", "layers.0/seed1")
    place.drop("layers.0", "layers.0/seed2")
    assert [one.layer for one in place.look().new] == ["sae@layers.0:seed1", "sae@layers.0:seed2"]


def test_baselines_come_with_the_coders_that_they_stand_beside(place: Place) -> None:
    place.others = {
        "neurons": {"format": "neurons", "k": 4},
        "pca": {"format": "pca", "k": 4},
        "random": {"format": "random", "like": "sae"},
        "odd": {"format": "random", "like": "neurons"},
    }
    place.drop("layers.0")
    place.drop("layers.1")
    place.look()
    beside = ["sae", "neurons", "pca", "random", "odd"]
    assert place.layers() == [f"{name}@layers.{i}" for i in (0, 1) for name in beside]


def test_a_look_that_has_no_time_left_goes_on_next_time(place: Place) -> None:
    place.drop("layers.0")
    found = place.look(seconds=-1.0)
    assert "the next look checks it" in found.waiting["sae@layers.0"]
    assert len(place.look().new) == 1


def test_a_subject_model_that_cannot_be_read_breaks_no_coder(place: Place, tmp_path: Path) -> None:
    place.drop("layers.0")
    place.model, whole = tmp_path / "nothing", place.model
    found = place.look()
    assert (list(found.waiting), found.broken) == (["subject model"], {})
    place.model = whole
    assert len(place.look().new) == 1


def test_a_hub_repository_is_asked_for_new_commits(place: Place, hub, tmp_path: Path) -> None:
    files = tmp_path / "files"
    place.source = {"repo": "me/saes"}
    assert "cannot be read" in place.look().waiting["sae"]
    shutil.copytree(place.apart / "layers.0", files / "layers.0")
    hub.add("me/saes", files)
    assert [one.layer for one in place.look().new] == ["sae@layers.0"]
    n_downloads = len(hub.downloads)
    assert place.look().new == []
    assert len(hub.downloads) == n_downloads

    shutil.copytree(place.apart / "layers.1", files / "layers.1")
    (files / "layers.1" / "sae.safetensors").unlink()
    hub.add("me/saes", files)
    found = place.look()
    assert (found.new, found.changed) == ([], [])
    assert "layers.1/sae.safetensors is not there yet" in found.waiting["sae@layers.1"]

    shutil.copy(place.apart / "layers.1" / "sae.safetensors", files / "layers.1")
    change(files / "layers.0", b_dec=torch.ones(16))
    hub.add("me/saes", files)
    found = place.look()
    assert [one.layer for one in found.new] == ["sae@layers.1"]
    assert [one.layer for one in found.changed] == ["sae@layers.0"]


def test_a_hub_that_fails_in_the_middle_breaks_no_coder(place: Place, hub, tmp_path: Path) -> None:
    place.source = {"repo": "me/saes"}
    files = tmp_path / "files"
    shutil.copytree(place.apart / "layers.0", files / "layers.0")
    hub.add("me/saes", files, gated=True)
    found = place.look()
    assert ("cannot be fetched" in found.waiting["sae@layers.0"], found.broken) == (True, {})
    hub.add("me/saes", files)
    assert len(place.look().new) == 1
