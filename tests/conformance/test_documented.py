"""Level documented is fair: a layer that is right on the operator's page, and no more, passes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from syncbn.conformance import runner, targets
from syncbn.conformance.case import Case, Step
from syncbn.conformance.cases import catalogue
from syncbn.conformance.clauses import CLAUSES
from syncbn.conformance.expected import expect
from syncbn.conformance.pool import Outcome, RankPool
from syncbn.conformance.verdict import judge
from syncbn.conformance.wire import Message
from tests.conftest import RANKS

VENDOR = Path(__file__).parents[2] / "examples" / "vendor_layer.py"
DOCUMENTED = [c for c in catalogue(RANKS, "certify") if CLAUSES[c.clause].documented]


def verdicts(target: str, cases: list[Case]) -> dict[str, list[str]]:
    """The messages of the cases that did not pass, by verdict."""
    found: dict[str, list[str]] = {}
    with RankPool(targets.parse(target), RANKS) as pool:
        for case in cases:
            one = runner.run_case(pool, case).verdict
            text = f"{case.clause} {case.title}: {one.message}"
            found.setdefault(one.verdict, []).append(text)
    return {name: texts for name, texts in found.items() if name != "pass"}


def test_a_layer_that_is_right_on_the_page_passes() -> None:
    found = verdicts(f"torch:{VENDOR}:SyncBatchNorm", DOCUMENTED)
    assert list(found) == ["unsupported"], found
    reasons = [text.split(":")[1].strip() for text in found["unsupported"]]
    assert all("float" in text or "ProcessGroup" in text for text in found["unsupported"]), reasons


def test_a_layer_in_an_adapter_fails_only_what_is_about_names_and_attributes() -> None:
    cases = [case for case in catalogue(RANKS, "smoke") if not case.clause.startswith("ERR")]
    found = verdicts("torch:tests.conformance.planted:Adapter", cases)
    assert sorted(text.split()[0] for text in found.pop("fail")) == ["CTOR-5", "CTOR-6"]
    assert not found


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("PassesOn", None),
        ("HasAnOption", None),
        ("Renamed", "the constructor has no argument eps"),
    ],
)
def test_arguments_that_a_constructor_does_not_show(layer: str, message: str | None) -> None:
    (signature,) = (case for case in catalogue(1, "certify") if case.clause == "CTOR-1")
    with RankPool(targets.parse(f"torch:tests.conformance.planted:{layer}"), 1) as pool:
        assert runner.run_case(pool, signature).verdict.message == message


def refusal(message: str, kind: str = "TypeError", clause: str = "GRAD-1") -> str:
    """The verdict on a layer that raises in a case with float64."""
    step = Step(((4, 3),), dtype="float64", backward=False)
    case = Case(clause, "float64", 1, {"num_features": 3, "dtype": "float64"}, (step,), ("y",))
    facts: dict[str, Any] = {"error": {"types": [kind, "Exception"], "message": message}}
    outcome = Outcome([Message({"steps": [facts]}, {})])
    return judge(case, outcome, lambda: expect(case)).verdict


@pytest.mark.parametrize(
    ("verdict", "refused"),
    [
        ("unsupported", {"message": "x must be float32, got torch.float64"}),
        ("unsupported", {"message": "input[x] must be Float32, but got Float64."}),
        ("fail", {"message": "x is of a wrong type"}),
        ("fail", {"message": "x must be float32, got bfloat16"}),
        ("fail", {"message": "no float64", "kind": "RuntimeError"}),
        ("fail", {"message": "no float64", "clause": "GRAD-2"}),  # decided
    ],
)
def test_the_page_names_no_dtypes(verdict: str, refused: dict[str, str]) -> None:
    assert refusal(**refused) == verdict


def test_a_layer_may_not_refuse_float32() -> None:
    step = Step(((4, 3),), backward=False)
    case = Case("FWD-1", "float32", 1, {"num_features": 3}, (step,), ("y",))
    raised = {"types": ["TypeError"], "message": "no float32"}
    outcome = Outcome([Message({"steps": [{"error": raised}]}, {})])
    assert judge(case, outcome, lambda: expect(case)).verdict == "fail"
    assert judge(replace(case, error="TypeError", steps=()), outcome, list).verdict == "fail"
