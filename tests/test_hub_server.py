"""The loopback hub answers the clients of the real one as the real one does."""

import os
import subprocess
import sys
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
from hub_server import HubServer
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoConfig, AutoModelForCausalLM


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "config.json").write_text('{"k": 1}')
    (folder / "deep" / "weights.safetensors").write_bytes(bytes(range(256)) * 10)
    (folder / "deep" / "er" / "ü b.txt").write_text("text")
    return folder


def test_a_snapshot_is_the_folder(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    commit = hub.add("me/sae", folder)
    found = Path(snapshot_download("me/sae"))
    assert found.is_relative_to(tmp_path / "hf_home")
    assert found.name == commit
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert all((found / path).read_bytes() == (folder / path).read_bytes() for path in paths)
    assert sorted(hub.downloads) == sorted(path.as_posix() for path in paths)


def test_a_second_download_asks_for_no_file(hub: HubServer, folder: Path) -> None:
    commit = hub.add("me/sae", folder)
    snapshot_download("me/sae", revision=commit)
    n_asked = len(hub.asked)
    snapshot_download("me/sae", revision=commit)
    assert len(hub.asked) == n_asked


def test_a_branch_moves_and_a_commit_stays(hub: HubServer, folder: Path) -> None:
    first = hub.add("me/texts", folder, kind="datasets")
    (folder / "config.json").write_text('{"k": 2}')
    second = hub.add("me/texts", folder, kind="datasets")
    assert first != second
    api = HfApi()
    assert api.dataset_info("me/texts").sha == second
    for revision, content in ((first, '{"k": 1}'), (second, '{"k": 2}'), ("main", '{"k": 2}')):
        path = hf_hub_download("me/texts", "config.json", repo_type="dataset", revision=revision)
        assert Path(path).read_text() == content


def test_a_revision_may_hold_slashes(hub: HubServer, folder: Path) -> None:
    commit = hub.add("me/texts", folder, kind="datasets", revision="refs/convert/parquet")
    assert HfApi().dataset_info("me/texts", revision="refs/convert/parquet").sha == commit


@pytest.mark.parametrize("page_len", [1, 2, 1000])
def test_a_listing_holds_every_file_with_size_and_hash(
    hub: HubServer, folder: Path, page_len: int
) -> None:
    hub.page_len = page_len
    hub.add("me/sae", folder)
    entries = {e.path: e for e in HfApi().list_repo_tree("me/sae", recursive=True)}
    assert set(entries) == {
        "config.json",
        "deep",
        "deep/er",
        "deep/er/ü b.txt",
        "deep/weights.safetensors",
    }
    # git hash-object config.json
    assert entries["config.json"].blob_id == "f265456f274bdf13c15fc0ead1d10327f512ba41"
    assert entries["deep/weights.safetensors"].lfs.size == 2560
    top = [e.path for e in HfApi().list_repo_tree("me/sae")]
    assert top == ["config.json", "deep"]
    assert [e.path for e in HfApi().list_repo_tree("me/sae", "deep/er")] == ["deep/er/ü b.txt"]


def test_the_file_system_reads_a_range_only(hub: HubServer, folder: Path) -> None:
    hub.add("me/sae", folder)
    before = hub.n_bytes
    with HfFileSystem().open("me/sae/deep/weights.safetensors", block_size=16) as file:
        file.seek(250)
        assert file.read(10) == bytes(range(250, 256)) + bytes(range(4))
    assert any(a.status == 206 and a.n_bytes < 100 for a in hub.asked)
    assert hub.n_bytes - before < 2560


def test_what_is_missing_is_the_hubs_own_error(hub: HubServer, folder: Path) -> None:
    hub.add("me/sae", folder)
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info("me/nothing")
    with pytest.raises(RepositoryNotFoundError):
        HfApi().dataset_info("me/sae")
    with pytest.raises(RevisionNotFoundError):
        HfApi().model_info("me/sae", revision="v2")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("me/sae", "nothing.json")


def test_a_gated_repository_opens_to_the_token(hub: HubServer, folder: Path) -> None:
    hub.add("me/sae", folder, gated=True)
    assert HfApi().model_info("me/sae").gated == "manual"
    with pytest.raises(GatedRepoError):
        hf_hub_download("me/sae", "config.json")
    with pytest.raises(GatedRepoError):
        hf_hub_download("me/sae", "config.json", token="hf_other")
    assert hf_hub_download("me/sae", "config.json", token=hub.token)
    assert hf_hub_download("me/sae", "deep/weights.safetensors", token=hub.token)
    assert hub.downloads == ["config.json", "deep/weights.safetensors"]
    assert {a.token for a in hub.asked if "/large/" in a.path} == {None}  # another host


def test_a_failing_hub_is_an_http_error(hub: HubServer, folder: Path) -> None:
    hub.add("me/sae", folder)
    hub.failing = 400
    with pytest.raises(HfHubHTTPError):
        HfApi().model_info("me/sae")


def test_transformers_loads_from_it(hub: HubServer, tiny_subject_model_dir: Path) -> None:
    commit = hub.add("me/tiny", tiny_subject_model_dir)
    model = AutoModelForCausalLM.from_pretrained("me/tiny", revision=commit)
    assert model.config.hidden_size == 16
    assert AutoConfig.from_pretrained("me/tiny").vocab_size == model.config.vocab_size


def test_a_process_started_by_the_test_uses_it(hub: HubServer, folder: Path) -> None:
    hub.add("me/sae", folder)
    code = "import huggingface_hub as h; print(h.hf_hub_download('me/sae', 'config.json'))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert hub.downloads == ["config.json"]


def test_without_the_fixture_the_endpoint_is_the_real_one() -> None:
    assert huggingface_hub.constants.ENDPOINT == "https://huggingface.co"


def test_a_range_beyond_the_end_is_refused(hub: HubServer, folder: Path) -> None:
    hub.add("me/sae", folder)
    url = f"{hub.url}/me/sae/resolve/main/config.json"
    assert httpx2.get(url, headers={"Range": "bytes=8-"}).status_code == 416
    assert httpx2.get(url, headers={"Range": "bytes=-3"}).text == " 1}"
