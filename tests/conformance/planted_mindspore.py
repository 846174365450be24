"""Layers for the tests of MindSpore's rank workers: a plain right one, and ones with one fault."""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Parameter, Tensor, communication, nn, ops
from mindspore.mint import distributed as dist


class Composed(nn.Cell):
    """Batch normalization over a group, of operations that MindSpore differentiates by itself.

    Two collectives in the forward, as many in the backward; it tracks nothing.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = Parameter(ops.ones((num_features,), ms.float32), name="weight")
        self.bias = Parameter(ops.zeros((num_features,), ms.float32), name="bias")
        self.process_group = process_group
        self.total = ops.AllReduce(group=process_group) if process_group else ops.AllReduce()
        self.size = communication.get_group_size(process_group or self.total.group)

    def construct(self, x: Tensor) -> Tensor:
        axes = (0, 2)
        values = x.shape[0] * x.shape[2] * self.size
        mean = self.total(x.sum(axes)) / values
        centred = x - mean.reshape(1, -1, 1)
        var = self.total((centred * centred).sum(axes)) / values
        scale = self.weight / ops.sqrt(var + self.eps)
        return centred * scale.reshape(1, -1, 1) + self.bias.reshape(1, -1, 1)


class Local(Composed):
    """Each rank takes its own statistics."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.total, self.size = ops.stop_gradient, 1


class Gathers(Composed):
    """One collective more, of the kind that MindSpore's profiler does not know."""

    def construct(self, x: Tensor) -> Tensor:
        dist.all_gather([ops.zeros_like(self.bias) for _ in range(self.size)], self.bias + 0)
        return super().construct(x)


class SpeaksOutOfTurn(Composed):
    """Raises on every rank in eval. With 4 channels, rank 0 first sends what no rank receives."""

    def construct(self, x: Tensor) -> Tensor:
        if not self.training:
            if x.shape[1] == 4 and communication.get_rank() == 0:
                ops.Broadcast(0)((x.sum().reshape(1),))
            raise ValueError("planted")
        y = super().construct(x)
        return ops.stack([y[0], y[1], y[2]])  # what MindSpore refuses if it is not tidied up


class NoFloat16(Composed):
    def construct(self, x: Tensor) -> Tensor:
        if x.dtype == ms.float16:
            raise TypeError("input must not be float16")
        return super().construct(x)
