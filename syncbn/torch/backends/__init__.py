"""The backends of the layer: the five operations, and the messages that ranks send each other."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from syncbn.backends import TORCH, BackendInfo, choose


class Running(NamedTuple):
    """The running statistics of a layer, which a step changes in place."""

    mean: Tensor  # (C,)
    var: Tensor  # (C,)
    steps: Tensor | None  # (), int64: the steps that moved them
    momentum: float | None  # weight of the newest batch; None for the average, which needs `steps`


class Backend(Protocol):
    """What a backend module provides: the five operations, and three on messages.

    x and dy are contiguous, of shape (R, C, S) with R * S >= 1 values per channel. Statistics,
    sums and parameters are (C,), in float32 or wider; weight and bias may be None. Nothing here
    may wait for the device, unless `may_sync_host`: no host value, no shape that depends on data.
    """

    def stats(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of each channel of this rank."""

    def combine(
        self, means: Tensor, variances: Tensor, counts: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Merge the statistics of P parts into mean, var, invstd (C,) and n, a scalar.

        means and variances are (P, C), counts (P,); a count of 0 is ignored. Chan, Golub and
        LeVeque, The American Statistician 37 (1983), for P parts: mean = sum w m and
        var = sum w (v + (m - mean)^2), with w = count / n; invstd = 1 / sqrt(var + eps).
        """

    def normalize(
        self, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """y = (x - mean) * invstd * weight + bias, in the dtype of x."""

    def reduce_grad(self, dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """sum dy and sum dy * (x - mean) over this rank."""

    def input_grad(
        self,
        dy: Tensor,
        x: Tensor,
        mean: Tensor,
        invstd: Tensor,
        weight: Tensor | None,
        sum_dy: Tensor,
        sum_dy_xmu: Tensor,
        n: Tensor,
    ) -> Tensor:
        """dx = weight invstd (dy - sum_dy / n - (x - mean) invstd^2 sum_dy_xmu / n).

        The sums and n are those of the whole group.
        """

    def pack_stats(self, x: Tensor, header: Tensor) -> Tensor:
        """The message of this rank in the forward: header, mean, var; (header words + 2 C,)."""

    def combine_ranks(
        self,
        table: Tensor,
        counts: Sequence[int] | None,
        filled: bool,
        eps: float,
        running: Running | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """mean and invstd (C,) and n, of the messages (ranks, header words + 2 C) of all ranks.

        The running statistics move, with the unbiased variance, unless n is 0.

        Args:
            table: with the counts in the headers, see `syncbn.protocol`.
            counts: values per channel of each rank, or None if the host does not know them.
            filled: whether the host knows that n is 2 or more.
        """

    def pack_grad(
        self, dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The message of this rank in the backward, and its gradients of weight and bias.

        The message is [sum dy, sum dy (x - mean), 0], (2 C + 1,). The gradients are of `dtype`.
        """


def statistics_dtype(device: torch.device, data: torch.dtype = torch.float64) -> torch.dtype:
    """The dtype in which the statistics of such data are merged and sent.

    float64 where it costs nothing to speak of, or data of it can be: on CPU and CUDA. On CUDA,
    float32 data have statistics of float32, like the kernels, because a conversion is a launch. But
    where the ranks read each other's marks, it does not depend on the data, which may be wrong.
    """
    if device.type not in ("cpu", "cuda"):
        return torch.float32
    if device.type == "cuda" and data != torch.float64 and not may_sync_host(device):
        return torch.float32
    return torch.float64


def may_sync_host(device: torch.device) -> bool:
    """Whether a training step may read a value of the device.

    That makes the host wait for an accelerator in every step, so there only SYNCBN_DEBUG=1 does.
    """
    return device.type == "cpu" or os.environ.get("SYNCBN_DEBUG") == "1"


def chosen_for(name: str, x: Tensor) -> BackendInfo:
    """The record of the backend of that name for the data x; see `load`."""
    return choose(TORCH, name, x.device.type, x.dtype == torch.float64)


def load(name: str, x: Tensor | None = None) -> Backend:
    """The backend of that name; "auto" is what SYNCBN_BACKEND says, or else the default for x.

    - composed: ATen's operations, on any device;
    - numba: on CPU, loops that Numba compiles;
    - aten: the batch-norm kernels of CUDA and, by torch_npu, of Ascend; the default there without
      Triton, and on CUDA for float64;
    - triton: the kernels of this project; the default on CUDA and Ascend where Triton is installed;
    - twin: the same as Ascend's compiler lowered them, on CPU, for tests.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: it needs what is not installed.
    """
    return module_of(chosen_for(name, x) if x is not None else choose(TORCH, name, ""))


def module_of(chosen: BackendInfo) -> Backend:
    """The module of a record. RuntimeError if it needs what is not installed."""
    try:
        module = importlib.import_module(chosen.module)
    except ModuleNotFoundError as error:
        if error.name not in chosen.needs:
            raise
        raise RuntimeError(
            f"backend {chosen.name!r} needs {error.name}, which is not installed: {chosen.install}"
        ) from error
    return cast(Backend, module)
