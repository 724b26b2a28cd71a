"""A small Hugging Face Hub on loopback, over folders of the test's own.

It speaks what ``huggingface_hub`` (and with it ``transformers``) asks: what a model or dataset
repository holds at a revision, a file's metadata by HEAD, files whole or by ranges, and the hub's
error headers. As on the real hub, large files redirect to another host.

Use the fixture :func:`hub`: it serves for one test with an empty cache in ``tmp_path``, and points
both this process and the processes it starts there.

    def test_weights_come_from_the_hub(hub, tmp_path):
        (tmp_path / "repo").mkdir()
        (tmp_path / "repo" / "config.json").write_text("{}")
        commit = hub.add("me/sae", tmp_path / "repo")
        path = huggingface_hub.hf_hub_download("me/sae", "config.json", revision=commit)
        assert hub.downloads == ["config.json"]
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import huggingface_hub.hf_api
import pytest

LARGE = re.compile(r"\.(safetensors|parquet|npz|npy|bin|pt|gguf|zst|gz)$")
"""Files that the hub keeps outside of git: served elsewhere, and their ETag is a sha256."""

_FILE = re.compile(
    r"/(?P<kind>datasets/)?(?P<id>[^/]+/[^/]+)/(?:resolve|large)/(?P<revision>[^/]+)/(?P<path>.+)"
)
_API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)"
    r"(/(?P<call>revision|tree|paths-info|refs)(/(?P<revision>[^/]+)(/(?P<path>.+))?)?)?"
)


@dataclass(frozen=True)
class Asked:
    """One answered request."""

    method: str
    path: str
    """Of the URL, with its query."""
    status: int
    n_bytes: int
    """Bytes of the answer's body."""
    token: str | None


@dataclass
class Repository:
    """Commits of one model or dataset repository."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Content by path, by commit."""
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    """Files are served to ``HubServer.token`` alone; information and listing to all."""

    def commit_of(self, revision: str) -> str | None:
        """The commit that a branch or a commit hash names."""
        return self.branches.get(revision, revision if revision in self.commits else None)


class HubServer:
    """The hub: add repositories, then let the code under test ask."""

    token = "hf_test"
    """The one that opens gated repositories."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.asked: list[Asked] = []
        """Every request answered, in order."""
        self.page_len = 1000
        """Most entries of a listing's page."""
        self.failing: int | None = None
        """A status that every request is answered with, e.g. 503."""
        self.url = ""
        self.large_url = ""
        """The other host, which serves large files."""

    def add(
        self,
        repo_id: str,
        folder: Path,
        kind: Literal["models", "datasets"] = "models",
        revision: str = "main",
        gated: bool = False,
    ) -> str:
        """Commits all files below ``folder`` to a branch, as they are now.

        Returns:
            The commit's hash, 40 hex digits; it depends on the files' paths and content alone.
        """
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        commit = hashlib.sha1(
            json.dumps([[path, _sha256(content)] for path, content in files.items()]).encode()
        ).hexdigest()
        repository = self.repositories.setdefault((kind, repo_id), Repository())
        repository.commits[commit] = files
        repository.branches[revision] = commit
        repository.gated = gated
        return commit

    @property
    def downloads(self) -> list[str]:
        """Paths of the files served, in order; one that is read by ranges once for each range."""
        served = [a for a in self.asked if a.method == "GET" and a.status in (200, 206)]
        found = [_FILE.fullmatch(urlsplit(asked.path).path) for asked in served]
        return [unquote(file["path"]) for file in found if file is not None]

    @property
    def n_bytes(self) -> int:
        """Bytes of all answers' bodies."""
        return sum(asked.n_bytes for asked in self.asked)

    @contextmanager
    def serving(self) -> Iterator["HubServer"]:
        """Answers on two ports of loopback until the end of the block."""
        with ExitStack() as stack:
            self.url, self.large_url = (stack.enter_context(_serve(self)) for _ in range(2))
            yield self


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty hub that serves for one test, with an empty cache; nothing reaches the real one.

    ``huggingface_hub`` reads its environment at import, so both are set: the variables, for the
    processes that the test starts, and the constants of the imported library, which its functions
    and ``transformers`` read at each call. No ``endpoint=`` argument is needed. Code that copied
    ``constants.ENDPOINT`` at its own import is not reached.
    """
    with HubServer().serving() as server:
        home = tmp_path / "hf_home"
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(home))
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HOME", str(home))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(home / "assets"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(home / "harnesses.json"))
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        yield server
        huggingface_hub.close_session()


@contextmanager
def _serve(hub: HubServer) -> Iterator[str]:
    class Handler(_Handler):
        server_hub = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join(timeout=10)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    """A file as the listing tells it."""
    entry = {"type": "file", "path": path, "size": len(content), "oid": _git_sha1(content)}
    if LARGE.search(path):
        entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 130}
    return entry


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET

    def _answer(self) -> None:
        url = urlsplit(self.path)
        posted = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        self.query = parse_qs(url.query) | parse_qs(posted)
        if self.server_hub.failing is not None:
            self._send(self.server_hub.failing)
        elif (found := _API.fullmatch(url.path)) is not None:
            self._api(found)
        elif (found := _FILE.fullmatch(url.path)) is not None:
            self._file(found)
        else:
            self._refuse(404, None, "Not Found")

    def _api(self, found: re.Match[str]) -> None:
        located = self._locate(found["kind"], found)
        if located is None:
            return
        repository, commit = located
        files = repository.commits[commit]
        match found["call"]:
            case None | "revision":
                self._send_json(self._information(found["id"], repository, commit))
            case "tree":
                self._tree(files, unquote(found["path"] or ""))
            case "paths-info":
                wanted = self.query.get("paths", [])
                self._send_json([_entry(path, files[path]) for path in wanted if path in files])
            case _:
                branches = [
                    {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
                    for name, commit in repository.branches.items()
                ]
                self._send_json({"branches": branches, "tags": [], "converts": []})

    def _information(self, repo_id: str, repository: Repository, commit: str) -> dict[str, Any]:
        siblings: list[dict[str, Any]] = [
            {"rfilename": path} for path in repository.commits[commit]
        ]
        if self.query.get("blobs", ["false"])[0].lower() == "true":
            for sibling in siblings:
                content = repository.commits[commit][sibling["rfilename"]]
                sibling |= {"size": len(content), "blobId": _git_sha1(content)}
                if LARGE.search(sibling["rfilename"]):
                    sibling["lfs"] = {
                        "sha256": _sha256(content),
                        "size": len(content),
                        "pointerSize": 130,
                    }
        return {
            "_id": "0" * 24,
            "id": repo_id,
            "author": repo_id.split("/")[0],
            "sha": commit,
            "lastModified": "2024-01-01T00:00:00.000Z",
            "createdAt": "2024-01-01T00:00:00.000Z",
            "private": False,
            "gated": "manual" if repository.gated else False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": siblings,
        }

    def _tree(self, files: dict[str, bytes], folder: str) -> None:
        inside = f"{folder}/" if folder else ""
        below = [path for path in files if path.startswith(inside)]
        if not below:
            self._refuse(404, "EntryNotFound", f"{folder} does not exist")
            return
        rests = [path.removeprefix(inside).split("/")[:-1] for path in below]
        folders = {inside + "/".join(rest[:n]) for rest in rests for n in range(1, len(rest) + 1)}
        entries = [_entry(path, files[path]) for path in below]
        entries += [{"type": "directory", "path": p, "size": 0, "oid": "0" * 40} for p in folders]
        if self.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            entries = [e for e in entries if "/" not in e["path"].removeprefix(inside)]
        entries.sort(key=lambda entry: entry["path"])
        start, page_len = int(self.query.get("cursor", ["0"])[0]), self.server_hub.page_len
        headers = {}
        if start + page_len < len(entries):
            path, _, query = self.path.partition("?")
            rest = "&".join(part for part in query.split("&") if not part.startswith("cursor="))
            following = f"{self.server_hub.url}{path}?{rest}&cursor={start + page_len}"
            headers["Link"] = f'<{following}>; rel="next"'
        self._send_json(entries[start : start + page_len], headers)

    def _file(self, found: re.Match[str]) -> None:
        located = self._locate("datasets" if found["kind"] else "models", found)
        if located is None:
            return
        repository, commit = located
        path = unquote(found["path"])
        content = repository.commits[commit].get(path)
        headers = {"X-Repo-Commit": commit}
        may_read = not repository.gated or self._token() == self.server_hub.token
        if not may_read and "/large/" not in self.path:
            status = 401 if self._token() is None else 403
            message = f"Access to {found['id']} is restricted. Ask for access on its page."
            self._refuse(status, "GatedRepo", message, headers)
        elif content is None:
            self._refuse(404, "EntryNotFound", "Entry not found", headers)
        elif LARGE.search(path):
            self._send_large(content, headers)
        else:
            self._send_ranged(content, headers | {"ETag": f'"{_git_sha1(content)}"'})

    def _send_large(self, content: bytes, headers: dict[str, str]) -> None:
        """From the other host, which needs no token; here, where it is and what it is."""
        etag = f'"{_sha256(content)}"'
        if "/large/" in self.path:
            self._send_ranged(content, {"ETag": etag})
        else:
            elsewhere = self.server_hub.large_url + self.path.replace("/resolve/", "/large/")
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
            self._send(302, b"", headers | {"Location": elsewhere})

    def _locate(self, kind: str, found: re.Match[str]) -> tuple[Repository, str] | None:
        """The repository and the commit; null once the refusal is sent."""
        repository = self.server_hub.repositories.get((kind, found["id"]))
        if repository is None:
            status = 401 if self._token() is None else 404
            self._refuse(status, "RepoNotFound", "Repository not found")
            return None
        revision = unquote(found["revision"] or "main")
        commit = repository.commit_of(revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository, commit

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _refuse(
        self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None
    ) -> None:
        headers = (headers or {}) | {"X-Error-Message": message}
        if code is not None:
            headers["X-Error-Code"] = code
        self._send_json({"error": message}, headers, status)

    def _send_json(
        self, value: object, headers: dict[str, str] | None = None, status: int = 200
    ) -> None:
        headers = {"Content-Type": "application/json"} | (headers or {})
        self._send(status, json.dumps(value).encode(), headers)

    def _send_ranged(self, content: bytes, headers: dict[str, str]) -> None:
        headers = headers | {"Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            self._send(200, content, headers)
            return
        size = len(content)
        first = int(wanted[1]) if wanted[1] else max(size - int(wanted[2]), 0)
        last = min(int(wanted[2]), size - 1) if wanted[1] and wanted[2] else size - 1
        if first > last:
            self._send(416, b"", headers | {"Content-Range": f"bytes */{size}"})
        else:
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
            self._send(206, content[first : last + 1], headers)

    def _send(
        self, status: int, content: bytes = b"", headers: dict[str, str] | None = None
    ) -> None:
        body = b"" if self.command == "HEAD" else content
        # Noted first: whoever has the answer finds it in the list.
        self.server_hub.asked.append(
            Asked(self.command, self.path, status, len(body), self._token())
        )
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(body)
