"""The five operations on PyTorch tensors, by the kernels of `batch_norm`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from syncbn.kernels.plan import CHANNELS, Plan, plan
from syncbn.kernels.variants import Variant

_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Running(Protocol):
    """Running statistics, changed in place: see `syncbn.torch.backends.Running`."""

    @property
    def mean(self) -> Tensor: ...
    @property
    def var(self) -> Tensor: ...
    @property
    def steps(self) -> Tensor | None: ...
    @property
    def momentum(self) -> float | None: ...


class Launch(Protocol):
    """Runs a kernel."""

    def __call__(self, variant: Variant, programs: int, arguments: list[Any]) -> None:
        """Run `programs` programs of a variant on its arguments, in the order of its signature."""


class Operations:
    """The operations of a backend, see `syncbn.torch.backends.Backend`.

    All arithmetic is float32. Each operation raises TypeError if x is not float32, float16 or
    bfloat16.

    Args:
        launch: runs a kernel.
        machine: of a device, the target of `plan` and the number of programs it runs at a time.
        header_words: of a rank's message in the forward.
        count_word: place in the header of the rank's count, in two words: the first in units of
            2^20.
    """

    def __init__(
        self,
        launch: Launch,
        machine: Callable[[torch.device], tuple[str, int]],
        header_words: int = 2,
        count_word: int = 0,
    ) -> None:
        self._launch = launch
        self._machine = machine
        self._header = (header_words, count_word)

    def stats(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = self.pack_stats(x, _empty(x, 0)).view(2, -1).unbind(0)
        return mean, var

    def combine(
        self, means: Tensor, variances: Tensor, counts: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        counts = counts.unsqueeze(1)
        table = torch.cat([torch.zeros_like(counts), counts, means, variances], 1)
        return self._combine(table, (2, 0), eps, None)

    def pack_stats(self, x: Tensor, header: Tensor) -> Tensor:
        cut, channels = self._plan(x), x.shape[1]
        means, variances = _empty(x, 2, cut.parts, channels).unbind(0)
        counts = _empty(x, cut.parts)
        self._over(x, "stats", cut, [x, means, variances, counts])
        message = _empty(x, header.numel() + 2 * channels)
        tensors = [means, variances, counts, _float32(header), message]
        self._of_channels(
            Variant("pack_stats", None, "fp32"), tensors, cut.parts, channels, header.numel()
        )
        return message

    def combine_ranks(
        self,
        table: Tensor,
        counts: Sequence[int] | None,
        filled: bool,
        eps: float,
        running: Running | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if running is not None and running.momentum is None and running.steps is not None:
            # The kernel must find this step counted: its programs do not wait for each other.
            _, count_word = self._header
            filled = filled or (counts is not None and sum(counts) > 0)
            words = table[:, count_word : count_word + 2]
            running.steps.add_(1 if filled else (words > 0).any())
        mean, _, invstd, n = self._combine(table, self._header, eps, running)
        return mean, invstd, n

    def _combine(
        self, table: Tensor, header: tuple[int, int], eps: float, running: Running | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ranks, width = table.shape
        channels = (width - header[0]) // 2
        mean, var, invstd = (_empty(table, channels) for _ in range(3))
        n = _empty(table)
        momentum = 0.0
        moved: list[Tensor] = [mean, var, n]  # unused
        variant = Variant("combine", None, "fp32", "none")
        if running is not None:
            mode = "average" if running.momentum is None else "moving"
            variant = Variant("combine", None, _DTYPES[running.mean.dtype], mode)
            steps = running.steps
            if steps is None:
                steps = torch.zeros((), dtype=torch.int64, device=table.device)
            moved = [running.mean, running.var, steps]
            momentum = running.momentum or 0.0
        tensors = [_float32(table), mean, var, invstd, n, *moved]
        scalars = [*header, float(eps), momentum, 1.0 - momentum]
        self._of_channels(variant, tensors, ranks, channels, *scalars)
        return mean, var, invstd, n

    def normalize(
        self, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        y = torch.empty_like(x)
        weight = _constant(1.0, mean.numel(), mean.device) if weight is None else weight
        bias = _constant(0.0, mean.numel(), mean.device) if bias is None else bias
        per_channel = [_float32(t) for t in (mean, invstd, weight, bias)]
        self._over(x, "normalize", self._plan(x), [x, *per_channel, y])
        return y

    def reduce_grad(self, dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        message, _, _ = self.pack_grad(dy, x, mean, mean, torch.float32)
        sum_dy, sum_dy_xmu = message[:-1].view(2, -1).unbind(0)
        return sum_dy, sum_dy_xmu

    def pack_grad(
        self, dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        cut, channels = self._plan(x), x.shape[1]
        sums = _empty(x, 2, cut.parts, channels)
        self._over(x, "reduce_grad", cut, [dy, x, _float32(mean), *sums.unbind(0)])
        message = _empty(x, 2 * channels + 1)
        written = dtype if dtype in _DTYPES else torch.float32
        grad_weight, grad_bias = (
            torch.empty(channels, dtype=written, device=x.device) for _ in range(2)
        )
        tensors = [sums, _float32(invstd), message, grad_weight, grad_bias]
        variant = Variant("pack_grad", None, _DTYPES[written])
        self._of_channels(variant, tensors, cut.parts, channels)
        return message, grad_weight.to(dtype), grad_bias.to(dtype)

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
        weight = _constant(1.0, mean.numel(), mean.device) if weight is None else weight
        per_channel = [_float32(t) for t in (mean, invstd, weight, sum_dy, sum_dy_xmu, n)]
        self._over(x, "input_grad", self._plan(x), [dy, x, *per_channel, dx])
        return dx

    def _plan(self, x: Tensor) -> Plan:
        if x.dtype not in _DTYPES:
            known = ", ".join(map(str, _DTYPES))
            raise TypeError(f"input must have one of the kernels' dtypes, {known}, got {x.dtype}")
        rows, channels, spatial = x.shape
        return plan((rows, channels, spatial), *self._machine(x.device))

    def _over(self, x: Tensor, name: str, cut: Plan, tensors: list[Tensor]) -> None:
        """Run a kernel over all of x; `tensors` are its pointers in order."""
        variant = Variant(name, cut.tiles, _DTYPES[x.dtype])
        self._launch(variant, cut.programs, [*tensors, *x.shape, cut.per_part, cut.parts])

    def _of_channels(
        self, variant: Variant, tensors: list[Tensor], parts: int, channels: int, *scalars: Any
    ) -> None:
        """Run a kernel that takes some numbers per part and channel."""
        _, cores = self._machine(tensors[0].device)
        programs = min(-(-channels // CHANNELS), cores)
        self._launch(variant, programs, [*tensors, parts, channels, *scalars])


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


@functools.lru_cache(maxsize=1024)
def _constant(value: float, channels: int, device: torch.device) -> Tensor:
    """A vector that is made once, not in every step. It must not be changed.

    On the host, as `filled` in syncbn.torch.messages, and for the same reason.
    """
    with torch.inference_mode(False):
        return torch.full((channels,), value, dtype=torch.float32).to(device)


def _float32(t: Tensor) -> Tensor:
    return t.to(torch.float32).contiguous()
