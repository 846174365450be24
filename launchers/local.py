"""Ranks on this machine, below a process that keeps them (syncbn.launchers.keeper)."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

from syncbn.launchers.site import LOOP_BACK, Site, SiteError

_KEEPER = (sys.executable, "-m", "syncbn.launchers.keeper")
_END_SECONDS = 10.0  # in which the keeper ends
_START_SECONDS = 120.0  # in which the keeper imports a framework and starts ranks
_ANSWER_SECONDS = 10.0  # in which it answers anything else


class KeeperError(OSError):
    """The keeper ended or does not answer. Then the ranks end as well."""


class LocalLauncher:
    """Starts ranks as children of one keeper, which stays for all starts."""

    def __init__(self, site: Site) -> None:
        if site.hosts or site.nodes > 1:
            raise SiteError("launcher local starts ranks here: nodes and hosts must not be given")
        self.secret = secrets.token_bytes(32)
        self._keeper: _Connection | None = None

    def start(
        self,
        command: Sequence[str],
        ranks: int,
        environment: Mapping[str, str],
        preload: Sequence[str] = (),
    ) -> LocalJob:
        if self._keeper is None or not self._keeper.lives():
            self.close()
            self._keeper = _Connection(environment)
        places = [
            {
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": LOOP_BACK,
                "SYNCBN_KEY": self.secret.hex(),
            }
            for rank in range(ranks)
        ]
        # A module can run in a fork of the keeper. Any other command is executed.
        python, option, *rest = [*command, "", ""][:3]
        forks = bool(preload) and (python, option) == (sys.executable, "-m")
        failed = self._keeper.request(
            {
                "do": "start",
                "command": list(command),
                "module": rest[0] if forks else None,
                "preload": list(preload),
                "environment": dict(environment),
                "places": places,
            },
            _START_SECONDS,
        )
        if failed:
            raise OSError(f"cannot start ranks: {failed}")
        return LocalJob(self._keeper, ranks)

    def plan(self, ranks: int, environment: Mapping[str, str]) -> list[tuple[str, str]]:
        return [(LOOP_BACK, shlex.join(_KEEPER))]

    def close(self) -> None:
        if self._keeper is not None:
            self._keeper.close()
            self._keeper = None


class LocalJob:
    """The ranks of one start."""

    def __init__(self, keeper: _Connection, ranks: int) -> None:
        self._keeper = keeper
        self._ranks = range(ranks)

    def dump_stacks(self) -> None:
        with contextlib.suppress(KeeperError):
            self._keeper.request({"do": "signal", "signal": int(signal.SIGUSR1)})

    def processes(self) -> dict[int, int]:
        try:
            return dict(enumerate(self._keeper.request({"do": "look"})["pids"]))
        except KeeperError:
            return {}

    def ended(self) -> dict[int, str]:
        try:
            ended = self._keeper.request({"do": "look"})["ended"]
        except KeeperError as error:
            return dict.fromkeys(self._ranks, str(error))
        return {int(rank): describe(code) for rank, code in ended.items()}

    def failure(self) -> str:
        try:
            self._keeper.request({"do": "look"})
        except KeeperError as error:
            return str(error)
        return ""

    def output(self, rank: int) -> str:
        try:
            return str(self._keeper.request({"do": "output", "rank": rank}))
        except KeeperError:
            return self._keeper.log()

    def stop(self) -> None:
        with contextlib.suppress(KeeperError):
            self._keeper.request({"do": "stop"})


class _Connection:
    """A keeper and the pipes to it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed in `close`
        self._process = subprocess.Popen(
            _KEEPER,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C in a terminal reaches only the controller
        )
        self._pending = b""
        self._lost = ""  # why nothing waits for an answer again

    def lives(self) -> bool:
        return not self._lost and self._process.poll() is None

    def log(self) -> str:
        """What the keeper itself has written; nothing unless an import prints, or it fails."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def request(self, request: dict[str, Any], seconds: float | None = None) -> Any:
        """The keeper's answer.

        Args:
            request: what it must do.
            seconds: the time in which it must answer; None for _ANSWER_SECONDS.

        Raises:
            KeeperError: there is none.
        """
        if self._lost:
            raise KeeperError(self._lost)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            end = time.monotonic() + (seconds or _ANSWER_SECONDS)
            while b"\n" not in self._pending:
                left = end - time.monotonic()
                if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                    self._lost = "the parent of the ranks does not answer"
                    raise KeeperError(self._lost)
                piece = os.read(self._process.stdout.fileno(), 1 << 16)
                if not piece:
                    raise KeeperError(f"the parent of the ranks ended: {self._how_ended()}")
                self._pending += piece
        except (BrokenPipeError, ValueError) as error:
            raise KeeperError(f"the parent of the ranks ended: {self._how_ended()}") from error
        line, self._pending = self._pending.split(b"\n", 1)
        return json.loads(line)

    def close(self) -> None:
        """End the keeper, which ends its ranks first."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _how_ended(self) -> str:
        try:
            ended = describe(self._process.wait(_END_SECONDS))
        except subprocess.TimeoutExpired:
            return "its pipe is closed"
        lines = self.log().splitlines()
        return f"{ended} ({lines[-1]})" if lines else ended


def describe(code: int) -> str:
    """How a process ended, from its return code as subprocess gives it."""
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"signal {-code}, {signal.Signals(-code).name}"
    except ValueError:  # a signal without a name
        return f"signal {-code}"
