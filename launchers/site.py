"""Where ranks start, and where the controller listens for them."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import platform
import socket
from dataclasses import dataclass, replace
from pathlib import Path

import syncbn

LOOP_BACK = "127.0.0.1"


class SiteError(ValueError):
    """Parts of a site do not fit together. The message is one line."""


@dataclass(frozen=True)
class Site:
    """The machines of a run.

    nodes: the number of machines, which get the same number of ranks.
    hosts: their names or addresses, as the other machines reach them. The first has rank 0. Empty
        for this machine alone, or if the launcher has a list of its own.
    agent: a program that runs a command on a host, with the arguments HOST COMMAND, as ssh does.
    listen: the name or address of this machine on which the controller waits for ranks.
    port: the port of the ranks, and the next one is that of their keepers; 0 for any two.

    Raises:
        SiteError: the parts do not fit together.
    """

    nodes: int = 1
    hosts: tuple[str, ...] = ()
    agent: tuple[str, ...] = ("ssh", "-o", "BatchMode=yes")
    listen: str = LOOP_BACK
    port: int = 0

    def __post_init__(self) -> None:
        if self.hosts and len(self.hosts) != self.nodes:
            raise SiteError(f"hosts must name {self.nodes} nodes, got {','.join(self.hosts)}")
        if self.listen in ("", "0.0.0.0"):
            raise SiteError(
                f"listen must be an address that ranks can connect to, got {self.listen!r}"
            )
        here = all(map(is_here, self.hosts)) if self.hosts else self.nodes == 1
        if is_loop_back(self.listen) and not here:
            raise SiteError(
                "listen must be an address that the other nodes reach, got the loop-back "
                f"address {self.listen!r}"
            )

    @property
    def meeting(self) -> str:
        """The host of rank 0, where the ranks meet; empty if only the launcher has its name."""
        if self.hosts:
            return self.hosts[0]
        return LOOP_BACK if self.nodes == 1 else ""

    def need_hosts(self, launcher: str) -> None:
        """Raises:
        SiteError: there are several nodes without names.
        """
        if self.nodes > 1 and not self.hosts:
            raise SiteError(f"hosts must name the {self.nodes} nodes for launcher {launcher}")

    def part(self, ranks: int) -> Site:
        """The site of this many ranks: the first machines, as many as get the same number each."""
        nodes = max(n for n in range(1, self.nodes + 1) if ranks % n == 0)
        return replace(self, nodes=nodes, hosts=self.hosts[:nodes])

    def ranks_per_node(self, ranks: int) -> int:
        """How many of the ranks each node gets.

        Raises:
            SiteError: the nodes cannot get the same number.
        """
        if ranks % self.nodes:
            raise SiteError(f"ranks must be a multiple of the {self.nodes} nodes, got {ranks}")
        return ranks // self.nodes


def is_loop_back(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_here(host: str) -> bool:
    """Whether a host is this machine, where a socket can have its address."""
    try:
        with socket.create_server((host, 0)):
            return True
    except OSError:
        return False


def free_port(host: str = LOOP_BACK) -> int:
    """A port of this machine that is free at this moment."""
    with socket.create_server((host, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def machine() -> str:
    """The machine of this process.

    In one machine, numbers of processes name the same ones, and what one process sends to another
    arrives at once. So two network namespaces are two machines: their link may be slow.
    """
    with contextlib.suppress(OSError):
        started = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return " ".join([started, *(os.readlink(f"/proc/self/ns/{of}") for of in ("pid", "net"))])
    return socket.gethostname()


def versions() -> dict[str, str]:
    """The versions that the controller and all ranks must share."""
    return {"syncbn": syncbn.__version__, "python": platform.python_version()}
