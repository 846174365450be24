"""The names that a checkpoint has for the parameters of a batch normalization layer.

No framework is imported here, and the values of a checkpoint may be of any type. All layers name
their parameters as SyncBatchNorm does, except BatchNorm1d, 2d and 3d of mindspore.nn. How a
checkpoint moves between frameworks is in docs/checkpoints.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The names of mindspore.nn.BatchNorm for those of all other layers.
MINDSPORE_NN = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}


def to_mindspore_nn(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the parameters of batch normalization layers as mindspore.nn.BatchNorm1d, 2d do.

    A layer is recognized by its running_mean. mindspore.nn does not count steps, so that
    num_batches_tracked is left out.

    Args:
        checkpoint: parameters by name, such as `layer1.norm.weight`.

    Returns:
        The same values, in the same order.

    Example:
        >>> from syncbn.checkpoints import to_mindspore_nn
        >>> to_mindspore_nn({"fc.weight": 1, "norm.weight": 2, "norm.running_mean": 3})
        {'fc.weight': 1, 'norm.gamma': 2, 'norm.moving_mean': 3}
    """
    renamed = {}
    for key, value in checkpoint.items():
        layer, dot, name = key.rpartition(".")
        if f"{layer}{dot}running_mean" not in checkpoint:
            renamed[key] = value
        elif name != "num_batches_tracked":
            renamed[f"{layer}{dot}{MINDSPORE_NN.get(name, name)}"] = value
    return renamed


def from_mindspore_nn(checkpoint: Mapping[str, Any], num_batches_tracked: Any) -> dict[str, Any]:
    """Rename the parameters of layers of mindspore.nn.BatchNorm1d, 2d and 3d as all others do.

    A layer is recognized by its moving_mean, or by gamma, beta, mean and variance if the checkpoint
    is that of a single layer. Other layers that have gamma and beta keep them.

    Args:
        checkpoint: parameters by name, such as `layer1.norm.gamma`.
        num_batches_tracked: the value of each layer's count of training steps, which mindspore.nn
            does not have: an integer scalar. It matters for momentum=None only.

    Returns:
        The same values, in the same order; each num_batches_tracked follows the layer's mean.
    """
    if set(checkpoint) == {"gamma", "beta", "mean", "variance"}:
        names = {"mean": "moving_mean", "variance": "moving_variance"}
        checkpoint = {names.get(key, key): value for key, value in checkpoint.items()}
    ours = {theirs: ours for ours, theirs in MINDSPORE_NN.items()}
    renamed = {}
    for key, value in checkpoint.items():
        layer, dot, name = key.rpartition(".")
        if f"{layer}{dot}moving_mean" not in checkpoint:
            renamed[key] = value
            continue
        # A BatchNorm3d wraps a BatchNorm2d of this name.
        prefix = f"{layer}{dot}".removesuffix("bn2d.")
        renamed[f"{prefix}{ours.get(name, name)}"] = value
        if name == "moving_mean":
            renamed[f"{prefix}num_batches_tracked"] = num_batches_tracked
    return renamed


def check_fits(found: Mapping[str, Any], expected: Mapping[str, Any], network: str) -> None:
    """Raise ValueError unless two checkpoints have the same names, with values of equal shapes.

    Args:
        found: what is to be loaded: arrays, tensors or numbers.
        expected: what the network has.
        network: how the error calls the network.
    """
    missing = [key for key in expected if key not in found]
    unused = [key for key in found if key not in expected]
    shapes = [
        f"{key}: {_shape(found[key])}, not {_shape(expected[key])}"
        for key in expected
        if key in found and _shape(found[key]) != _shape(expected[key])
    ]
    problems = {
        "not in the checkpoint": missing,
        f"not in the {network}": unused,
        "of another shape": shapes,
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {keys}" for what, keys in problems.items() if keys)
        raise ValueError(f"checkpoint must fit the {network}, got {listed}")


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))  # a number has none
