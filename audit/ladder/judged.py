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
    for x in xs:
        mean, var = operations.stats(x)
        matrix = x.double().numpy().swapaxes(0, 1).reshape(channels, -1)
        u = reference.Precision(str(dtype).removeprefix("torch.")).u
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
    ys = norm.forward(data, training=True, dtype=str(dtype).removeprefix("torch."))
    gradients = norm.backward([dy.double().numpy() for dy in dys])
    mean, var, invstd, n = operations.combine(
        torch.stack(means), torch.stack(variances), counts, _EPS
    )
    yield "combine", mean, norm.running_mean
    yield "combine", var * (n / (n - 1)), norm.running_var

    sums = [operations.reduce_grad(dy, x, mean) for dy, x in zip(dys, xs, strict=True)]
    sum_dy, sum_dy_xmu = (torch.stack(of_ranks).sum(0) for of_ranks in zip(*sums, strict=True))
    for rank, (x, dy) in enumerate(zip(xs, dys, strict=True)):
        yield "normalize", operations.normalize(x, mean, invstd, weight, bias), ys[rank]
        yield "reduce_grad", sums[rank][0], gradients[rank].bias
        yield "reduce_grad", sums[rank][1] * invstd, gradients[rank].weight
        dx = operations.input_grad(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, n)
        yield "input_grad", dx, gradients[rank].input
