"""A layer whose backward waits, so that something can happen to the ranks meanwhile."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from syncbn.torch import SyncBatchNorm


class Waits(SyncBatchNorm):
    """With 64 channels, rank 0 makes the file SLOW_FILE in its backward, and waits for its end."""

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        if self.num_features == 64 and dist.is_initialized() and dist.get_rank() == 0:
            y.register_hook(_wait)
        return y


def _wait(_: Tensor) -> None:
    file = Path(os.environ["SLOW_FILE"])
    file.touch()
    while file.exists():
        time.sleep(0.001)  # so often that it is no idle rank
