"""Run the suite under faults, and check that each case has one verdict and that nothing is left."""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from audit.storm import SLEEP
from syncbn import reports
from syncbn.conformance.cases import catalogue
from syncbn.conformance.place import JOURNAL

ROOT = Path(__file__).resolve().parents[2]
_MARK = "STORM_RUN"
_TARGET = "torch:audit/storm/layer.py:Stormy"
_CACHES = (f"torchinductor_{getpass.getuser()}",)  # what PyTorch keeps for all its users
_LIMIT_SECONDS = 1200.0  # for one run
_EARLY = 0.3  # the share of runs that have faults from their start, not from their first result
_GONE_SECONDS = 20.0  # in which all processes of a run must be gone


def main(
    *, minutes: float, seed: int, ranks: int, profile: str, rate: float, console: Console
) -> int:
    """Exit status: 0 if every run kept every promise, 1 if not.

    Args:
        minutes: for how long runs are started; at least one is.
        seed: of the faults.
        ranks: of each run.
        profile: of each run.
        rate: how many forwards in one have a fault from inside.
        console: where to print.
    """
    end, runs, broken = time.monotonic() + 60 * minutes, 0, 0
    verdicts: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    while runs == 0 or time.monotonic() < end:
        one = _Run(f"{seed}-{runs}", ranks, profile, rate)
        promises = one.run()
        runs, broken = runs + 1, broken + bool(promises)
        verdicts += one.verdicts
        faults += one.faults
        for promise in promises:
            console.print(f"run {one.name}: {promise}", style="bold red", highlight=False)
    console.print(f"{runs} runs of {profile} on {ranks} ranks, {broken} broke a promise")
    console.print("faults from outside: " + _counts(faults), highlight=False)
    console.print("verdicts: " + _counts(verdicts), highlight=False)
    return 1 if broken else 0


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counter.most_common()) or "none"


class _Run:
    """One run of the suite, and the faults that it gets from outside."""

    def __init__(self, name: str, ranks: int, profile: str, rate: float) -> None:
        self.name = name
        self.verdicts: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self._ranks, self._profile, self._rate = ranks, profile, rate
        self._random = random.Random(name)
        self._mark = f"{_MARK}={os.getpid()}-{name}".encode()

    def run(self) -> list[str]:
        """The promises that the run broke."""
        with tempfile.TemporaryDirectory(prefix="syncbn-storm-") as folder:
            out, temporary = Path(folder, "out"), Path(folder, "tmp")
            temporary.mkdir()
            command = [sys.executable, "-m", "syncbn.conformance", "run", "--target", _TARGET]
            command += ["--ranks", str(self._ranks), "--profile", self._profile]
            command += ["--oracle", "none", "--max-hangs", "1000", "--out", str(out)]
            name, value = self._mark.decode().split("=")
            environment = {name: value, "STORM": f"{self.name} {self._rate}"}
            environment["TMPDIR"] = str(temporary)
            with tempfile.TemporaryFile() as output:
                controller = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=os.environ | environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
                try:
                    status = self._send_faults(controller, out)
                finally:
                    controller.kill()
                output.seek(0)
                text = output.read().decode(errors="replace")
            files = [place.name for place in temporary.iterdir()]
            broken = [*self._left(), *(f"it left {name}" for name in files if name not in _CACHES)]
            if status is None:
                broken.append(f"it did not end in {_LIMIT_SECONDS:.0f} s")
            elif status != -signal.SIGKILL:
                broken += self._judge(status, out, text)
            return broken

    def _send_faults(self, controller: subprocess.Popen[bytes], out: Path) -> int | None:
        """Send faults until the run has ended. Returns its status, or None if it was too slow."""
        end = time.monotonic() + _LIMIT_SECONDS
        started = self._random.random() < _EARLY
        while time.monotonic() < end:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return controller.wait(self._random.uniform(1.0, 8.0))
            started = started or _has_a_result(out / JOURNAL)
            if not started:
                continue
            fault = self._random.choice(_OUTSIDE)
            with contextlib.suppress(OSError, IndexError):
                fault(self._random, controller.pid)
                self.faults[fault.__name__.strip("_").replace("_", " ")] += 1
        controller.kill()
        controller.wait()
        return None

    def _judge(self, status: int, out: Path, text: str) -> Iterator[str]:
        """What is wrong with the report of a run that has ended by itself."""
        if status == 2 and not out.joinpath("report.json").exists():
            last = text.splitlines()[-1] if text else ""
            if not last.startswith("syncbn-conformance: "):
                yield f"status 2 without a reason: {text[-1000:]}"
            self.verdicts["not started"] += 1
            return
        try:
            report = reports.load(out / "report.json")
        except reports.ReportError as error:
            yield f"no report, status {status}: {error}; {text[-1000:]}"
            return
        ids = Counter(case["id"] for case in report["cases"])
        expected = {case.id for case in catalogue(self._ranks, self._profile)}
        if lost := expected - set(ids):
            yield f"{len(lost)} cases are lost"
        if doubled := [id for id, count in ids.items() if count > 1]:
            yield f"{len(doubled)} cases are doubled"
        wanted = {"pass": 0, "fail": 1, "error": 3}.get(report["summary"]["verdict"])
        if status != wanted:
            yield f"status {status} with the verdict {report['summary']['verdict']}; {text[-1000:]}"
        if "Traceback" in text:
            yield f"a traceback: {text[-1000:]}"
        self.verdicts.update(case["verdict"] for case in report["cases"])

    def _left(self) -> list[str]:
        """The processes of the run that are still there."""
        end = time.monotonic() + _GONE_SECONDS
        while (found := self._processes()) and time.monotonic() < end:
            time.sleep(0.1)
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return [f"process {pid} is left: {command}" for pid, command in found.items()]

    def _processes(self) -> dict[int, str]:
        """The processes with the mark, and children of the layer without any environment."""
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (place / "cmdline").read_bytes().split(b"\0")
                words = (place / "environ").read_bytes().split(b"\0")
                if self._mark in words or SLEEP.encode() in command:
                    found[int(place.name)] = b" ".join(command).decode(errors="replace")
        return found


def _has_a_result(journal: Path) -> bool:
    return journal.exists() and journal.read_bytes().count(b"\n") > 1


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for place in tasks for child in place.read_text().split()]


def _guard(controller: int) -> int:
    """The guard of the parent of the ranks.

    Raises:
        ProcessLookupError: there is none at the moment.
    """
    for pid in _children(controller):
        if b"syncbn.launchers.keeper" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    raise ProcessLookupError


def _keeper(controller: int) -> int:
    """The parent of the ranks.

    Raises:
        IndexError: there is none at the moment.
    """
    return _children(_guard(controller))[0]


def _any_rank(choose: random.Random, controller: int) -> int:
    return choose.choice(_children(_keeper(controller)))


def _kill_a_rank(choose: random.Random, controller: int) -> None:
    os.kill(_any_rank(choose, controller), signal.SIGKILL)


def _stop_a_rank(choose: random.Random, controller: int) -> None:
    os.kill(_any_rank(choose, controller), signal.SIGSTOP)


def _pause_a_rank(choose: random.Random, controller: int) -> None:
    _pause(_any_rank(choose, controller), 0.7)


def _kill_the_parent_of_the_ranks(choose: random.Random, controller: int) -> None:
    if choose.random() < 0.5:  # a run that cannot start twice in a row gives up
        raise IndexError
    os.kill(choose.choice((_guard, _keeper))(controller), signal.SIGKILL)


def _pause_the_parent_of_the_ranks(_: random.Random, controller: int) -> None:
    _pause(_keeper(controller), 2.0)


def _pause_the_controller(_: random.Random, controller: int) -> None:
    _pause(controller, 2.0)


def _pause(pid: int, seconds: float) -> None:
    os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    os.kill(pid, signal.SIGCONT)


def _kill_the_controller(choose: random.Random, controller: int) -> None:
    if choose.random() < 0.1:  # otherwise no run comes to its end
        os.kill(controller, signal.SIGKILL)
    else:
        raise IndexError


def _strangers(choose: random.Random, controller: int) -> None:
    """Connect to every port of the run, and send something or nothing."""
    for pid in (controller, *_children(_keeper(controller))):
        for port in _ports(pid):
            with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
                connection.sendall(choose.randbytes(choose.choice((0, 1, 100, 10_000))))


def _ports(pid: int) -> list[int]:
    sockets = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = [row for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]
    return [int(row[1].split(":")[1], 16) for row in listening]


_OUTSIDE: tuple[Callable[[random.Random, int], None], ...] = (
    _kill_a_rank,
    _stop_a_rank,
    _pause_a_rank,
    _kill_the_parent_of_the_ranks,
    _pause_the_parent_of_the_ranks,
    _pause_the_controller,
    _kill_the_controller,
    _strangers,
)
