"""The list of known failures, and whether it fits the cases of the suite."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from syncbn.conformance import ConformanceError
from syncbn.conformance.case import Case

try:
    import tomllib  # type: ignore[import-not-found]
except ModuleNotFoundError:  # before Python 3.11, where pytest installs its predecessor
    import tomli as tomllib

# OWNER/REPOSITORY with the number of an issue or pull request, a commit, or a path and its part.
SOURCE = re.compile(
    r"(?P<repository>[\w.-]+/[\w.-]+)"
    r"(?:#(?P<number>\d+)|@(?P<commit>[0-9a-f]{7,40})|: (?P<path>[\w./-]+)(?:, (?P<part>.+))?)"
)

_FILE = Path(__file__).with_name("known.toml")


class FailureListError(ConformanceError, ValueError):
    """The list of failures does not fit the cases; the text has a line for each problem."""


@dataclass(frozen=True)
class Failure:
    """One way in which a SyncBatchNorm went wrong.

    id: a short name.
    went_wrong: one or two sentences.
    sources: where it is reported, each written as SOURCE has it.
    caught_by: by clause, a regular expression that matches the whole title of each case which
        would have caught it.
    no_case: why no case can catch it, or "". Tests are named as pytest names them.
    """

    id: str
    went_wrong: str
    sources: tuple[str, ...] = ()
    caught_by: Mapping[str, str] = field(default_factory=dict)
    no_case: str = ""

    def is_caught_by(self, case: Case) -> bool:
        title = self.caught_by.get(case.clause)
        return title is not None and re.fullmatch(title, case.title) is not None


Sections: TypeAlias = Mapping[str, Sequence[Failure]]


def load() -> Sections:
    """The failures of known.toml by section, in the order of the file."""
    document = tomllib.loads(_FILE.read_text(encoding="utf-8"))
    return {name: [_failure(**table) for table in tables] for name, tables in document.items()}


def _failure(
    id: str, went_wrong: str, sources: Sequence[str], no_case: str = "", **caught_by: Any
) -> Failure:
    return Failure(id, _text(went_wrong), tuple(sources), **caught_by, no_case=_text(no_case))


def _text(text: str) -> str:
    return " ".join(text.split())


def flat(sections: Sections) -> list[Failure]:
    """All failures of all sections."""
    return [failure for failures in sections.values() for failure in failures]


def cases_of(failure: Failure, cases: Sequence[Case]) -> list[Case]:
    """The cases that would have caught the failure."""
    return [case for case in cases if failure.is_caught_by(case)]


def problems(sections: Sections, cases: Sequence[Case]) -> list[str]:
    """What is wrong with the list, and where it does not fit the cases; one line each."""
    failures = flat(sections)
    return [*_repeated_ids(failures), *_bad_sources(failures), *_missing_cases(failures, cases)]


def _repeated_ids(failures: Sequence[Failure]) -> Iterator[str]:
    for id, times in Counter(failure.id for failure in failures).items():
        if times > 1:
            yield f"{id}: the list has {times} failures of this id"


def _bad_sources(failures: Sequence[Failure]) -> Iterator[str]:
    owner: dict[str, str] = {}
    for failure in failures:
        if not failure.sources:
            yield f"{failure.id}: it has no source"
        for source in failure.sources:
            if not SOURCE.fullmatch(source):
                yield f"{failure.id}: a source must not be written like {source!r}"
            if source in owner:
                yield f"{failure.id}: {source!r} is already a source of {owner[source]}"
            owner[source] = failure.id


def _missing_cases(failures: Sequence[Failure], cases: Sequence[Case]) -> Iterator[str]:
    for failure in failures:
        if bool(failure.caught_by) == bool(failure.no_case):
            yield f"{failure.id}: it must have either caught_by or no_case"
        for clause, title in failure.caught_by.items():
            if not any(failure.is_caught_by(case) for case in cases if case.clause == clause):
                yield f"{failure.id}: no case of {clause} has a title like {title!r}"
