"""Ranks that an engine of a cluster places, such as torchrun. One keeper in the place of each rank.

The engine starts a keeper (syncbn.launchers.keeper) on every node for every rank. Each connects to
the controller, and then starts, watches and ends its rank on request. So the controller handles the
ranks of all engines alike, new ranks need no new start of the engine, and output and stacks of
ranks on other machines come back over these connections.

The secret of the ranks goes to each node through stdin of what starts the engine there, never on a
command line and never in a message.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, Any

from syncbn.launchers.handshake import Reception
from syncbn.launchers.link import Link, WireError
from syncbn.launchers.local import describe
from syncbn.launchers.prctl import END_WITH_PARENT, control
from syncbn.launchers.site import LOOP_BACK, Site, is_here, machine, versions

_START_SECONDS = 120.0  # in which all keepers connect, and in which each imports a framework
_ANSWER_SECONDS = 10.0  # in which a keeper answers anything else
_FAREWELL_SECONDS = 1.0  # in which a keeper takes the last request
_END_SECONDS = 10.0  # in which the engine ends after its keepers
_KILL_SECONDS = 40.0  # in which it ends what did not end by itself; torchrun gives that 30 s
_LEFT_SECONDS = 10.0  # in which a machine ends keepers that its engine has left
_END_LEFT = "for pid in {pids}; do grep -qs {address} /proc/$pid/cmdline && kill -KILL $pid; done"


class EngineError(OSError):
    """The engine did not start the keepers, or has lost one. The message is one line."""


class EngineLauncher(ABC):
    """Starts an engine once, and ranks in its places as often as necessary."""

    name: str  # of the engine
    variables: tuple[str, str, str]  # for rank, number of ranks, and rank on its machine
    lasts: bool = True  # whether its places can have new ranks

    def __init__(self, site: Site) -> None:
        self.site = site
        self.secret = secrets.token_bytes(32)
        self._keepers: Keepers | None = None

    @abstractmethod
    def check(self) -> None:
        """Raises:
        FileNotFoundError: the engine is not installed here. The message has what to install.
        """

    @abstractmethod
    def commands(
        self, ranks: int, keeper: Sequence[str], environment: Iterable[str]
    ) -> list[tuple[str, list[str]]]:
        """The hosts on which the engine must be started, and the command on each.

        Args:
            ranks: of all nodes.
            keeper: the arguments for Python of what the engine must start for every rank.
            environment: the names of the variables that it must pass on to other machines.
        """

    def reason(self, log: str) -> str:
        """The line of an engine's output that has the reason for its end."""
        return (log.splitlines() or [""])[-1].strip()

    def plan(self, ranks: int, environment: Mapping[str, str]) -> list[tuple[str, str]]:
        port = str(self.site.port + 1) if self.site.port else "PORT"
        scripts = self._scripts(ranks, environment, f"{self.site.listen}:{port}")
        return [(host, shlex.join(self.words(host, script))) for host, script in scripts]

    def start(
        self,
        command: Sequence[str],
        ranks: int,
        environment: Mapping[str, str],
        preload: Sequence[str] = (),
    ) -> EngineJob:
        if self._keepers is None:
            self.check()
            self._keepers = Keepers(self, ranks, environment)
        job = EngineJob(self._keepers, self._after_stop)
        module = command[2] if tuple(command[:2]) == (sys.executable, "-m") else None
        self._keepers.start(
            {
                "do": "start",
                "command": list(command),
                "module": module if preload else None,
                "preload": list(preload),
                "environment": dict(environment),
            }
        )
        return job

    def _after_stop(self) -> None:
        if not self.lasts:
            self.close()

    def close(self) -> None:
        if self._keepers is not None:
            self._keepers.close()
            self._keepers = None
            self.secret = secrets.token_bytes(32)  # what was not reached must not come back

    def open(self, ranks: int, environment: Mapping[str, str], address: str) -> list[Node]:
        """Start the engine on every node."""
        nodes: list[Node] = []
        try:
            for host, script in self._scripts(ranks, environment, address):
                nodes.append(Node(self, host, self.words(host, script)))
        except BaseException:
            for node in nodes:
                node.close()
            raise
        return nodes

    def _scripts(
        self, ranks: int, environment: Mapping[str, str], address: str
    ) -> Iterable[tuple[str, str]]:
        """Host and shell script of each node."""
        keeper = ["-m", "syncbn.launchers.keeper", address, *self.variables]
        given = [f"{name}={value}" for name, value in environment.items()]
        for host, command in self.commands(ranks, keeper, ["SYNCBN_KEY", *environment]):
            run = shlex.join(["exec", "env", *given, *command])
            folder = shlex.quote(os.getcwd())
            yield host, f"read -r SYNCBN_KEY && export SYNCBN_KEY && cd {folder} && {run}"

    def words(self, host: str, script: str) -> list[str]:
        """The command that runs a shell script on a host."""
        if is_here(host):
            return ["sh", "-c", script]
        return [*self.site.agent, host, f"sh -c {shlex.quote(script)}"]


class Node:
    """The engine on one node, or the agent that runs it there."""

    def __init__(self, launcher: EngineLauncher, host: str, words: Sequence[str]) -> None:
        self._launcher = launcher
        self._host = host
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed in `close`
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in a terminal reaches only the controller
            # Before its keepers have started, nothing else notices the end of the controller.
            preexec_fn=lambda: control(END_WITH_PARENT, signal.SIGTERM),
        )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `ended` has the reason
            self._process.stdin.write(launcher.secret.hex().encode() + b"\n")
            self._process.stdin.flush()

    def ended(self) -> str:
        """How the engine has ended on this node; empty if it has not."""
        code = self._process.poll()
        if code is None:
            return ""
        self._log.seek(0)
        reason = self._launcher.reason(self._log.read().decode(errors="replace"))
        how = f"{self._launcher.name} on {self._host} ended: {describe(code)}"
        return f"{how} ({reason})" if reason else how

    def close(self) -> bool:
        """Wait until the engine has ended after its keepers, or end it with what it has left.

        Returns whether it has ended its keepers, which are not in its session: one that was killed
        has not.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        self._process.terminate()  # engines then end their processes, at last by SIGKILL
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_KILL_SECONDS)
        with contextlib.suppress(ProcessLookupError):  # what it has left of its session
            os.killpg(self._process.pid, signal.SIGKILL)
        self._log.close()
        return self._process.wait() == 0


class Keepers:
    """The keepers of all ranks, and what started them.

    Raises:
        EngineError: they do not start, or they differ in their versions.
    """

    def __init__(
        self, launcher: EngineLauncher, ranks: int, environment: Mapping[str, str]
    ) -> None:
        site = launcher.site
        self._launcher = launcher
        self._each = site.ranks_per_node(ranks)
        self._links: dict[int, Link] = {}
        self._lost: dict[int, str] = {}  # by rank, how
        self.places: dict[int, dict[str, Any]] = {}
        port = site.port and site.port + 1
        with Reception(ranks, launcher.secret, site.listen, port) as reception:
            self._address = reception.address
            self._nodes = launcher.open(ranks, environment, self._address)
            try:
                self._links = reception.gather(_START_SECONDS, self._look)
                if missing := sorted(set(range(ranks)) - set(self._links)):
                    raise EngineError(f"no keeper of rank {missing[0]} has connected")
                self._introduce(site)
            except BaseException:
                self.close()
                raise

    def _look(self, missing: set[int]) -> None:
        if ended := self._ended():
            raise EngineError(ended)

    def _introduce(self, site: Site) -> None:
        """Take the place of every keeper, which is in its first message."""
        self.places = said = self._answers(self._links, _ANSWER_SECONDS)
        if self._lost:
            raise EngineError(self.failure())
        own = versions()
        for rank, place in sorted(said.items()):
            if place["versions"] != own:
                raise EngineError(
                    f"rank {rank} on {place['host']} has {_words(place['versions'])}, and the "
                    f"controller has {_words(own)}"
                )
            place["environment"]["MASTER_ADDR"] = site.meeting or said[0]["host"]

    def start(self, request: dict[str, Any]) -> None:
        requests = {
            rank: request | {"places": [place["environment"]]}
            for rank, place in self.places.items()
        }
        failed = self.request(requests, _START_SECONDS)
        if failure := self.failure():
            raise EngineError(failure)
        for rank, reason in failed.items():
            if reason:
                raise EngineError(f"cannot start rank {rank}: {reason}")

    def request_all(self, request: dict[str, Any]) -> dict[int, Any]:
        """The answer of every keeper that is not lost."""
        return self.request(dict.fromkeys(self._links, request), _ANSWER_SECONDS)

    def request(self, requests: Mapping[int, dict[str, Any]], seconds: float) -> dict[int, Any]:
        """The answers by rank. A keeper that does not answer in time is lost."""
        sent = []
        for rank, request in requests.items():
            if rank in self._lost:
                continue
            try:
                self._links[rank].send(json.dumps(request).encode(), seconds)
                sent.append(rank)
            except OSError as error:
                self._lose(rank, error)
        return self._answers(sent, seconds)

    def _answers(self, ranks: Iterable[int], seconds: float) -> dict[int, Any]:
        answers, end = {}, time.monotonic() + seconds
        for rank in ranks:
            try:
                left = max(0.0, end - time.monotonic())
                answers[rank] = json.loads(self._links[rank].receive(left))
            except (EOFError, OSError, WireError) as error:
                self._lose(rank, error)
        return answers

    def _lose(self, rank: int, error: Exception) -> None:
        where = f" on {self.places[rank]['host']}" if rank in self.places else ""
        how = "does not answer" if isinstance(error, TimeoutError) else f"is lost: {error}"
        self._lost[rank] = f"the keeper of rank {rank}{where} {how}"

    def lost(self) -> dict[int, str]:
        """How keepers were lost, by rank."""
        return dict(self._lost)

    def failure(self) -> str:
        """Why keepers are lost; empty if none is, whatever the engine does."""
        first = list(self._lost.values())[:1]
        return "; ".join(filter(None, [*first, self._ended()])) if first else ""

    def _ended(self) -> str:
        """How the engine has ended on the first node on which it has; empty if it has not."""
        return next((how for node in self._nodes if (how := node.ended())), "")

    def close(self) -> None:
        """End all keepers, each of which ends its rank first, and the engine."""
        for link in self._links.values():
            with contextlib.suppress(OSError):  # it is lost
                link.send(json.dumps({"do": "end"}).encode(), _FAREWELL_SECONDS)
            link.close()
        ended = [node.close() for node in self._nodes]
        if not all(ended):
            self._end_left()

    def _end_left(self) -> None:
        """End the keepers that are still there, such as one that is stopped, and so their ranks."""
        site, own = self._launcher.site, machine()
        left: dict[str, list[int]] = {}  # by host
        for rank, place in self.places.items():
            if site.hosts:
                left.setdefault(site.hosts[rank // self._each], []).append(place["pid"])
            elif place["machine"] == own:
                left.setdefault(LOOP_BACK, []).append(place["pid"])
        for host, pids in left.items():
            script = _END_LEFT.format(pids=" ".join(map(str, pids)), address=self._address)
            with contextlib.suppress(subprocess.TimeoutExpired):  # a machine that is lost
                subprocess.run(
                    self._launcher.words(host, script),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    timeout=_LEFT_SECONDS,
                )


class EngineJob:
    """The ranks of one start."""

    def __init__(self, keepers: Keepers, after_stop: Callable[[], None]) -> None:
        self._keepers = keepers
        self._after_stop = after_stop

    def processes(self) -> dict[int, int]:
        """Of this machine only: the number of a process means nothing on another one."""
        looks = self._keepers.request_all({"do": "look"})
        own = machine()
        places = self._keepers.places
        return {
            rank: look["pids"][0]
            for rank, look in looks.items()
            if look["pids"] and places[rank]["machine"] == own
        }

    def dump_stacks(self) -> None:
        self._keepers.request_all({"do": "signal", "signal": int(signal.SIGUSR1)})

    def ended(self) -> dict[int, str]:
        looks = self._keepers.request_all({"do": "look"})
        ended = {rank: look["ended"]["0"] for rank, look in looks.items() if look["ended"]}
        return self._keepers.lost() | {rank: describe(code) for rank, code in ended.items()}

    def failure(self) -> str:
        self._keepers.request_all({"do": "look"})
        return self._keepers.failure()

    def output(self, rank: int) -> str:
        answers = self._keepers.request({rank: {"do": "output", "rank": 0}}, _ANSWER_SECONDS)
        return str(answers.get(rank, ""))

    def stop(self) -> None:
        self._keepers.request_all({"do": "stop"})
        self._after_stop()


def _words(found: Mapping[str, str]) -> str:
    return " and ".join(f"{name} {version}" for name, version in found.items())
