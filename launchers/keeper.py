"""The process that keeps ranks: their parent, and the heir of all they start.

syncbn.launchers.local starts one for all ranks of this machine, and an engine of a cluster one for
each rank (syncbn.launchers.engine). It is a program of its own for three reasons. On Linux it
adopts the processes that a rank leaves behind, so that it can end them; it ends everything when
the controller ends, in whatever way; and it imports a framework once, so that a rank is a fork of
it and starts in a moment. It reads what the ranks write, and keeps the end of it. On stdin and
stdout it has a guard, its own parent: if something kills one of the two, the other ends the rest.
The guard also ends a keeper that outlives the controller, because an import reads no pipe.

Requests and answers are JSON: one a line on stdin and stdout, or messages of a link to the
controller if there are arguments. These are HOST:PORT of the controller, and the variables in which
the engine writes rank, number of ranks, and rank on this machine. Then SYNCBN_KEY has the secret,
and the first message has the place of the rank.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from syncbn.launchers.handshake import connect
from syncbn.launchers.link import Link, WireError
from syncbn.launchers.prctl import ADOPT, END_WITH_PARENT, control
from syncbn.launchers.site import machine, versions

_KEPT = 1 << 16  # bytes of output that are kept of each rank
_PIECE = 1 << 16
_TICK_SECONDS = 0.2  # between looks for processes that have ended
_GRACE_SECONDS = 2.0  # in which the keeper ends by itself after the controller
_OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


class _Connection(Protocol):
    """The way to the controller."""

    def fileno(self) -> int:
        """What can be read when requests have arrived."""

    def requests(self) -> Iterator[bytes]:
        """The requests that have arrived.

        Raises:
            EOFError, OSError: the controller has ended.
        """

    def answer(self, answer: bytes) -> None:
        """Send an answer."""

    def close(self) -> None:
        """Close it in this process."""


class _Pipes:
    """Requests from a file descriptor, and answers to another one, one a line."""

    def __init__(self, requests: int, answers: int) -> None:
        self._requests = requests
        self._answers = answers
        self._pending = b""

    def fileno(self) -> int:
        return self._requests

    def requests(self) -> Iterator[bytes]:
        piece = os.read(self._requests, _PIECE)
        if not piece:
            raise EOFError
        *lines, self._pending = (self._pending + piece).split(b"\n")
        yield from lines

    def answer(self, answer: bytes) -> None:
        rest = answer + b"\n"
        while rest:
            rest = rest[os.write(self._answers, rest) :]

    def close(self) -> None:
        os.close(self._requests)
        os.close(self._answers)


class _Linked:
    """Messages of a link."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self.fileno = link.fileno
        self.answer = link.send
        self.close = link.close

    def requests(self) -> Iterator[bytes]:
        yield from iter(self._link.arrived, None)


@dataclass
class _Rank:
    pid: int
    output: int  # the end of a pipe, -1 when it is closed
    text: bytes = b""
    status: int | None = None  # as waitpid gives it


class Keeper:
    """Serves the requests of the controller until it ends.

    Args:
        connection: the way to it.
        environment: what every rank gets in addition to what a request gives.
        guard: the end of a pipe that closes with the guard; None if there is none.
    """

    def __init__(
        self, connection: _Connection, environment: Mapping[str, str], guard: int | None = None
    ) -> None:
        self._guard = guard
        self._connection = connection
        self._environment = environment
        self._ranks: list[_Rank] = []
        self._ends = False  # whether the controller has said that it is about to end
        self._selector = selectors.PollSelector()
        self._selector.register(connection, selectors.EVENT_READ)
        if guard is not None:
            self._selector.register(guard, selectors.EVENT_READ)

    def serve(self) -> bool:
        """Returns whether the controller has said that it is about to end."""
        while True:
            ready = [key.fd for key, _ in self._selector.select(_TICK_SECONDS)]
            for rank in self._ranks:
                if rank.output in ready:
                    self._read(rank)
            self._reap()
            if self._guard in ready:
                self.end_all()
                return self._ends
            if self._connection.fileno() not in ready:
                continue
            try:
                for request in self._connection.requests():
                    self._connection.answer(json.dumps(self._do(json.loads(request))).encode())
            except (EOFError, OSError, WireError):  # the controller has ended
                self.end_all()
                return self._ends

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
        self._ends = request["do"] == "end"
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
                self._connection.close()
                os.close(reading)
                for rank in self._ranks:
                    os.close(rank.output)
                _be_rank(request, {**self._environment, **place}, writing)
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
        _end_descendants()
        for rank in self._ranks:
            self._close(rank)
        self._ranks = []


def _be_rank(request: dict[str, Any], place: Mapping[str, str], output: int) -> None:
    """Become a rank, in a child process. Does not return."""
    status = 1
    try:
        control(END_WITH_PARENT, signal.SIGKILL)  # at the end of the keeper
        os.setsid()  # Ctrl-C in a terminal reaches only the controller
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        os.environ.update({**request["environment"], **place})
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


def _end_descendants() -> None:
    """Kill all processes below this one, and wait until they have ended."""
    while True:
        for pid in _descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.005)


def _fork_below_a_guard() -> int:
    """Go on in a child process. This process becomes the guard, and ends as the child does.

    Returns:
        The end of a pipe that closes with the guard.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        return reading
    for of_child in (1, reading):
        os.close(of_child)
    control(ADOPT, 1)
    status = os.waitstatus_to_exitcode(_wait_for_the_keeper(child))
    _end_descendants()
    if status < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no handler
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _wait_for_the_keeper(keeper: int) -> int:
    """Wait until it has ended, or end it if the controller ended some time ago.

    Returns:
        Its status, as waitpid gives it.
    """
    controller = select.poll()
    controller.register(0, 0)  # reports only the end of the controller
    while not controller.poll(1000 * _TICK_SECONDS):
        pid, status = os.waitpid(keeper, os.WNOHANG)
        if pid:
            return status
    end = time.monotonic() + _GRACE_SECONDS
    while time.monotonic() < end:
        pid, status = os.waitpid(keeper, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.02)
    os.kill(keeper, signal.SIGKILL)
    return os.waitpid(keeper, 0)[1]


def _dial(address: str, *variables: str) -> tuple[_Connection, dict[str, str]]:
    """Connect to the controller. Returns the connection, and what a rank needs to connect as well.

    Raises:
        OSError: that is not possible.
    """
    secret = os.environ.pop("SYNCBN_KEY")
    place = {name: os.environ[its] for name, its in zip(_OURS, variables, strict=True)}
    link = connect(address, bytes.fromhex(secret), int(place["RANK"]))
    about = {"host": socket.gethostname(), "machine": machine(), "pid": os.getpid()}
    about |= {"versions": versions(), "environment": place}
    link.send(json.dumps(about).encode())
    return _Linked(link), {"SYNCBN_KEY": secret}


def main(arguments: Sequence[str]) -> None:
    """Serve on copies of stdin and stdout, which are not for what an import may print."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the controller handles them, and its end ends all
    guard = None if arguments else _fork_below_a_guard()
    connection: _Connection = _Pipes(os.dup(0), os.dup(1))
    environment: dict[str, str] = {}
    if arguments:
        connection.close()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as the engine ends its processes
        connection, environment = _dial(*arguments)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    control(ADOPT, 1)
    keeper = Keeper(connection, environment, guard)
    try:
        ends = keeper.serve()
    except BaseException:
        keeper.end_all()
        raise
    # An engine ends at once only if a keeper fails: torchrun waits 300 s for nodes that are lost.
    # `_exit` is without the slow farewell of a framework.
    os._exit(0 if ends or not arguments else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
