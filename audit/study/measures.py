"""The measures of CANN's published standards of accuracy, to compare with the ratio of this suite.

The standards are in hicann/opbase, docs/zh/ops_precision_standard/. Their numbers differ between
revisions, so each measure names its commit:

MERE/MARE  experimental_standard.md at 3e62966: mean and largest relative error, below T and 10 T
mixed      mixed_tolerance_standard.md at 233ee24: |error| <= T + T |golden| in 99 % of elements,
           and none beyond an absolute cap or 32 units in the last place, whichever is larger
RMS ratio  commercial_standard.md at 3e62966: the RMS error over that of another implementation, at
           most 2 at its level L0. The standard uses 1e-7 in place of a divisor of 0. The study does
           not, because that would hide every error of results near 1e-18.

T is 2^-13 for float32, 2^-10 for float16 and 2^-7 for bfloat16. float64 has no limit.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

THRESHOLDS = {"float32": 2.0**-13, "float16": 2.0**-10, "bfloat16": 2.0**-7}
RMS_LIMIT = 2.0

_AGAINST_ZERO = 1e-7  # added to |golden|
_UNMATCHED = 0.01  # share of elements
_CAPS = {"float32": 1e-2, "float16": 1e-1, "bfloat16": 1e-1}
_SIGNIFICANT_BITS = {"float32": 24, "float16": 11, "bfloat16": 8}


def errors(got: Array, golden: Array) -> Array:
    """|got - golden| where golden is finite, (k,) float64; infinite where got is not finite."""
    finite = np.isfinite(golden)
    with np.errstate(invalid="ignore"):
        error = np.abs(got.astype(np.float64)[finite] - golden[finite])
    return np.where(np.isnan(error), np.inf, error)


def mere(error: Array, golden: Array) -> float:
    """Mean relative error of the elements (k,)."""
    return float(np.mean(_relative(error, golden)))


def mare(error: Array, golden: Array) -> float:
    """Largest relative error of the elements (k,)."""
    return float(np.max(_relative(error, golden)))


def mixed(error: Array, golden: Array, dtype: str) -> float:
    """The larger of two ratios; the elements (k,) of a result of `dtype` pass if it is at most 1.

    One is the share of elements out of tolerance, over 1 %. The other is the largest error, over
    its cap.
    """
    size = np.abs(golden)
    threshold = THRESHOLDS[dtype]
    unmatched = float(np.mean(error > threshold * (1 + size)))
    last_place = np.ldexp(1.0, np.frexp(size)[1] - _SIGNIFICANT_BITS[dtype])
    capped = float(np.max(error / np.maximum(_CAPS[dtype], 32 * last_place)))
    return max(unmatched / _UNMATCHED, capped)


def rms(error: Array) -> float:
    """The root of the mean square of the errors (k,), correct even if a square overflows."""
    largest = float(np.max(error, initial=0.0))
    if largest == 0 or not np.isfinite(largest):
        return largest
    return largest * float(np.sqrt(np.mean(np.square(error / largest))))


def rms_ratio(of: float, baseline: float) -> float:
    """An RMS error divided by that of the baseline; 1 if neither has an error."""
    if baseline == 0 or not np.isfinite(baseline):
        return 1.0 if of == baseline else np.inf
    return of / baseline


def _relative(error: Array, golden: Array) -> Array:
    relative: Array = error / (np.abs(golden) + _AGAINST_ZERO)
    return relative
