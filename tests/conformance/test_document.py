"""Case documents from outside: what is no case ends in one line, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncbn.conformance.__main__ import main
from syncbn.conformance.cases import catalogue
from syncbn.conformance.document import CaseError, load, read
from tests.conformance.test_case import DOCUMENT

STEP: dict[str, Any] = {"shapes": [[3, 3, 4], [2, 3, 4]]}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"ranks": 0}, "ranks: 0 is less than the minimum of 1"),
        ({"ranks": -1}, "ranks: -1 is less"),
        ({"ranks": 10**9}, "ranks: 1000000000 is greater than the maximum of 1024"),
        ({"ranks": 2.0}, "ranks: 2.0 is not of type 'integer'"),
        ({"ranks": "2"}, "ranks: '2' is not of type 'integer'"),
        ({"ranks": True}, "ranks: True is not of type 'integer'"),
        ({"checks": ["z"]}, "checks must be among .*, got z"),
        ({"checks": []}, "checks must name something that the case can fail"),
        ({"checks": ["y"], "steps": []}, "checks must name something that the case can fail"),
        ({"checks": ["grad_input"], "steps": [STEP | {"backward": False}]}, "can fail"),
        ({"checks": ["grad_grad_input"]}, "can fail"),
        ({"state": "odd"}, "state must be one of .*, got 'odd'"),
        ({"clause": "FWD-99"}, "clause must be one of the contract, got 'FWD-99'"),
        ({"clause": "../../etc/passwd"}, "clause: .* does not match"),
        ({"colour": "red"}, "colour"),
        ({"deadline": 1e308}, "deadline: .* greater than the maximum"),
        ({"deadline": 0}, "deadline: 0 is less"),
        ({"deadline": "soon"}, "deadline: 'soon' is not of type 'number'"),
        ({"deadline": float("nan")}, "deadline: nan is not of type 'number'"),
        ({"seed": 10**4000}, "seed: .* greater"),
        ({"groups": "abc"}, "groups: 'abc' is not of type"),
        ({"groups": [[0], [0, 1]]}, "groups must hold ranks below 2, each once"),
        ({"groups": [[0, 2]]}, "groups must hold ranks below 2"),
        ({"title": "x" * 501}, "title"),
        ({"layer": {"num_features": 10**9}}, "num_features of layer must be an int from 1 to 2"),
        ({"layer": {"num_features": 4}}, r"must be \(N, num_features, ...\)"),
        ({"layer": {"num_features": 3, "eps": "small"}}, "eps of layer must be a float"),
        ({"layer": {"num_features": 3, "eps": 1}}, "eps of layer must be a float"),
        ({"steps": [STEP | {"attributes": {"eps": 10**30}}]}, "eps of attributes must be a float"),
        ({"layer": {"num_features": 3, "momentum": 2}}, "momentum of layer"),
        ({"layer": {"num_features": 3, "dtype": "__class__"}}, "dtype of layer"),
        ({"layer": {"num_features": 3, "__class__": 1}}, "__class__"),
        ({"layer": {"num_features": 3, "dtype": [[1]]}}, "layer.dtype"),
        ({"layers": [[2, {}]]}, "layers must name ranks below 2, got 2"),
        ({"error": "TypeError"}, "steps must be none if the constructor must raise"),
    ],
)
def test_what_is_no_case(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(CaseError, match=text) as raised:
        load(DOCUMENT | fields)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"shapes": [[3, 3]]}, r"steps\[0\].shapes must have one for each rank \(2\), got 1"),
        ({"shapes": [[3, 3], [-1, 3]]}, r"shapes\[1\]\[0\]: -1 is less"),
        ({"shapes": [[3, 3], [2.5, 3]]}, "2.5 is not of type 'integer'"),
        ({"shapes": [[3, 3], ["2", 3]]}, "'2' is not of type 'integer'"),
        ({"shapes": [[3, 3], [2**31 - 1, 3, 2**31 - 1]]}, "must hold at most"),
        ({"shapes": [[3, 3], [3]]}, "unless an error is expected"),
        ({"shapes": [[1, 3], [0, 3]]}, "must not hold one value per channel of a group"),
        ({"shapes": [[1, 3], [2, 3]], "present": [0]}, "must not hold one value per channel"),
        ({"shapes": [[3, 3]] * 2, "recording": "off"}, "recording .* got 'off'"),
        ({"recording": "no_grad"}, "backward must be false"),
        ({"repeat": 0}, "repeat: 0 is less"),
        ({"repeat": 10**9}, "repeat: 1000000000 is greater"),
        ({"dtype": "__class__"}, r"steps\[0\].dtype: '__class__'"),
        ({"dtype": ["float32"]}, r"dtype must have one for each rank \(2\), got 1"),
        ({"layout": "odd"}, "layout: 'odd'"),
        ({"mode": "test"}, "mode: 'test' is not one of"),
        ({"present": []}, "present: .*"),
        ({"frozen_input": [2]}, "frozen_input must hold ranks below 2, got 2"),
        ({"error": {"type": "ValueError", "ranks": [7]}}, "error.ranks must hold ranks below 2"),
        ({"paired": True}, "even batches if paired"),
        ({"x": {"flat": [3]}}, "x.flat must name channels"),
        ({"x": {"scale": 0}}, "scale: 0"),
        ({"x": {"poison": [[[0, 3, 0, 0], "nan"]]}}, "poison must be at a place of the input"),
        ({"x": {"poison": [[[2, 0, 0, 0], "nan"]]}}, "poison must be at a place of the input"),
        ({"x": {"poison": [[[0, 0], "nan"]]}}, "poison must be at a place of the input"),
        ({"x": {"poison": [[[0, 0, 0, 0], "1"]]}}, "poison"),
        ({"second": ["bias"]}, "second must be among"),
        ({"autocast": "bfloat16", "second": ["input"]}, "neither"),
    ],
)
def test_what_is_no_step(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(CaseError, match=text):
        load(DOCUMENT | {"steps": [STEP | fields]})


def test_groups_hold_the_same_ranks_in_all_steps() -> None:
    with pytest.raises(CaseError, match=r"steps\[1\].groups must hold the same ranks as before"):
        load(DOCUMENT | {"steps": [STEP, STEP | {"groups": [[0]]}]})


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "holds no case"),
        (b"\x00\xff", "holds no case"),
        (b"[]", "is not of type 'object'"),
        (b"null", "is not of type 'object'"),
        (b"[" * 200_000 + b"]" * 200_000, "too many levels"),
        (b"[" * 300 + b"]" * 300, "at most 40 levels"),
        (b'{"ranks": NaN}', "NaN is not a JSON value"),
        (b'{"ranks": 1, "ranks": 2}', "the name 'ranks' is twice in an object"),
        (b" " * 1_000_001, "at most 1000000 bytes"),
    ],
    ids=range(9),
)
def test_a_file_that_holds_no_case_ends_in_one_line(
    tmp_path: Path, content: bytes, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "case\x1b[2J.json"
    path.write_bytes(content)
    with pytest.raises(CaseError, match=text):
        read(path)
    assert main(["replay", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "\x1b" not in error


def test_every_case_of_the_suite_is_within_the_limits() -> None:
    for ranks in (1, 8):
        for case in catalogue(ranks, "certify"):
            assert load(json.loads(json.dumps(case.document))) == case


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
BASES = [case.document for case in catalogue(2, "certify")]


@given(data=st.data())
@settings(max_examples=300, deadline=None, database=None, derandomize=True)
def test_a_changed_document_is_a_case_or_is_refused(data: st.DataObject) -> None:
    """No other exception, and what is accepted has an id and shapes that can be drawn."""
    document = json.loads(json.dumps(data.draw(st.sampled_from(BASES))))
    for _ in range(data.draw(st.integers(1, 3))):
        place: Any = document
        for _ in range(data.draw(st.integers(0, 3))):
            keys = list(place) if isinstance(place, dict) else range(len(place))
            inner = [k for k in keys if isinstance(place[k], (dict, list)) and place[k]]
            if inner:
                place = place[data.draw(st.sampled_from(inner))]
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        place[data.draw(st.sampled_from(keys))] = data.draw(VALUES)
    try:
        case = load(document)
    except CaseError as refused:
        error = str(refused)
    else:
        assert load(json.loads(json.dumps(case.document))).id == case.id
        error = ""
    assert "\n" not in error
