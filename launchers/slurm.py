"""Ranks that Slurm places: srun in an allocation, such as that of an sbatch script or of salloc."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Sequence

from syncbn.launchers.engine import EngineLauncher
from syncbn.launchers.site import LOOP_BACK


class SlurmLauncher(EngineLauncher):
    """Starts one step of the job."""

    name = "srun"
    variables = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")

    def check(self) -> None:
        if shutil.which("srun") is None:
            raise FileNotFoundError(
                "launcher slurm needs srun, which is not installed: apt-get install slurm-client"
            )
        if "SLURM_JOB_ID" not in os.environ:
            raise FileNotFoundError(
                "launcher slurm needs an allocation: start the command in an sbatch script, or "
                "after salloc"
            )

    def commands(
        self, ranks: int, keeper: Sequence[str], environment: Iterable[str]
    ) -> list[tuple[str, list[str]]]:
        options = [
            f"--nodes={self.site.nodes}",
            f"--ntasks={ranks}",
            f"--ntasks-per-node={self.site.ranks_per_node(ranks)}",
            "--kill-on-bad-exit=1",
            "--input=none",
            "--export=ALL",  # which hands the secret to slurmd, and to no command line
        ]
        if self.site.hosts:
            options.append(f"--nodelist={','.join(self.site.hosts)}")
        return [(LOOP_BACK, ["srun", *options, sys.executable, *keeper])]

    def reason(self, log: str) -> str:
        """The last line of a task or of slurmstepd, before srun's own about how the step ended."""
        own = ("srun: ", "slurmstepd: error: *** STEP")
        lines = [line for line in log.splitlines() if not line.startswith(own)]
        return super().reason("\n".join(lines) or log)
