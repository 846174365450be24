"""The parameters of a MindSpore network as NumPy arrays, which another framework can load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mindspore as ms
import numpy as np
import numpy.typing as npt
from mindspore import Tensor, nn

from syncbn.checkpoints import check_fits


def arrays_of(source: nn.Cell | Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """Copies of all parameters, by name.

    bfloat16 becomes float32, because NumPy has no bfloat16.

    Args:
        source: a network, or what mindspore.load_checkpoint returns.

    Example:
        >>> from syncbn.mindspore import SyncBatchNorm, arrays_of
        >>> arrays_of(SyncBatchNorm(2))["running_var"]
        array([1., 1.], dtype=float32)
    """
    parameters = source.parameters_dict() if isinstance(source, nn.Cell) else source
    return {name: _array(parameter) for name, parameter in parameters.items()}


def load_arrays(network: nn.Cell, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Load all parameters of a network. Each keeps its dtype.

    Args:
        network: a network, or a single layer.
        arrays: of the names and shapes of the network's parameters.

    Raises:
        ValueError: names or shapes differ; nothing has been loaded then.
    """
    parameters = network.parameters_dict()
    check_fits(arrays, parameters, "network")
    for name, parameter in parameters.items():
        parameter.set_data(Tensor(np.array(arrays[name]), parameter.dtype))


def _array(parameter: Tensor) -> npt.NDArray[Any]:
    if parameter.dtype == ms.bfloat16:
        parameter = parameter.astype(ms.float32)
    array: npt.NDArray[Any] = parameter.asnumpy().copy()
    return array
