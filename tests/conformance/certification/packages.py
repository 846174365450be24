"""Small packages for tests: few cases on 1 and 2 ranks, and ways to change one by hand."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from syncbn import reports
from syncbn.conformance import must_pass, report, targets
from syncbn.conformance.case import Case
from syncbn.conformance.cases import catalogue
from syncbn.conformance.certification import contents
from syncbn.conformance.certification import make as maker_module
from syncbn.conformance.certification.environment import environment
from syncbn.conformance.certification.make import Maker
from syncbn.conformance.certification.plan import Plan
from syncbn.reports.junit import junit

PRODUCT = {"name": "Layer", "vendor": "Vendor", "version": "1.2", "contact": "a@example.org"}
CLAUSES = ("CTOR-1", "CTOR-5", "ERR-1", "ERR-9", "FWD-1", "GRAD-1", "STAT-2", "STAT-3")


class FewCases(Plan):
    """The first case of some clauses, and one with a large array."""

    def cases(self, ranks: int) -> list[Case]:
        return _cases(ranks, self.profile)


@functools.cache
def _cases(ranks: int, profile: str) -> list[Case]:
    every = catalogue(ranks, profile)
    found = {case.clause: case for case in reversed(every)}
    large = next(case for case in every if case.title == "float32, equal values on each rank")
    wanted = [found[clause].id for clause in CLAUSES if clause in found] + [large.id]
    return [case for case in every if case.id in wanted]


PLAN = FewCases("few", "certify", (1, 2))


@contextlib.contextmanager
def few_listed() -> Iterator[None]:
    """The must-pass lists hold the cases of PLAN alone, so that its runs can pass.

    The environment is read once: an installation next to the tests is not their subject.
    """

    def listed(ranks: int, profile: str) -> dict[str, str]:
        return {case.id: case.title for case in PLAN.cases(ranks)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(must_pass, "listed", listed)
        patch.setattr(maker_module, "environment", functools.cache(environment))
        yield


def make(folder: Path, target: str, **options: Any) -> str:
    """A package of PLAN. Returns its result."""
    maker = Maker(
        targets.parse(target),
        PRODUCT,
        folder,
        level=options.pop("level", "decided"),
        launcher="local",
        command=["syncbn-conformance", "certify"],
        plan=PLAN,
    )
    with maker:
        for ranks in maker.runs:
            maker.run(ranks)
        return maker.finish(**options)


def load(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def store(folder: Path, name: str, document: Any) -> None:
    (folder / name).write_text(json.dumps(document, indent=1) + "\n")


def bind(folder: Path) -> None:
    """Put the digests of the files as they are now into the certificate."""
    certificate = load(folder, contents.CERTIFICATE)
    predicate = certificate["predicate"]
    for one in [*certificate["subject"], *predicate["configuration"]]:
        if (folder / one["name"]).is_file():
            data = (folder / one["name"]).read_bytes()
            one["digest"]["sha256"] = hashlib.sha256(data).hexdigest()
    store(folder, contents.CERTIFICATE, certificate)


def forge(folder: Path, change: Callable[[list[dict[str, Any]]], Any], ranks: int = 2) -> None:
    """Change the cases of a report, and make every other file again from the changed ones.

    The raw results stay, as do their digests in the log.
    """
    made = {}
    for number in PLAN.ranks:
        name = contents.name_of(number, contents.REPORT)
        given = load(folder, name)
        if number == ranks:
            change(given["cases"])
            derived = ("selection", "must_pass", "summary", "clauses", "cases")
            facts = {key: value for key, value in given.items() if key not in derived}
            given = report.conclude(facts, given["cases"])
            reports.save(given, folder / name)
            (folder / contents.name_of(number, contents.JUNIT)).write_text(junit(given))
        made[number] = given
    product, here = load(folder, contents.PRODUCT), load(folder, contents.ENVIRONMENT)
    result = contents.result_of(made, PLAN, here["level"])
    lines = [json.loads(line) for line in (folder / contents.LOG).read_text().splitlines()]
    raw = {(line["ranks"], line["id"]): line["raw"] for line in lines if line["event"] == "case"}
    sources = {line["ranks"]: line["sources"] for line in lines if line["event"] == "ran"}
    log = [contents.begin_line(product, here)]
    for number, given in made.items():
        log.append(contents.run_line(given))
        log += [
            contents.case_line(number, row, raw.get((number, row["id"]))) for row in given["cases"]
        ]
        log.append(contents.ran_line(given, sources[number]))
    log.append(contents.end_line(result))
    (folder / contents.LOG).write_text("".join(f"{json.dumps(line)}\n" for line in log))
    (folder / contents.TEXT).write_text(contents.text(product, here, made, result, PLAN))
    digests = {one["name"]: "0" * 64 for one in load(folder, contents.CERTIFICATE)["subject"]}
    store(folder, contents.CERTIFICATE, contents.statement(digests, made, result))
    bind(folder)
