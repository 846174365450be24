"""Two hosts: network namespaces that a pair of virtual Ethernet devices joins. Needs root."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from audit.hosts import ADDRESSES, TwoHosts, why_not
from syncbn import reports
from tests.launchers.processes import parent

ROOT = Path(__file__).parents[2]

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

first, second, *agent = sys.argv[1:]
site = Site(2, (first, second), tuple(agent), first)
target = targets.parse("torch:tests/launchers/slow.py:Waits")
with RankPool(target, 4, "torchrun", site=site) as pool:
    for line in sys.stdin:
        verdict = runner.run_case(pool, case(int(line))).verdict
        print(verdict.verdict, str(verdict.message).replace(chr(10), " "), flush=True)
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    if reason := why_not():
        pytest.skip(reason)
    with TwoHosts("test") as found:
        yield found


def left(mark: str) -> list[int]:
    """The processes with a mark in their environment."""
    found = []
    for place in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in place.read_bytes().split(b"\0"):
                found.append(int(place.parent.name))
    return found


def verdicts(out: Path, on: TwoHosts | None = None) -> dict[str, tuple[str, float | None]]:
    """Verdict and ratio of each case of a short run on 4 ranks, here or on two hosts."""
    words = [sys.executable, "-m", "syncbn.conformance", "run", "--target", "syncbn.torch"]
    words += ["--ranks", "4", "--profile", "smoke", "--clause", "GRAD-1,ERR-6,ERR-9"]
    words += ["--oracle", "none", "--out", str(out)]
    if on is not None:
        words += ["--launcher", "torchrun", "--nodes", "2", "--hosts", ",".join(ADDRESSES)]
        words += ["--listen", f"{ADDRESSES[0]}:0", "--agent", shlex.join(on.agent)]
        words = on.on_the_first(words)
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    report = reports.load(out / "report.json")
    assert done.returncode == 0, [case["message"] for case in report["cases"]]
    assert report["restarts"] == []
    return {case["id"]: (case["verdict"], case["ratio"]) for case in report["cases"]}


def test_a_slow_link_that_loses_packets_changes_no_verdict(tmp_path: Path) -> None:
    """200 ms in each direction, and 5 % of the packets lost. ERR-9 takes more than the 20 s that a
    case has on a fast link, and all ranks sleep for more than the second that means a hang there.
    """
    if reason := why_not(delay=0.2):
        pytest.skip(reason)
    with TwoHosts("slow", delay=0.2) as slow:
        slow.lose(5)
        assert verdicts(tmp_path / "slow", slow) == verdicts(tmp_path / "local")


def rank_of(keeper: int) -> int:
    """The process of a rank."""
    return int(Path(f"/proc/{keeper}/task/{keeper}/children").read_text())


def keeper_of(rank: int, mark: str) -> int:
    """The process that keeps a rank: its parent is torchrun, which has no rank."""
    for pid in left(mark):
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        above = Path(f"/proc/{parent(pid)}/environ").read_bytes()
        if f"RANK={rank}".encode() in words and b"\0RANK=" not in above:
            return pid
    raise AssertionError("it is not there")


def test_a_link_that_is_cut_costs_a_case(hosts: TwoHosts, tmp_path: Path) -> None:
    """Two nodes, four ranks. A rank that is killed is named with its host. Lost packets cost
    nothing. After a cut there is a verdict in time, and all is well when the link is back."""
    reached = tmp_path / "in a backward"
    mark = f"SLOW_FILE={reached}"
    command = [sys.executable, "-c", CONTROLLER, *ADDRESSES, *hosts.agent]
    controller = subprocess.Popen(
        hosts.on_the_first(command),
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
        os.kill(rank_of(keeper_of(3, mark)), signal.SIGKILL)
        print(3, file=cases, flush=True)
        assert verdicts.readline().startswith("crash rank 3 on b.test died (signal 9, SIGKILL")
        hosts.lose(5)
        print(3, file=cases, flush=True)
        assert verdicts.readline().startswith("pass")
        hosts.lose(0)
        print(64, file=cases, flush=True)
        while not reached.exists():
            assert controller.poll() is None
            time.sleep(0.05)
        hosts.cut()
        reached.unlink()
        found = verdicts.readline()
        assert found.startswith("error the keeper of rank "), found
        assert " on b.test " in found
        hosts.mend()
        print(3, file=cases, flush=True)
        assert verdicts.readline().startswith("pass")
        cases.close()
        assert controller.wait(60) == 0
    end = time.monotonic() + 60
    while left(mark) and time.monotonic() < end:
        time.sleep(0.2)
    assert left(mark) == []
