"""Two hosts on one machine: network namespaces that a pair of virtual Ethernet devices joins.

Each has a network and, for what the agent starts, a host name of its own. Files and processes are
those of the machine. It needs root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

_ROOT = Path(__file__).parents[1]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
_DEVICE = "link0"
_TOOLS = ("ip", "nft", "nsenter", "unshare", "hostname")
_LOSS = """\
table ip loss {{
  chain in {{
    type filter hook input priority 0
    iifname "{device}" numgen random mod 100 < {percent} drop
  }}
}}
"""


def why_not(delay: float = 0.0) -> str:
    """Why this machine cannot be two hosts with this delay; empty if it can."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if sys.platform != "linux" or missing:
        packages = "apt-get install iproute2 nftables util-linux hostname"
        return f"needs Linux and {', '.join(missing)}: {packages}"
    if os.geteuid():
        return "needs root, to make network namespaces"
    try:
        with TwoHosts("try", delay):
            return ""
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().splitlines()[-1]
        return f"needs network namespaces, and virtual devices between them: {reason}"


class TwoHosts:
    """The hosts with the ADDRESSES. Use it as a context manager, which removes them at its end.

    Args:
        name: of these two, next to others of this process.
        delay: the seconds that a packet takes from one to the other.
    """

    def __init__(self, name: str, delay: float = 0.0) -> None:
        self._name = f"syncbn-{os.getpid()}-{name}"
        self._delay = delay
        self._made = contextlib.ExitStack()

    def __enter__(self) -> TwoHosts:
        with contextlib.ExitStack() as made:
            for address in ADDRESSES:
                _run("ip", "netns", "add", self._namespace(address))
                made.callback(_run, "ip", "netns", "del", self._namespace(address))
                self._ip(address, "link", "set", "lo", "up")
            if self._delay:
                made.enter_context(self._slow_link())
            else:
                peer = ("peer", "name", _DEVICE, "netns", self._namespace(ADDRESSES[1]))
                self._ip(ADDRESSES[0], "link", "add", _DEVICE, "type", "veth", *peer)
            for address in ADDRESSES:
                self._ip(address, "addr", "add", f"{address}/24", "dev", _DEVICE)
                self._ip(address, "link", "set", _DEVICE, "up")
            self._made = made.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._made.close()

    @property
    def agent(self) -> tuple[str, ...]:
        """What ssh would be: it runs COMMAND on HOST, which it gets as $0 and $1."""
        inside = f"nsenter --net=/run/netns/{self._name}-$0"
        return ("sh", "-c", f'exec {inside} unshare --uts sh -c "hostname b.test; $1"')

    def on_the_first(self, command: Sequence[str]) -> list[str]:
        """The command, on the first host."""
        return ["nsenter", f"--net=/run/netns/{self._namespace(ADDRESSES[0])}", *command]

    def cut(self) -> None:
        self._ip(ADDRESSES[1], "link", "set", _DEVICE, "down")

    def mend(self) -> None:
        self._ip(ADDRESSES[1], "link", "set", _DEVICE, "up")

    def lose(self, percent: int) -> None:
        """Lose so many of the packets from now on, in both directions. 0 ends it."""
        for address in ADDRESSES:
            nft = ("ip", "netns", "exec", self._namespace(address), "nft")
            _run(*nft, "flush", "ruleset")
            if percent:
                _run(*nft, "-f", "-", text=_LOSS.format(device=_DEVICE, percent=percent))

    def processes(self) -> list[int]:
        """All processes on the two hosts."""
        return [
            int(pid)
            for address in ADDRESSES
            for pid in _run("ip", "netns", "pids", self._namespace(address)).split()
        ]

    @contextlib.contextmanager
    def _slow_link(self) -> Iterator[None]:
        words = (_DEVICE, str(self._delay), *map(self._namespace, ADDRESSES))
        command = [sys.executable, "-m", "audit.slow_link", *words]
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command, cwd=_ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            try:
                if process.stdout.readline() != "ready\n":
                    error = process.stderr.read()
                    raise subprocess.CalledProcessError(process.wait(), command, stderr=error)
                yield
            finally:
                process.stdin.close()

    def _namespace(self, address: str) -> str:
        return f"{self._name}-{address}"

    def _ip(self, address: str, *words: str) -> None:
        _run("ip", "-n", self._namespace(address), *words)


def _run(*words: str, text: str | None = None) -> str:
    return subprocess.run(words, input=text, capture_output=True, check=True, text=True).stdout
