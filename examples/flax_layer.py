"""Flax's BatchNorm with the arguments that the suite gives; see jax_framework.py."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh


class BatchNorm(nnx.Module):
    """`flax.nnx.BatchNorm` under other names. It checks and computes nothing that Flax does not.

    Args:
        num_features: the number of channels, which are axis 1.
        eps: `epsilon` in Flax.
        momentum: the share of the new batch; Flax's is the share of the old value.
        affine: whether there are a scale and a bias.
        track_running_stats: must be True, because Flax has no layer without running statistics.
        process_group: the devices of the group; None for those of all processes.
        dtype: of scale and bias; Flax keeps its statistics in float32.
        options: other arguments of Flax, such as use_fast_variance.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Mesh | None = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        self.norm = nnx.BatchNorm(
            num_features,
            axis=1,
            epsilon=eps,
            momentum=1 - momentum,
            use_scale=affine,
            use_bias=affine,
            param_dtype=jnp.float32 if dtype is None else dtype,
            rngs=nnx.Rngs(0),
            **options,
        )
        # Flax counts no batches. The suite reads the number in many clauses.
        self.num_batches_tracked = nnx.BatchStat(jnp.zeros((), jnp.int64))
        self.mesh = process_group

    def __call__(
        self,
        x: jax.Array,
        training: bool,
        axis_name: str | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """y of the same shape and dtype as x.

        Args:
            x: (N, C, ...).
            training: whether the statistics are those of the batch.
            axis_name: the axis over which Flax averages the statistics; None for no other device.
            mask: which elements of x count; None for all.
        """
        if training:
            counts = x.size > 0 if mask is None else mask.any()
            self.num_batches_tracked[...] += jnp.asarray(counts, jnp.int64)
        self.norm.dtype, self.norm.axis_name = x.dtype, axis_name
        y: jax.Array = self.norm(x, use_running_average=not training, mask=mask)
        return y

    @property
    def eps(self) -> float:
        return self.norm.epsilon

    @eps.setter
    def eps(self, eps: float) -> None:
        self.norm.epsilon = eps

    @property
    def momentum(self) -> float:
        return 1 - self.norm.momentum

    @momentum.setter
    def momentum(self, momentum: float) -> None:
        self.norm.momentum = 1 - momentum


# A class of Flax has the signature of its metaclass. Users see that of the constructor.
BatchNorm.__signature__ = inspect.signature(BatchNorm.__init__)
