"""Ranks that torchrun places, on one node or several, as PyTorch's users start theirs."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Sequence

from syncbn.launchers.engine import EngineLauncher
from syncbn.launchers.site import LOOP_BACK, Site, free_port


class TorchrunLauncher(EngineLauncher):
    """Starts one torchrun for each node."""

    name = "torchrun"
    variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK")

    def __init__(self, site: Site) -> None:
        site.need_hosts(self.name)
        super().__init__(site)

    def check(self) -> None:
        if importlib.util.find_spec("torch") is None:
            raise FileNotFoundError(
                "launcher torchrun needs PyTorch, which is not installed: pip install "
                "'syncbn[torch]'"
            )

    def commands(
        self, ranks: int, keeper: Sequence[str], environment: Iterable[str]
    ) -> list[tuple[str, list[str]]]:
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        # Without a folder for logs: the keepers read what ranks write.
        common = [
            f"--nproc-per-node={self.site.ranks_per_node(ranks)}",
            "--max-restarts=0",
            f"--log-dir={os.devnull}",
        ]
        hosts = self.site.hosts or (LOOP_BACK,)
        if self.site.nodes == 1:
            return [(hosts[0], [*torchrun, "--standalone", *common, *keeper])]
        port = free_port()  # of this machine, which often has rank 0
        meeting = [
            f"--nnodes={self.site.nodes}",
            f"--master-addr={hosts[0]}",
            f"--master-port={port}",
        ]
        return [
            (host, [*torchrun, *meeting, f"--node-rank={node}", *common, *keeper])
            for node, host in enumerate(hosts)
        ]

    def reason(self, log: str) -> str:
        """The last line before torchrun's own report, which begins with the date in its form."""
        before = re.split(r"^[EW]\d{4} ", log, maxsplit=1, flags=re.MULTILINE)[0]
        return super().reason(before if before.strip() else log)
