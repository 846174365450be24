"""The tool that changes the layer at random."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from rich.console import Console

from audit.mutate import run, show
from audit.mutate.changes import KINDS, Source
from audit.mutate.draw import Mutant, draw, files
from audit.mutate.result import Detection, Result
from syncbn.conformance.cases import catalogue

ROOT = Path(__file__).resolve().parents[2]

FUNCTION = '''\
def f(a, b):
    """Text."""
    c = a + 1
    if a < b:
        c = g(a, b)
    return f"{c + 2} é", True
'''


def changed(kind: str) -> set[str]:
    """All versions of FUNCTION after one change of that kind."""
    source = Source(FUNCTION.encode())
    (function,) = ast.parse(FUNCTION).body
    return {source.apply(edits).decode() for edits in KINDS[kind](function, source)}


def with_(*replacements: tuple[str, str]) -> str:
    text = FUNCTION
    for old, new in replacements:
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


ASSIGN = "    c = a + 1\n"
BRANCH = "    if a < b:\n        c = g(a, b)\n"
RETURN = '    return f"{c + 2} é", True\n'
HEAD = FUNCTION.partition(ASSIGN)[0]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("arguments", {with_(("g(a, b)", "g(b, a)"))}),
        ("operator", {with_(("a + 1", "a - 1")), with_(("a < b", "a <= b"))}),
        ("negate", {with_(("a < b", "(not (a < b))"))}),
        ("constant", {with_(("a + 1", "a + 2")), with_(("True", "False"))}),
        (
            "drop",
            {
                with_((ASSIGN, "    pass\n")),
                with_(("if a < b:\n        c = g(a, b)", "pass")),
                with_(("c = g(a, b)", "pass")),
                with_((RETURN, "    pass\n")),
            },
        ),
    ],
)
def test_each_kind_of_change(kind: str, expected: set[str]) -> None:
    assert changed(kind) == expected


def test_swapped_statements_take_their_blocks_along() -> None:
    assert changed("swap") == {
        HEAD + BRANCH + ASSIGN + RETURN,
        HEAD + RETURN + BRANCH + ASSIGN,
        HEAD + ASSIGN + RETURN + BRANCH,
    }


def test_the_files_are_those_of_a_step() -> None:
    assert {"syncbn/contract.py", "syncbn/torch/step.py"} <= set(files())
    assert "syncbn/torch/convert.py" not in files()
    assert all((ROOT / path).is_file() for path in files())


@pytest.mark.parametrize("kind", KINDS)
def test_mutants_differ_from_the_layer_and_compile(kind: str) -> None:
    for mutant in draw(5, 0, [kind]):
        original = (ROOT / mutant.path).read_bytes()
        assert mutant.kind == kind
        assert ast.dump(ast.parse(mutant.text)) != ast.dump(ast.parse(original))
        compile(mutant.text, mutant.path, "exec")
        assert any(line.startswith("-") for line in mutant.diff)


def test_a_seed_draws_the_same_mutants_and_another_seed_draws_others() -> None:
    ids = [mutant.id for mutant in draw(10, 0, list(KINDS))]
    assert [mutant.id for mutant in draw(10, 0, list(KINDS))] == ids
    assert len(set(ids)) == 10
    assert set(ids).isdisjoint(mutant.id for mutant in draw(10, 1, list(KINDS)))


def planted(path: str, old: str, new: str) -> Mutant:
    text = (ROOT / path).read_text()
    assert text.count(old) == 1
    return Mutant(path, "planted", 1, "swap", text.replace(old, new).encode(), (f"-{old}",))


MESSAGES = "syncbn/torch/messages.py"


@pytest.mark.parametrize(
    ("mutant", "hows"),
    [
        (None, []),
        (planted(MESSAGES, "n = sum(counts)", "n = sum(counts) + 1"), ["wrong"]),
        (planted(MESSAGES, "n = sum(counts)", "n = total(counts)"), ["raised"]),
        (planted("syncbn/torch/layer.py", "import copy\n", "import copies\n"), ["load"]),
    ],
    ids=["the layer itself", "wrong", "raised", "load"],
)
def test_the_ranks_run_the_copy_and_the_suite_detects_the_change(
    mutant: Mutant | None, hows: list[str]
) -> None:
    cases = [case for case in catalogue(2, "smoke") if case.clause == "FWD-1"]
    with run.copy_of_layer(mutant) as target:
        assert [detection.how for detection in run.detections(target, cases)] == hows


def test_the_ranks_run_the_copy_of_a_module_that_the_suite_imports() -> None:
    """The ranks have imported syncbn.contract before they load the layer."""
    mutant = planted("syncbn/contract.py", "if num_features < 1:", "if num_features < 0:")
    cases = [case for case in catalogue(1, "certify") if case.title == "num_features=0"]
    with run.copy_of_layer(mutant) as target:
        assert [detection.how for detection in run.detections(target, cases)] == ["wrong"]


def test_the_summary_shows_the_survivor() -> None:
    (case,) = (case for case in catalogue(2, "smoke") if case.clause == "FWD-1")
    survivor = planted(MESSAGES, "n = sum(counts)", "n = sum(counts) + 0")
    killed = planted(MESSAGES, "n = sum(counts)", "n = sum(counts) + 1")
    results = [
        Result(survivor, None, 1.0),
        Result(killed, Detection("wrong", case, "m"), 2.0),
    ]
    console = Console(record=True, width=120)
    show.summarize(results, console)
    shown = console.export_text()
    assert f"survived: {survivor.id} {MESSAGES}:1" in shown
    assert "swap: 1 of 2 killed" in shown
    assert json.loads(json.dumps(show.document(results)))[1]["result"] == "wrong"
