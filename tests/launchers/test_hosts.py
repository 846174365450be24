"""Two hosts: network namespaces that a pair of virtual Ethernet devices joins. Needs root."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOSTS = ("10.77.0.1", "10.77.0.2")
NAMES = f"syncbn-{os.getpid()}"  # with an address, the name of a namespace
TOOLS = ("ip", "nsenter", "unshare", "hostname")

# What ssh would be: it runs COMMAND on HOST, which it gets as $0 and $1.
AGENT = f'''exec nsenter --net=/run/netns/{NAMES}-$0 unshare --uts sh -c "hostname b.test; $1"'''

CONTROLLER = """
import sys
from syncbn.conformance import runner, targets
from syncbn.conformance.case import Case, Step
from syncbn.conformance.pool import RankPool
from syncbn.launchers import engine
from syncbn.launchers.site import Site

# A torchrun that has lost a node waits for it in vain, 40 s if it may.
engine._END_SECONDS, engine._KILL_SECONDS = 2.0, 5.0

def case(channels):
    step = Step(tuple((2 + rank, channels, 3) for rank in range(4)))
    layer = {"num_features": channels}
    return Case("FWD-1", f"{channels}", 4, layer, (step,), ("y", "grad_input"))

agent, *hosts = sys.argv[1:]
site = Site(2, tuple(hosts), ("sh", "-c", agent), hosts[0])
target = targets.parse("torch:tests/launchers/slow.py:Waits")
with RankPool(target, 4, "torchrun", site=site) as pool:
    for line in sys.stdin:
        verdict = runner.run_case(pool, case(int(line))).verdict
        print(verdict.verdict, str(verdict.message).replace(chr(10), " "), flush=True)
"""


def why_not() -> str:
    """Why this machine cannot be two hosts; empty if it can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if sys.platform != "linux" or missing:
        return f"needs Linux and {', '.join(missing)}: apt-get install iproute2 util-linux hostname"
    name = f"{NAMES}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"needs root, to make network namespaces: {made.stderr.strip()}"
    link = ["ip", "-n", name, "link", "add", "link0", "type", "veth", "peer", "name", "link1"]
    made = subprocess.run(link, capture_output=True, text=True)
    ip("netns", "del", name)
    if made.returncode:
        return f"needs pairs of virtual Ethernet devices: {made.stderr.strip()}"
    return ""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[str, ...]]:
    if reason := why_not():
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        for host in HOSTS:
            ip("netns", "add", f"{NAMES}-{host}")
            stack.callback(ip, "netns", "del", f"{NAMES}-{host}")
            ip("-n", f"{NAMES}-{host}", "link", "set", "lo", "up")
        peer = ("peer", "name", "link0", "netns", f"{NAMES}-{HOSTS[1]}")
        ip("link", "add", "link0", "netns", f"{NAMES}-{HOSTS[0]}", "type", "veth", *peer)
        for host in HOSTS:
            ip("-n", f"{NAMES}-{host}", "addr", "add", f"{host}/24", "dev", "link0")
            set_link(host, "up")
        yield HOSTS


def set_link(host: str, state: str) -> None:
    ip("-n", f"{NAMES}-{host}", "link", "set", "link0", state)


def left(mark: str) -> list[int]:
    """The processes with a mark in their environment."""
    found = []
    for place in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in place.read_bytes().split(b"\0"):
                found.append(int(place.parent.name))
    return found


def test_a_link_that_is_cut_costs_a_case(hosts: tuple[str, ...], tmp_path: Path) -> None:
    """Two nodes, four ranks: a verdict in time, and all is well when the link is back."""
    reached = tmp_path / "in a backward"
    mark = f"SLOW_FILE={reached}"
    inside = ["nsenter", f"--net=/run/netns/{NAMES}-{hosts[0]}"]
    controller = subprocess.Popen(
        [*inside, sys.executable, "-c", CONTROLLER, AGENT, *hosts],
        cwd=ROOT,
        env=os.environ | {"SLOW_FILE": str(reached), "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with controller:
        cases, verdicts = controller.stdin, controller.stdout
        assert cases is not None
        assert verdicts is not None
        print(3, file=cases, flush=True)
        assert verdicts.readline().startswith("pass")
        assert len(left(mark)) >= 10  # ranks, keepers and torchrun on both hosts
        print(64, file=cases, flush=True)
        while not reached.exists():
            assert controller.poll() is None
            time.sleep(0.05)
        set_link(hosts[1], "down")
        reached.unlink()
        found = verdicts.readline()
        assert found.startswith("error the keeper of rank "), found
        assert " on b.test " in found
        set_link(hosts[1], "up")
        print(3, file=cases, flush=True)
        assert verdicts.readline().startswith("pass")
        cases.close()
        assert controller.wait(60) == 0
    end = time.monotonic() + 60
    while left(mark) and time.monotonic() < end:
        time.sleep(0.2)
    assert left(mark) == []
