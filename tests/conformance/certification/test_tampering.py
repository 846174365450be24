"""Packages that somebody changed by hand: each is refused, by the name of what was changed."""

from __future__ import annotations

import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from syncbn.conformance.certification import contents, raw
from syncbn.conformance.certification.plan import CERTIFIED, Plan
from syncbn.conformance.certification.verify import verify
from syncbn.conformance.wire import Message, encode
from tests.conformance.certification.packages import (
    PLAN,
    bind,
    forge,
    load,
    store,
)

REPORT, RAW = "runs/2/report.json", "runs/2/raw.bin"


def test_what_a_run_makes_is_verified(passed: Path, failed: Path) -> None:
    for folder, result in ((passed, "PASSED"), (failed, "FAILED")):
        found = verify(folder, plan=PLAN)
        assert found.refused == []
        assert found.result == result
        assert found.title.startswith(f"{result} at level decided: ")
        assert any("arrays of more than 64 KiB" in note for note in found.notes)


def test_only_the_plan_of_a_certificate_makes_one(passed: Path) -> None:
    (first, *_) = verify(passed).refused
    assert first == f'environment.json: plan.name is "few", not "{CERTIFIED.name}"'
    other = Plan(CERTIFIED.name, "smoke", (1, 2))
    assert 'plan.name is "few"' in verify(passed, plan=other).refused[0]


# Changes of a folder. Those of a failing package try to make it pass.

Change = Callable[[Path], None]


def edited(name: str, change: Callable[[Any], None], then: Change = bind) -> Change:
    """A change of a JSON file; then the digests are put right, unless `then` is other."""

    def apply(folder: Path) -> None:
        document = load(folder, name)
        change(document)
        store(folder, name, document)
        then(folder)

    return apply


def nothing(folder: Path) -> None:
    pass


def text(name: str, old: str, new: str) -> Change:
    def apply(folder: Path) -> None:
        before = (folder / name).read_text()
        assert old in before
        (folder / name).write_text(before.replace(old, new, 1))
        bind(folder)

    return apply


def lines(change: Callable[[list[str]], Any]) -> Change:
    """A change of the lines of the log."""

    def apply(folder: Path) -> None:
        found = (folder / contents.LOG).read_text().splitlines(keepends=True)
        change(found)
        (folder / contents.LOG).write_text("".join(found))
        bind(folder)

    return apply


def records(path: Path) -> list[Message]:
    with path.open("rb") as file:
        return [record.message for record in raw.read(file)]


def write_records(path: Path, messages: list[Message]) -> None:
    packed = []
    for message in messages:
        data = encode(*message)
        small = zlib.compress(data)
        packed.append(struct.pack("<II", len(small), len(data)) + small)
    path.write_bytes(raw.MAGIC + b"".join(packed))


def results(change: Callable[[list[Message]], Any]) -> Change:
    """A change of the raw results on 2 ranks."""

    def apply(folder: Path) -> None:
        messages = records(folder / RAW)
        change(messages)
        write_records(folder / RAW, messages)
        bind(folder)

    return apply


def passes(cases: list[dict[str, Any]]) -> None:
    for case in cases:
        if case["verdict"] == "fail":
            case |= {"verdict": "pass", "ratio": 0.5, "message": None}


def case_of(clause: str, cases: list[Any]) -> Any:
    return next(case for case in cases if case["clause"] == clause)


def one_pass(report: Any) -> None:
    passes([case_of("STAT-2", report["cases"])])


def not_required(report: Any) -> None:
    for clause in report["clauses"]:
        if clause["verdict"] == "fail":
            clause["required"] = False
            report["summary"]["required"]["fail"] -= 1
    report["summary"]["verdict"] = "pass"


def large_ratio(report: Any) -> None:
    case_of("FWD-1", report["cases"])["ratio"] = 1e9


def no_clauses(report: Any) -> None:
    report["clauses"] = []


def twice(report: Any) -> None:
    report["cases"].append(report["cases"][0])


def rename(message: Message, case: str) -> Message:
    return Message(message.content | {"case": case}, message.arrays)


def relabel(messages: list[Message]) -> None:
    one, other = (messages[i].content["case"] for i in (4, 5))
    messages[4:6] = [rename(messages[4], other), rename(messages[5], one)]


def better_numbers(messages: list[Message]) -> None:
    for index, message in enumerate(messages):
        if any("running_var" in name for name in message.arrays):
            arrays = {n: a * 1.001 if "running_var" in n else a for n, a in message.arrays.items()}
            messages[index] = Message(message.content, arrays)


def large(messages: list[Message]) -> Any:
    message = next(message for message in messages if message.content["large"])
    return message, next(iter(message.content["large"].values()))


def other_digest(messages: list[Message]) -> None:
    large(messages)[1]["sha256"] = "ab" * 32


def no_mark(messages: list[Message]) -> None:
    large(messages)[1]["marked"] = []


def other_shape(messages: list[Message]) -> None:
    large(messages)[1]["shape"] = [2**21, 2**21]


def one_value(messages: list[Message]) -> None:
    message = next(m for m in messages if "0:0/y" in m.arrays and not m.content["large"])
    values = message.arrays["0:0/y"].copy()
    values.flat[0] += 1e-12 + values.flat[0] * 1e-7
    message.arrays["0:0/y"] = values


def other_suite(environment: Any) -> None:
    environment["here"]["suite"]["files"]["reference/ratio.py"] = "0" * 64


def other_version(environment: Any) -> None:
    environment["here"]["suite"]["version"] = "0.0.9"


def swap_runs(folder: Path) -> None:
    (folder / "runs/1").rename(folder / "runs/0")
    (folder / "runs/2").rename(folder / "runs/1")
    (folder / "runs/0").rename(folder / "runs/2")
    bind(folder)


def as_npu(folder: Path) -> None:
    """The device is renamed in every file."""
    for name in contents.names(PLAN.ranks):
        if not name.endswith(".bin"):
            path = folder / name
            path.write_text(path.read_text().replace('"device": "cpu"', '"device": "npu"'))
    forge(folder, passes)


def other_command(document: Any) -> None:
    document["command"] = ["other"]


def merged(failed: Path, passed: Path) -> None:
    """The cases of a layer that passes, in the report of the one that fails."""
    wanted = {case["id"]: case for case in load(passed, REPORT)["cases"]}
    forge(failed, lambda cases: [case.update(wanted[case["id"]]) for case in cases])


def other_run(failed: Path, passed: Path) -> None:
    """The whole run of a layer that passes in the place of the one that fails."""
    shutil.rmtree(failed / "runs/2")
    shutil.copytree(passed / "runs/2", failed / "runs/2")
    bind(failed)


BINDS = "is not the file that the certificate binds"
TAMPERINGS: dict[str, tuple[str, Change, str]] = {
    "a verdict in the report": ("failed", edited(REPORT, one_pass, nothing), f"{REPORT}: {BINDS}"),
    "a verdict, and its digest": (
        "failed",
        edited(REPORT, one_pass),
        '.verdict is "pass", not "fail"',
    ),
    "every verdict, in every file": (
        "failed",
        lambda folder: forge(folder, passes),
        '.verdict is "pass", not "fail"',
    ),
    "failing clauses are not required": ("failed", edited(REPORT, not_required), ".required is"),
    "the device, in every file": ("failed", as_npu, "npu-smi reports no accelerator"),
    "a ratio of a failure": ("passed", edited(REPORT, large_ratio), ".ratio is 1000000000.0, not"),
    "no clauses": ("failed", edited(REPORT, no_clauses), ".clauses is []"),
    "a case twice in the report": ("passed", edited(REPORT, twice), "is there again"),
    "a case left out of the report": (
        "failed",
        lambda folder: forge(folder, lambda cases: cases.remove(case_of("STAT-2", cases))),
        "is left out",
    ),
    "cases in another order": (
        "passed",
        edited(REPORT, lambda report: report["cases"].reverse()),
        "another order",
    ),
    "the document of a case": (
        "passed",
        edited(REPORT, lambda report: report["cases"][5]["spec"].update(seed=7)),
        ".spec.seed is there, and must not be",
    ),
    "the title of a case": (
        "passed",
        edited(REPORT, lambda report: report["cases"][5]["spec"].update(title="easy")),
        '.spec.title is "easy", not',
    ),
    "the id of a case": (
        "passed",
        edited(REPORT, lambda report: report["cases"][5].update(id="0123456789ab")),
        "case 0123456789ab is not one of the plan",
    ),
    "the clause of a case": (
        "passed",
        edited(REPORT, lambda report: report["cases"][5].update(clause="CTOR-1")),
        ".clause is",
    ),
    "the message of a failure": (
        "failed",
        edited(REPORT, lambda report: case_of("STAT-2", report["cases"]).update(message="fine")),
        '.message is "fine", not',
    ),
    "the seconds of a case": (
        "passed",
        edited(REPORT, lambda report: report["cases"][5].update(seconds=0.5)),
        "log.jsonl: line",
    ),
    "the profile": (
        "passed",
        edited(REPORT, lambda report: report.update(profile="full")),
        '.profile is "full", not "certify"',
    ),
    "the level": (
        "failed",
        edited(REPORT, lambda report: report.update(level="documented")),
        '.level is "documented", not "decided"',
    ),
    "the number of ranks": (
        "passed",
        edited(REPORT, lambda report: report.update(ranks=8)),
        ".ranks is 8, not 2",
    ),
    "the rung": (
        "passed",
        edited(REPORT, lambda report: report["target"].update(rung="twin")),
        '.target.rung is "twin", not "device"',
    ),
    "the id of a run": (
        "passed",
        edited(REPORT, lambda report: report["run"].update(id="0" * 16)),
        ".run.id is",
    ),
    "the id, date and command of a run": (
        "passed",
        edited(REPORT, lambda report: report.pop("run")),
        f"{REPORT}: run is missing",
    ),
    "the environment of a run": (
        "passed",
        edited(REPORT, lambda report: report["environment"].update(torch="2.0.0")),
        ".environment.torch is",
    ),
    "a list of the frozen cases": (
        "passed",
        edited(REPORT, lambda report: report["must_pass"].update(listed=3)),
        ".must_pass.listed is 3, not",
    ),
    "a case left out of the raw results": ("passed", results(lambda all: all.pop(3)), "not-run"),
    "a case twice in the raw results": (
        "passed",
        results(lambda all: all.append(all[3])),
        "is there again",
    ),
    "raw results in another order": ("passed", results(lambda all: all.reverse()), "another order"),
    "raw results of other cases": ("passed", results(relabel), f"{REPORT}: case"),
    "raw results of no case": (
        "passed",
        results(lambda all: all.append(rename(all[0], "0123456789ab"))),
        "case 0123456789ab is not one of the plan",
    ),
    "better numbers in the raw results": ("failed", results(better_numbers), ".ratio is"),
    "one number in the raw results": ("passed", results(one_value), ".raw is"),
    "the digest of a large array": ("passed", results(other_digest), ".ratio is"),
    "no place of the largest ratio": ("passed", results(no_mark), "a value at each of its places"),
    "the shape of a large array": ("passed", results(other_shape), "is not one of a large array"),
    "the runs exchanged": ("passed", swap_runs, ".ranks is"),
    "a report merged from two runs": ("failed", nothing, '.verdict is "pass", not "fail"'),
    "a run of another layer": ("failed", nothing, ".target.name is"),
    "the JUnit file": (
        "failed",
        text("runs/2/junit.xml", "<failure", "<skipped"),
        "runs/2/junit.xml: is not the JUnit file of runs/2/report.json",
    ),
    "a line of the log left out": ("passed", lines(lambda all: all.pop(4)), "log.jsonl: must have"),
    "a line of the log twice": (
        "passed",
        lines(lambda all: all.insert(4, all[4])),
        "log.jsonl: must have",
    ),
    "a verdict in the log": (
        "failed",
        text("log.jsonl", '"verdict": "fail"', '"verdict": "pass"'),
        '.verdict is "pass", not "fail"',
    ),
    "the vendor": (
        "passed",
        edited("product.json", lambda product: product.update(vendor="Other")),
        "CERTIFICATE.md: line",
    ),
    "the processor": (
        "passed",
        edited("environment.json", lambda found: found["here"]["machine"].update(cpu="NPU")),
        '.environment.here.machine.cpu is "',
    ),
    "the date": (
        "passed",
        edited("environment.json", lambda found: found.update(started="2020-01-01T00:00:00+00:00")),
        "started is",
    ),
    "the command": ("passed", edited("environment.json", other_command), "run.command is"),
    "a changed suite": (
        "passed",
        edited("environment.json", other_suite),
        "suite: reference/ratio.py differs",
    ),
    "another version of the suite": (
        "passed",
        edited("environment.json", other_version),
        "suite: the package was made by version 0.0.9",
    ),
    "a file of the layer": (
        "passed",
        edited("environment.json", lambda found: found["sources"]["files"].update(a="0" * 64)),
        "environment.json: sources.files.a is of no run",
    ),
    "a file of the layer in the log": (
        "passed",
        text("log.jsonl", '"syncbn/torch/layer.py": "', '"syncbn/torch/layer.py": "f'),
        "log.jsonl: sources.files.syncbn/torch/layer.py is another",
    ),
    "the title": (
        "failed",
        text(contents.TEXT, "**FAILED at", "**PASSED at"),
        "CERTIFICATE.md: line 3 is",
    ),
    "the result": (
        "failed",
        edited(contents.CERTIFICATE, lambda found: found["predicate"].update(result="PASSED")),
        'certificate.json.predicate.result is "PASSED", not "FAILED"',
    ),
    "the failed tests": (
        "failed",
        edited(contents.CERTIFICATE, lambda found: found["predicate"].update(failedTests=[])),
        "certificate.json.predicate.failedTests is []",
    ),
    "a file that is not bound": (
        "passed",
        edited(contents.CERTIFICATE, lambda found: found["subject"].pop(2)),
        "certificate.json.subject is",
    ),
    "a name outside the package": (
        "passed",
        edited(contents.CERTIFICATE, lambda found: found["subject"][0].update(name="../../x")),
        "certificate.json.subject[0].name is",
    ),
    "a file more": (
        "passed",
        lambda folder: (folder / "runs/2/extra").touch(),
        "runs/2/extra: is no file of the package",
    ),
    "a file less": ("passed", lambda folder: (folder / RAW).unlink(), f"{RAW}: missing"),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_change_is_refused_by_name(name: str, passed: Path, failed: Path, tmp_path: Path) -> None:
    which, change, reason = TAMPERINGS[name]
    folder = tmp_path / "package"
    shutil.copytree(passed if which == "passed" else failed, folder)
    if name == "a report merged from two runs":
        merged(folder, passed)
    elif name == "a run of another layer":
        other_run(folder, passed)
    change(folder)
    found = verify(folder, plan=PLAN)
    assert any(reason in one for one in found.refused), found.refused[:10]
    assert all(len(one.splitlines()) == 1 for one in found.refused)
