"""The layer, a drop-in for torch.nn.SyncBatchNorm that also runs on CPU ranks."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.contract import check_arguments, check_dtype, check_shape
from syncbn.torch import backends
from syncbn.torch.functional import sync_batch_norm
from syncbn.torch.groups import (
    ProcessGroupLike,
    check_group,
    check_world,
    has_peers,
    portable,
)
from syncbn.torch.step import DTYPES

_ModuleT = TypeVar("_ModuleT", bound=torch.nn.Module)

# To torch.fx, a forward is one call of the first function. Its argument is the layer, so that the
# mode and the settings stay live in what was traced. A layer that is traced by itself is a call of
# the second one, with the mode and the settings that it had.
torch.fx.wrap("_forward")
torch.fx.wrap("sync_batch_norm")


class SyncBatchNorm(_BatchNorm):
    """Batch normalization whose statistics are those of all ranks of a process group.

    `y = (x - mean) / sqrt(var + eps) * weight + bias` per channel. In training, mean and biased
    var are taken over the inputs of the whole group, which may differ in N and in spatial size
    and may be empty, and the gradients are those of this group-wide formula. Running statistics
    take the unbiased variance and are bitwise equal on all ranks. A step costs one all_gather and
    one all_reduce; eval does not communicate. An error that one rank meets is raised on all. The
    gradients can be differentiated once more.

    In eval with running statistics the layer is PyTorch's own batch normalization. In training it
    is two operators of `torch.library`, which compilers and torch.export take as they are.

    The arguments and their defaults are those of mindspore.mint.nn.SyncBatchNorm, the state_dict
    is that of torch.nn.BatchNorm. Without torch.distributed, or in a group of one rank, it is a
    BatchNorm.

    Args:
        num_features: C of the input (N, C, +).
        eps: added to the variance, a float.
        momentum: weight of the newest batch in the running statistics, in [0, 1]; None for their
            cumulative average.
        affine: whether weight (ones) and bias (zeros), of shape (C,), are learned.
        bias: False leaves out the bias, with affine=True.
        track_running_stats: whether to keep running_mean (zeros), running_var (ones) and
            num_batches_tracked (0) for eval. Without them, eval normalizes each rank's input with
            its own statistics.
        process_group: the ranks to synchronize with: None for all, a ProcessGroup, the name of a
            group made by `create_group`, or a list of rank ids (every member builds the layer).
            The layer keeps what it is given and finds the group at each step, so that ids and
            names outlive torch.distributed's world; pickle replaces a ProcessGroup by rank ids.
        dtype: of parameters and running statistics; None is torch.float32.
        device: of parameters and running statistics.
        backend: "auto" or the name of a backend (`syncbn.torch.backends`).

    The attributes eps, momentum, track_running_stats, process_group and backend may be set later;
    they take effect at the next step.

    Raises:
        TypeError: an argument is not of its type; see `syncbn.contract.check_arguments`.
        ValueError: num_features < 1, momentum outside [0, 1], eps negative, a rank id outside
            [0, world size), an unknown backend; in forward, an input of the wrong shape.
        RuntimeError: a ProcessGroup that was destroyed; in a training forward, also a group where
            torch.distributed is not initialized, or None after the layer trained with other ranks
            in a world that was destroyed.
        RuntimeError, PeerError: in forward, see `syncbn.torch.functional.sync_batch_norm`.

    Example, in each of the processes that torchrun starts (or in a single one):
        >>> import torch
        >>> from syncbn.torch import SyncBatchNorm
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), SyncBatchNorm(8), torch.nn.ReLU())
        >>> y = model(torch.randn(4, 3, 10, 10))
        >>> y.mean().backward()
        >>> model[1].num_batches_tracked
        tensor(1)
    """

    # Of a layer that was converted, and so never constructed.
    process_group: ProcessGroupLike = None
    backend: str = "auto"
    _converted_from: type[_BatchNorm] | None = None
    _trained_with_others: bool = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: ProcessGroupLike = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        backend: str = "auto",
    ) -> None:
        check_arguments(num_features, eps, momentum, affine, track_running_stats, bias)
        check_dtype(dtype, DTYPES)
        check_group(process_group)
        backends.load(backend)  # to refuse one that is not there before the first step
        super().__init__(
            int(num_features),
            float(eps),
            None if momentum is None else float(momentum),
            affine,
            track_running_stats,
            device=device,
            dtype=torch.float32 if dtype is None else dtype,
        )
        if not bias:
            self.register_parameter("bias", None)  # before torch 2.13 the base has no such argument
        self.process_group = process_group
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:
        """Normalize a batch; in training, all ranks of the group call this together.

        Args:
            input: (N, C, +) with at least 2 dimensions, of the dtype of the parameters, or float16
                or bfloat16 with parameters of float32. N may be 0 and may differ between ranks.

        Returns:
            A tensor of the shape, dtype and memory format of the input.

        Raises:
            TypeError, ValueError, RuntimeError, PeerError: see
                `syncbn.torch.functional.sync_batch_norm`.
        """
        if isinstance(input, torch.fx.Proxy) and getattr(input.tracer, "root", None) is not self:
            return _forward(self, input)
        if self.training and self.process_group is None:
            self._check_world()
        tracking = not self.training or self.track_running_stats
        return sync_batch_norm(
            input,
            self.running_mean if tracking else None,
            self.running_var if tracking else None,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
            self.process_group,
            num_features=self.num_features,
            num_batches_tracked=self.num_batches_tracked if tracking else None,
            backend=self.backend,
        )

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if self.weight is not None:
            torch.nn.init.ones_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    @classmethod
    def convert_sync_batchnorm(
        cls, module: _ModuleT, process_group: ProcessGroupLike = None
    ) -> _ModuleT:
        """See `syncbn.torch.convert.convert_sync_batchnorm`."""
        from syncbn.torch import convert  # which imports this module

        return convert.convert_sync_batchnorm(module, process_group)

    @classmethod
    def revert_sync_batchnorm(
        cls, module: _ModuleT, batch_norm: type[_BatchNorm] | None = None
    ) -> _ModuleT:
        """See `syncbn.torch.convert.revert_sync_batchnorm`."""
        from syncbn.torch import convert

        return convert.revert_sync_batchnorm(module, batch_norm)

    def extra_repr(self) -> str:
        shown = ""
        if isinstance(self.process_group, dist.ProcessGroup):
            shown += f", process_group=ProcessGroup {self.process_group.group_name!r}"
        elif self.process_group is not None:
            shown += f", process_group={self.process_group!r}"
        if self.backend != "auto":
            shown += f", backend={self.backend!r}"
        return super().extra_repr() + shown

    def _check_world(self) -> None:
        """Refuse to train alone, in silence, after steps with other ranks."""
        if has_peers():
            # A graph remembers it by `key_of`. Compiled with a checkpoint, it must change nothing.
            if not torch.compiler.is_compiling():
                self._trained_with_others = True
        elif self._trained_with_others:
            check_world()

    def _check_input_dim(self, input: Tensor) -> None:
        check_shape(input.shape, self.num_features)

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        """A copy that shares the process group, a handle which cannot be copied."""
        memo[id(self.process_group)] = self.process_group
        clone = self.__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__ = copy.deepcopy(self.__dict__, memo)
        return clone

    def __copy__(self) -> SyncBatchNorm:
        clone = self.__new__(type(self))
        clone.__dict__.update(self.__dict__)
        return clone

    def __getstate__(self) -> dict[str, Any]:
        """What pickle keeps: rank ids in the place of a handle, and no past of this process."""
        state = self.__dict__ | {"process_group": portable(self.process_group)}
        state.pop("_trained_with_others", None)
        return state


def _forward(layer: SyncBatchNorm, input: Tensor) -> Tensor:
    return SyncBatchNorm.forward(layer, input)
