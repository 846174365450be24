"""The backends of the layer: five operations each, and nothing else."""

from __future__ import annotations

import importlib
from typing import Any, Protocol, cast

import mindspore as ms
from mindspore import Tensor, ops

from syncbn.backends import MINDSPORE, BackendInfo, choose

_DEVICES = {"CPU": "cpu", "Ascend": "npu"}  # by device_target


class Backend(Protocol):
    """What a backend module provides: functions that also compile in graph mode.

    x and dy are of shape (R, C, S) with R * S >= 1 values per channel. Statistics and sums are
    (C,), of the dtype `statistics_dtype()`. weight and bias are (C,) or None. Nothing here may wait
    for the device: no host value, no shape that depends on data.
    """

    def stats(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of each channel of this rank."""

    def combine(
        self, means: Tensor, variances: Tensor, counts: Tensor, eps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Merge the statistics of P parts into mean, var, invstd (C,) and n, a scalar.

        means and variances are (P, C), counts (P,), eps a scalar. A count of 0 is ignored. Chan,
        Golub and LeVeque, The American Statistician 37 (1983), for P parts: mean = sum w m and
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


@ops.constexpr
def statistics_dtype() -> Any:
    """The dtype of statistics and sums: float64 on CPU, and float32 on Ascend without float64."""
    return ms.float64 if ms.get_context("device_target") == "CPU" else ms.float32


def number(value: float) -> Tensor:
    """A number of the dtype `statistics_dtype()`. A graph cannot make one: it rounds to float32."""
    return Tensor(value, statistics_dtype())


def inverse_std(var: Tensor, eps: Tensor) -> Tensor:
    """1 / sqrt(var + eps)."""
    return 1 / ops.sqrt(var + eps)


def info(name: str) -> BackendInfo:
    """The backend that a layer uses on this device; see `syncbn.backends.choose`.

    Raises:
        ValueError: there is no backend of that name, or none for this device.
    """
    target = ms.get_context("device_target")
    if target not in _DEVICES:
        known = ", ".join(_DEVICES)
        raise ValueError(f"device_target must be one of {known}, got {target!r}")
    return choose(MINDSPORE, name, _DEVICES[target])


def load(name: str) -> Backend:
    """The five operations of that backend.

    Raises:
        ValueError: see `info`.
    """
    return cast(Backend, importlib.import_module(info(name).module))
