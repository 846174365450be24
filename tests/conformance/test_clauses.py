"""Every case of every clause on syncbn.torch: one test for each case, named CLAUSE-id."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncbn.conformance import runner
from syncbn.conformance.case import Case, Data, Step
from syncbn.conformance.cases import catalogue
from syncbn.conformance.cases.build import ALL
from syncbn.conformance.clauses import CLAUSES
from syncbn.conformance.pool import RankPool
from tests.conftest import RANKS

CASES = catalogue(RANKS, "certify")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.clause}-{case.id}")
def test_clause(pool: RankPool, case: Case) -> None:
    found = runner.run_case(pool, case).verdict
    assert found.verdict == "pass", f"{case.title}: {found.message}"


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """A step with shapes, dtype, layouts and distribution of its own."""
    spatial = draw(st.lists(st.integers(1, 5), max_size=4))
    batches = draw(st.lists(st.integers(0, 9), min_size=RANKS, max_size=RANKS))
    if sum(batches) < 2:
        batches[0] += 2
    layout = st.sampled_from(("contiguous", "channels_last", "permuted", "sliced", "expanded"))
    return Step(
        tuple((batch, 3, *spatial) for batch in batches),
        mode=draw(st.sampled_from(("train", "train", "eval"))),
        dtype=draw(st.sampled_from(("float32", "float16", "bfloat16"))),
        x=Data(ratio=draw(st.sampled_from((0.0, 3.0, 300.0)))),
        dy_zero_sum=draw(st.booleans()),
        layout=tuple(draw(layout) for _ in batches),
        dy_layout=tuple(draw(layout) for _ in batches),
    )


@given(
    sequence=st.lists(steps(), min_size=1, max_size=3),
    affine=st.booleans(),
    tracking=st.booleans(),
    momentum=st.sampled_from((None, 0.0, 0.1, 1.0)),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_random_sequences_of_steps(
    pool: RankPool,
    sequence: list[Step],
    affine: bool,
    tracking: bool,
    momentum: float | None,
    seed: int,
) -> None:
    layer = {
        "num_features": 3,
        "affine": affine,
        "track_running_stats": tracking,
        "momentum": momentum,
    }
    checks = (*ALL, "num_batches_tracked", "format", "input_unmodified", "ranks_agree")
    case = Case("NUM-1", "random", RANKS, layer, tuple(sequence), checks, seed=seed)
    found = runner.run_case(pool, case).verdict
    assert found.verdict == "pass", f"{found.message} in {case.document}"


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_ids_are_unique_and_stable(ranks: int) -> None:
    ids = [case.id for case in catalogue(ranks)]
    assert len(set(ids)) == len(ids)
    assert ids == [case.id for case in catalogue(ranks)]


def test_every_clause_has_cases_or_a_reason_for_none() -> None:
    with_cases = {case.clause for case in catalogue(4)}
    assert with_cases == {name for name, clause in CLAUSES.items() if clause.not_run is None}
    assert {case.clause for case in catalogue(4, "smoke")} == with_cases


def test_the_contract_is_that_of_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "contract.md").read_text()
    rows = re.findall(r"^\| ([A-Z]+-\d+) \|.*\| (doc, decided|doc|decided)\b[^|]*\|$", text, re.M)
    assert dict(rows) == {name: clause.origin for name, clause in CLAUSES.items()}
