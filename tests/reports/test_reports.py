"""Reports: what is valid, that a file is whole or absent, and what a reader sees."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from rich.console import Console

from syncbn import reports
from syncbn.conformance.__main__ import main
from syncbn.conformance.cases import catalogue
from syncbn.conformance.clauses import CLAUSES
from syncbn.conformance.runner import FINDINGS
from syncbn.reports import ReportError

ROOT = Path(__file__).parents[2]
VERDICTS = ("pass", "fail", "hang", "crash", "error", "unsupported", "not-run")


def clause(name: str, verdict: str = "pass", **fields: Any) -> dict[str, Any]:
    return {
        "id": name,
        "title": CLAUSES[name].title,
        "origin": CLAUSES[name].origin,
        "required": True,
        "verdict": verdict,
        "cases": 1,
        "unsupported": 0,
        "worst_ratio": None,
        "worst_case": None,
        "reason": None,
        **fields,
    }


def case(number: int, name: str, verdict: str = "pass", **fields: Any) -> dict[str, Any]:
    return {
        "id": f"{number:012x}",
        "clause": name,
        "spec": {"clause": name, "title": f"case {number}", "steps": [{"shapes": [[2, 3]]}]},
        "verdict": verdict,
        "ratio": None,
        "message": None,
        "seconds": 0.25,
        "oracle": None,
        **fields,
    }


def report_of(clauses: list[dict[str, Any]], cases: list[dict[str, Any]]) -> dict[str, Any]:
    def counts(judged: list[dict[str, Any]]) -> dict[str, int]:
        counted = Counter(one["verdict"] for one in judged)
        return {verdict: counted[verdict] for verdict in VERDICTS}

    required = [one for one in clauses if one["required"]]
    summary = "pass" if all(one["verdict"] == "pass" for one in required) else "fail"
    if any(one["verdict"] == "error" for one in cases):
        summary = "error"
    return {
        "schema": "syncbn-report/1",
        "suite": {"version": "0.1.0", "commit": "8834954c01d2" + "0" * 28, "dirty": True},
        "target": {
            "name": "syncbn.torch",
            "framework": "torch",
            "module": "syncbn.torch",
            "class": "SyncBatchNorm",
            "backend": "composed",
            "device": "cpu",
            "mode": None,
            "rung": "twin",
        },
        "oracle": {"target": None, "left_out": "--oracle none"},
        "environment": {"python": "3.11.7"},
        "ranks": 4,
        "launcher": "local",
        "profile": "full",
        "level": "decided",
        "seconds": 74.21,
        "must_pass": {"listed": len(cases), "missing": []},
        "restarts": [],
        "summary": {
            "verdict": summary,
            "required": counts(required),
            "cases": counts(cases),
        },
        "clauses": clauses,
        "cases": cases,
    }


def passing() -> dict[str, Any]:
    """Every clause of the contract; those that the suite cannot run are not required."""
    clauses, cases = [], []
    for number, (name, known) in enumerate(CLAUSES.items()):
        if known.not_run:
            clauses.append(clause(name, "not-run", required=False, cases=0, reason=known.not_run))
        else:
            cases.append(case(number, name, ratio=0.0625))
            clauses.append(clause(name, worst_ratio=0.0625, worst_case=cases[-1]["id"]))
    return report_of(clauses, cases)


def failing() -> dict[str, Any]:
    clauses = [
        clause("CTOR-5", "unsupported", required=False, cases=0, reason="no state_dict"),
        clause("ERR-9", "hang", reason="rank 1 missed the deadline of 20 s"),
        clause("FWD-1", worst_ratio=0.12345, worst_case=f"{1:012x}"),
        clause("FWD-3", "fail", cases=6, worst_ratio="inf", worst_case=f"{7:012x}", reason="off"),
        clause("STAT-2", "crash", required=False, reason="rank 3 died"),
        clause("EVAL-2", "not-run", cases=0, reason="interrupted"),
    ]
    cases = [
        case(1, "FWD-1", ratio=0.12345),
        case(2, "ERR-9", "hang", message="\n".join(f"stack {line}" for line in range(9))),
        *(case(n, "FWD-3", "fail", ratio=812.4, message=f"y of rank {n}") for n in range(3, 7)),
        case(7, "FWD-3", "fail", ratio="inf", message="y is [bold]nan[/bold]"),
        case(8, "FWD-3", ratio=0.5),
        case(9, "STAT-2", "crash", message="rank 3 died"),
    ]
    return report_of(clauses, cases)


def table(report: dict[str, Any], width: int, color: Any = None) -> list[str]:
    """The lines that summarize prints, on a terminal if there is a color system."""
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=bool(color), color_system=color)
    reports.summarize(report, console)
    return [line.rstrip() for line in file.getvalue().splitlines()]


class TestSchema:
    def test_is_a_schema(self) -> None:
        Draft202012Validator.check_schema(reports.SCHEMA)

    def test_describes_every_field(self) -> None:
        definitions = reports.SCHEMA["$defs"]

        def undescribed(schema: dict[str, Any]) -> list[str]:
            found = []
            for name, field in schema.get("properties", {}).items():
                referred = definitions.get(field.get("$ref", "").removeprefix("#/$defs/"), {})
                if "description" not in field | referred:
                    found.append(name)
                found += undescribed(field) + undescribed(field.get("items", {}))
            return found

        assert undescribed(reports.SCHEMA) == []
        assert undescribed(definitions["counts"]) == []

    def test_lists_the_verdicts(self) -> None:
        definitions = reports.SCHEMA["$defs"]
        assert tuple(definitions["verdict"]["enum"]) == VERDICTS
        assert tuple(definitions["counts"]["required"]) == VERDICTS
        assert tuple(definitions["counts"]["properties"]) == VERDICTS


class TestValidate:
    @pytest.mark.parametrize("make", [passing, failing])
    def test_accepts(self, make: Callable[[], dict[str, Any]]) -> None:
        reports.validate(make())

    def test_accepts_what_is_not_known(self) -> None:
        report = passing()
        report["suite"].update(commit=None, dirty=None)
        report["target"]["backend"] = None
        reports.validate(report)

    @pytest.mark.parametrize(
        ("place", "value", "message"),
        [
            ("schema", "other/1", "schema: must be 'syncbn-report/1', got 'other/1'"),
            ("suite.commit", "main", "suite.commit: 'main' does not match"),
            ("suite.branch", "main", "suite: Additional properties are not allowed ('branch' was"),
            ("target.rung", "simulated", "target.rung: 'simulated' is not one of ['interpreted', "),
            ("target.mode", 3, "target.mode: 3 is not of type 'string', 'null'"),
            ("target.backend", 1, "target.backend: 1 is not of type 'string', 'null'"),
            ("environment.cpus", 2, "environment.cpus: 2 is not of type 'string'"),
            ("ranks", 0, "ranks: 0 is less than the minimum of 1"),
            ("ranks", True, "ranks: True is not of type 'integer'"),
            ("level", "doc", "level: 'doc' is not one of ['decided', 'documented']"),
            ("seconds", float("nan"), "seconds: nan is not of type 'number'"),
            ("summary.cases.skip", 1, "summary.cases: Additional properties are not allowed"),
            ("clauses.1.verdict", "passed", "clauses[1].verdict: 'passed' is not one of ['pass', "),
            ("clauses.1.id", "FWD1", "clauses[1].id: 'FWD1' does not match"),
            ("clauses.1.origin", "page", "clauses[1].origin: 'page' is not one of ['doc', "),
            ("clauses.1.worst_ratio", float("inf"), "clauses[1].worst_ratio: inf is not of type"),
            ("clauses.1.worst_ratio", "Infinity", "clauses[1].worst_ratio: 'Infinity' does not"),
            ("clauses.1.worst_ratio", "-inf", "clauses[1].worst_ratio: '-inf' does not match"),
            ("clauses.1.worst_case", "7", "clauses[1].worst_case: '7' does not match"),
            ("cases.0.id", "0A1B2C3D4E5F", "cases[0].id: '0A1B2C3D4E5F' does not match"),
            ("cases.0.ratio", -1.0, "cases[0].ratio: -1.0 is less than the minimum of 0"),
            ("cases.0.spec.x", [[float("nan")]], "cases[0].spec.x[0][0]: nan is not of type"),
            ("cases.0.clause", "FWD-9", "cases[0].clause: must be a clause of the report, got"),
            ("summary.required.fail", 0, "summary.required.fail: must be the count 1, got 0"),
            ("summary.cases.pass", 3, "summary.cases.pass: must be the count 2, got 3"),
            ("summary.verdict", "pass", "summary.verdict: must be 'fail' unless every required"),
            ("must_pass.missing", [f"{1:012x}"], "must_pass.missing: must not name a case that"),
        ],
    )
    def test_refuses(self, place: str, value: Any, message: str) -> None:
        report: Any = failing()
        *parents, name = place.split(".")
        field = report
        for parent in parents:
            field = field[int(parent) if parent.isdigit() else parent]
        field[name] = value
        with pytest.raises(ReportError) as caught:
            reports.validate(report)
        assert str(caught.value).startswith(message)

    @pytest.mark.parametrize("field", sorted(passing()))
    def test_refuses_without(self, field: str) -> None:
        report = passing()
        del report[field]
        with pytest.raises(ReportError, match=f"'?{field}"):
            reports.validate(report)

    def test_messages_stay_short(self) -> None:
        report = passing()
        report["clauses"] = dict.fromkeys((f"FWD-{n}" for n in range(999)), "pass")
        with pytest.raises(ReportError, match="is not of type 'array'") as caught:
            reports.validate(report)
        assert len(str(caught.value)) < 400


class TestSave:
    def test_is_read_back(self, tmp_path: Path) -> None:
        reports.save(failing(), tmp_path / "report.json")
        assert reports.load(tmp_path / "report.json") == failing()
        assert os.listdir(tmp_path) == ["report.json"]

    def test_is_as_readable_as_other_files(self, tmp_path: Path) -> None:
        reports.save(passing(), tmp_path / "report.json")
        (tmp_path / "other").touch()
        assert (tmp_path / "report.json").stat().st_mode == (tmp_path / "other").stat().st_mode

    def test_refuses_what_is_not_valid(self, tmp_path: Path) -> None:
        report = passing()
        report["ranks"] = 0
        with pytest.raises(ReportError, match="ranks: 0 is less"):
            reports.save(report, tmp_path / "report.json")
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("call", ["fsync", "replace"])
    @pytest.mark.parametrize(
        ("cause", "raised", "message"),
        [
            (
                OSError(errno.ENOSPC, "No space left on device"),
                ReportError,
                "cannot write report to {}: No space left on device",
            ),
            (KeyboardInterrupt(), KeyboardInterrupt, ""),
        ],
    )
    def test_interrupted_leaves_the_previous_report(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        call: str,
        cause: BaseException,
        raised: type[BaseException],
        message: str,
    ) -> None:
        path = tmp_path / "report.json"
        reports.save(passing(), path)

        def interrupt(*_: Any) -> None:
            assert len(os.listdir(tmp_path)) == 2  # a temporary file next to the report
            raise cause

        monkeypatch.setattr(os, call, interrupt)
        with pytest.raises(raised) as caught:
            reports.save(failing(), path)
        assert str(caught.value) == message.format(path)
        assert reports.load(path) == passing()
        assert os.listdir(tmp_path) == ["report.json"]

    def test_is_on_the_disk_before_it_replaces(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = []
        fsync, replace = os.fsync, os.replace

        def syncing(file: int) -> None:
            calls.append("fsync")
            fsync(file)

        def replacing(source: Path, target: Path) -> None:
            calls.append("replace")
            assert reports.load(source) == passing()
            assert source.parent == target.parent
            replace(source, target)

        monkeypatch.setattr(os, "fsync", syncing)
        monkeypatch.setattr(os, "replace", replacing)
        reports.save(passing(), tmp_path / "report.json")
        assert calls == ["fsync", "replace"]

    def test_needs_a_place(self, tmp_path: Path) -> None:
        missing = tmp_path / "missing" / "report.json"
        with pytest.raises(ReportError, match=r"cannot write report to .*: No such file or dir"):
            reports.save(passing(), missing)
        with pytest.raises(ReportError, match=r"cannot write report to .*: Is a directory"):
            reports.save(passing(), tmp_path)


class TestLoad:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "is not JSON: Expecting value"),
            (b'{"schema": "syncbn-report/1"', "is not JSON: Expecting ',' delimiter"),
            (b"\xff\xfe\xff", "is not JSON: "),
            (b"[" * 100_000, "is not JSON: "),
            (b'{"ratio": NaN}', "is not JSON: NaN is not a JSON value"),
            (b"[]", "is not a valid report: schema: must be 'syncbn-report/1', got []"),
            (b"{}", "is not a valid report: schema: must be 'syncbn-report/1', got None"),
            (
                b'{"schema": "syncbn-report/2"}',
                "is not a valid report: schema: must be 'syncbn-report/1', got 'syncbn-report/2'",
            ),
            (
                b'{"schema": "syncbn-report/1"}',
                "is not a valid report: 'suite' is a required property",
            ),
        ],
    )
    def test_refuses(self, tmp_path: Path, content: bytes, message: str) -> None:
        path = tmp_path / "report.json"
        path.write_bytes(content)
        with pytest.raises(ReportError) as caught:
            reports.load(path)
        assert str(caught.value).startswith(f"{path} {message}")
        assert "\n" not in str(caught.value)

    def test_refuses_what_is_not_a_file(self, tmp_path: Path) -> None:
        with pytest.raises(ReportError, match=r"cannot read report .*: No such file or directory"):
            reports.load(tmp_path / "report.json")
        with pytest.raises(ReportError, match=r"cannot read report .*: Is a directory"):
            reports.load(tmp_path)

    def test_refuses_a_number_that_overflows(self, tmp_path: Path) -> None:
        text = json.dumps(passing()).replace('"ranks": 4', '"ranks": 4e999')
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(ReportError, match="ranks: inf is not of type 'integer'"):
            reports.load(tmp_path / "report.json")


class TestSummarize:
    def test_has_one_row_per_clause(self) -> None:
        rows = [" ".join(line.split()) for line in table(failing(), 100)]
        for row in (
            "clause title origin verdict cases ratio",
            "CTOR-5* state names are those of BatchNorm decided unsupported 0",
            "no state_dict",
            "ERR-9 one rank's error is raised on all decided hang 1",
            "FWD-1 y uses the statistics of the group doc pass 1 0.123",
            "FWD-3 uneven shards decided fail 6 inf",
            "STAT-2* running_var: unbiased, group count decided crash 1",
            "EVAL-2 eval never communicates decided not run 0",
            "interrupted",
            "* does not count for the verdict",
        ):
            assert rows.count(row) == 1, row
        assert "off" not in rows  # the failing cases of FWD-3 tell more

    def test_names_what_was_judged(self) -> None:
        assert table(failing(), 100)[:6] == [
            "target   syncbn.torch (torch: syncbn.torch.SyncBatchNorm)",
            "ranks    4, launcher local",
            "backend  composed",
            "device   cpu, rung twin",
            "profile  full, level decided",
            "suite    0.1.0, commit 8834954c01d2, with local changes",
        ]

    def test_breaks_no_title_from_100_columns_on(self) -> None:
        lines = table(passing(), 100)
        for name, known in CLAUSES.items():
            assert any(line.startswith(name) and known.title in line for line in lines), name

    @pytest.mark.parametrize("width", [80, 100, 120])
    @pytest.mark.parametrize("make", [passing, failing])
    def test_fits(self, make: Callable[[], dict[str, Any]], width: int) -> None:
        report = make()
        for case in report["cases"]:
            case["message"] = case["message"] and "x" * 200 + " word" * 50
        *lines, last = table(report, width)
        wide = [line for line in lines if len(line) > width]
        assert all(line.startswith("    syncbn-conformance replay ") for line in wide)
        assert "…" not in "".join([*lines, last])

    @pytest.mark.parametrize("width", [40, 100])
    def test_shows_three_failing_cases_of_a_clause(self, width: int) -> None:
        lines = table(failing(), width)
        replayed = [line.strip() for line in lines if "replay" in line]
        assert replayed == [
            f"syncbn-conformance replay {number:012x} --target syncbn.torch "
            "--backend composed --ranks 4"
            for number in (2, 3, 4, 5, 9)
        ]
        assert lines.count("  and 2 more") == 1

    def test_shows_mode_and_launcher_and_how_to_replay_with_them(self) -> None:
        report = failing()
        report["target"].update(name="syncbn.mindspore", backend="auto", mode="graph")
        report["launcher"] = "msrun"
        lines = table(report, 130)
        assert "device   cpu, rung twin, mode graph" in lines
        assert lines.count(
            "    syncbn-conformance replay 000000000002 --target syncbn.mindspore --mode graph "
            "--launcher msrun --ranks 4"
        )

    @pytest.mark.parametrize("name", ["torch:$(rm -r /):`C`", "torch:a'; b #:C", 'torch:"a b":C'])
    def test_a_name_is_no_command_of_the_shell(self, name: str) -> None:
        report = failing()
        report["target"]["name"] = name
        report["target"]["layer_args"] = {"a": "'; b #"}
        replayed = [line for line in table(report, 200) if " replay " in line]
        assert replayed
        for line in replayed:
            words = shlex.split(line)
            assert words[words.index("--target") + 1] == name
            assert json.loads(words[words.index("--layer-args") + 1]) == {"a": "'; b #"}

    def test_shows_why_a_case_failed(self) -> None:
        lines = table(failing(), 100)
        start = lines.index("FWD-3 uneven shards (5 of 6 cases)")
        assert lines[start + 1 : start + 3] == [
            "  000000000003 fail, ratio 812: case 3",
            "    y of rank 3",
        ]
        start = lines.index("  000000000002 hang: case 2")
        assert lines[start + 1 : start + 8] == [
            *(f"    stack {line}" for line in range(6)),
            "    and 3 more lines in the report",
        ]

    def test_takes_messages_literally(self) -> None:
        report = failing()
        report["cases"][2]["message"] = "got [bold]nan[/bold] :smile: [/]"
        report["clauses"][0]["reason"] = "[red]no state_dict"
        lines = [line.strip() for line in table(report, 100)]
        assert "got [bold]nan[/bold] :smile: [/]" in lines
        assert "[red]no state_dict" in lines

    def test_shows_the_reason_of_a_failure_without_a_case(self) -> None:
        report = report_of([clause("FWD-1", "crash", reason="no rank started", cases=0)], [])
        assert "no rank started" in [line.strip() for line in table(report, 100)]

    def test_ends_with_one_line(self) -> None:
        required = sum(not known.not_run for known in CLAUSES.values())
        not_run = ", ".join(f"{name}*" for name, known in CLAUSES.items() if known.not_run)
        assert table(passing(), 80)[-1] == (
            f"pass: {required} of {required} required clauses, {required} cases in 74.2 s; "
            f"not run: {not_run}"
        )
        assert table(failing() | {"seconds": 247.3}, 40)[-1] == (
            "FAIL: 1 of 4 required clauses pass, 9 cases in 4 min 7 s; fail: FWD-3; hang: ERR-9; "
            "crash: STAT-2*; unsupported: CTOR-5*; not run: EVAL-2"
        )

    def test_has_colours_on_a_terminal_only(self) -> None:
        assert "\x1b" not in "".join(table(failing(), 100))
        lines = table(failing(), 100, color="standard")
        assert any("\x1b[32mpass" in line for line in lines)
        assert any("\x1b[1;31mfail" in line for line in lines)


class TestCommandLine:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        reports.save(failing(), tmp_path / "report.json")
        return tmp_path / "report.json"

    def test_shows_a_file_or_the_directory_of_a_run(
        self, path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["report", "show", str(path)]) == 0
        of_file = capsys.readouterr()
        assert of_file.out.splitlines()[-1].startswith("FAIL: 1 of 4 required clauses pass")
        assert of_file.err == ""
        assert main(["report", "show", str(path.parent)]) == 0
        assert capsys.readouterr() == of_file

    @pytest.mark.parametrize("content", [None, "{}", "nonsense"])
    def test_fails_on_one_line(
        self, path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
    ) -> None:
        if content is None:
            path.unlink()
        else:
            path.write_text(content)
        assert main(["report", "show", str(path.parent)]) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert len(output.err.splitlines()) == 1
        assert str(path) in output.err

    def test_helps(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            main(["report", "show", "--help"])
        assert caught.value.code == 0
        assert "report.json" in capsys.readouterr().out

    def test_imports_only_its_own(self, path: Path) -> None:
        """No framework, no NumPy, no other part of the repository."""
        code = (
            "import sys\nfrom rich.console import Console\nfrom syncbn import reports\n"
            f"reports.summarize(reports.load({str(path)!r}), Console())\n"
            "print(*sorted(sys.modules))"
        )
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        imported = set(run.stdout.splitlines()[-1].split())
        assert {"syncbn.reports", "rich", "jsonschema"} <= imported
        assert not imported & {"torch", "mindspore", "numpy"}
        base = {"syncbn.contract", "syncbn.extras", "syncbn.protocol"}
        ours = {name for name in imported - base if name.startswith("syncbn.")}
        assert all(name.startswith("syncbn.reports") for name in ours)


def comparison(finding: str, verdict: str = "pass", **fields: Any) -> dict[str, Any]:
    """The result of an oracle in a case."""
    empty = {"ratio": None, "apart": None, "message": None}
    return {"finding": finding, "verdict": verdict, **empty, **fields}


def three_ways() -> dict[str, Any]:
    """A target that passes, and an oracle that does not always."""
    cases = [
        case(1, "FWD-1", ratio=0.1, oracle=comparison("agree", ratio=0.2, apart=0.3)),
        case(
            2, "FWD-4", oracle=comparison("oracle departs", "fail", ratio="inf", message="y is nan")
        ),
        case(
            3,
            "FWD-4",
            oracle=comparison("no answer", "fail", message="ValueError: [bold]no[/bold]"),
        ),
        case(4, "ERR-9", oracle=comparison("not asked", "not-run", message="may hang")),
    ]
    report = report_of([clause("FWD-1"), clause("FWD-4", cases=2), clause("ERR-9")], cases)
    oracle = report["target"] | {"name": "mindspore.mint", "rung": "substituted"}
    report["oracle"] = {"target": oracle, "left_out": None}
    return report


class TestOracle:
    def test_is_valid(self) -> None:
        reports.validate(three_ways())

    def test_an_unknown_finding_is_refused(self) -> None:
        report = three_ways()
        report["cases"][0]["oracle"]["finding"] = "fine"
        with pytest.raises(ReportError, match="'fine' is not one of"):
            reports.validate(report)

    def test_every_finding_of_the_runner_is_valid(self) -> None:
        for finding in FINDINGS:
            report = three_ways()
            report["cases"][0]["oracle"]["finding"] = finding
            reports.validate(report)

    def test_the_table_counts_findings_and_shows_the_first_message_of_each_clause(self) -> None:
        lines = table(three_ways(), 100)
        start = next(n for n, line in enumerate(lines) if line.startswith("three ways"))
        assert " ".join(lines[start : start + 2]).startswith(
            "three ways, with mindspore.mint (cpu, rung substituted) as the oracle: agree 1, "
        )
        shown = [line for line in lines if "departs in" in line or "no answer in" in line]
        assert shown == [
            "  FWD-4    oracle departs in 1 of 2: y is nan",
            "  FWD-4    no answer in 1 of 2: ValueError: [bold]no[/bold]",
        ]

    def test_an_oracle_that_was_left_out_is_said_to_be(self) -> None:
        assert "oracle left out: --oracle none" in table(passing(), 100)

    def test_a_clause_that_passes_shows_its_unsupported_cases(self) -> None:
        partly = clause("NUM-2", cases=3, unsupported=1, reason="no bfloat16")
        cases = [case(1, "NUM-2"), case(2, "NUM-2"), case(3, "NUM-2", "unsupported")]
        assert any(
            "1 unsupported: no bfloat16" in line for line in table(report_of([partly], cases), 100)
        )


class TestFindings:
    def test_shows_each_run_and_how_to_see_it_again(self) -> None:
        one, four = failing(), failing()
        one["ranks"] = 1
        text = reports.findings([four, one], "the command")
        assert text.startswith("# What syncbn.torch.SyncBatchNorm does\n")
        assert "Made by `the command`" in text
        assert "- 4 ranks: **fail** in 5 of 6 cases" in text
        assert "- 1 rank: **fail** in 5 of 6 cases" in text
        assert "  - case 3: fail: y of rank 3\n    `syncbn-conformance replay 000000000003" in text
        assert "  - and 1 more cases" in text
        assert (
            text.index("FWD-1") < text.index("## What the page leaves open") < text.index("ERR-9")
        )

    def test_a_message_cannot_become_markdown(self) -> None:
        report = report_of([clause("FWD-1", "fail")], [case(1, "FWD-1", "fail", message="a|b `c`")])
        assert "a\\|b \\`c\\`" in reports.findings([report], "c")

    def test_refuses_reports_of_different_targets(self) -> None:
        other = passing()
        other["target"]["name"] = "torch.nn"
        with pytest.raises(
            ReportError, match=r"must be of one target, got syncbn\.torch, torch\.nn"
        ):
            reports.findings([passing(), other], "c")

    def test_from_the_command_line(self, tmp_path: Path) -> None:
        reports.save(passing(), tmp_path / "report.json")
        assert main(["report", "findings", str(tmp_path), "--out", str(tmp_path / "found.md")]) == 0
        assert "# What syncbn.torch.SyncBatchNorm does" in (tmp_path / "found.md").read_text()

    def test_the_kept_document_names_cases_that_exist(self) -> None:
        text = (ROOT / "docs" / "mindspore-conformance.md").read_text()
        named = set(
            re.findall(r"replay ([0-9a-f]{12}) --target mindspore.mint --ranks (\d+)", text)
        )
        assert named
        known = {(one.id, str(ranks)) for ranks in (1, 4) for one in catalogue(ranks)}
        assert named <= known
