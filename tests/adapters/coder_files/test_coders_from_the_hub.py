"""Coders come from a repository as from a folder, and only the files in use are fetched."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from format_builders import arrays, write_npz
from hub_server import HubServer
from write_oracles import HERE

from autointerp_dagster import load_sparse_coder
from autointerp_dagster.adapters.coder_files import (
    coder_identity,
    discover_hookpoints,
    open_coder,
)
from autointerp_dagster.core.config import FileCoderConfig
from autointerp_dagster.core.errors import CoderError


def add_gemma_scope(hub: HubServer, folder: Path) -> str:
    for layer in (3, 4):
        for l0 in (22, 70):
            file = folder / f"layer_{layer}/width_16k/average_l0_{l0}/params.npz"
            write_npz(file, arrays(100 * layer + l0))
    (folder / "README.md").write_text("about")
    return hub.add("google/gemma-scope-2b-pt-res", folder)


def test_only_the_one_coder_s_files_are_fetched(hub: HubServer, tmp_path: Path) -> None:
    commit = add_gemma_scope(hub, tmp_path / "files")
    config = FileCoderConfig(repo="google/gemma-scope-2b-pt-res", l0=70)
    loaded = open_coder(config, "layers.4", lambda: "gemma2")
    assert hub.downloads == ["layer_4/width_16k/average_l0_70/params.npz"]
    assert (loaded.format, loaded.reads, loaded.expected_l0) == ("gemma_scope", "layers.4", 70)
    assert f"google/gemma-scope-2b-pt-res@{commit}" in loaded.about
    local = tmp_path / "gemma-scope-2b-pt-res"
    shutil.copytree(tmp_path / "files", local)
    here = open_coder(FileCoderConfig(path=local, l0=70), "layers.4", lambda: "gemma2")
    assert here.identity == loaded.identity
    asked = len(hub.asked)
    assert coder_identity(config, "layers.4", lambda: "gemma2") == loaded.identity
    assert len(hub.asked) == asked  # the listing is kept, the file cached
    assert discover_hookpoints(config) == ["layers.3", "layers.4"]
    assert len(hub.downloads) == 1


@pytest.mark.parametrize(
    ("case", "files"),
    [
        ("sparsify/seed", ["layers.3/seed1/cfg.json", "layers.3/seed1/sae.safetensors"]),
        ("saelens/batchtopk", ["cfg.json", "sae_weights.safetensors"]),
        ("dictionary_learning/GatedAutoEncoder", ["config.json", "ae.pt"]),
    ],
)
def test_a_repository_gives_what_its_folder_gives(
    hub: HubServer, tmp_path: Path, case: str, files: list[str]
) -> None:
    folder = tmp_path / "files"
    shutil.copytree(HERE / case, folder)
    (folder / "optimizer_0.pt").write_bytes(b"not for us")
    hub.add("me/coder", folder, revision=case.split("/")[0])
    coder = load_sparse_coder("me/coder", revision=case.split("/")[0])
    x = torch.randn(6, coder.d_in, generator=torch.Generator().manual_seed(0))
    assert torch.equal(coder.encode_dense(x), load_sparse_coder(folder).encode_dense(x))
    assert hub.downloads == files


def test_a_revision_pins_the_files(hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "gemma"
    first = add_gemma_scope(hub, folder)
    identity = {}
    for revision, seed in ((first, None), ("main", 9)):
        if seed is not None:
            write_npz(folder / "layer_3/width_16k/average_l0_70/params.npz", arrays(seed))
            hub.add("google/gemma-scope-2b-pt-res", folder)
        repo = "google/gemma-scope-2b-pt-res"
        config = FileCoderConfig(repo=repo, revision=revision, select="average_l0_70")
        identity[revision] = coder_identity(config, "layers.3")
    assert identity[first] != identity["main"]
    with pytest.raises(CoderError, match=r"revision v9.*RevisionNotFound"):
        open_coder(FileCoderConfig(repo=repo, revision="v9"), "layers.3")


def test_without_the_hub_its_cache_is_used(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(HERE / "saelens" / "standard", tmp_path / "files" / "blocks.3.hook_resid_post")
    hub.add("me/sae", tmp_path / "files")
    huggingface_hub.snapshot_download("me/sae")
    asked = len(hub.asked)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    coder = load_sparse_coder("me/sae", "blocks.3.hook_resid_post")
    assert coder.num_latents == 24
    assert len(hub.asked) == asked
    with pytest.raises(CoderError, match=r"me/other .*cannot be read.*cache does not hold it"):
        load_sparse_coder("me/other")


def test_a_hub_that_fails_is_an_error_that_says_so(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(CoderError, match=r"nobody/nothing .*(RepositoryNotFound|401)"):
        load_sparse_coder("nobody/nothing")
    shutil.copytree(HERE / "saelens" / "standard", tmp_path / "files")
    hub.add("me/gated", tmp_path / "files", gated=True)
    with pytest.raises(CoderError, match=r"cfg\.json: cannot be fetched \(GatedRepo.*log in for a"):
        load_sparse_coder("me/gated")
