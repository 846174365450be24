"""The ratio of an error to its bound, and the threshold that a sound implementation stays below.

One number for every result, dtype and implementation, as in LAPACK's tests.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from syncbn.reference.bounds import Bounded
from syncbn.reference.formulas import Array

# Room for sums in blocks of up to 128 values, whose errors may align; see test_bounds.py.
THRESHOLD = 3.0


def ratio(got: npt.NDArray[Any], expected: Bounded) -> Array:
    """|got - expected| / bound of each element; infinite where that is undefined.

    Where the reference has a number, NaN and infinity have an infinite ratio. Where the reference
    is NaN, NaN and infinity have the ratio 0. Where it is infinite, only that infinity has the
    ratio 0. A bound of 0 accepts exactly the expected value.

    Args:
        got: any shape and real dtype.
        expected: value and bound, each of the shape of `got`.
    """
    value, bound = expected
    got = got.astype(np.float64)
    with np.errstate(all="ignore"):
        quotient = np.abs(got - value) / bound
    finite = np.isfinite(value) & np.isfinite(got) & np.isfinite(bound) & (bound > 0)
    alike = np.where(np.isnan(value), ~np.isfinite(got), got == value)
    return np.where(finite, quotient, np.where(alike, 0.0, np.inf))
