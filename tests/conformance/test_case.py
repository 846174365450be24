"""A case and its document are the same, and a document that is no case is refused."""

from __future__ import annotations

import json
from typing import Any

from syncbn.conformance.case import Case, ExpectedError, Step
from syncbn.conformance.cases import catalogue
from syncbn.conformance.document import load

SHAPES = ((3, 3, 4), (2, 3, 4))
DOCUMENT = {
    "clause": "FWD-1",
    "title": "a case",
    "ranks": 2,
    "layer": {"num_features": 3},
    "steps": [{"shapes": [[3, 3, 4], [2, 3, 4]]}],
    "checks": ["y"],
}


def test_every_case_survives_its_document() -> None:
    for case in catalogue(4):
        assert load(json.loads(json.dumps(case.document))) == case


def test_defaults_are_left_out() -> None:
    """A field that is added later must not change the ids that there are."""
    case = Case("FWD-1", "a case", 2, {"num_features": 3}, (Step(SHAPES),), ("y",))
    assert case.document == DOCUMENT
    assert load(DOCUMENT) == case


def test_the_title_is_no_part_of_the_id() -> None:
    assert load(DOCUMENT | {"title": "another title"}).id == load(DOCUMENT).id
    assert load(DOCUMENT | {"seed": 1}).id != load(DOCUMENT).id


def test_layers_that_differ() -> None:
    step = Step(SHAPES, error=ExpectedError("Exception", (1,)))
    layers = ((1, {"dtype": "bfloat16"}),)
    case = Case("ERR-9", "they differ", 2, {"num_features": 3}, (step,), layers=layers)
    assert load(json.loads(json.dumps(case.document))) == case
    assert case.of_rank(0).layer == {"num_features": 3}
    assert case.of_rank(1).layer == {"num_features": 3, "dtype": "bfloat16"}
    assert case.dtypes == {"float32", "bfloat16"}


def test_attributes_add_up() -> None:
    steps: list[dict[str, Any]] = [{"eps": 0.5}, {}, {"momentum": None}, {"eps": 0.1}]
    case = Case("CTOR-6", "", 2, {}, tuple(Step(SHAPES, attributes=given) for given in steps))
    assert case.attributes_at(1) == {"eps": 0.5}
    assert case.attributes_at(3) == {"eps": 0.1, "momentum": None}
