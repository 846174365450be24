"""How rank processes start. A launcher starts one command on every rank and returns a Job.

The command connects to the controller by itself (syncbn.conformance.ranks.worker). So launchers
differ only in how they start processes, not in how the controller talks to these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from syncbn.launchers import local, mpirun, msrun, slurm, torchrun
from syncbn.launchers.site import Site


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
    """A way to start ranks, as often as necessary.

    `secret` is what every rank finds in SYNCBN_KEY, in hexadecimal digits. It never stands on a
    command line.

    Raises:
        SiteError: the launcher cannot start ranks on such a site.
    """

    secret: bytes

    def __init__(self, site: Site) -> None: ...

    def start(
        self,
        command: Sequence[str],
        ranks: int,
        environment: Mapping[str, str],
        preload: Sequence[str] = (),
    ) -> Job:
        """Start `command` on every rank.

        Its environment has RANK, WORLD_SIZE, LOCAL_RANK, SYNCBN_KEY, and in MASTER_ADDR the host
        where the ranks meet.

        Args:
            command: a program and its arguments. PYTHON -m MODULE has a function `main`.
            ranks: the number of ranks.
            environment: what is added to the environment.
            preload: the modules that every rank will import; a launcher may import them once.

        Raises:
            OSError: the program that starts the ranks does not exist, or cannot start them.
        """

    def plan(self, ranks: int, environment: Mapping[str, str]) -> list[tuple[str, str]]:
        """What `start` would run, without a start: each host with its command line."""

    def close(self) -> None:
        """End what serves all starts. Every job must have been stopped. It may start again."""


LAUNCHERS: dict[str, Callable[[Site], Launcher]] = {
    "local": local.LocalLauncher,
    "mpirun": mpirun.MpirunLauncher,
    "msrun": msrun.MsrunLauncher,
    "slurm": slurm.SlurmLauncher,
    "torchrun": torchrun.TorchrunLauncher,
}
