"""The gate: every change is named and fails, unless a valid waiver lets it pass."""

from __future__ import annotations

import copy
import json
import re
import tempfile
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncbn import reports
from syncbn.conformance.__main__ import main
from syncbn.reports import ReportError
from syncbn.reports.baseline import BASELINE_SCHEMA, baseline, load_baseline, text
from syncbn.reports.gate import Gated, gate
from syncbn.reports.gate_views import gate_junit, github, gitlab, lines, summary
from syncbn.reports.waivers import Waiver, load_waivers
from tests.reports.test_reports import case, clause, failing, passing, report_of
from tests.reports.test_text import EVIL, evil_report

TODAY = date(2026, 11, 28)


def run(**verdicts: str) -> dict[str, Any]:
    """A report with two clauses of three cases; `FWD_1_2="fail"` changes the second of FWD-1."""
    clauses, cases = [], []
    for start, name in enumerate(("FWD-1", "STAT-2")):
        rows = []
        for number in range(1, 4):
            verdict = verdicts.get(f"{name.replace('-', '_')}_{number}", "pass")
            message = None if verdict == "pass" else f"{verdict} of {number}"
            ratio = 0.2 if verdict == "pass" else None
            rows.append(case(10 * start + number, name, verdict, ratio=ratio, message=message))
        worst = next((row["verdict"] for row in rows if row["verdict"] != "pass"), "pass")
        worst = "pass" if worst == "unsupported" else worst
        clauses.append(clause(name, worst, cases=3))
        cases += rows
    report = report_of(clauses, cases)
    reports.validate(report)
    return report


def gated(
    old: dict[str, Any], new: dict[str, Any], *waivers: Waiver, today: date = TODAY, **limits: float
) -> Gated:
    return gate(baseline(old), new, waivers, today=today, **limits)


def waiver(case: str | None = None, clause: str | None = None, until: str = "2026-12-31") -> Waiver:
    return Waiver(case, clause, "known", "https://x.test/1", "team", date.fromisoformat(until))


def said(found: Gated) -> str:
    return "\n".join(lines(found))


class TestChanges:
    @pytest.mark.parametrize("report", [passing(), failing(), run()])
    def test_the_same_run_is_green(self, report: dict[str, Any]) -> None:
        found = gated(report, copy.deepcopy(report))
        assert not found.red
        assert found.clauses == []
        assert said(found).startswith("gate: pass, no change of syncbn.torch")

    @pytest.mark.parametrize("verdict", ["fail", "hang", "crash", "unsupported", "not-run"])
    def test_a_pass_that_is_lost_is_red(self, verdict: str) -> None:
        found = gated(run(), run(STAT_2_2=verdict))
        assert found.red
        assert "STAT-2  running_var: unbiased, group count" in said(found)
        assert f"00000000000c pass -> {verdict}: case 12" in said(found)
        assert f"{verdict} of 2" in said(found)
        assert "replay 00000000000c --target syncbn.torch" in said(found)

    def test_an_unexpected_pass_is_red(self) -> None:
        found = gated(run(FWD_1_1="fail"), run())
        assert found.red
        assert "fail -> pass (an unexpected pass: write a new baseline)" in said(found)

    def test_a_case_that_one_side_has_not_is_red(self) -> None:
        more, less = run(), run()
        del less["cases"][1]
        less["clauses"][0]["cases"] = 2
        less["summary"]["cases"]["pass"] = 5
        lost, new = gated(more, less), gated(less, more)
        assert lost.red
        assert "pass -> absent: case 2" in said(lost)
        assert new.red
        assert "absent -> pass (a new case: write a new baseline): case 2" in said(new)

    def test_a_clause_that_one_side_has_not_is_red(self) -> None:
        more = run()
        less = report_of(more["clauses"][:1], more["cases"][:3])
        for old, new in ((more, less), (less, more)):
            assert [one.id for one in gated(old, new).clauses if one.red] == ["STAT-2"]

    def test_a_clause_without_cases_whose_verdict_changes_is_red(self) -> None:
        old, new = passing(), passing()
        (row,) = (one for one in new["clauses"] if one["id"] == "COMM-2")
        row["verdict"] = "unsupported"
        found = gated(old, new)
        assert [(one.id, one.before, one.after) for one in found.clauses] == [
            ("COMM-2", "not-run", "unsupported")
        ]
        assert found.red
        assert not gated(old, new, waiver(clause="COMM-2")).red

    def test_a_ratio_may_grow_by_a_factor(self) -> None:
        old, new = run(), run()
        new["cases"][0]["ratio"] = 0.55
        assert not gated(old, new).red
        found = gated(old, new, max_growth=2.5)
        assert found.red
        assert "pass, ratio 0.2 -> pass, ratio 0.55: case 1" in said(found)

    def test_the_growth_of_a_tiny_ratio_means_nothing(self) -> None:
        old, new = run(), run()
        old["cases"][0]["ratio"], new["cases"][0]["ratio"] = 1e-6, 0.29
        assert not gated(old, new).red
        new["cases"][0]["ratio"] = 0.31
        assert gated(old, new).red

    def test_a_ratio_that_is_lost_is_red(self) -> None:
        old, new = run(), run()
        new["cases"][0]["ratio"] = None
        assert "pass, ratio 0.2 -> pass, no ratio" in said(gated(old, new))
        assert gated(old, new).red

    def test_a_slower_run_is_warned_of(self) -> None:
        slow = run()
        for row in slow["cases"]:
            row["seconds"] = 1.0
        found = gated(run(), slow)
        assert not found.red
        assert found.warnings == ["slower: the cases took 6.0 s, 1.5 s in the baseline"]
        assert gated(run(), slow, max_slowdown=5).warnings == []

    def test_other_versions_are_warned_of(self) -> None:
        other = run()
        other["environment"] = {"python": "3.12.0", "platform": "x"}
        found = gated(run(), other)
        assert not found.red
        assert found.warnings == ["other python: 3.12.0, 3.11.7 in the baseline"]

    def test_an_error_of_the_suite_is_no_verdict(self) -> None:
        found = gated(run(), run(FWD_1_1="error"))
        assert found.no_verdict
        assert "NO VERDICT" in said(found)

    @pytest.mark.parametrize(
        ("place", "value", "message"),
        [
            ("target.name", "torch.nn", "target: the baseline is of 'syncbn.torch', the report of"),
            ("target.backend", "aten", "backend: the baseline is of 'composed', the report of"),
            ("target.device", "npu", "device: "),
            ("target.layer_args", {"eps": 1.0}, "layer_args: "),
            ("ranks", 2, "ranks: the baseline is of 4, the report of 2"),
            ("profile", "smoke", "profile: the baseline is of 'full', the report of 'smoke'"),
            ("level", "documented", "level: "),
            ("selection", {"clauses": [], "cases": [], "shard": "1/2"}, "selection: "),
        ],
    )
    def test_another_subject_is_refused_by_name(self, place: str, value: Any, message: str) -> None:
        new: Any = run()
        *outer, last = place.split(".")
        inner = new[outer[0]] if outer else new
        inner[last] = value
        with pytest.raises(ReportError, match=re.escape(message)):
            gated(run(), new)


class TestWaivers:
    def test_a_waived_change_passes(self) -> None:
        new = run(FWD_1_1="fail", FWD_1_2="fail")
        both = gated(run(), new, waiver(clause="FWD-1"))
        assert not both.red
        assert "waived: FWD-1 000000000001 pass -> fail: known (team, until 2026-12-31" in said(
            both
        )
        assert "no change of syncbn.torch" in said(both)
        one = gated(run(), new, waiver(case=f"{1:012x}"))
        assert one.red
        assert one.problems == []

    def test_a_waiver_holds_on_its_last_day(self) -> None:
        until = waiver(clause="FWD-1", until="2026-11-28")
        assert not gated(run(), run(FWD_1_1="fail"), until).red
        late = gated(run(), run(FWD_1_1="fail"), until, today=date(2026, 11, 29))
        assert late.red
        assert late.problems[0].startswith("the waiver of clause FWD-1 has expired: known (team")

    def test_one_that_matches_nothing_is_red(self) -> None:
        found = gated(run(), run(), waiver(case=f"{1:012x}"))
        assert found.red
        assert "the waiver of case 000000000001 matches no change" in said(found)
        assert "FAIL, 1 bad waiver of" in said(found)

    @pytest.mark.parametrize("name", ["waivers.toml", "waivers.json"])
    def test_files(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        fields = {"reason": "r", "link": "https://x.test", "owner": "o", "expires": "2026-12-01"}
        if name.endswith("toml"):
            values = "\n".join(f"{key} = '{value}'" for key, value in fields.items())
            values = values.replace("'2026-12-01'", "2026-12-01")
            path.write_text(f"[[waiver]]\nclause = 'FWD-1'\n{values}\n")
        else:
            path.write_text(json.dumps({"waiver": [{"clause": "FWD-1", **fields}]}))
        expected = Waiver(None, "FWD-1", "r", "https://x.test", "o", date(2026, 12, 1))
        assert load_waivers(path) == [expected]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"reason": " "}, "waiver[0].reason"),
            ({"link": "see mail"}, "waiver[0].link"),
            ({"owner": None}, "waiver[0].owner"),
            ({"expires": "2026-02-30"}, "must be a date, got '2026-02-30'"),
            ({"expires": "soon"}, "waiver[0].expires"),
            ({"case": "0" * 12}, "waiver[0]"),  # and a clause
            ({"clause": "FWD-1\n"}, r"waiver[0].clause: 'FWD-1\n' does not match"),
            ({"expires": "2026-12-01\n"}, "waiver[0].expires"),
            ({"expires": "20261201"}, "waiver[0].expires"),
            ({"expires": "2026-W49-2"}, "waiver[0].expires"),
            ({"expires": "2026-12-01T00:00:00Z"}, "waiver[0].expires"),
            ({"expires": "\uff12026-12-01"}, "waiver[0].expires"),  # of another script
            ({"until": "2027-01-01"}, "'until' was unexpected"),
        ],
    )
    def test_a_bad_waiver_is_refused(
        self, tmp_path: Path, change: dict[str, Any], message: str
    ) -> None:
        one = {"clause": "FWD-1", "reason": "r", "link": "https://x.test", "owner": "o"}
        one |= {"expires": "2026-12-01"} | change
        (tmp_path / "w.json").write_text(json.dumps({"waiver": [one]}))
        with pytest.raises(ReportError, match=re.escape(message)):
            load_waivers(tmp_path / "w.json")


class TestOrder:
    def test_clauses_that_count_and_fail_most_come_first(self) -> None:
        new = run(FWD_1_1="fail", STAT_2_1="fail", STAT_2_2="fail", STAT_2_3="fail")
        assert [one.id for one in gated(run(), new).clauses] == ["STAT-2", "FWD-1"]
        new["clauses"][1]["required"] = False
        assert [one.id for one in gated(run(), new).clauses] == ["FWD-1", "STAT-2"]


class TestViews:
    new = run(FWD_1_1="fail", STAT_2_1="hang")

    def test_the_summary_is_markdown(self) -> None:
        page = summary(gated(run(), self.new, waiver(clause="FWD-1")))
        assert page.startswith("### gate: FAIL, changes in STAT\\-2 of syncbn.torch")
        assert (
            "| **STAT-2** | running\\_var: unbiased, group count | pass | hang | 1 of 3 |" in page
        )
        assert "| FWD-1, waived |" in page
        assert "`syncbn-conformance replay 00000000000b --target syncbn.torch" in page

    def test_github(self, tmp_path: Path) -> None:
        path = tmp_path / "b.json"
        path.write_text(text(baseline(run())))
        found = github(gated(run(), self.new), path).splitlines()
        assert len(found) == 2
        line = (
            path.read_text()
            .splitlines()
            .index('  "00000000000b": ["STAT-2", "pass", 0.2, "case 11"],')
        )
        assert f"line={line + 1},title=STAT-2%3A running_var%3A unbiased%2C group" in found[1]
        assert found[1].startswith(f"::error file={path}")

    def test_a_message_is_no_command_of_github(self) -> None:
        new = run(FWD_1_1="fail")
        new["cases"][0]["message"] = new["cases"][0]["spec"]["title"] = "::stop-commands::x\n::x::"
        for line in said(gated(run(), new)).splitlines():
            assert not line.lstrip().startswith("::")

    def test_gitlab(self, tmp_path: Path) -> None:
        (tmp_path / "b.json").write_text(text(baseline(run())))
        issues = json.loads(gitlab(gated(run(), self.new), tmp_path / "b.json"))
        assert [one["check_name"][-6:] for one in issues] == [" FWD-1", "STAT-2"]
        assert len({one["fingerprint"] for one in issues}) == 2

    def test_junit(self) -> None:
        root = ElementTree.fromstring(gate_junit(gated(run(), self.new, waiver(clause="FWD-1"))))
        tests = {test.get("name"): [child.tag for child in test] for test in root.iter("testcase")}
        assert tests == {
            "case 1 [000000000001]": ["skipped"],
            "case 11 [00000000000b]": ["failure"],
            "verdict": ["failure"],
        }
        green = ElementTree.fromstring(gate_junit(gated(run(), run())))
        assert (green.get("failures"), green.get("errors")) == ("0", "0")

    def test_hostile_text_stays_text(self, tmp_path: Path) -> None:
        old = evil_report()
        new = copy.deepcopy(old)
        for row in new["cases"]:
            row["ratio"], row["verdict"] = None, "crash"
        found = gated(old, new)
        (tmp_path / "b.json").write_text(text(baseline(old)))
        views = [said(found), summary(found), github(found, tmp_path / "b.json")]
        views += [gitlab(found, tmp_path / "b.json"), gate_junit(found)]
        for view in views:
            assert not set(view) & set("\x1b\x07\x9b\u202e\u2028\r")
        outside = re.sub(r"(?<!\\)(`+)(?!`).*?(?<!`)\1(?!`)", "", views[1]).replace("\\<", "")
        assert "<script>" not in outside
        ElementTree.fromstring(views[-1])


class TestBaseline:
    def test_is_read_back(self, tmp_path: Path) -> None:
        path = tmp_path / "b.json"
        path.write_text(text(baseline(failing())))
        assert load_baseline(path) == baseline(failing())

    def test_has_a_line_for_each_case(self) -> None:
        written = text(baseline(run())).splitlines()
        assert '  "00000000000b": ["STAT-2", "pass", 0.2, "case 11"],' in written
        assert '  "FWD-1": ["pass", "y uses the statistics of the group"],' in written
        changed = text(baseline(run(STAT_2_1="fail"))).splitlines()
        assert sum(a != b for a, b in zip(written, changed, strict=True)) == 2

    def test_its_schema_describes_every_field(self) -> None:
        for field in BASELINE_SCHEMA["properties"].values():
            assert field["description"]

    @pytest.mark.parametrize("verdict", ["error", "incomplete"])
    def test_a_run_without_a_verdict_is_refused(self, verdict: str) -> None:
        report = run()
        report["summary"]["verdict"] = verdict
        with pytest.raises(ReportError, match=r"summary\.verdict: must be a verdict on the target"):
            baseline(report)

    def test_a_part_of_a_run_is_refused(self) -> None:
        report = run() | {"selection": {"clauses": ["FWD-1"], "cases": [], "shard": None}}
        with pytest.raises(ReportError, match="selection: must be of the whole profile"):
            baseline(report)


class TestCommand:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        reports.save(run(), tmp_path / "old.json")
        reports.save(run(STAT_2_1="fail"), tmp_path / "new.json")
        assert (
            main(["baseline", str(tmp_path / "old.json"), "--out", str(tmp_path / "b.json")]) == 0
        )
        return tmp_path

    def gate(self, folder: Path, report: str, *more: str) -> int:
        return main(["gate", "--baseline", str(folder / "b.json"), str(folder / report), *more])

    def test_statuses(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.gate(folder, "old.json") == 0
        assert "gate: pass" in capsys.readouterr().out
        views = ("--junit", str(folder / "j.xml"), "--markdown", str(folder / "s.md"))
        assert self.gate(folder, "new.json", *views, "--annotations", "github") == 1
        shown = capsys.readouterr().out
        assert shown.startswith("::error file=")
        assert shown.splitlines()[-1].startswith("gate: FAIL, changes in STAT-2 of syncbn.torch")
        assert "**STAT-2**" in (folder / "s.md").read_text()
        ElementTree.parse(folder / "j.xml")
        reports.save(run(STAT_2_1="error"), folder / "none.json")
        assert self.gate(folder, "none.json") == 3

    def test_a_waiver_makes_it_green(self, folder: Path) -> None:
        (folder / "w.toml").write_text(
            '[[waiver]]\nclause = "STAT-2"\nreason = "r"\nlink = "https://x.test"\nowner = "o"\n'
            "expires = 9999-12-31\n"
        )
        assert self.gate(folder, "new.json", "--waivers", str(folder / "w.toml")) == 0
        assert self.gate(folder, "old.json", "--waivers", str(folder / "w.toml")) == 1

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "is not JSON"),
            (b"{", "is not JSON"),
            (b"[" * 100_000, "is not JSON"),
            (b"\xff\xfe", "is not JSON"),
            (b"[]", "schema: must be 'syncbn-baseline/1', got None"),
            (
                b'{"schema": "syncbn-report/1"}',
                "must be 'syncbn-baseline/1', got 'syncbn-report/1'",
            ),
            (b'{"schema": "syncbn-baseline/2"}', "got 'syncbn-baseline/2'"),
            (b'{"schema": "syncbn-baseline/1"}', "'of' is a required property"),
            (b'{"schema": "a", "schema": "b"}', "is twice in an object"),
            ('{"schema": "syncbn-baseline/1"}'.encode("utf-16"), "is not JSON"),
            (b'\xef\xbb\xbf{"schema": "syncbn-baseline/1"}', "Unexpected UTF-8 BOM"),
        ],
    )
    def test_a_bad_baseline_is_one_line(
        self, folder: Path, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (folder / "b.json").write_bytes(content)
        assert self.gate(folder, "old.json") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line

    @pytest.mark.parametrize(
        ("place", "value"),
        [
            ("seconds", -1),
            ("seconds", True),
            ("ranks", 4),
            ("cases.000000000001", ["FWD-9", "pass", 0.2, "of a clause that is not there"]),
            ("cases.000000000001", ["FWD-1", "passed", 0.2, ""]),
            ("cases.000000000001", ["FWD-1", "pass", -0.2, ""]),
            ("cases.000000000001", ["FWD-1", "pass", 10**400, ""]),
            ("cases.000000000001", ["FWD-1", "pass", "nan", ""]),
            ("cases.000000000001", ["FWD-1", "pass"]),
            ("cases.x", ["FWD-1", "pass", None, ""]),
            ("cases.000000000001\n", ["FWD-1", "pass", None, ""]),
            ("cases.000000000001", ["FWD-1\n", "pass", None, ""]),
            ("clauses.FWD-1\n", ["pass", ""]),
            ("clauses.FWD-1", ["pass", EVIL, 1]),
            ("of", {}),
        ],
    )
    def test_an_edited_baseline_is_one_line(
        self, folder: Path, place: str, value: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        document: Any = json.loads((folder / "b.json").read_text())
        outer, _, inner = place.partition(".")
        if inner:
            document[outer][inner] = value
        else:
            document[outer] = value
        (folder / "b.json").write_text(json.dumps(document))
        assert self.gate(folder, "old.json") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "is not a valid baseline: " in line

    @given(data=st.data())
    @settings(max_examples=100, deadline=None, database=None, derandomize=True)
    def test_any_edit_of_a_baseline_is_a_verdict_or_one_line(self, data: st.DataObject) -> None:
        document = json.loads(text(baseline(run())))
        place: Any = document
        for _ in range(data.draw(st.integers(0, 3))):
            keys = list(place) if isinstance(place, dict) else range(len(place))
            inner = [key for key in keys if isinstance(place[key], (dict, list)) and place[key]]
            if inner:
                place = place[data.draw(st.sampled_from(inner))]
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        edits: st.SearchStrategy[Any] = st.sampled_from(
            [None, True, -1, 0, 10**400, 1e308, "", EVIL, "inf", [], {}]
        )
        place[data.draw(st.sampled_from(keys))] = data.draw(edits)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "b.json")
            path.write_text(json.dumps(document))
            try:
                found = gate(load_baseline(path), run(), today=TODAY)
            except ReportError:
                return
        assert said(found)
        assert summary(found)
        ElementTree.fromstring(gate_junit(found))

    def test_what_is_too_large_is_not_read(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with open(folder / "huge.json", "wb") as file:
            file.truncate(11_000_000)
        assert self.gate(folder, "old.json", "--waivers", str(folder / "huge.json")) == 2
        assert "must have at most 10000000 bytes" in capsys.readouterr().err

    @pytest.mark.parametrize("option", ["--max-growth", "--max-slowdown"])
    @pytest.mark.parametrize("value", ["0.5", "nan", "inf", "two"])
    def test_bad_factors(self, folder: Path, option: str, value: str) -> None:
        with pytest.raises(SystemExit) as stopped:
            self.gate(folder, "old.json", option, value)
        assert stopped.value.code == 2

    def test_a_report_with_a_number_too_large_is_one_line(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        report = run()
        report["cases"][0]["ratio"] = 10**400
        (folder / "old.json").write_text(json.dumps(report))
        assert self.gate(folder, "old.json") == 2
        assert "cases[0].ratio" in capsys.readouterr().err
