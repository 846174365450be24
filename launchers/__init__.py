"""How rank processes start. A launcher starts one command on every rank and returns a Job.

The command connects to the controller by itself (syncbn.conformance.ranks.worker). So launchers
differ only in how they start processes, not in how the controller talks to these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from syncbn.launchers import local, msrun


class Job(Protocol):
    """The processes of one start."""

    def processes(self) -> dict[int, int]:
        """The process id of each rank that was started, as far as they are known."""

    def dump_stacks(self) -> None:
        """Make every living rank write the stacks of its threads to its output."""

    def ended(self) -> dict[int, str]:
        """The ranks whose process has ended, and how, as in "exit status 1"."""

    def failure(self) -> str:
        """Why the launcher has lost its ranks, whatever they did; empty if it has not."""

    def output(self, rank: int) -> str:
        """The end of the text that a rank has written to stdout and stderr so far."""

    def stop(self) -> None:
        """Kill every process, also those that ranks have started, and wait for their end."""


class Launcher(Protocol):
    """A way to start ranks, as often as necessary."""

    def start(
        self,
        command: Sequence[str],
        ranks: int,
        environment: Mapping[str, str],
        preload: Sequence[str] = (),
    ) -> Job:
        """Start `command` on every rank with RANK, WORLD_SIZE, LOCAL_RANK and `environment`.

        Args:
            command: a program and its arguments. PYTHON -m MODULE has a function `main`.
            ranks: the number of ranks.
            environment: what is added to the environment.
            preload: the modules that every rank will import; a launcher may import them once.

        Raises:
            OSError: the program that starts the ranks does not exist, or cannot start them.
        """

    def close(self) -> None:
        """End what serves all starts. Every job must have been stopped."""


LAUNCHERS: dict[str, Callable[[], Launcher]] = {
    "local": local.LocalLauncher,
    "msrun": msrun.MsrunLauncher,
}
