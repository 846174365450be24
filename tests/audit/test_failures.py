"""The list of known failures fits the cases, and docs/failure-modes.md shows both."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from audit.failures import known, page
from audit.failures.known import SOURCE, Failure, FailureListError
from syncbn.conformance.cases import catalogue

ROOT = Path(__file__).parents[2]
CASES = catalogue(4, "certify")
SECTIONS = known.load()


def test_every_failure_has_cases_or_a_reason() -> None:
    assert len(known.flat(SECTIONS)) > 80
    assert known.problems(SECTIONS, CASES) == []


def test_the_page_is_current() -> None:
    kept = (ROOT / "docs" / "failure-modes.md").read_text(encoding="utf-8")
    assert kept == page.document(SECTIONS, CASES), "make it again: python -m audit failures"


def test_every_file_and_test_that_a_reason_names_exists() -> None:
    """Tests are named as pytest names them: FILE::CLASS::TEST[PARAMETER]."""
    reasons = " ".join(failure.no_case for failure in known.flat(SECTIONS))
    named = re.findall(r"`((?:docs|tests)/[^`:]+)((?:::[^`]+)?)`", reasons)
    assert any(test for _, test in named)
    for file, test in named:
        text = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"\w+", test):
            assert re.search(rf"^\s*(def|class) {name}\b|\b{name}=|\"{name}\"", text, re.M), (
                f"{file} has no {name}"
            )


@pytest.mark.parametrize(
    "source",
    ["one/project#1", "one/project@0123abc", "one/project: a/file.py", "one/project: a.md, here"],
)
def test_good_sources(source: str) -> None:
    assert SOURCE.fullmatch(source)


@pytest.mark.parametrize(
    "source",
    ["#1", "project#1", "one/project", "one/project#", "one/project@main", "one/project:a/file.py"],
)
def test_bad_sources(source: str) -> None:
    assert not SOURCE.fullmatch(source)


def test_white_space_in_a_text_is_one_space() -> None:
    assert not any("\n" in failure.went_wrong for failure in known.flat(SECTIONS))


CAUGHT = Failure("caught", "It was wrong.", ("one/project#1", "one/project#2"), {"FWD-3": "cut"})
NOT_CAUGHT = Failure(
    "not-caught", "Also wrong.", ("one/project: its/file.py, a part",), no_case="No layer."
)
CATCHES, OTHER = (replace(CASES[0], clause="FWD-3", title=title) for title in ("cut", "cuts"))


def small(*failures: Failure) -> dict[str, list[Failure]]:
    """The two failures, in a section each."""
    return {f"Section {number}": [failure] for number, failure in enumerate(failures, 1)}


def test_a_list_that_fits() -> None:
    assert known.problems(small(CAUGHT, NOT_CAUGHT), [CATCHES]) == []


def test_a_case_catches_a_failure_by_its_whole_title() -> None:
    assert known.cases_of(CAUGHT, [CATCHES, OTHER]) == [CATCHES]
    assert known.cases_of(NOT_CAUGHT, [CATCHES, OTHER]) == []


@pytest.mark.parametrize(
    ("first", "second", "problem"),
    [
        (
            replace(CAUGHT, caught_by={}),
            NOT_CAUGHT,
            "caught: it must have either caught_by or no_case",
        ),
        (
            replace(CAUGHT, no_case="No layer."),
            NOT_CAUGHT,
            "caught: it must have either caught_by or no_case",
        ),
        (
            replace(CAUGHT, caught_by={"FWD-3": "cut", "FWD-4": "cut"}),
            NOT_CAUGHT,
            "caught: no case of FWD-4 has a title like 'cut'",
        ),
        (
            CAUGHT,
            replace(NOT_CAUGHT, id="caught"),
            "caught: the list has 2 failures of this id",
        ),
        (
            CAUGHT,
            replace(NOT_CAUGHT, sources=CAUGHT.sources[1:]),
            "not-caught: 'one/project#2' is already a source of caught",
        ),
        (CAUGHT, replace(NOT_CAUGHT, sources=()), "not-caught: it has no source"),
        (
            CAUGHT,
            replace(NOT_CAUGHT, sources=("hearsay",)),
            "not-caught: a source must not be written like 'hearsay'",
        ),
    ],
)
def test_problems(first: Failure, second: Failure, problem: str) -> None:
    assert known.problems(small(first, second), [CATCHES]) == [problem]


def test_page(tmp_path: Path) -> None:
    page.write(tmp_path / "page.md", small(CAUGHT, NOT_CAUGHT), [CATCHES])
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "2 ways" in text
    assert "For 1 of them the suite has a case" in text
    assert (
        "## Section 1\n\n| failure | sources | caught by |\n| --- | --- | --- |\n"
        "| **caught**: It was wrong. "
        "| [one/project#1](https://github.com/one/project/issues/1), "
        "[one/project#2](https://github.com/one/project/issues/2) "
        f"| FWD-3: `{CATCHES.id}` |\n"
    ) in text
    assert text.endswith(
        "| **not-caught**: Also wrong. | [one/project: its/file.py, a part]"
        "(https://github.com/one/project/blob/HEAD/its/file.py) | no case. No layer. |\n"
    )


def test_page_of_many_cases() -> None:
    many = [replace(CATCHES, seed=seed) for seed in range(7)]
    ids = [f"`{case.id}`" for case in many]
    sections = small(CAUGHT, NOT_CAUGHT)
    assert f"| FWD-3: {', '.join(ids[:5])} and 2 more |" in page.document(sections, many)
    assert f": {', '.join(ids[:6])} |" in page.document(sections, many[:6])


def test_no_page_of_a_list_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(FailureListError, match="caught: no case of FWD-3"):
        page.write(tmp_path / "page.md", small(CAUGHT), [OTHER])
    assert not (tmp_path / "page.md").exists()
