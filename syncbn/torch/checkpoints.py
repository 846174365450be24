"""The state of a PyTorch module as NumPy arrays, which another framework can load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.checkpoints import check_fits


def arrays_of(source: nn.Module | Mapping[str, Tensor]) -> dict[str, Any]:
    """Copies of all parameters and buffers as NumPy arrays, by name.

    bfloat16 becomes float32, because NumPy has no bfloat16.

    Args:
        source: a module, or a state_dict.

    Example:
        >>> from syncbn.torch import SyncBatchNorm, arrays_of
        >>> arrays_of(SyncBatchNorm(2))["running_var"]
        array([1., 1.], dtype=float32)
    """
    state = source.state_dict() if isinstance(source, nn.Module) else source
    return {name: _array(tensor) for name, tensor in state.items()}


def load_arrays(module: nn.Module, arrays: Mapping[str, Any]) -> None:
    """Load all parameters and buffers of a module. Each keeps its dtype and device.

    Args:
        module: a model, or a single layer.
        arrays: NumPy arrays of the names and shapes of the module's state_dict.

    Raises:
        ValueError: names or shapes differ; nothing has been loaded then.
    """
    check_fits(arrays, module.state_dict(), "module")
    module.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})


def _array(tensor: Tensor) -> Any:
    values = tensor.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy().copy()
