"""How rank processes start. A launcher starts one command on every rank and gives a Job to hold.

The command dials the controller by itself (syncbn.conformance.ranks.worker), so launchers differ
only in how processes come to life, not in how they are spoken to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from syncbn.launchers import local, msrun


class Job(Protocol):
    """The processes of one start, whichever way they were started."""

    def dump_stacks(self) -> None:
        """Ask every rank that lives to write the stacks of its threads to its output."""

    def ended(self) -> list[int]:
        """The ranks whose process has ended."""

    def output(self, rank: int) -> str:
        """What a rank has written to stdout and stderr so far."""

    def stop(self) -> None:
        """End every process, by force, and wait until none is left."""


class Launcher(Protocol):
    """A way to start ranks."""

    def __call__(self, command: Sequence[str], ranks: int, environment: Mapping[str, str]) -> Job:
        """Start `command` on every rank with RANK, WORLD_SIZE, LOCAL_RANK and `environment`.

        Raises:
            OSError: what starts the ranks is not there.
        """


LAUNCHERS: dict[str, Launcher] = {"local": local.LocalJob, "msrun": msrun.MsrunJob}
