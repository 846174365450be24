"""Ranks that msrun starts on this machine, as MindSpore's users start theirs. Needs Linux.

msrun starts a program once for each rank, and once more as the scheduler, through which the ranks
meet in mindspore.communication.init(). That program is this file, which becomes the command or the
scheduler. msrun runs without --join, because with that it kills the peers of a rank that fails
before they can report. So msrun ends as soon as all processes have started, and a mark in their
environment finds them again.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from syncbn.launchers.site import LOOP_BACK, Site, SiteError, free_port

_MARK = "SYNCBN_MSRUN"
_KEPT = 1 << 16  # bytes of output that are shown of each rank
_LONG_LOG = 64 << 20  # bytes on disk after which a log is emptied
_SCHEDULER = "from mindspore.communication import init; init()"


class MsrunLauncher:
    """Calls msrun for each start."""

    def __init__(self, site: Site) -> None:
        if site.hosts or site.nodes > 1:
            raise SiteError("launcher msrun starts ranks here: nodes and hosts must not be given")
        self.secret = secrets.token_bytes(32)

    def start(
        self,
        command: Sequence[str],
        ranks: int,
        environment: Mapping[str, str],
        preload: Sequence[str] = (),  # each rank of msrun is a program of its own
    ) -> MsrunJob:
        return MsrunJob(command, ranks, {**environment, "SYNCBN_KEY": self.secret.hex()})

    def plan(self, ranks: int, environment: Mapping[str, str]) -> list[tuple[str, str]]:
        logs = Path(tempfile.gettempdir(), "syncbn-msrun-...")
        return [(LOOP_BACK, shlex.join(_msrun(ranks, free_port(), logs, ["..."])))]

    def close(self) -> None:
        """Nothing outlives a job."""


class MsrunJob:
    """The ranks and the scheduler of one call of msrun.

    Raises:
        FileNotFoundError: MindSpore is not installed.
    """

    def __init__(self, command: Sequence[str], ranks: int, environment: Mapping[str, str]) -> None:
        if importlib.util.find_spec("mindspore") is None:
            raise FileNotFoundError(
                "launcher msrun needs MindSpore, which is not installed: "
                "pip install 'syncbn[mindspore]'"
            )
        self._ranks = ranks
        self._logs = Path(tempfile.mkdtemp(prefix="syncbn-msrun-"))
        # msrun starts the first python3 in PATH, which must be this one.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        # The scheduler reads the pipe, so that it ends with the controller.
        with self._own_log.open("wb") as log:
            self._msrun = subprocess.Popen(
                _msrun(ranks, free_port(), self._logs, command),
                env={**os.environ, **environment, "PATH": path, _MARK: str(self._logs)},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that Ctrl-C in a terminal reaches only the controller
            )

    def processes(self) -> dict[int, int]:
        return self._workers()

    def dump_stacks(self) -> None:
        for pid in self._workers().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)

    def ended(self) -> dict[int, str]:
        self._shorten_logs()
        if self._msrun.poll() is None:  # some may not have started yet
            return {}
        workers = self._workers()
        ended = [rank for rank in range(self._ranks) if rank not in workers]
        return dict.fromkeys(ended, "how is not known: msrun ends before its ranks")

    def failure(self) -> str:
        return ""

    def output(self, rank: int) -> str:
        if self._msrun.poll():  # msrun failed, and its log has the reason
            return _end_of(self._own_log)
        log = self._log(rank)
        return _end_of(log) if log.exists() else ""

    def stop(self) -> None:
        with self._msrun:  # first, so that it starts no more processes
            self._msrun.kill()
        while processes := list(self._processes()):
            for pid, _ in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        shutil.rmtree(self._logs, ignore_errors=True)

    def _shorten_logs(self) -> None:
        """Give back the space of long logs. A rank goes on to write where it was."""
        for log in map(self._log, range(self._ranks)):
            with contextlib.suppress(FileNotFoundError):
                if log.stat().st_blocks * 512 > _LONG_LOG:
                    os.truncate(log, 0)

    def _log(self, rank: int) -> Path:
        return self._logs / f"worker_{rank}.log"

    @property
    def _own_log(self) -> Path:
        return self._logs / "msrun.log"

    def _workers(self) -> dict[int, int]:
        """The process id of each living rank, without the processes that a rank has started."""
        by_rank = {}
        for pid, environment in self._processes():
            with contextlib.suppress(ProcessLookupError):
                # msrun gives every rank a session of its own.
                if environment.get("MS_ROLE") == "MS_WORKER" and os.getsid(pid) == pid:
                    by_rank[int(environment["MS_NODE_ID"])] = pid
        return by_rank

    def _processes(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Every process of this start, with its initial environment."""
        for place in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # it has just ended, or belongs to another user
                lines = os.fsdecode(place.read_bytes()).split("\0")
                environment = dict(line.split("=", 1) for line in lines if "=" in line)
                if environment.get(_MARK) == str(self._logs):
                    yield int(place.parent.name), environment


def _end_of(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _KEPT))
        return file.read().replace(b"\0", b"").decode(errors="replace")


def _msrun(ranks: int, port: int, logs: Path, command: Sequence[str]) -> list[str]:
    """The command line of msrun."""
    options = {
        "worker_num": ranks,
        "local_worker_num": ranks,
        "master_port": port,
        "log_dir": logs,
    }
    return [
        *(sys.executable, "-m", "mindspore.parallel.cluster.run"),
        *(f"--{name}={value}" for name, value in options.items()),
        *("python3", __file__, *command),
    ]


def _schedule() -> None:
    """Be the scheduler until the controller ends, which closes the pipe at stdin."""
    # In a child process, because init() lets no other thread run.
    scheduler = subprocess.Popen([sys.executable, "-c", _SCHEDULER], stdin=subprocess.DEVNULL)
    sys.stdin.read()
    scheduler.kill()


def _become(command: list[str]) -> None:
    """Be a rank: replace this process by the command."""
    os.environ["RANK"] = os.environ["MS_NODE_ID"]
    os.environ["WORLD_SIZE"] = os.environ["MS_WORKER_NUM"]
    os.environ["LOCAL_RANK"] = os.environ["DEVICE_ID"]
    os.environ["MASTER_ADDR"] = os.environ["MS_SCHED_HOST"]
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    os.execvp(command[0], command)


if __name__ == "__main__":
    if os.environ["MS_ROLE"] == "MS_SCHED":
        _schedule()
    else:
        _become(sys.argv[1:])
