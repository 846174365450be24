"""The five operations on PyTorch tensors, by the kernels of `batch_norm`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from syncbn.kernels.plan import CHANNELS, Plan, plan
from syncbn.kernels.variants import Variant

_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Launch(Protocol):
    """Runs a kernel."""

    def __call__(self, variant: Variant, programs: int, arguments: list[Any]) -> None:
        """Run `programs` programs of a variant on its arguments, in the order of its signature."""


class Operations:
    """The five operations of a backend, see `syncbn.torch.backends.Backend`.

    All arithmetic is float32. Each operation raises TypeError if x is not float32, float16 or
    bfloat16.

    Args:
        launch: runs a kernel.
        machine: of a device, the target of `plan` and the number of programs it runs at a time.
    """

    def __init__(self, launch: Launch, machine: Callable[[torch.device], tuple[str, int]]) -> None:
        self._launch = launch
        self._machine = machine

    def stats(self, x: Tensor) -> tuple[Tensor, Tensor]:
        cut = self._plan(x, reduction=True)
        means, variances = _empty(x, 2, cut.parts, x.shape[1]).unbind(0)
        counts = _empty(x, cut.parts)
        self._over(x, "stats", cut, [x, means, variances, counts])
        mean, var, _, _ = self.combine(means, variances, counts, eps=0.0)
        return mean, var

    def combine(
        self, means: Tensor, variances: Tensor, counts: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        parts, channels = means.shape
        mean, var, invstd = _empty(means, 3, channels).unbind(0)
        n = _empty(means)
        inputs = [_float32(t) for t in (means, variances, counts)]
        _, cores = self._machine(means.device)
        programs = min(-(-channels // CHANNELS), cores)
        outputs = [mean, var, invstd, n]
        combine = Variant("combine", None, "fp32")
        self._launch(combine, programs, [*inputs, *outputs, parts, channels, float(eps)])
        return mean, var, invstd, n

    def normalize(
        self, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        y = torch.empty_like(x)
        weight = torch.ones_like(mean) if weight is None else weight
        bias = torch.zeros_like(mean) if bias is None else bias
        per_channel = [_float32(t) for t in (mean, invstd, weight, bias)]
        self._over(x, "normalize", self._plan(x), [x, *per_channel, y])
        return y

    def reduce_grad(self, dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        cut = self._plan(x, reduction=True)
        sums = _empty(x, 2, cut.parts, x.shape[1])
        self._over(x, "reduce_grad", cut, [dy, x, _float32(mean), *sums.unbind(0)])
        sum_dy, sum_dy_xmu = sums.sum(1).unbind(0)
        return sum_dy, sum_dy_xmu

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
        dx = torch.empty_like(dy)
        weight = torch.ones_like(mean) if weight is None else weight
        per_channel = [_float32(t) for t in (mean, invstd, weight, sum_dy, sum_dy_xmu, n)]
        self._over(x, "input_grad", self._plan(x), [dy, x, *per_channel, dx])
        return dx

    def _plan(self, x: Tensor, reduction: bool = False) -> Plan:
        if x.dtype not in _DTYPES:
            known = ", ".join(map(str, _DTYPES))
            raise TypeError(f"input must have one of the kernels' dtypes, {known}, got {x.dtype}")
        rows, channels, spatial = x.shape
        return plan((rows, channels, spatial), *self._machine(x.device), reduction)

    def _over(self, x: Tensor, name: str, cut: Plan, tensors: list[Tensor]) -> None:
        """Run a kernel over all of x; `tensors` are its pointers in order."""
        variant = Variant(name, cut.tiles, _DTYPES[x.dtype])
        self._launch(variant, cut.programs, [*tensors, *x.shape, cut.per_part, cut.parts])


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _float32(t: Tensor) -> Tensor:
    return t.to(torch.float32).contiguous()
