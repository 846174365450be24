"""The registry of known failures fits the cases, and docs/failure-modes.md shows both."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from audit import failures
from audit.failures import FAILURES, SOURCE, Failure, RegistryError
from syncbn.conformance.cases import catalogue

ROOT = Path(__file__).parents[2]
CASES = catalogue(4, "certify")
ASKED = Failure(
    "asked", ("one/project#1", "one/project#2"), "It was wrong.", asked=(("FWD-3", "cut"),)
)
NOT_ASKED = Failure(
    "not-asked", ("one/project: its/file.py, a part",), "Also wrong.", not_asked="No layer."
)


def test_every_failure_has_cases_or_a_reason() -> None:
    assert failures.problems(CASES) == []


def test_the_document_is_that_of_the_registry_and_the_cases() -> None:
    kept = (ROOT / "docs" / "failure-modes.md").read_text(encoding="utf-8")
    assert kept == failures.document(CASES), "make it again: python -m audit failures"


def test_what_a_reason_names_exists() -> None:
    """Files, and tests as pytest names them: FILE::CLASS::TEST[PARAMETER]."""
    reasons = [failure.not_asked or "" for section in FAILURES.values() for failure in section]
    named = re.findall(r"`((?:conformance|docs)/[^`:]+)((?:::[^`]+)?)`", " ".join(reasons))
    assert named
    for file, test in named:
        text = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"\w+", test):
            assert re.search(rf"^\s*(def|class) {name}\b", text, re.M), f"{file} has no {name}"


@pytest.mark.parametrize(
    "source",
    ["one/project#1", "one/project@0123abc", "one/project: a/file.py", "one/project: a.md, here"],
)
def test_sources_that_are_well_formed(source: str) -> None:
    assert SOURCE.fullmatch(source)


@pytest.mark.parametrize(
    "source",
    ["#1", "project#1", "one/project", "one/project#", "one/project@main", "one/project:a/file.py"],
)
def test_sources_that_are_not(source: str) -> None:
    assert not SOURCE.fullmatch(source)


class TestPlanted:
    """A small registry, and cases that fit it but for one fault."""

    @pytest.fixture(autouse=True)
    def registry(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plant(monkeypatch, ASKED, NOT_ASKED)

    asking, other = (replace(CASES[0], clause="FWD-3", title=title) for title in ("cut", "cuts"))

    def plant(self, monkeypatch: pytest.MonkeyPatch, *found: Failure) -> None:
        monkeypatch.setattr(failures, "FAILURES", {"One": found[:1], "Two": found[1:]})

    def test_nothing(self) -> None:
        assert failures.problems([self.asking]) == []

    def test_the_case_of_a_failure_is_found(self) -> None:
        assert failures.answers([self.asking, self.other]) == {
            "asked": [self.asking],
            "not-asked": [],
        }

    def test_a_case_that_there_is_not(self) -> None:
        (problem,) = failures.problems([self.other])
        assert problem == "asked: no case of FWD-3 has a title like 'cut'"

    def test_neither_case_nor_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plant(monkeypatch, replace(ASKED, asked=()), NOT_ASKED)
        (problem,) = failures.problems([self.asking])
        assert problem == "asked: it must name cases that ask about it, or say why there are none"

    def test_both_case_and_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plant(monkeypatch, replace(ASKED, not_asked="No layer."), NOT_ASKED)
        (problem,) = failures.problems([self.asking])
        assert problem == "asked: it must name cases that ask about it, or say why there are none"

    def test_a_name_twice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plant(monkeypatch, ASKED, replace(NOT_ASKED, id="asked"))
        assert "asked: there are 2 failures of this name" in failures.problems([self.asking])

    def test_a_source_twice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plant(monkeypatch, ASKED, replace(NOT_ASKED, id="other", sources=ASKED.sources[1:]))
        expected = "other: 'one/project#2' is a source of asked already"
        assert expected in failures.problems([self.asking])

    def test_no_source(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plant(monkeypatch, ASKED, replace(NOT_ASKED, sources=()))
        assert failures.problems([self.asking]) == ["not-asked: it has no source"]

    def test_a_source_that_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plant(monkeypatch, ASKED, replace(NOT_ASKED, sources=("hearsay",)))
        (problem,) = failures.problems([self.asking])
        assert problem == "not-asked: a source is not written like 'hearsay'"

    def test_document(self, tmp_path: Path) -> None:
        failures.write(tmp_path / "page.md", [self.asking])
        text = (tmp_path / "page.md").read_text(encoding="utf-8")
        assert "2 ways" in text
        assert "1 of them can be asked" in text
        assert (
            "## One\n\n| failure | sources | asked by |\n|---|---|---|\n| **asked**: It was wrong. "
            "| [one/project#1](https://github.com/one/project/issues/1), "
            "[one/project#2](https://github.com/one/project/issues/2) "
            f"| {self.asking.clause}: `{self.asking.id}` |\n"
        ) in text
        assert text.endswith(
            "| **not-asked**: Also wrong. | [one/project: its/file.py, a part]"
            "(https://github.com/one/project/blob/HEAD/its/file.py) | nothing. No layer. |\n"
        )

    def test_document_of_many_cases(self) -> None:
        many = [replace(self.asking, seed=seed) for seed in range(7)]
        ids = [f"`{case.id}`" for case in many]
        assert f"| FWD-3: {', '.join(ids[:5])} and 2 more |" in failures.document(many)
        assert f": {', '.join(ids[:6])} |" in failures.document(many[:6])

    def test_no_document_of_what_does_not_fit(self, tmp_path: Path) -> None:
        with pytest.raises(RegistryError, match="asked: no case of FWD-3"):
            failures.write(tmp_path / "page.md", [])
        assert not (tmp_path / "page.md").exists()
