"""The kinds of data in the study, and the unsound layers whose fault each kind must show."""

from __future__ import annotations

import math

from syncbn.conformance.case import Case

ONE_PASS = "one-pass variance"
RAW_MOMENTS = "raw-moment gradients"
FLOAT16_STATISTICS = "float16 statistics"
FLOAT16_SUMS = "float16 gradient sums"

_FEW = 1000  # values per channel
_HALVES = ("float16", "bfloat16")

# By family, in the order of the page. A family without a dtype in its name is of float32.
FAMILIES: dict[str, tuple[str, ...]] = {
    "float64": (ONE_PASS,),
    **{
        f"{dtype}, {size} 1,000 values per channel": (FLOAT16_STATISTICS, FLOAT16_SUMS)
        for dtype in _HALVES
        for size in ("up to", "more than")
    },
    "scale 1e-18 or 1e18": (ONE_PASS,),
    "std 1e-8 to 1e-2, eps 1e-5": (),
    "equal values on each rank, mean/std to 300": (),
    "equal values on each rank, mean/std from 1e3": (ONE_PASS, RAW_MOMENTS),
    "dy orthogonal to x, mean/std from 1e3": (ONE_PASS, RAW_MOMENTS),
    "mean/std 0": (),
    "mean/std 1 to 10": (),
    "mean/std 30": (),
    "mean/std 100": (),
    "mean/std 300": (),
    "mean/std 1000": (ONE_PASS,),
    "mean/std 10000": (ONE_PASS,),
    "mean/std 100000": (ONE_PASS,),
}


def is_of_halves(family: str) -> bool:
    """Whether the data are float16 or bfloat16."""
    return family.startswith(_HALVES)


def family_of(case: Case) -> str:
    """The first family that the case fits, one of FAMILIES."""
    first = case.steps[0]
    dtype = first.dtype_of(0)
    offset = max(abs(step.x.ratio) for step in case.steps)  # mean/std
    scale = max(step.x.scale for step in case.steps)
    equal_values = first.x.constant or len(first.x.flat) == case.num_features
    if dtype == "float64":
        return dtype
    if dtype in _HALVES:
        return (
            f"{dtype}, {'up to' if _values(case) <= _FEW else 'more than'} 1,000 values per channel"
        )
    if not 1e-18 < scale < 1e18:
        return "scale 1e-18 or 1e18"
    if scale < 1 and case.eps > 0:
        return "std 1e-8 to 1e-2, eps 1e-5"
    if equal_values:
        return f"equal values on each rank, mean/std {'to 300' if offset <= 300 else 'from 1e3'}"
    if first.paired:
        return "dy orthogonal to x, mean/std from 1e3"
    return "mean/std 1 to 10" if 1 <= offset <= 10 else f"mean/std {offset:g}"


def _values(case: Case) -> int:
    """Values per channel of all ranks in the first step."""
    step = case.steps[0]
    shapes = [shape for rank, shape in enumerate(step.shapes) if step.takes_part(rank)]
    return sum(math.prod(shape) // max(case.num_features, 1) for shape in shapes)
