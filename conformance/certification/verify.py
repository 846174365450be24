"""Verify a package: derive every verdict again, and compare everything with what follows from it.

Nothing of the package is executed, and no framework is needed. What cannot be derived, such as a
time, stands in two files that were written at different times; both must agree.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from syncbn import reports
from syncbn.conformance import ConformanceError, must_pass, report, runner
from syncbn.conformance.case import Case
from syncbn.conformance.certification import contents, product, raw, signature
from syncbn.conformance.certification.environment import TOOLS, suite_files
from syncbn.conformance.certification.folder import Folder, UnreadableError
from syncbn.conformance.certification.make import NO_ORACLE
from syncbn.conformance.certification.plan import CERTIFIED, Plan
from syncbn.conformance.expected import expect
from syncbn.conformance.runner import Result
from syncbn.reports.junit import junit
from syncbn.reports.schema import Schema, parse, shorten
from syncbn.reports.text import one_line

_SCHEMAS = Path(__file__).parent.parent / "schema"
_CERTIFICATE = Schema(json.loads((_SCHEMAS / "certificate-1.json").read_bytes()))
_ENVIRONMENT = Schema(json.loads((_SCHEMAS / "environment-1.json").read_bytes()))
_SOURCES = Schema(
    _ENVIRONMENT.document["properties"]["sources"] | {"$defs": _ENVIRONMENT.document["$defs"]}
)
_LINE = Schema({"type": "object"})  # which also limits its levels
_REPORT = Schema(reports.SCHEMA)
_NUMBER = re.compile(r"[-+]?[0-9]+\.?[0-9]*(?:e[-+]?[0-9]+)?")
_DERIVED = ("ratio", "worst_ratio")  # numbers that depend on the last bits of the reference
_TEXTS = ("message", "reason")  # texts that may quote such numbers
_CLOSE = 1e-6  # relative; of the former
_CLOSE_IN_TEXT = 1e-2  # they are rounded to 2 digits and more
_LARGEST_SIGNATURE = 100_000  # bytes
_SHOWN = 5  # differences of one kind


@dataclass(frozen=True)
class Verification:
    """What a verifier found.

    refused: why the package is refused, one line each; empty if it is verified.
    title: what it certifies, in one line.
    notes: what a reader must know of a package that is verified.
    result: PASSED or FAILED.
    """

    refused: list[str]
    title: str = ""
    notes: list[str] = field(default_factory=list)
    result: str = ""


def verify(path: Path, allowed_signers: Path | None = None, plan: Plan = CERTIFIED) -> Verification:
    """Verify the package in a folder.

    Args:
        path: the folder.
        allowed_signers: whose signatures to trust; then the package must have one of them.
        plan: the runs that it must have.

    Raises:
        UnreadableError: there is no package.
    """
    folder = Folder(path)
    if contents.CERTIFICATE not in folder.names:
        raise UnreadableError(f"{path} holds no package: it has no file {contents.CERTIFICATE}")
    return _Verifier(folder, plan).verify(allowed_signers)


class _Stop(Exception):
    """Nothing more can be compared."""


class _Verifier:
    """Verifies one package; `_refused` collects why it is refused."""

    def __init__(self, folder: Folder, plan: Plan) -> None:
        self._folder = folder
        self._plan = plan
        self._refused: list[str] = []
        self._reports: dict[int, Any] = {}  # as the package has them
        self._derived: dict[int, Any] = {}
        self._digests: dict[int, dict[str, str]] = {}  # of the raw results of each case
        self._sampled = 0

    def verify(self, allowed_signers: Path | None) -> Verification:
        try:
            notes = self._signed(allowed_signers)
            certificate = self._document(contents.CERTIFICATE, _CERTIFICATE)
            self._product = self._document(contents.PRODUCT, product.SCHEMA)
            self._environment = self._document(contents.ENVIRONMENT, _ENVIRONMENT)
            runs = self._runs()
            digests = self._bound(certificate, runs)
            self._suite()
            for ranks in runs:
                self._run(ranks)
            result = contents.result_of(self._derived, self._plan, self._environment["level"])
            self._log(result)
            self._text(result)
            wanted = contents.statement(digests, self._reports, result)
            self._compare(contents.CERTIFICATE, certificate, wanted)
        except UnreadableError as error:  # of a file that is too large
            self._refuse(str(error))
            return Verification(self._refused)
        except _Stop:
            return Verification(self._refused)
        if self._sampled:
            notes.append(
                f"{self._sampled} arrays of more than {raw.LARGEST_WHOLE // 1024} KiB were judged "
                f"at {raw.SAMPLE} places each, and where the run found the largest ratio"
            )
        title = contents.title(self._environment, result)
        return Verification(self._refused, title, notes, result)

    def _signed(self, allowed_signers: Path | None) -> list[str]:
        """Check the signature. Returns the notes on it for the reader."""
        name = contents.CERTIFICATE + signature.SUFFIX
        if name not in self._folder.names:
            if allowed_signers is not None:
                self._refuse(f"{name}: missing, the package is not signed")
            return ["not signed: the digests bind the files to each other only"]
        if len(self._folder.read(name)) > _LARGEST_SIGNATURE:
            self._refuse(f"{name}: must have at most {_LARGEST_SIGNATURE} bytes")
            return []
        try:
            signer = signature.check(
                self._folder.read(contents.CERTIFICATE), self._folder.path(name), allowed_signers
            )
        except signature.SignatureError as error:
            self._refuse(f"{name}: {error}")
            return []
        return [f"signed by {one_line(signer)}"]

    def _document(self, name: str, schema: Schema) -> Any:
        """The JSON document of a file, which must obey its schema."""
        document = self._parsed(name, self._read(name))
        if violation := schema.violation(document):
            raise self._stop(f"{name}: {violation}")
        return document

    def _runs(self) -> tuple[int, ...]:
        """The numbers of ranks that the package must have runs of."""
        known = self._environment
        try:
            runs = self._plan.runs(known["target"]["device"], known["devices"])
        except ConformanceError as error:
            raise self._stop(f"{contents.ENVIRONMENT}: {error}") from error
        tool = TOOLS.get(known["target"]["device"])
        if tool and tool not in known["here"]["accelerator"]:
            device = known["target"]["device"]
            self._refuse(f"{contents.ENVIRONMENT}: {tool} reports no accelerator of type {device}")
        made = {"name": self._plan.name, "profile": self._plan.profile, "ranks": [*runs]}
        self._compare(f"{contents.ENVIRONMENT}: plan", known["plan"], made)
        return runs

    def _bound(self, certificate: Any, runs: tuple[int, ...]) -> dict[str, str]:
        """Compare the files with those of the plan, and with the digests of the certificate."""
        names = contents.names(runs)
        own = {contents.CERTIFICATE, contents.CERTIFICATE + signature.SUFFIX}
        for name in sorted(set(self._folder.names) - own - set(names)):
            self._refuse(f"{name}: is no file of the package")
        folders = {str(above) for name in names for above in PurePosixPath(name).parents}
        for name in sorted(set(self._folder.folders) - folders):
            self._refuse(f"{name}: is no folder of the package")
        for name in sorted(self._folder.odd):
            self._refuse(f"{name}: is no regular file")
        if missing := sorted(set(names) - set(self._folder.names)):
            for name in missing:
                self._refuse(f"{name}: missing")
            raise _Stop
        bound = {one["name"]: one["digest"]["sha256"] for one in certificate["subject"]}
        digests = {name: self._folder.sha256(name) for name in names}
        for name, digest in digests.items():
            if name in bound and bound[name] != digest:
                self._refuse(f"{name}: is not the file that the certificate binds by its SHA-256")
        return digests

    def _suite(self) -> None:
        """Compare the suite that judged with this one."""
        kept, here = self._environment["here"]["suite"], report.suite()
        if kept["version"] != here["version"]:
            self._refuse(
                f"suite: the package was made by version {kept['version']}, this is "
                f"{here['version']}; verify it with that version"
            )
        own = suite_files()
        changed = [
            name
            for name in sorted({*own, *kept["files"]})
            if own.get(name) != kept["files"].get(name)
        ]
        for name in changed[:_SHOWN]:
            how = "is not in this suite" if name not in own else "is in this suite only"
            how = "differs" if name in own and name in kept["files"] else how
            self._refuse(
                f"suite: {name} {how}; the package was made by commit {kept['commit']}, this is "
                f"{here['commit']}"
            )
        if len(changed) > _SHOWN:
            self._refuse(f"suite: {len(changed) - _SHOWN} more files differ")

    def _run(self, ranks: int) -> None:
        """Derive the report of a run from its raw results, and compare."""
        place = contents.name_of(ranks, contents.REPORT)
        given = self._document(place, _REPORT)
        if "run" not in given:  # reports of before 2026-11-27 do not have it
            raise self._stop(f"{place}: run is missing")
        known = self._environment
        suite = {name: v for name, v in known["here"]["suite"].items() if name != "files"}
        settled = {
            "suite": suite,
            "target": known["target"],
            "oracle": {"target": None, "left_out": NO_ORACLE},
            "ranks": ranks,
            "profile": self._plan.profile,
            "level": known["level"],
        }
        self._compare(place, {name: given[name] for name in settled}, settled)
        self._compare(f"{place}: run.command", given["run"]["command"], known["command"])
        rows = self._rows(ranks, given)
        facts = {
            name: value
            for name, value in given.items()
            if name not in ("selection", "must_pass", "summary", "clauses", "cases")
        }
        derived = report.conclude(facts | settled, rows)
        self._reports[ranks], self._derived[ranks] = given, derived
        self._compare_cases(place, given["cases"], rows)
        others = [{n: v for n, v in one.items() if n != "cases"} for one in (given, derived)]
        self._compare(place, *others)
        name = contents.name_of(ranks, contents.JUNIT)
        if self._folder.read(name) != junit(given).encode():
            self._refuse(f"{name}: is not the JUnit file of {place}")

    def _rows(self, ranks: int, given: Any) -> list[report.Row]:
        """The result of every case of the plan on this many ranks, from the raw results."""
        name = contents.name_of(ranks, contents.RAW)
        cases = {case.id: case for case in self._plan.cases(ranks)}
        if set(cases) != set(must_pass.listed(ranks, self._plan.profile)):
            self._refuse(f"suite: the cases on {ranks} ranks are not those of its frozen list")
        results: dict[str, Result] = {}
        digests = self._digests[ranks] = {}
        try:
            with self._folder.open(name) as file:
                for number, record in enumerate(raw.read(file)):
                    if record.case not in cases:
                        self._refuse(f"{name}: case {record.case} is not one of the plan")
                    elif record.case in results:
                        self._refuse(f"{name}: case {record.case} is there again")
                    else:
                        results[record.case] = self._judge(name, cases[record.case], record)
                        digests[record.case] = record.sha256
                    if number == len(cases):  # one too many: however many follow, it is refused
                        break
        except raw.RawError as error:
            self._refuse(f"{name}: {error}")
        if [*results] != [id for id in cases if id in results]:
            self._refuse(f"{name}: the cases are in another order than in the suite")
        seconds = {row["id"]: row["seconds"] for row in given["cases"]}
        found = [results.get(id) or runner.not_run(case) for id, case in cases.items()]
        rows = [
            report.row(one) | {"seconds": seconds.get(one.case.id, one.seconds)} for one in found
        ]
        return json.loads(json.dumps(rows))  # as they are read

    def _judge(self, name: str, case: Case, record: raw.Record) -> Result:
        expected = functools.cache(lambda: expect(case))
        self._sampled += len(record.message.content["large"])
        try:
            outcome = record.outcome(case, expected)
        except raw.RawError as error:
            self._refuse(f"{name}: case {case.id}: {error}")
            return runner.not_run(case)
        verdict = runner.judge(case, outcome, expected)
        return Result(case, verdict, 0.0, changed=tuple(outcome.changed))

    def _compare_cases(self, place: str, given: list[Any], derived: list[report.Row]) -> None:
        """Compare the cases of a report by their ids."""
        ids = [row["id"] for row in given]
        wanted = {row["id"]: row for row in derived}
        counts = Counter(ids)
        for id, count in counts.items():
            if count > 1:
                self._refuse(f"{place}: case {id} is there again")
        for id in wanted:
            if id not in counts:
                self._refuse(f"{place}: case {id} is left out")
        for row in given:
            if row["id"] not in wanted:
                self._refuse(f"{place}: case {row['id']} is not one of the plan")
            else:
                self._compare(f"{place}: case {row['id']}", row, wanted[row["id"]])
        if sorted(ids) == sorted(wanted) and ids != [*wanted]:
            self._refuse(f"{place}: the cases are in another order than in the suite")

    def _log(self, result: str) -> None:
        """Compare the log with the reports and the raw results."""
        lines = []
        *texts, rest = self._read(contents.LOG).split(b"\n")
        for number, text in enumerate([*texts, rest] if rest else texts, 1):
            line = self._parsed(f"{contents.LOG}: line {number}", text)
            if violation := _LINE.violation(line):
                raise self._stop(f"{contents.LOG}: line {number}: {violation}")
            lines.append(line)
        wanted = list(self._wanted_log(lines, result))
        for number, (line, one) in enumerate(zip(lines, wanted, strict=False), 1):
            what = one.get("id") or one["event"]
            self._compare(f"{contents.LOG}: line {number} ({what})", line, one)
        if len(lines) != len(wanted):
            self._refuse(f"{contents.LOG}: must have {len(wanted)} lines, got {len(lines)}")

    def _wanted_log(self, lines: list[Any], result: str) -> Iterator[dict[str, Any]]:
        """The lines that follow from the other files. The files of the layer are taken from it."""
        sources = [
            line["sources"] for line in lines if _SOURCES.violation(line.get("sources")) is None
        ]
        yield contents.begin_line(self._product, self._environment)
        for index, (ranks, given) in enumerate(self._reports.items()):
            yield contents.run_line(given)
            for row in given["cases"]:
                yield contents.case_line(ranks, row, self._digests[ranks].get(row["id"]))
            yield contents.ran_line(given, sources[index] if index < len(sources) else {})
        yield contents.end_line(result)
        self._compare_sources(sources)

    def _compare_sources(self, sources: list[Any]) -> None:
        """The files of the layer are those of the runs, and the same in all of them."""
        for kind, known in self._environment["sources"].items():
            for found in sources:
                for name in found[kind]:
                    if found[kind][name] != known.get(name):
                        self._refuse(f"{contents.LOG}: sources.{kind}.{name} is another")
            for name in sorted(set(known).difference(*(found[kind] for found in sources))):
                self._refuse(f"{contents.ENVIRONMENT}: sources.{kind}.{name} is of no run")

    def _text(self, result: str) -> None:
        text = contents.text(self._product, self._environment, self._reports, result, self._plan)
        wanted = text.encode().split(b"\n")
        found = self._read(contents.TEXT).split(b"\n")
        for number, (line, one) in enumerate(zip(found, wanted, strict=False), 1):
            if line != one:
                shown = [_show(each.decode(errors="backslashreplace")) for each in (line, one)]
                self._refuse(f"{contents.TEXT}: line {number} is {shown[0]}, not {shown[1]}")
        if len(found) != len(wanted):
            self._refuse(f"{contents.TEXT}: must have {len(wanted)} lines, got {len(found)}")

    def _read(self, name: str) -> bytes:
        if name not in self._folder.names:
            raise self._stop(f"{name}: missing")
        return self._folder.read(name)

    def _parsed(self, place: str, text: bytes) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise self._stop(f"{place}: is not JSON: {error}") from error

    def _compare(self, place: str, given: Any, wanted: Any) -> None:
        for difference in differences(given, wanted):
            self._refuse(f"{place}{difference}")

    def _refuse(self, text: str) -> None:
        self._refused.append(shorten(one_line(text), 500))

    def _stop(self, text: str) -> _Stop:
        self._refuse(text)
        return _Stop()


def differences(given: Any, wanted: Any, name: str = "") -> Iterator[str]:
    """The places at which a document differs from the one that was derived, as ".NAME is A, not B".

    Numbers that depend on the last bits of the reference may differ by as little.
    """
    if isinstance(given, Mapping) and isinstance(wanted, Mapping):
        for key in [*wanted, *(key for key in given if key not in wanted)]:
            if key not in given:
                yield f".{key} is missing"
            elif key not in wanted:
                yield f".{key} is there, and must not be"
            else:
                for found in differences(given[key], wanted[key], key):
                    yield f".{key}{found}"
    elif isinstance(given, list) and isinstance(wanted, list) and len(given) == len(wanted):
        for index, (one, other) in enumerate(zip(given, wanted, strict=True)):
            for found in differences(one, other, name):
                yield f"[{index}]{found}"
    elif not _alike(given, wanted, name):
        yield f" is {_show(given)}, not {_show(wanted)}"


def _alike(given: Any, wanted: Any, name: str) -> bool:
    if name in _DERIVED and isinstance(given, float) and isinstance(wanted, float):
        return math.isclose(given, wanted, rel_tol=_CLOSE)
    if name in _TEXTS and isinstance(given, str) and isinstance(wanted, str):
        return _alike_texts(given, wanted)
    return type(given) is type(wanted) and given == wanted


def _alike_texts(given: str, wanted: str) -> bool:
    numbers = [[float(n) for n in _NUMBER.findall(text)] for text in (given, wanted)]
    return _NUMBER.sub("#", given) == _NUMBER.sub("#", wanted) and all(
        math.isclose(one, other, rel_tol=_CLOSE_IN_TEXT)
        for one, other in zip(*numbers, strict=True)
    )


def _show(value: Any) -> str:
    return shorten(json.dumps(value), 160)
