"""A layer that misbehaves on rank 1 in the way that its number of channels chooses."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import random
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.conformance.ranks.base import Rank
from syncbn.conformance.wire import Channel
from syncbn.torch import SyncBatchNorm


def full_disk(_: Tensor) -> None:
    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise RuntimeError("the cache cannot be written") from error


def exits(_: Tensor) -> None:
    sys.exit(7)


def exits_at_once(_: Tensor) -> None:
    os._exit(9)


def segfault(_: Tensor) -> None:
    os.close(2)  # the stack must arrive all the same
    ctypes.string_at(0)


class Wordy(Exception):
    def __str__(self) -> str:
        return "w" * 50_000_000


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def wordy(_: Tensor) -> None:
    raise Wordy


def mute(_: Tensor) -> None:
    raise Mute


def surrogates(_: Tensor) -> None:
    raise ValueError("\ud800 \0")


def draws(_: Tensor) -> None:
    raise RuntimeError(f"{torch.rand(()).item()} {random.random()}")


def changes(_: Tensor) -> None:
    """All that can be put back."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    torch.set_autocast_enabled("cpu", True)
    torch.use_deterministic_algorithms(True)
    torch.set_flush_denormal(True)
    np.seterr(all="raise")
    torch.manual_seed(0)
    os.environ["PLANTED"] = "1"
    os.environ["SYNCBN_BACKEND"] = "none"
    os.chdir("/")
    os.umask(0o077)
    sys.path.insert(0, "/planted")
    random.seed(0)


def leaves_a_thread(_: Tensor) -> None:
    threading.Thread(target=time.sleep, args=(1000,), name="planted", daemon=True).start()


def closes_stdout(_: Tensor) -> None:
    os.close(1)


def new_world(_: Tensor) -> None:
    dist.destroy_process_group()
    store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not marked so
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)


def patches(_: Tensor) -> None:
    Rank._run = lambda self, case: ({"steps": []}, {})  # type: ignore[method-assign]


def allocates(_: Tensor) -> None:
    torch.ones(5 << 30, dtype=torch.float32)  # 20 GiB


def channel() -> Channel:
    """A layer finds the connection of its rank, as it finds everything in its process."""
    (found,) = [one for one in gc.get_objects() if type(one) is Channel]
    return found


def to_the_controller(sends: bytes) -> Callable[[Tensor], Any]:
    return lambda _: os.write(channel().fileno(), sends)


class Marked(Tensor):
    pass


def then(action: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """Do something after a right result."""

    def both(y: Tensor) -> Tensor:
        action(y)
        return y

    return both


BEFORE: dict[int, Callable[[Tensor], Any]] = {
    20: full_disk,
    21: exits,
    22: exits_at_once,
    23: segfault,
}
AFTER: dict[int, Callable[[Tensor], Any]] = {
    24: wordy,
    25: mute,
    26: surrogates,
    27: draws,
    40: lambda y: y.to("meta"),
    41: lambda y: y.to_sparse(),
    42: lambda y: None,
    43: lambda y: (y, y),
    39: lambda y: y.as_subclass(Marked),
    44: then(changes),
    45: then(leaves_a_thread),
    46: then(closes_stdout),
    47: then(new_world),
    48: then(patches),
    49: then(allocates),
    60: to_the_controller(struct.pack("<Q", 2) + b"[]" + bytes(32)),
    61: lambda y: channel().send({"steps": []}),
    62: to_the_controller(b"\xff" * 8),
    63: to_the_controller(struct.pack("<Q", 10_000) + b"{"),  # and its own answer within
    64: lambda y: channel()._link.send(b"[]"),
}


class Unruly(SyncBatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        chosen = torch.distributed.is_initialized() and dist.get_rank() == 1
        if chosen and self.num_features in BEFORE:
            BEFORE[self.num_features](input)
        y = super().forward(input)
        if chosen and self.num_features in AFTER:
            changed: Tensor = AFTER[self.num_features](y)
            return changed
        return y
