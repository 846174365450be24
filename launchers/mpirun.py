"""Ranks that Open MPI's mpirun places, on one node or several. The ranks themselves use no MPI."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence

from syncbn.launchers.engine import EngineLauncher
from syncbn.launchers.site import LOOP_BACK, Site

_LONGEST = 400  # characters of a reason


class MpirunLauncher(EngineLauncher):
    """Starts one mpirun on this machine, which starts its own processes on the nodes."""

    name = "mpirun"
    variables = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")

    def __init__(self, site: Site) -> None:
        site.need_hosts(self.name)
        super().__init__(site)

    def check(self) -> None:
        if shutil.which("mpirun") is None:
            raise FileNotFoundError(
                "launcher mpirun needs Open MPI, which is not installed: apt-get install "
                "openmpi-bin"
            )

    def commands(
        self, ranks: int, keeper: Sequence[str], environment: Iterable[str]
    ) -> list[tuple[str, list[str]]]:
        each = self.site.ranks_per_node(ranks)
        options = ["-np", str(ranks), "--map-by", f"ppr:{each}:node:OVERSUBSCRIBE"]
        options += ["--bind-to", "none"]
        if self.site.hosts:
            options += ["--host", ",".join(f"{host}:{each}" for host in self.site.hosts)]
            options += ["--mca", "plm_rsh_agent", shlex.join(self.site.agent)]
        if os.geteuid() == 0:  # Open MPI refuses to run as root unless it is told to
            options.append("--allow-run-as-root")
        for name in environment:  # without values, which would stand on the command line
            options += ["-x", name]
        return [(LOOP_BACK, ["mpirun", *options, sys.executable, *keeper])]

    def reason(self, log: str) -> str:
        """The last line before mpirun's own report between two lines of hyphens, or that report."""
        before, _, own = log.partition("-" * 60)
        return super().reason(before) or " ".join(own.replace("-" * 10, "").split())[:_LONGEST]
