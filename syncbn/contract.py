"""The documented argument checks of SyncBatchNorm, shared by every front end.

No framework is imported here. A message names the argument, the value that was given and the
rule. The ids (ERR-1 ...) are the clauses of the contract, see docs/contract.md.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from numbers import Integral, Rational, Real
from typing import Any

# The dtypes of input, parameters and running statistics, by name.
FLOATING = ("float16", "bfloat16", "float32", "float64")

# The text of the error of a group that trains on exactly one value per channel (ERR-7).
SINGLE_VALUE = (
    "the group must have more than 1 value per channel when training (the variance of one value "
    "is undefined), got 1 over all its ranks"
)


def check_arguments(
    num_features: Any,
    eps: Any,
    momentum: Any,
    affine: Any,
    track_running_stats: Any,
    bias: Any = True,
) -> None:
    """Check what every SyncBatchNorm constructor takes.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance, in the square of the input's unit.
        momentum: weight of the newest batch in the running statistics, or None for their
            cumulative average.
        affine: whether there are a learnable weight and bias.
        track_running_stats: whether there are running statistics.
        bias: whether an affine layer has a bias.

    Raises:
        TypeError: num_features is not an int (ERR-1), eps is not a float (ERR-2), momentum is
            not a number, affine, track_running_stats or bias is not a bool (ERR-8).
        ValueError: num_features < 1 (ERR-3), momentum is not in [0, 1] (ERR-4), eps is
            negative or NaN (ERR-8).
    """
    if not _is_int(num_features):
        raise TypeError(f"num_features must be an int, got {_show(num_features)}")
    if num_features < 1:
        raise ValueError(f"num_features must be at least 1, got {num_features!r}")
    # Every int is Rational; a float, also one of NumPy's, is not.
    if isinstance(eps, Rational):
        raise TypeError(f"eps must be a float, got {_show(eps)}")
    check_settings(eps, momentum)
    flags = {"affine": affine, "track_running_stats": track_running_stats, "bias": bias}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool, got {_show(flag)}")


def check_settings(eps: Any, momentum: Any) -> None:
    """Check what may change after the construction; eps may be an int here.

    Raises:
        TypeError: eps is not a number, or momentum is neither a number nor None.
        ValueError: eps is negative or NaN (ERR-8), momentum is not in [0, 1] (ERR-4).
    """
    if not _is_real(eps):
        raise TypeError(f"eps must be a float, got {_show(eps)}")
    if not eps >= 0:
        raise ValueError(f"eps must be zero or positive, got {eps!r}")
    if momentum is not None:
        if not _is_real(momentum):
            raise TypeError(f"momentum must be a number or None, got {_show(momentum)}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1], got {momentum!r}")


def check_dtype(dtype: Any, floating: Iterable[Any]) -> None:
    """Raise TypeError unless dtype is None or one of the framework's `floating` dtypes (ERR-8)."""
    floating = tuple(floating)
    if dtype is not None and not any(dtype is known for known in floating):
        known_names = ", ".join(map(str, floating))
        raise TypeError(f"dtype must be None or one of {known_names}, got {_show(dtype)}")


def check_rank_ids(rank_ids: Any, rank_size: int | None) -> tuple[int, ...]:
    """Check the global rank ids of a process group and return them in ascending order.

    Args:
        rank_ids: a list or tuple of distinct ints.
        rank_size: the number of ranks in the world; None if there is no world yet.

    Raises:
        TypeError: rank_ids is not a list or tuple of ints.
        ValueError: a rank id is not in [0, rank_size) (ERR-5) or stands twice; the list is empty.
    """
    if not isinstance(rank_ids, (list, tuple)):
        raise TypeError(f"rank_ids must be a list of ints, got {_show(rank_ids)}")
    if not rank_ids:
        raise ValueError("rank_ids must name at least one rank, got an empty list")
    for rank in rank_ids:
        if not _is_int(rank):
            raise TypeError(f"rank_ids must be a list of ints, got {_show(rank)} in it")
        if rank < 0 or (rank_size is not None and rank >= rank_size):
            rule = "0 or more" if rank_size is None else f"in [0, {rank_size})"
            raise ValueError(
                f"every rank id of process_group must be {rule}, got {rank!r} in {list(rank_ids)!r}"
            )
    if len(set(rank_ids)) != len(rank_ids):
        raise ValueError(f"rank_ids must be distinct, got {list(rank_ids)!r}")
    return tuple(sorted(operator.index(rank) for rank in rank_ids))


def check_shape(shape: Sequence[int], num_features: int) -> None:
    """Raise ValueError unless shape is (N, C, +) with C = num_features (ERR-6)."""
    shown = tuple(shape)
    if len(shown) < 2:
        raise ValueError(
            f"input must have at least 2 dimensions (N, C, +), got {len(shown)} in shape {shown}"
        )
    if shown[1] == 0:
        raise ValueError(f"input must have at least 1 channel, got 0 in shape {shown}")
    if shown[1] != num_features:
        raise ValueError(
            f"input must have num_features={num_features} channels in dimension 1, "
            f"got {shown[1]} in shape {shown}"
        )


def check_input_dtype(dtype: str, parameter_dtype: str | None) -> None:
    """Check the dtype of the input, by name: that of the parameters, or a half with float32.

    Args:
        dtype: of the input.
        parameter_dtype: of weight and bias; None if the layer has none.

    Raises:
        TypeError: dtype is not in FLOATING, or does not go with that of the parameters.
    """
    if dtype not in FLOATING:
        raise TypeError(f"input must have one of the dtypes {', '.join(FLOATING)}, got {dtype}")
    half_with_float32 = dtype in ("float16", "bfloat16") and parameter_dtype == "float32"
    if parameter_dtype not in (None, dtype) and not half_with_float32:
        raise TypeError(
            f"input must have the dtype of the parameters, {parameter_dtype} (float16 and "
            f"bfloat16 also go with float32), got {dtype}"
        )


def check_count(count: int) -> None:
    """Raise ValueError if a whole group has exactly one value per channel (ERR-7)."""
    if count == 1:
        raise ValueError(SINGLE_VALUE)


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _show(value: Any) -> str:
    return f"{value!r} of type {type(value).__name__}"
