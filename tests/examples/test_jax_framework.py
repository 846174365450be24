"""Flax's BatchNorm, judged by a framework of one's own, fails for reasons of Flax and no other."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from syncbn.conformance import runner, targets
from syncbn.conformance.cases import catalogue
from syncbn.conformance.frameworks import FRAMEWORKS
from syncbn.conformance.pool import RankPool
from syncbn.conformance.targets import Target

EXAMPLES = Path(__file__).parents[2] / "examples"
RANKS = 2
CASES = {case.clause: case for case in catalogue(RANKS, "smoke")}
# Flax checks few arguments, has names of its own, divides 0 by 0, and keeps the biased variance.
FAILING = ("CTOR-5", "ERR-2", "ERR-3", "ERR-4", "ERR-6", "ERR-7", "GRAD-3", "STAT-2")
PASSING = ("CTOR-1", "FWD-1", "FWD-3", "FWD-5", "GRAD-1", "GRAD-2", "STAT-1", "EVAL-1", "EVAL-2")
UNSUPPORTED = ("ERR-9", "FWD-7", "GRAD-5", "TRACK-1")

RAISES_ON_ONE_RANK = """
import jax
from examples.flax_layer import BatchNorm

class Raises(BatchNorm):
    def __call__(self, x, training, axis_name=None, mask=None):
        if training and jax.process_index() == 1 and x.ndim == 4:
            raise OSError("only on rank 1")
        return super().__call__(x, training, axis_name, mask)
"""

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("jax", "flax")),
    reason="JAX or Flax is not installed",
)


@pytest.fixture(autouse=True)
def _forget_the_framework() -> Iterator[None]:
    yield
    FRAMEWORKS.pop("jax", None)


def target(layer: Path, cls: str) -> Target:
    file = str(EXAMPLES / "jax_framework.py")
    return targets.parse(f"jax:{layer}:{cls}", framework_file=file)


def test_flax_fails_for_reasons_of_flax() -> None:
    with RankPool(target(EXAMPLES / "flax_layer.py", "BatchNorm"), RANKS) as pool:
        verdicts = {
            clause: runner.run_case(pool, CASES[clause]).verdict
            for clause in (*FAILING, *PASSING, *UNSUPPORTED)
        }
    expected = dict.fromkeys(FAILING, "fail") | dict.fromkeys(PASSING, "pass")
    expected |= dict.fromkeys(UNSUPPORTED, "unsupported")
    assert {clause: one.verdict for clause, one in verdicts.items()} == expected, verdicts
    assert "running_var" in str(verdicts["STAT-2"].message)


def test_an_error_on_one_rank_reaches_the_others(tmp_path: Path) -> None:
    path = tmp_path / "raises.py"
    path.write_text(RAISES_ON_ONE_RANK)
    with RankPool(target(path, "Raises"), RANKS) as pool:
        outcome = pool.run(CASES["FWD-3"])
        errors = [answer.content["steps"][0]["error"] for answer in outcome.answers if answer]
        assert [error["message"] for error in errors] == [
            "rank 1 could not trace the step",
            "only on rank 1",
        ]
        assert runner.run_case(pool, CASES["FWD-5"]).verdict.verdict == "pass"
        assert (pool.starts, pool.hangs) == (1, 0)
