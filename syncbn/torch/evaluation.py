"""Eval with running statistics, or as a part of a graph: PyTorch's own batch normalization.

No operator and no autograd class of this package takes part, so every tool that traces, exports,
fuses, vectorizes or differentiates a BatchNorm does it with the layer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.jit import is_tracing  # type: ignore[attr-defined]  # public, but not marked so
from torch.utils.hooks import unserializable_hook

from syncbn.torch import layout

# What cuDNN takes.
_MOST_DIMENSIONS = 5


def evaluate(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """(x - running_mean) / sqrt(running_var + eps) * weight + bias, in the memory order of x.

    Without running statistics, mean and variance are those of x.
    """
    dtype = x.dtype
    of_batch = running_mean is None
    if dtype in (torch.float16, torch.bfloat16):
        # With vectors of the same half type, some kernels compute in it.
        running_mean, running_var, weight, bias = (
            None if v is None else v.float() for v in (running_mean, running_var, weight, bias)
        )
        if x.is_cuda and torch.is_grad_enabled() and weight is not None and weight.requires_grad:
            # CUDA's kernel rounds partial sums of the gradients of weight and bias to x's type.
            x = x.float()
    if torch.is_grad_enabled() and not is_tracing():
        # A training step may move the buffers before the backward.
        running_mean, running_var = (
            None if v is None else v.clone() for v in (running_mean, running_var)
        )

    def normalize(values: Tensor) -> Tensor:
        # Not torch.nn.functional.batch_norm, which refuses an eps of 0 in some versions.
        y = torch.batch_norm(
            values,
            weight,
            bias,
            running_mean,
            running_var,
            of_batch,
            0.0,
            eps,
            torch.backends.cudnn.enabled,
        )
        y = y if y.dtype == dtype else y.to(dtype)
        _lay_out_gradient(y)
        return y

    if x.is_contiguous() and x.dim() <= _MOST_DIMENSIONS:
        return normalize(x)
    channels_last = layout.is_channels_last(x)
    rows = layout.to_rows(x, channels_last)
    if channels_last:
        image = rows.view(1, rows.shape[0], 1, rows.shape[1]).movedim(-1, 1)
        rows = normalize(image).movedim(1, -1).view(rows.shape)
    else:
        rows = normalize(rows)
    return layout.from_rows(rows, x.shape, channels_last)


def _lay_out_gradient(y: Tensor) -> None:
    """Give the backward of y a gradient in the memory order of y.

    With another one, PyTorch's kernels on CPU add up bfloat16 in bfloat16, and give wrong gradients
    if its strides in dimensions of size 1 are not the usual ones (PyTorch 2.13). Compiled code lays
    it out itself.
    """
    if not y.requires_grad or y.device.type != "cpu":
        return
    if torch.compiler.is_compiling() or is_tracing():
        return
    shape, channels_last = y.shape, layout.is_channels_last(y)

    @unserializable_hook  # y may be saved without it
    def lay_out(dy: Tensor | None) -> Tensor | None:
        if dy is None:
            return None
        return layout.from_rows(layout.to_rows(dy, channels_last), shape, channels_last)

    y.register_hook(lay_out)
