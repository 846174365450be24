"""Ranks as child processes of the controller, on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path


class LocalJob:
    """One child process for each rank. Each writes to a file of its own."""

    def __init__(self, command: Sequence[str], ranks: int, environment: Mapping[str, str]) -> None:
        self._logs = Path(tempfile.mkdtemp(prefix="syncbn-ranks-"))
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank in range(ranks):
            place = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
            with self._log(rank).open("wb") as log:
                process = subprocess.Popen(
                    command,
                    env={**os.environ, **environment, **place},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C in a terminal reaches only the controller
                )
            self._processes.append(process)

    def dump_stacks(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGUSR1)

    def ended(self) -> dict[int, str]:
        codes = {rank: process.poll() for rank, process in enumerate(self._processes)}
        return {rank: describe(code) for rank, code in codes.items() if code is not None}

    def output(self, rank: int) -> str:
        return self._log(rank).read_text(errors="replace")

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        shutil.rmtree(self._logs, ignore_errors=True)

    def _log(self, rank: int) -> Path:
        return self._logs / f"rank{rank}.log"


def describe(code: int) -> str:
    """How a process ended, from its return code as subprocess gives it."""
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"signal {-code}, {signal.Signals(-code).name}"
    except ValueError:  # a signal without a name
        return f"signal {-code}"
