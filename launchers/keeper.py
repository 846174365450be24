"""The process that keeps the ranks of this machine: their parent, and the heir of all they start.

It is a program of its own, started by syncbn.launchers.local, for three reasons. On Linux it adopts
the processes that a rank leaves behind, so that it can end them; it ends everything when the
controller ends, in whatever way; and it imports a framework once, so that a rank is a fork of it
and starts in a moment. It reads what the ranks write, and keeps the end of it.

Requests and answers are JSON, one a line, on stdin and stdout.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import selectors
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_KEPT = 1 << 16  # bytes of output that are kept of each rank
_PIECE = 1 << 16
_TICK_SECONDS = 0.2  # between looks for processes that have ended
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


@dataclass
class _Rank:
    pid: int
    output: int  # the end of a pipe, -1 when it is closed
    text: bytes = b""
    status: int | None = None  # as waitpid gives it


class Keeper:
    """Serves the requests of the controller until it ends.

    Args:
        requests: the file descriptor to read from.
        answers: the file descriptor to write to.
    """

    def __init__(self, requests: int, answers: int) -> None:
        self._requests = requests
        self._answers = answers
        self._ranks: list[_Rank] = []
        self._selector = selectors.PollSelector()
        self._selector.register(requests, selectors.EVENT_READ)

    def serve(self) -> None:
        pending = b""
        while True:
            ready = [key.fd for key, _ in self._selector.select(_TICK_SECONDS)]
            for rank in self._ranks:
                if rank.output in ready:
                    self._read(rank)
            self._reap()
            if self._requests not in ready:
                continue
            piece = os.read(self._requests, _PIECE)
            if not piece:  # the controller has ended
                self.end_all()
                return
            *lines, pending = (pending + piece).split(b"\n")
            for line in lines:
                answer = json.dumps(self._do(json.loads(line))).encode() + b"\n"
                while answer:
                    answer = answer[os.write(self._answers, answer) :]

    def _do(self, request: dict[str, Any]) -> Any:
        if request["do"] == "start":
            return self._start(request)
        if request["do"] == "look":
            for rank in self._ranks:
                self._read(rank)
            ended = {n: r.status for n, r in enumerate(self._ranks) if r.status is not None}
            return {"pids": [rank.pid for rank in self._ranks], "ended": ended}
        if request["do"] == "output":
            rank = self._ranks[request["rank"]]
            self._read(rank)
            return rank.text.decode(errors="replace")
        if request["do"] == "signal":
            for rank in self._ranks:
                if rank.status is None:
                    os.kill(rank.pid, request["signal"])
            return None
        self.end_all()
        return None

    def _start(self, request: dict[str, Any]) -> str | None:
        """Start the ranks. Returns why that is not possible, or None."""
        if request["module"]:
            _import(request["preload"])
        for place in request["places"]:
            reading, writing = os.pipe()
            try:
                pid = os.fork()
            except OSError as error:
                os.close(reading)
                os.close(writing)
                self.end_all()
                return str(error)
            if pid == 0:
                for own in (self._requests, self._answers, reading):
                    os.close(own)
                for rank in self._ranks:
                    os.close(rank.output)
                _be_rank(request, place, writing)
            os.close(writing)
            os.set_blocking(reading, False)
            self._ranks.append(_Rank(pid, reading))
            self._selector.register(reading, selectors.EVENT_READ)
        return None

    def _read(self, rank: _Rank) -> None:
        """Read all that a rank has written by now; its end is kept."""
        while rank.output >= 0:
            try:
                piece = os.read(rank.output, _PIECE)
            except BlockingIOError:
                return
            if not piece:
                self._close(rank)
                return
            rank.text = (rank.text + piece)[-_KEPT:]
            if len(piece) < _PIECE:
                return

    def _close(self, rank: _Rank) -> None:
        if rank.output >= 0:
            self._selector.unregister(rank.output)
            os.close(rank.output)
            rank.output = -1

    def _reap(self) -> bool:
        """Collect the processes that have ended. Returns whether there are others."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            for rank in self._ranks:
                if rank.pid == pid:
                    rank.status = os.waitstatus_to_exitcode(status)

    def end_all(self) -> None:
        """Kill the ranks and all that they have started, and wait until it has ended."""
        for rank in self._ranks:
            if rank.status is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(rank.pid, signal.SIGKILL)
        while True:
            for pid in _descendants(os.getpid()):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            if not self._reap():
                break
            self._selector.select(0.005)
        for rank in self._ranks:
            self._close(rank)
        self._ranks = []


def _be_rank(request: dict[str, Any], place: dict[str, str], output: int) -> None:
    """Become a rank, in a child process. Does not return."""
    status = 1
    try:
        _control(_PR_SET_PDEATHSIG, signal.SIGKILL)  # at the end of the keeper
        os.setsid()  # Ctrl-C in a terminal reaches only the controller
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        os.environ.update(request["environment"] | place)
        if request["module"]:
            importlib.import_module(request["module"]).main()
            status = 0
        else:
            command = request["command"]
            os.execvp(command[0], command)
    except SystemExit as error:
        status = _status(error)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _status(error: SystemExit) -> int:
    """The exit status that Python would give."""
    if error.code is None or isinstance(error.code, int):
        return int(error.code or 0) & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def _import(modules: Sequence[str]) -> None:
    """Import what all ranks will need. What cannot be imported is an error of the ranks."""
    for name in modules:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def _descendants(pid: int) -> Iterator[int]:
    """All processes below a process; none where there is no /proc."""
    for place in Path(f"/proc/{pid}/task").glob("*/children"):
        children: list[str] = []
        with contextlib.suppress(OSError):  # it has just ended
            children = place.read_text().split()
        for child in children:
            yield int(child)
            yield from _descendants(int(child))


def _control(option: int, value: int) -> None:
    """Set an option of this process, which only Linux has."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def main() -> None:
    """Serve on copies of stdin and stdout, which are not for what an import may print."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the controller handles them, and its end ends all
    requests, answers = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    _control(_PR_SET_CHILD_SUBREAPER, 1)
    keeper = Keeper(requests, answers)
    try:
        keeper.serve()
    except BaseException:
        keeper.end_all()
        raise
    os._exit(0)  # without the slow farewell of a framework


if __name__ == "__main__":
    main()
