"""Run the suite under faults, and check that each case has one verdict and that nothing is left."""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from audit.hosts import why_not
from audit.storm import SLEEP
from audit.storm.one_machine import OneMachine
from audit.storm.two_hosts import TwoHosts
from syncbn import reports
from syncbn.conformance import ConformanceError
from syncbn.conformance.cases import catalogue
from syncbn.conformance.place import JOURNAL

ROOT = Path(__file__).resolve().parents[2]
_MARK = "STORM_RUN"
_TARGET = "torch:audit/storm/layer.py:Stormy"
_CACHES = (f"torchinductor_{getpass.getuser()}",)  # what PyTorch keeps for all its users
_LIMIT_SECONDS = 1200.0  # for one run
_EARLY = 0.3  # the share of runs that have faults from their start, not from their first result
_MOST_FAULTS = 30  # from outside in one run, so that it comes to its end
_TRIES = 10  # to find a fault that has something to hit


def main(
    *,
    minutes: float,
    seed: int,
    ranks: int,
    profile: str,
    rate: float,
    every: float,
    two_hosts: bool,
    console: Console,
) -> int:
    """Exit status: 0 if every run kept every promise, 1 if not.

    Args:
        minutes: for how long runs are started; at least one is.
        seed: of the faults.
        ranks: of each run.
        profile: of each run.
        rate: how many forwards in one have a fault from inside.
        every: the mean seconds between two faults from outside.
        two_hosts: whether each run is on two hosts, as network namespaces, by torchrun.
        console: where to print.

    Raises:
        ConformanceError: this machine cannot be two hosts.
    """
    if two_hosts and (reason := why_not()):
        raise ConformanceError(f"a storm on two hosts {reason}")
    began, runs, broken, restarts = time.monotonic(), 0, 0, 0
    end = began + 60 * minutes
    verdicts: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    with TwoHosts() if two_hosts else OneMachine() as place:
        while runs == 0 or time.monotonic() < end:
            one = _Run(f"{seed}-{runs}", ranks, profile, rate, every, place)
            promises = one.run()
            runs, broken = runs + 1, broken + bool(promises)
            restarts += one.restarts
            verdicts += one.verdicts
            faults.update(one.sent)
            for promise in promises:
                console.print(f"run {one.name}: {promise}", style="bold red", highlight=False)
            if promises:
                console.print(f"after {', '.join(one.sent)}", highlight=False)
    seconds = time.monotonic() - began
    console.print(
        f"{runs} runs of {profile} on {ranks} ranks in {seconds / 60:.1f} minutes, "
        f"{broken} broke a promise; the ranks started again {restarts} times",
        highlight=False,
    )
    pace = f"{faults.total()}, one in {seconds / max(1, faults.total()):.1f} s"
    console.print(f"faults from outside: {pace}: {_counts(faults)}", highlight=False)
    console.print("verdicts: " + _counts(verdicts), highlight=False)
    return 1 if broken else 0


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counter.most_common()) or "none"


class _Run:
    """One run of the suite, and the faults that it gets from outside."""

    def __init__(
        self,
        name: str,
        ranks: int,
        profile: str,
        rate: float,
        every: float,
        place: OneMachine | TwoHosts,
    ) -> None:
        self.name = name
        self.restarts = 0  # of the ranks
        self._every = every
        self._place = place
        self.verdicts: Counter[str] = Counter()
        self.sent: list[str] = []  # the faults from outside
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
            command += self._place.options
            name, value = self._mark.decode().split("=")
            environment = {name: value, "STORM": f"{self.name} {self._rate}"}
            environment["TMPDIR"] = str(temporary)
            with tempfile.TemporaryFile() as output:
                controller = subprocess.Popen(
                    self._place.command(command),
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
                    self._place.settle()
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
                return controller.wait(self._random.uniform(0.2, 1.8) * self._every)
            started = started or _has_a_result(out / JOURNAL)
            if not started:
                continue
            if len(self.sent) == _MOST_FAULTS:
                continue
            self._hit(controller.pid)
        controller.kill()
        controller.wait()
        return None

    def _hit(self, controller: int) -> None:
        """Send one fault. Some have nothing to hit while ranks start."""
        for _ in range(_TRIES):
            with contextlib.suppress(OSError, IndexError):
                self.sent.append(self._place.hit(self._random, controller))
                return

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
        self.restarts = len(report["restarts"])
        self.verdicts.update(case["verdict"] for case in report["cases"])

    def _left(self) -> list[str]:
        """The processes of the run that are still there."""
        end = time.monotonic() + self._place.gone_seconds
        while (found := self._processes()) and time.monotonic() < end:
            time.sleep(0.1)
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return [f"process {pid} is left: {command}" for pid, command in found.items()]

    def _processes(self) -> dict[int, str]:
        """The processes with the mark, and children of the layer without any environment."""
        others = self._place.processes()
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (place / "cmdline").read_bytes().split(b"\0")
                words = (place / "environ").read_bytes().split(b"\0")
                pid = int(place.name)
                if self._mark in words or SLEEP.encode() in command or pid in others:
                    found[pid] = b" ".join(command).decode(errors="replace")
        return found


def _has_a_result(journal: Path) -> bool:
    return journal.exists() and journal.read_bytes().count(b"\n") > 1
