"""Judge the five operations by the bounds of the reference, for the rungs that execute them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from syncbn import reference
from syncbn.kernels.operations import Operations
from syncbn.reference import Bounded, bounds, formulas
from syncbn.reference.ratio import ratio
from syncbn.torch.backends import Running

# (R, C, S) of two shards each. They use every width of a tile, filled and not. In the last of each
# layout, a program has more tiles than it adds in one run.
_SHAPES = {
    "planes": [
        ((5, 3, 13), (2, 3, 9)),
        ((70, 2, 49), (3, 2, 64)),
        ((4, 2, 200), (1, 2, 256)),
        ((2, 1, 20000), (1, 1, 1025)),
        ((1, 1, 1024 * 52 + 7), (1, 1, 5)),
    ],
    "columns": [
        ((70, 33, 1), (64, 33, 1)),
        ((40, 257, 1), (7, 257, 1)),
        ((256 * 52 + 7, 3, 1), (1, 3, 1)),
    ],
}
_TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_EPS = 1e-5


def worst_ratios(operations: Operations, layout: str, dtype: str) -> dict[str, float]:
    """The largest |got - expected| / bound of the results of each kernel."""
    worst: dict[str, float] = {}
    for seed, shapes in enumerate(_SHAPES[layout]):
        for kernel, got, expected in _answers(operations, shapes, _TORCH[dtype], seed):
            found = float(ratio(got.double().numpy(), expected).max())
            worst[kernel] = max(worst.get(kernel, 0.0), found)
    return worst


def _answers(
    operations: Operations, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, seed: int
) -> Iterator[tuple[str, Tensor, Bounded]]:
    """Kernel, result and expected result, in one training step of a group of one shard per rank."""
    channels = shapes[0][1]
    rng = np.random.default_rng(seed)

    def random(shape: tuple[int, ...], offset: float, kind: torch.dtype = dtype) -> Tensor:
        return torch.tensor(rng.standard_normal(shape) + offset, dtype=kind)

    xs = [random(shape, 3.0 + rank) for rank, shape in enumerate(shapes)]
    dys = [random(shape, 0.5) for shape in shapes]
    weight, bias = (random((channels,), 0.1, torch.float32) for _ in range(2))

    means, variances = [], []
    header = torch.arange(1.0, 11.0)
    for x in xs:
        mean, var = operations.stats(x)
        message = operations.pack_stats(x, header)
        yield "pack_stats", message, _exactly(torch.cat([header, mean, var]))
        matrix = x.double().numpy().swapaxes(0, 1).reshape(channels, -1)
        u = reference.Precision(_name(dtype)).u
        moments = bounds.of_stats(matrix, *formulas.stats(matrix), u)
        yield "stats", mean, moments.mean
        yield "stats", var, moments.var
        means.append(mean)
        variances.append(var)

    # A rank without data, whose statistics are undefined.
    means.append(torch.full_like(means[0], torch.nan))
    variances.append(torch.full_like(means[0], torch.inf))
    counts = torch.tensor([*(float(x.numel() // channels) for x in xs), 0.0])
    norm = reference.SyncBatchNorm(
        channels, _EPS, momentum=1.0, weight=weight.double().numpy(), bias=bias.double().numpy()
    )
    data = [x.double().numpy() for x in xs]
    ys = norm.forward(data, training=True, dtype=_name(dtype))
    gradients = norm.backward([dy.double().numpy() for dy in dys])
    mean, var, invstd, n = operations.combine(
        torch.stack(means), torch.stack(variances), counts, _EPS
    )
    yield "combine", mean, norm.running_mean
    yield "combine", var * (n / (n - 1)), norm.running_var
    table = torch.stack(
        [
            torch.cat([torch.stack([count // 2**20, count % 2**20]), mean, var])
            for count, mean, var in zip(counts, means, variances, strict=True)
        ]
    )
    for momentum in (0.75, None):
        batch = (norm.running_mean, norm.running_var)
        old = [random((channels,), 2.0) for _ in batch]
        steps = torch.tensor(4)
        mean_then, var_then = (t.clone() for t in old)
        running = Running(mean_then, var_then, steps, momentum)
        again = operations.combine_ranks(table, None, True, _EPS, running)
        yield "combine", again[1], _exactly(invstd)
        yield "combine", steps, _exactly(torch.tensor(5))
        for got, before, expected in zip(running[:2], old, batch, strict=True):
            yield "combine", got, _moved(before, expected, momentum or 1 / 5)

    sums = [operations.reduce_grad(dy, x, mean) for dy, x in zip(dys, xs, strict=True)]
    sum_dy, sum_dy_xmu = (torch.stack(of_ranks).sum(0) for of_ranks in zip(*sums, strict=True))
    for rank, (x, dy) in enumerate(zip(xs, dys, strict=True)):
        yield "normalize", operations.normalize(x, mean, invstd, weight, bias), ys[rank]
        yield "reduce_grad", sums[rank][0], gradients[rank].bias
        yield "reduce_grad", sums[rank][1] * invstd, gradients[rank].weight
        message, grad_weight, grad_bias = operations.pack_grad(dy, x, mean, invstd, dtype)
        yield "pack_grad", message, _exactly(torch.cat([*sums[rank], torch.zeros(1)]))
        yield "pack_grad", grad_weight, _rounded(gradients[rank].weight, dtype)
        yield "pack_grad", grad_bias, _rounded(gradients[rank].bias, dtype)
        dx = operations.input_grad(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, n)
        yield "input_grad", dx, gradients[rank].input


def _exactly(value: Tensor) -> Bounded:
    return Bounded(value.double().numpy(), np.zeros(tuple(value.shape)))


def _rounded(result: Bounded, dtype: torch.dtype) -> Bounded:
    return bounds.rounded(result, _name(dtype))


def _moved(old: Tensor, batch: Bounded, momentum: float) -> Bounded:
    """The running statistic (1 - momentum) old + momentum batch, in the dtype of `old`."""
    before = _exactly(old)
    value = (1 - momentum) * before.value + momentum * batch.value
    bound = bounds.of_running(before, batch, momentum, reference.Precision("float32").u)
    return _rounded(Bounded(value, bound), old.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
