"""Layers with one planted fault each, for the tests of the suite itself."""

from __future__ import annotations

import os
import signal
import time
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn import functional as differentiable

from syncbn.torch import SyncBatchNorm, messages
from syncbn.torch.backends import composed


class LocalCount(SyncBatchNorm):
    """running_var is made unbiased with the rank's own count, as in PyTorch issue 22192."""

    def forward(self, input: Tensor) -> Tensor:
        def with_own_count(table: Tensor, counts: list[int], *rest: Any) -> Any:
            def moving(running: Any, mean: Tensor, unbiased: Tensor, *rest: Any) -> None:
                local = input.numel() // input.shape[1]
                own, of_group = (max(n, 1) / max(n - 1, 1) for n in (local, sum(counts)))
                move(running, mean, unbiased * (own / of_group), *rest)

            with mock.patch.object(messages, "move", moving):
                return combine(table, counts, *rest)

        move, combine = messages.move, composed.combine_ranks
        with mock.patch.object(composed, "combine_ranks", with_own_count):
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


class LeavesItsPeers(SyncBatchNorm):
    """Rank 0 takes no part in a training step on 3 images, in which the others wait for it."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.shape[0] == 3 and dist.get_rank() == 0:
            return input * 1.0
        return super().forward(input)


class NeverBuilt(SyncBatchNorm):
    """On rank 1: with 65 channels its constructor ignores signals and never returns."""

    def __init__(self, num_features: int, *arguments: Any, **options: Any) -> None:
        super().__init__(num_features, *arguments, **options)
        if num_features == 65 and dist.get_rank() == 1:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN)
            while True:
                pass


class Computes(SyncBatchNorm):
    """Uses half a second of a processor before each step."""

    def forward(self, input: Tensor) -> Tensor:
        end = time.process_time() + 0.5
        while time.process_time() < end:
            pass
        return super().forward(input)


class Renamed(SyncBatchNorm):
    """The documented eps has another name, so Python itself refuses every value of it."""

    def __init__(self, num_features: int, epsilon: float = 1e-5, **rest: Any) -> None:
        if "eps" in rest:
            raise TypeError("Renamed.__init__() got an unexpected keyword argument 'eps'")
        super().__init__(num_features, epsilon, **rest)


class PassesOn(SyncBatchNorm):
    """A right layer whose constructor shows no argument."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)


class HasAnOption(SyncBatchNorm):
    """A right layer with an optional argument of its own."""

    def __init__(self, num_features: int, *arguments: Any, fused: bool = False, **rest: Any):
        super().__init__(num_features, *arguments, **rest)


class CannotBeBuilt:
    def __init__(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("planted constructor")


class Composed(SyncBatchNorm):
    """The layer without running statistics, in differentiable operations and collectives.

    So PyTorch derives both backwards. Each rank scales dy by its copy of the weight.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training and self.track_running_stats:
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        axes = [0, *range(2, x.dim())]
        per_channel = [1, -1] + [1] * (x.dim() - 2)
        n = self.summed(x.new_full((), input.numel() // input.shape[1])).clamp(min=1)
        mean = self.summed(x.sum(axes)) / n
        deviations = x - mean.view(per_channel)
        var = self.summed((deviations * deviations).sum(axes)) / n
        y = deviations / (var + self.eps).sqrt().view(per_channel)
        if self.weight is not None and self.bias is not None:
            y = y * self.weight.view(per_channel) + self.bias.view(per_channel)
        return y.to(input.dtype)

    def summed(self, values: Tensor) -> Tensor:
        """The sum over the ranks, whose derivative is a sum over the ranks as well."""
        if not self.training:
            return values
        total: Tensor = differentiable.all_reduce(values, group=self.process_group)
        return total


class ForgetsToSumAgain(Composed):
    """The sums over ranks are right, and so are their derivatives, but not the second ones."""

    def summed(self, values: Tensor) -> Tensor:
        total: Tensor = _Summed.apply(values, self.process_group) if self.training else values
        return total


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()  # whose derivative is that of a copy
        with torch.no_grad():
            other = gradient.detach().clone()
            dist.all_reduce(other, group=ctx.group)
            other -= gradient.detach()
        return total + other, None


class Adapter(nn.Module):
    """A right layer in a wrapper: its state has other names, its attributes are elsewhere."""

    def __init__(self, num_features: int, *arguments: Any, **options: Any) -> None:
        super().__init__()
        self.inner = SyncBatchNorm(num_features, *arguments, **options)

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.inner(input)
        return output


def set_up_unit(local_rank: int) -> None:
    os.environ["PLANTED_UNIT"] = f"{local_rank} is ready"


class NeedsMore(SyncBatchNorm):
    """A right layer with an argument of its own, which works after a set-up only."""

    def __init__(self, num_features: int, *arguments: Any, unit: str, **options: Any) -> None:
        if (unit, os.environ["PLANTED_UNIT"]) != ("three", "0 is ready"):
            raise RuntimeError("the layer was not set up")
        super().__init__(num_features, *arguments, **options)
