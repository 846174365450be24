"""How rank processes start. A launcher starts one command on every rank and returns a Job.

The command connects to the controller by itself (syncbn.conformance.ranks.worker). So launchers
differ only in how they start processes, not in how the controller talks to these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from syncbn.launchers import local, msrun


class Job(Protocol):
    """The processes of one start."""

    def dump_stacks(self) -> None:
        """Make every living rank write the stacks of its threads to its output."""

    def ended(self) -> dict[int, str]:
        """The ranks whose process has ended, and how, as in "exit status 1"."""

    def output(self, rank: int) -> str:
        """The text that a rank has written to stdout and stderr so far."""

    def stop(self) -> None:
        """Kill every process, and wait until all have ended."""


class Launcher(Protocol):
    """A way to start ranks."""

    def __call__(self, command: Sequence[str], ranks: int, environment: Mapping[str, str]) -> Job:
        """Start `command` on every rank with RANK, WORLD_SIZE, LOCAL_RANK and `environment`.

        Raises:
            OSError: the program that starts the ranks does not exist.
        """


LAUNCHERS: dict[str, Launcher] = {"local": local.LocalJob, "msrun": msrun.MsrunJob}
