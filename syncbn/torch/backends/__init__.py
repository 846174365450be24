"""The backends of the layer: five leaf operations each, and nothing else."""

from __future__ import annotations

import importlib
import os
from typing import Protocol, cast

import torch
from torch import Tensor

_MODULES = {"composed": "syncbn.torch.backends.composed"}


class Backend(Protocol):
    """What a backend module provides.

    x and dy are contiguous, of shape (R, C, S) with R * S >= 1 values per channel. Statistics,
    sums and parameters are (C,), in float32 or wider; weight and bias may be None. Nothing here
    may wait for the device: no host value, no shape that depends on data.
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


def wide(device: torch.device) -> torch.dtype:
    """The dtype in which statistics are merged and sent: float64 where every such device has it."""
    return torch.float64 if device.type == "cpu" else torch.float32


def load(name: str) -> Backend:
    """The backend of that name; "auto" is what SYNCBN_BACKEND says, or else composed.

    Raises:
        ValueError: there is no backend of that name.
    """
    source = "backend"
    if name == "auto":
        source, name = "SYNCBN_BACKEND", os.environ.get("SYNCBN_BACKEND", "auto")
    if name != "auto" and name not in list(_MODULES):
        known = ", ".join(["auto", *_MODULES])
        raise ValueError(f"{source} must be one of {known}, got {name!r}")
    module = importlib.import_module(_MODULES["composed" if name == "auto" else name])
    return cast(Backend, module)
