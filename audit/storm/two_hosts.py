"""A storm on two hosts: what hits a run of torchrun on two network namespaces from outside."""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from audit import hosts
from audit.storm.one_machine import children, name_of, pause


class TwoHosts:
    """Where a run of two torchruns takes place, as audit.storm.one_machine.OneMachine."""

    gone_seconds = 100.0  # the other host notices a lost link within 40 s

    def __init__(self) -> None:
        self._hosts = hosts.TwoHosts("storm")
        first, second = hosts.ADDRESSES
        options = ("--launcher", "torchrun", "--nodes", "2", "--hosts", f"{first},{second}")
        agent = shlex.join(self._hosts.agent)
        self.options = (*options, "--listen", f"{first}:0", "--agent", agent)

    def __enter__(self) -> TwoHosts:
        self._hosts.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._hosts.__exit__(None, None, None)

    def command(self, words: Sequence[str]) -> list[str]:
        return self._hosts.on_the_first(words)

    def hit(self, choose: random.Random, controller: int) -> str:
        (fault,) = choose.choices(list(_FAULTS), list(_FAULTS.values()))
        fault(self, choose, controller)
        return name_of(fault)

    def settle(self) -> None:
        self._hosts.mend()
        self._hosts.lose(0)

    def processes(self) -> list[int]:
        return self._hosts.processes()

    def _engines(self) -> list[int]:
        return [pid for pid in self.processes() if b"torch.distributed.run" in _words(pid)]

    def _keepers(self) -> list[int]:
        return [child for engine in self._engines() for child in children(engine)]

    def _ranks(self) -> list[int]:
        return [child for keeper in self._keepers() for child in children(keeper)]

    def _kill_a_rank(self, choose: random.Random, _: int) -> None:
        os.kill(choose.choice(self._ranks()), signal.SIGKILL)

    def _stop_a_rank(self, choose: random.Random, _: int) -> None:
        os.kill(choose.choice(self._ranks()), signal.SIGSTOP)

    def _kill_a_keeper(self, choose: random.Random, _: int) -> None:
        os.kill(choose.choice(self._keepers()), signal.SIGKILL)

    def _stop_a_keeper(self, choose: random.Random, _: int) -> None:
        os.kill(choose.choice(self._keepers()), signal.SIGSTOP)

    def _pause_a_keeper(self, choose: random.Random, _: int) -> None:
        pause(choose.choice(self._keepers()), 2.0)

    def _kill_a_torchrun(self, choose: random.Random, _: int) -> None:
        os.kill(choose.choice(self._engines()), signal.SIGKILL)

    def _stop_a_torchrun(self, choose: random.Random, _: int) -> None:
        os.kill(choose.choice(self._engines()), signal.SIGSTOP)

    def _cut_the_link_for_a_moment(self, choose: random.Random, _: int) -> None:
        self._hosts.cut()
        time.sleep(choose.uniform(1.0, 8.0))
        self._hosts.mend()

    def _cut_the_link_for_a_minute(self, _: random.Random, __: int) -> None:
        self._hosts.cut()
        time.sleep(60.0)
        self._hosts.mend()

    def _lose_packets(self, choose: random.Random, _: int) -> None:
        self._hosts.lose(5)
        time.sleep(choose.uniform(1.0, 5.0))
        self._hosts.lose(0)

    def _pause_the_controller(self, _: random.Random, controller: int) -> None:
        pause(controller, 2.0)

    def _kill_the_controller(self, _: random.Random, controller: int) -> None:
        for pid in [*self._engines(), *self._keepers()]:
            os.kill(pid, signal.SIGCONT)  # only the controller can end one that is stopped
        os.kill(controller, signal.SIGKILL)


# By how often: each that ends the engine costs a new start of it, and the controller the run.
_FAULTS: dict[Callable[[TwoHosts, random.Random, int], None], float] = {
    TwoHosts._kill_a_rank: 4,
    TwoHosts._stop_a_rank: 2,
    TwoHosts._kill_a_keeper: 1,
    TwoHosts._stop_a_keeper: 1,
    TwoHosts._pause_a_keeper: 2,
    TwoHosts._kill_a_torchrun: 1,
    TwoHosts._stop_a_torchrun: 1,
    TwoHosts._cut_the_link_for_a_moment: 3,
    TwoHosts._cut_the_link_for_a_minute: 0.5,
    TwoHosts._lose_packets: 3,
    TwoHosts._pause_the_controller: 1,
    TwoHosts._kill_the_controller: 0.2,
}


def _words(pid: int) -> list[bytes]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return []
