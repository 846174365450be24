"""The processes of a pool, on this machine."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

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
