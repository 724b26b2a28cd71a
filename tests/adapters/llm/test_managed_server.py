import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from managed_servers import Served, is_alive, wait_for

from autointerp_dagster.adapters.llm.managed.process import Port, is_taken
from autointerp_dagster.adapters.llm.managed.servers import ManagedServers, arguments_of, program_of
from autointerp_dagster.core.config.models import RemoteLLMConfig
from autointerp_dagster.core.errors import LLMError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

STUBBORN = 2
"""Children that ignore SIGTERM, one of them outside the session; each has one of its own."""


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return Served(tmp_path)


@pytest.fixture
def servers() -> Iterator[ManagedServers]:
    with ManagedServers(grace_s=0.5, max_restarts=2) as servers:
        yield servers


def get(url: str) -> int:
    with urllib.request.urlopen(url, timeout=5) as response:
        return response.status


def test_a_server_is_started_once_and_answers_at_its_url(served, servers):
    config = served.config()
    assert servers.running_url(config) is None
    url = servers.url_of(config, served.log_dir)
    assert get(f"{url}/models") == 200
    assert servers.url_of(config, served.log_dir) == servers.running_url(config) == url
    # Who talks to it, and how long it may take, does not make another server of it.
    assert servers.url_of(served.config(timeout_s=1, alias="mine"), served.log_dir) == url
    assert len(served.processes()) == 1


def test_many_threads_that_ask_at_once_get_the_same_server(served, servers):
    urls: list[str] = []
    ask = lambda: urls.append(servers.url_of(served.config(), served.log_dir))  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(urls) == 8
    assert len(set(urls)) == 1
    assert len(served.processes()) == 1


def test_each_command_has_a_server_of_its_own(served, servers):
    urls = {servers.url_of(served.config("--say", say), served.log_dir) for say in ("a", "b")}
    assert len(urls) == len(served.living()) == 2


def test_the_log_is_kept_private_and_named_after_model_port_and_process(served, servers):
    url = servers.url_of(served.config("--say", "the loading of shards"), served.log_dir)
    servers.close()
    (log,) = served.log_dir.iterdir()
    port = url.split(":")[-1].removesuffix("/v1")
    assert log.name == f"tiny-{port}-{os.getpid()}.log"
    assert log.read_text() == "hello the loading of shards\n"
    assert log.stat().st_mode & 0o077 == 0


def test_closing_ends_grandchildren_that_ignore_sigterm_or_left_the_session(served, servers):
    servers.url_of(served.config("--stubborn", str(STUBBORN)), served.log_dir)
    wait_for(lambda: len(served.living()) == 1 + 2 * STUBBORN)
    servers.close()
    assert served.living() == []
    servers.close()


def test_after_closing_the_same_command_is_started_anew(served, servers):
    servers.url_of(served.config(), served.log_dir)
    servers.close()
    assert servers.running_url(served.config()) is None
    assert get(servers.url_of(served.config(), served.log_dir) + "/models") == 200


def test_an_early_exit_is_an_error_with_code_log_and_command(served, servers):
    config = served.config("--say", "no such model weights", "--exit", "3")
    with pytest.raises(LLMError) as caught:
        servers.url_of(config, served.log_dir)
    message = str(caught.value)
    (log,) = served.log_dir.iterdir()
    for part in ("exit code 3", "no such model weights", str(log), config.serve, "'tiny'"):
        assert part in message


def test_what_a_failed_server_left_behind_is_ended(served, servers):
    config = served.config("--stubborn", str(STUBBORN), "--exit", "3")
    with pytest.raises(LLMError, match="exit code 3"):
        servers.url_of(config, served.log_dir)
    assert served.living() == []


def test_a_server_that_never_gets_healthy_is_ended_when_time_is_out(served, caplog):
    config = served.config("--mute", "--say", "loading shard 1", serve_timeout_s=1.5)
    servers = ManagedServers(grace_s=0.5, progress_s=0.3)
    caplog.set_level(logging.INFO)
    with pytest.raises(LLMError, match=r"answered HTTP 503 for 1.5 s \(serve_timeout_s\)"):
        servers.url_of(config, served.log_dir)
    assert len(served.processes()) == 1
    assert served.living() == []
    waiting = [r.getMessage() for r in caplog.records if r.getMessage().startswith("waiting")]
    assert waiting[-1].endswith("hello loading shard 1")


def test_start_and_readiness_are_said(served, servers, caplog):
    with caplog.at_level(logging.INFO):
        servers.url_of(served.config(), served.log_dir)
    first, last = (record.getMessage() for record in caplog.records)
    (log,) = served.log_dir.iterdir()
    assert first.startswith("starting ")
    assert str(log) in first
    assert "ready after" in last


def test_a_model_that_the_server_does_not_list_is_a_warning(served, servers, caplog):
    servers.url_of(served.config(model="Qwen/other"), served.log_dir)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "models tiny, not 'Qwen/other'" in warning
    assert next(served.log_dir.iterdir()).name.startswith("Qwen-other-")


def test_a_port_taken_meanwhile_is_tried_once_more_elsewhere(served, servers, tmp_path):
    taken = ("--say", "[Errno 98] Address already in use", "--exit", "1")
    url = servers.url_of(served.config(*taken, "--once", tmp_path / "was"), served.log_dir)
    assert get(f"{url}/models") == 200
    assert len(list(served.log_dir.iterdir())) == 2


def test_a_port_that_is_always_taken_is_an_error(served, servers):
    taken = ("--say", "[Errno 98] Address already in use", "--exit", "1")
    with pytest.raises(LLMError, match="already in use"):
        servers.url_of(served.config(*taken), served.log_dir)
    assert len(list(served.log_dir.iterdir())) == 2


def test_ports_are_free_and_belong_to_one_process():
    ports = [Port() for _ in range(20)]
    assert len({port.number for port in ports}) == 20
    with socket.create_server(("127.0.0.1", ports[0].number)):
        assert is_taken(ports[0].number)
    assert not is_taken(ports[1].number)
    for port in ports:
        port.release()


def test_a_server_that_died_is_started_again_but_not_for_ever(served, servers, caplog):
    config = served.config()
    urls = []
    for _ in range(3):  # the first start and two restarts
        urls.append(servers.url_of(config, served.log_dir))
        os.kill(served.living()[0], signal.SIGKILL)
        wait_for(lambda: servers.running_url(config) is None)
    assert len(set(urls)) == 3
    with pytest.raises(LLMError, match=r"3 times \(exit code 137, killed by signal 9 at last\)"):
        servers.url_of(config, served.log_dir)
    assert "starting it again (2 of 2 times)" in caplog.text
    assert served.living() == []


def test_a_restart_waits_until_the_dead_servers_children_are_gone(served, servers, tmp_path):
    servers.url_of(served.config("--stubborn", str(STUBBORN)), served.log_dir)
    wait_for(lambda: len(served.living()) == 1 + 2 * STUBBORN)
    first = set(served.living())
    (server,) = [p for p in first if b"server.py" in Path(f"/proc/{p}/cmdline").read_bytes()]
    os.kill(server, signal.SIGKILL)
    wait_for(lambda: servers.running_url(served.config("--stubborn", str(STUBBORN))) is None)
    servers.url_of(served.config("--stubborn", str(STUBBORN)), served.log_dir)
    assert not any(map(is_alive, first))


def test_closing_ends_a_start_that_another_thread_waits_for(served, servers):
    errors: list[LLMError] = []

    def start() -> None:
        with pytest.raises(LLMError) as caught:
            servers.url_of(served.config("--mute"), served.log_dir)
        errors.append(caught.value)

    thread = threading.Thread(target=start)
    thread.start()
    wait_for(lambda: len(served.living()) == 1)
    servers.close()
    thread.join()
    assert served.living() == []
    assert "told to end while it started" in str(errors[0])


PARENT = """
import os, sys, threading, time
from pathlib import Path
from autointerp_dagster.adapters.llm.managed.servers import ManagedServers
from autointerp_dagster.core.config.models import RemoteLLMConfig

servers = ManagedServers(grace_s=0.5)
config = RemoteLLMConfig(serve=sys.argv[1], model="tiny")
def start(): servers.url_of(config, Path(sys.argv[2]))
if sys.argv[3] == "starting":
    threading.Thread(target=start, daemon=True).start()
else:
    start()
    if sys.argv[3] == "forked" and os.fork() == 0:
        time.sleep(600)
Path(sys.argv[2], "ready").touch()
if sys.argv[3] in ("killed", "forked", "terminated"):
    time.sleep(600)
if sys.argv[3] == "starting":
    while not os.listdir(sys.argv[4]):
        time.sleep(0.05)
"""


def parent_of(served: Served, how: str, *options: str) -> subprocess.Popen[bytes]:
    """A process that has started a server."""
    served.log_dir.mkdir()
    command = served.config(*options).serve
    arguments = [command, served.log_dir, how, served.folder]
    parent = subprocess.Popen([sys.executable, "-c", PARENT, *arguments], start_new_session=True)
    wait_for((served.log_dir / "ready").exists, 60)
    return parent


def test_kill_9_of_the_parent_leaves_no_process(served):
    parent = parent_of(served, "killed", "--stubborn", str(STUBBORN))
    wait_for(lambda: len(served.living()) == 1 + 2 * STUBBORN)
    parent.kill()
    parent.wait()
    wait_for(lambda: served.living() == [])


def test_sigterm_of_the_parent_leaves_no_process(served):
    parent = parent_of(served, "terminated")
    parent.terminate()
    parent.wait()
    wait_for(lambda: served.living() == [])


def test_a_forked_child_that_outlives_the_parent_does_not_keep_the_server(served):
    parent = parent_of(served, "forked")
    parent.kill()
    parent.wait()
    wait_for(lambda: served.living() == [])
    os.killpg(parent.pid, signal.SIGKILL)  # the forked child


@pytest.mark.parametrize("how", ["exits", "starting"])
def test_the_end_of_the_interpreter_ends_the_server(served, how):
    """Also while a thread still waits for it to get healthy."""
    parent = parent_of(served, how, *(["--mute"] if how == "starting" else []))
    assert parent.wait(20) == 0
    assert len(served.processes()) == 1
    assert served.living() == []


def serve_as_a_run_worker(config: RemoteLLMConfig, log_dir: Path) -> None:
    ManagedServers(grace_s=0.5).url_of(config, log_dir)


def test_the_end_of_a_spawned_run_worker_ends_the_server(served):
    """As the code server starts a process for each run."""
    worker = multiprocessing.get_context("spawn").Process(
        target=serve_as_a_run_worker, args=(served.config(), served.log_dir)
    )
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    assert len(served.processes()) == 1
    wait_for(lambda: served.living() == [])


def test_a_killed_guard_is_noticed_and_its_server_ended(served, servers):
    config = served.config()
    first = servers.url_of(config, served.log_dir)
    (server,) = served.living()
    stat = Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()
    os.kill(int(stat[1]), signal.SIGKILL)  # its parent is the guard
    wait_for(lambda: servers.running_url(config) is None)
    assert servers.url_of(config, served.log_dir) != first
    assert not is_alive(server)


def test_the_key_is_sent_but_never_written(served, servers, monkeypatch, caplog):
    monkeypatch.setenv("SERVER_KEY", "canary-7c1")
    locked = served.config("--key", "SERVER_KEY", api_key_env="SERVER_KEY")
    with caplog.at_level(logging.DEBUG):
        servers.url_of(locked, served.log_dir)
        blabs = served.config("--say", "key=canary-7c1", "--exit", "2", api_key_env="SERVER_KEY")
        with pytest.raises(LLMError, match="key=<key>") as caught:
            servers.url_of(blabs, served.log_dir)
    assert "canary-7c1" not in caplog.text + str(caught.value)


def test_a_server_that_wants_another_key_is_an_error_at_once(served, servers, monkeypatch):
    monkeypatch.setenv("SERVER_KEY", "canary-7c1")
    with pytest.raises(LLMError, match=r"HTTP 401: it wants a key.* in api_key_env"):
        servers.url_of(served.config("--key", "SERVER_KEY"), served.log_dir)
    assert served.living() == []


def test_a_missing_program_is_named_before_anything_starts(served, servers):
    config = served.config(serve="no-such-program --port {port}")
    with pytest.raises(LLMError, match="'no-such-program' is not a program on this machine"):
        servers.url_of(config, served.log_dir)
    assert not served.log_dir.exists()
    shell = served.config(serve="CUDA_VISIBLE_DEVICES=1 vllm serve m --port {port}")
    with pytest.raises(LLMError, match="write `env CUDA_VISIBLE_DEVICES=1"):
        program_of(shell)
    with pytest.raises(LLMError, match="No closing quotation"):
        program_of(served.config(serve="vllm 'serve --port {port}"))


def test_a_program_that_cannot_be_run_is_an_error(served, servers, tmp_path):
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o755)
    with pytest.raises(LLMError, match=r"exit code 127(.|\n)*Exec format error"):
        servers.url_of(served.config(serve=f"{broken} {{port}}"), served.log_dir)


def test_only_the_port_is_filled_into_a_command(served):
    config = served.config(serve="""vllm serve --port {port} --override '{"a b": {}}' x{port}""")
    words = ["vllm", "serve", "--port", "8123", "--override", '{"a b": {}}', "x8123"]
    assert arguments_of(config, 8123) == words
