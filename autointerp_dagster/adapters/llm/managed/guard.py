"""Ends a server, and all that it started, when the process that wanted it is gone.

Run as a script of its own (``python -I -S guard.py GRACE_S PARENT COMMAND ...``), with the
standard library alone, so it is there in milliseconds and nothing of the package can break it.

1. Start the command in a session of its own and write its process id to stdout (0 if that failed).
2. Wait until the server ends; or stdin holds a byte or is at its end (the parent closed it, or
   died, by ``kill -9`` too); or the parent is another process (a child that the parent forked may
   keep stdin open); or a signal asks this process to end.
3. Write the server's exit code, or ``end``, to stdout: from now on nobody should ask it.
4. Send SIGTERM to every process that came from the command, SIGKILL after a grace, and leave with
   the server's exit code (128 + n after signal n).

On Linux this process adopts the orphans among its descendants, so a process that left the
server's session is found and ended as well, and the server gets a SIGTERM if this one is killed.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PARENT_CHECK_S = 1.0
STEP_S = 0.05
KILL_WAIT_S = 10.0
"""Seconds that SIGKILL may take; longer takes a process that hangs inside the kernel."""

_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36
_IS_LINUX = sys.platform == "linux"


def main(arguments: list[str]) -> int:
    """Guard a server; see above.

    Args:
        arguments: Seconds between SIGTERM and SIGKILL, the parent's process id, the command.
    """
    grace_s, parent, command = float(arguments[0]), int(arguments[1]), arguments[2:]
    if _IS_LINUX:
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    bell = _bell()
    try:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),  # its log
            start_new_session=True,
            preexec_fn=_end_with_guard if _IS_LINUX else None,  # one thread here, so safe
        )
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        _tell("0\n127")
        return 127
    _tell(str(server.pid))
    family = _Family(server.pid)
    _wait(family, parent, bell)
    _tell("end" if family.exit_code is None else str(family.exit_code))
    family.end(grace_s)
    server.returncode = family.exit_code or 0  # reaped here, not by Popen
    return server.returncode


class _Family:
    """The server and all that came from it."""

    def __init__(self, server: int) -> None:
        self._server = server
        self.exit_code: int | None = None
        """Of the server; null while it runs."""
        self.is_gone = False
        """Whether no process is left."""

    def reap(self) -> None:
        """Take note of those that ended."""
        with contextlib.suppress(ChildProcessError):
            while True:
                process, status = os.waitpid(-1, os.WNOHANG)
                if process == 0:
                    return
                if process == self._server:
                    code = os.waitstatus_to_exitcode(status)
                    self.exit_code = code if code >= 0 else 128 - code
        self.is_gone = True

    def end(self, grace_s: float) -> None:
        """Return once no process is left, or those that are cannot be killed."""
        self._send(signal.SIGTERM)
        self._wait(grace_s)
        deadline = time.monotonic() + KILL_WAIT_S
        while not self.is_gone and time.monotonic() < deadline:
            self._send(signal.SIGKILL)
            self._wait(STEP_S)
        if not _IS_LINUX:  # orphans are not adopted here, so they may be left in the group
            self._send(signal.SIGKILL)

    def _wait(self, longest_s: float) -> None:
        deadline = time.monotonic() + longest_s
        self.reap()
        while not self.is_gone and time.monotonic() < deadline:
            time.sleep(STEP_S)
            self.reap()

    def _send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._server, number)
        for process in _descendants():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, number)


def _wait(family: _Family, parent: int, bell: int) -> None:
    """Return when the server has ended or should."""
    while True:
        ready, _, _ = select.select([0, bell], [], [], PARENT_CHECK_S)
        if 0 in ready:
            return
        family.reap()
        if family.exit_code is not None or os.getppid() != parent:
            return
        if bell in ready and any(number != signal.SIGCHLD for number in os.read(bell, 64)):
            return


def _bell() -> int:
    """A descriptor that can be read after a signal: of a child that ended, or to end."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # A function, not SIG_IGN: the server would inherit that.
        signal.signal(number, lambda *_: None)
    return reading


def _end_with_guard() -> None:
    ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _tell(line: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody is left to read it
        os.write(1, f"{line}\n".encode())


def _descendants() -> Iterator[int]:
    """Processes below this one, where /proc tells."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # "pid (name) state parent ...", and the name may hold spaces and brackets.
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
            children.setdefault(int(after_name[1]), []).append(int(folder.name))
    found = [os.getpid()]
    for process in found:
        found += children.get(process, [])
    yield from found[1:]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
