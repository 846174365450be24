"""Layers with one planted fault each, for the tests of the suite itself."""

from __future__ import annotations

import os
import signal
import time
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.torch import SyncBatchNorm, functional


class LocalCount(SyncBatchNorm):
    """running_var is made unbiased with the rank's own count, as in PyTorch issue 22192."""

    def forward(self, input: Tensor) -> Tensor:
        def own_count(*arguments: Any) -> None:
            *others, n = arguments
            local = torch.full_like(n, max(input.numel() // input.shape[1], 1))
            update(*others, torch.where(n > 0, local, n))

        update: Any = functional._update_running
        with mock.patch.object(functional, "_update_running", own_count):
            return super().forward(input)


class FailsByChannels(SyncBatchNorm):
    """On rank 1: dies with 64 channels, never returns with 65, raises with 257, is slow with 63."""

    def forward(self, input: Tensor) -> Tensor:
        if dist.get_rank() == 1:
            if self.num_features == 64:
                os.kill(os.getpid(), signal.SIGKILL)
            while self.num_features == 65:
                pass
            if self.num_features == 257:
                raise RuntimeError("planted")
            if self.num_features == 63:
                time.sleep(2.0)
        return super().forward(input)


class CannotBeBuilt:
    def __init__(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("planted constructor")
