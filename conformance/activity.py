"""Whether processes do anything, as /proc shows it. So a hang need not wait for a deadline.

Ranks that wait for each other sleep: no thread of any rank, or of any process that a rank has
started, runs or is about to run, and none uses the processor. On a busy machine a thread that has
work is `running` in /proc even while it waits for a processor, so load does not look like sleep.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

_SHARE = (
    0.02  # of the time that a sleeping process may use: threads that look for work now and then
)
_BUSY = "RD"  # the states of a thread that runs or is about to, or that waits for a disk


class _Thread(NamedTuple):
    state: str
    seconds: float  # that it has used of processors
    queued: float  # seconds that it has waited for a processor


_UNSEEN = _Thread("", 0.0, 0.0)


class Activity:
    """What processes do from now on. Where there is no /proc, they are always taken as active.

    Args:
        pids: the processes; those that they start belong to them.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = list(pids)
        self._first = self._look()
        self._last = self._first
        self._last_time = self._since = time.monotonic()

    def idle_seconds(self) -> float:
        """For how long all processes have slept. To be called a few times a second."""
        now, found = time.monotonic(), self._look()
        used = sum(
            thread.seconds - (self._last[key].seconds if key in self._last else 0.0)
            for key, thread in found.items()
        )
        sleeping = bool(found) and not any(thread.state in _BUSY for thread in found.values())
        if not sleeping or used > _SHARE * (now - self._last_time):
            self._since = now
        self._last, self._last_time = found, now
        return now - self._since

    def wake(self) -> None:
        """Something has arrived from the processes."""
        self._since = time.monotonic()

    def busiest_seconds(self) -> float:
        """The processor time of the thread that has used most since the start."""
        return max((used for used, _ in self._since_start()), default=0.0)

    def queued_seconds(self) -> float:
        """For how long threads that could run have waited for a processor since the start.

        It is a sum, because a rank may wait for one rank after the other, and each for a processor.
        """
        return sum(queued for _, queued in self._since_start())

    def _since_start(self) -> Iterator[tuple[float, float]]:
        for key, thread in self._last.items():
            _, used, queued = self._first.get(key, _UNSEEN)
            yield thread.seconds - used, thread.queued - queued

    def _look(self) -> dict[str, _Thread]:
        return {name: thread for pid in self._pids for name, thread in _threads(pid)}


def _threads(pid: int) -> Iterator[tuple[str, _Thread]]:
    """The threads of a process and of all processes below it."""
    for task in Path(f"/proc/{pid}/task").glob("*"):
        children: list[str] = []
        with contextlib.suppress(OSError):  # it has just ended
            state = (task / "stat").read_text().rsplit(")", 1)[1].split()[0]
            used, queued, _ = (task / "schedstat").read_text().split()
            children = (task / "children").read_text().split()
            yield str(task), _Thread(state, int(used) / 1e9, int(queued) / 1e9)
        for child in children:
            yield from _threads(int(child))
