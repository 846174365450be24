"""A step on CPU calls no more operations, and takes no more memory, than the kept page says."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import step
from benchmarks.performance_page import KEPT


def kept(*key: object) -> dict[str, list[int]]:
    records = json.loads((KEPT / "step.json").read_text())["records"]
    (found,) = (
        record
        for record in records
        if (record["layer"], tuple(record["shape"]), record["dtype"], record["layout"]) == key
    )
    return found


@pytest.mark.parametrize(("shape", "dtype"), step.CASES)
def test_counts_are_at_or_below_those_reached(shape: tuple[int, ...], dtype: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        now = step.count("syncbn", shape, dtype, "contiguous")
    finally:
        torch.set_num_threads(threads)
    reached = kept("syncbn", shape, dtype, "contiguous")
    for what in ("operations", "peak"):
        for direction, found, most in zip(
            ("forward", "backward"), now[what], reached[what], strict=True
        ):
            assert found <= most, f"{what} in the {direction}"
