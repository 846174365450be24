"""Processes that sleep, run, wait for a child that runs, or are stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from syncbn.conformance.activity import Activity

SPINS = "print(flush=True)\nwhile True: pass"
WAITS = "import time; print(flush=True); time.sleep(300)"
WAITS_FOR_CHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SPINS!r}])"
THREADS = f"import threading; threading.Thread(target=lambda: exec({SPINS!r})).start()"


@pytest.mark.parametrize(
    ("script", "idle"),
    [(SPINS, False), (WAITS, True), (WAITS_FOR_CHILD, False), (THREADS, False)],
)
def test_activity(script: str, idle: bool) -> None:
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        activity = Activity([process.pid])
        longest = 0.0
        for _ in range(8):
            time.sleep(0.1)
            longest = max(longest, activity.idle_seconds())
        assert (longest > 0.4) == idle
        assert (activity.busiest_seconds() > 0.05) != idle
        for pid in [*children(process.pid), process.pid]:
            subprocess.run(["kill", "-KILL", str(pid)], check=True)


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def test_a_stopped_process_does_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", SPINS], stdout=subprocess.PIPE) as process:
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.2)
        activity = Activity([process.pid])
        time.sleep(0.3)
        assert activity.idle_seconds() > 0.2
        process.kill()


def test_processes_on_one_processor_wait_for_it() -> None:
    processor = min(os.sched_getaffinity(0))
    script = f"import os; os.sched_setaffinity(0, {{{processor}}})\n{SPINS}"
    command = [sys.executable, "-c", script]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as one,
        subprocess.Popen(command, stdout=subprocess.PIPE) as other,
    ):
        for process in (one, other):
            assert process.stdout is not None
            process.stdout.readline()
        activity = Activity([one.pid])
        time.sleep(1.0)
        activity.idle_seconds()
        assert activity.queued_seconds() > 0.2
        one.kill()
        other.kill()


def test_what_cannot_be_seen_is_active() -> None:
    activity = Activity([])
    time.sleep(0.1)
    assert activity.idle_seconds() == 0.0
