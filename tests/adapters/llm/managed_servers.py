"""A small server that tests of managed servers run as a real process, and how they look at it."""

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

from autointerp_dagster.core.config.models import RemoteLLMConfig

SERVER = '''
"""Answers /v1/models and chats with [1, 0]; misbehaves as told."""
import argparse, json, os, signal, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int)
parser.add_argument("--folder")  # every process writes a file named after its id
parser.add_argument("--say", default="")
parser.add_argument("--exit", type=int)
parser.add_argument("--once")  # misbehave only if this file does not exist, and make it
parser.add_argument("--mute", action="store_true")  # 503 for ever
parser.add_argument("--key")  # name of a variable
parser.add_argument("--die-after", type=int, default=10**9)  # chats
parser.add_argument("--stubborn", type=int, default=0)  # children that ignore SIGTERM
options = parser.parse_args()

CHILD = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if sys.argv[2] == "1": os.setsid()  # leaves the server's session
if sys.argv[3] == "1":
    subprocess.Popen([sys.executable, "-c", sys.argv[4], *sys.argv[1:3], "0", ""])
open(os.path.join(sys.argv[1], str(os.getpid())), "w").close()
time.sleep(600)
"""
def note():
    open(os.path.join(options.folder, str(os.getpid())), "w").close()

print("hello", options.say, flush=True)
is_first = options.once is None or not os.path.exists(options.once)
if options.once is not None: open(options.once, "w").close()
for i in range(options.stubborn):
    subprocess.Popen([sys.executable, "-c", CHILD, options.folder, str(i % 2), "1", CHILD])
if options.exit is not None and is_first: sys.exit(options.exit)
n_asked = 0

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        bearer = "Bearer " + os.environ.get(options.key or "", "")
        if options.key and self.headers.get("Authorization") != bearer: self.send(401, {})
        elif options.mute: self.send(503, {})
        else: self.send(200, {"data": [{"id": "tiny"}]})
    def do_POST(self):
        global n_asked
        self.rfile.read(int(self.headers["Content-Length"]))
        n_asked += 1
        if n_asked > options.die_after: os._exit(7)
        message = {"role": "assistant", "content": "[1, 0]"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 5, "total_tokens": 6}
        self.send(200, {"id": "x", "object": "chat.completion", "created": 0, "model": "tiny",
                        "choices": [choice], "usage": usage})
    def send(self, status, body):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
    def log_message(self, *_): pass

server = ThreadingHTTPServer(("127.0.0.1", options.port), Handler)
note()
server.serve_forever(0.02)
'''


class Served:
    """The command that runs the server, and the processes that came of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "processes"
        self.folder.mkdir()
        self.script = folder / "server.py"
        self.script.write_text(SERVER)
        self.log_dir = folder / "logs"

    def config(self, *options: str, **changes) -> RemoteLLMConfig:
        words = [sys.executable, self.script, "--folder", self.folder, *options]
        command = shlex.join(map(str, words)) + " --port {port}"
        settings = {"serve": command, "model": "tiny", "serve_timeout_s": 60.0}
        return RemoteLLMConfig(**{**settings, **changes})

    def processes(self) -> list[int]:
        """All that ever ran, by id."""
        return [int(file.name) for file in self.folder.iterdir()]

    def living(self) -> list[int]:
        return [process for process in self.processes() if is_alive(process)]


def is_alive(process: int) -> bool:
    """Whether it runs; a zombie does not."""
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for(condition: Callable[[], bool], longest_s: float = 20.0) -> None:
    deadline = time.monotonic() + longest_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
