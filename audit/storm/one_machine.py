"""A storm on one machine: what hits a run from outside."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path


class OneMachine:
    """Where a run of launcher local takes place. Use it as a context manager."""

    options: tuple[str, ...] = ()  # of the run
    gone_seconds = 20.0  # in which all processes of a run must be gone

    def __enter__(self) -> OneMachine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def command(self, words: Sequence[str]) -> list[str]:
        """The words of the controller's command, where it must run."""
        return list(words)

    def hit(self, choose: random.Random, controller: int) -> str:
        """Send one fault. Returns its name.

        Raises:
            OSError, IndexError: there was nothing to hit.
        """
        fault = choose.choice(_FAULTS)
        fault(choose, controller)
        return name_of(fault)

    def settle(self) -> None:
        """Put back what a fault has changed on the machines."""

    def processes(self) -> list[int]:
        """Processes that must be gone after a run, whatever their environment."""
        return []


def name_of(fault: Callable[..., None]) -> str:
    return fault.__name__.strip("_").replace("_", " ")


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for place in tasks for child in place.read_text().split()]


def _guard(controller: int) -> int:
    """The guard of the parent of the ranks.

    Raises:
        ProcessLookupError: there is none at the moment.
    """
    for pid in children(controller):
        if b"syncbn.launchers.keeper" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    raise ProcessLookupError


def _keeper(controller: int) -> int:
    """The parent of the ranks.

    Raises:
        IndexError: there is none at the moment.
    """
    return children(_guard(controller))[0]


def _any_rank(choose: random.Random, controller: int) -> int:
    return choose.choice(children(_keeper(controller)))


def _kill_a_rank(choose: random.Random, controller: int) -> None:
    os.kill(_any_rank(choose, controller), signal.SIGKILL)


def _stop_a_rank(choose: random.Random, controller: int) -> None:
    os.kill(_any_rank(choose, controller), signal.SIGSTOP)


def _pause_a_rank(choose: random.Random, controller: int) -> None:
    pause(_any_rank(choose, controller), 0.7)


def _kill_the_parent_of_the_ranks(choose: random.Random, controller: int) -> None:
    if choose.random() < 0.5:  # a run that cannot start twice in a row gives up
        raise IndexError
    os.kill(choose.choice((_guard, _keeper))(controller), signal.SIGKILL)


def _pause_the_parent_of_the_ranks(_: random.Random, controller: int) -> None:
    pause(_keeper(controller), 2.0)


def _pause_the_controller(_: random.Random, controller: int) -> None:
    pause(controller, 2.0)


def pause(pid: int, seconds: float) -> None:
    os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    os.kill(pid, signal.SIGCONT)


def _kill_the_controller(choose: random.Random, controller: int) -> None:
    if choose.random() < 0.1:  # otherwise no run comes to its end
        os.kill(controller, signal.SIGKILL)
    else:
        raise IndexError


def _strangers(choose: random.Random, controller: int) -> None:
    """Connect to every port of the run, and send something or nothing."""
    for pid in (controller, *children(_keeper(controller))):
        for port in _ports(pid):
            with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
                connection.sendall(choose.randbytes(choose.choice((0, 1, 100, 10_000))))


def _ports(pid: int) -> list[int]:
    sockets = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = [row for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]
    return [int(row[1].split(":")[1], 16) for row in listening]


_FAULTS: tuple[Callable[[random.Random, int], None], ...] = (
    _kill_a_rank,
    _stop_a_rank,
    _pause_a_rank,
    _kill_the_parent_of_the_ranks,
    _pause_the_parent_of_the_ranks,
    _pause_the_controller,
    _kill_the_controller,
    _strangers,
)
