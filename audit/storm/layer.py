"""A right layer that now and then does one of FAULTS, as STORM in the environment describes.

STORM is "SEED RATE": the seed of the random choices, and how many forwards in one have a fault.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from audit.storm import SLEEP
from syncbn.conformance.wire import Channel
from syncbn.torch import SyncBatchNorm


def _raises() -> None:
    raise ValueError("a planted error")


def _full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _exits() -> None:
    sys.exit(3)


def _kills_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _segfaults() -> None:
    ctypes.string_at(0)


def _loops() -> None:
    while True:
        pass


def _sleeps() -> None:
    time.sleep(1000)


def _garbage() -> None:
    for channel in [one for one in gc.get_objects() if type(one) is Channel]:
        os.write(channel.fileno(), random.randbytes(100))


def _prints() -> None:
    print("storm " * 1_000_000)


def _children() -> None:
    subprocess.Popen(["sleep", SLEEP])
    subprocess.Popen(["sleep", SLEEP], start_new_session=True, env={})


def _forks() -> None:
    if os.fork() == 0:
        time.sleep(1000)


def _memory() -> None:
    torch.ones(1 << 36)  # 256 GiB


def _thread() -> None:
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()


def _settings() -> None:
    torch.set_default_dtype(torch.float64)
    os.environ.clear()
    os.chdir("/")


def _closes() -> None:
    os.closerange(0, 64)


def _no_world() -> None:
    dist.destroy_process_group()


FAULTS: tuple[Callable[[], None], ...] = (
    _raises,
    _full_disk,
    _exits,
    _kills_itself,
    _segfaults,
    _loops,
    _sleeps,
    _garbage,
    _prints,
    _children,
    _forks,
    _memory,
    _thread,
    _settings,
    _closes,
    _no_world,
)


def _chance() -> tuple[random.Random, float]:
    seed, rate = os.environ["STORM"].split()
    return random.Random(f"{seed} {os.getpid()}"), float(rate)


_random, _rate = _chance()


class Stormy(SyncBatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        if _random.random() < _rate:
            _random.choice(FAULTS)()
        return super().forward(input)
