"""The processes of a pool of an engine, on this machine, and what must hold when one is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from syncbn.conformance import runner
from syncbn.conformance.case import Case
from syncbn.conformance.pool import RankPool


def keepers(pool: RankPool) -> list[int]:
    """The parents of the ranks, by rank."""
    assert pool._job is not None
    return [parent(pid) for _, pid in sorted(pool._job.processes().items())]


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().split("PPid:")[1].split()[0])


def wait_until_ended(*pids: int) -> None:
    """A process that its parent has not collected yet has ended as well."""
    end = time.monotonic() + 30
    for pid in pids:
        while (place := Path(f"/proc/{pid}/stat")).exists() and time.monotonic() < end:
            with contextlib.suppress(OSError):
                if place.read_text().rsplit(")", 1)[1].split()[0] == "Z":
                    break
            time.sleep(0.05)
    assert time.monotonic() < end, "it did not happen in time"


def assert_a_killed_rank_is_replaced(pool: RankPool, case: Case) -> None:
    """It costs a case, and its keeper starts the new one."""
    before = keepers(pool)
    assert pool._job is not None
    os.kill(pool._job.processes()[1], signal.SIGKILL)
    found = runner.run_case(pool, case).verdict
    assert found.verdict == "crash"
    assert "rank 1 died (signal 9, SIGKILL)" in str(found.message)
    assert runner.run_case(pool, case).verdict.verdict == "pass"
    assert keepers(pool) == before


def assert_an_error_of_the_machine(pool: RankPool, case: Case) -> None:
    """After a keeper was lost: no fault of the layer, and the next case has a new engine."""
    found = runner.run_case(pool, case).verdict
    assert found.verdict == "error"
    assert "the keeper of rank " in str(found.message)
    assert runner.run_case(pool, case).verdict.verdict == "pass"
