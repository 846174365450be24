"""The folder of a run: nothing stale, nothing lost, and no two runs in it."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from syncbn import reports
from syncbn.conformance import progress, report, targets
from syncbn.conformance.__main__ import main
from syncbn.conformance.cases import catalogue
from syncbn.conformance.place import Place, PlaceError
from syncbn.conformance.pool import RankPool
from syncbn.conformance.selection import Selection, SelectionError, shard

ASKED = {"ranks": 1}
ROW: dict[str, Any] = {
    "id": "0" * 12,
    "clause": "FWD-1",
    "spec": {"title": "one"},
    "verdict": "pass",
    "ratio": 0.5,
    "message": None,
    "seconds": 0.1,
    "oracle": None,
}
RUN = ["run", "--ranks", "1", "--oracle", "none", "--clause", "CTOR-2,ERR-3"]
COMMAND = [sys.executable, "-m", "syncbn.conformance"]


def test_a_run_in_the_folder_of_another_is_refused(tmp_path: Path) -> None:
    with Place(tmp_path), pytest.raises(PlaceError, match="another run"), Place(tmp_path):
        pass
    with Place(tmp_path):  # the lock is gone with its run
        pass


def test_an_older_report_is_set_aside_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.json").write_text("an older pass")
    assert main(["run", "--target", "missing", "--out", str(tmp_path)]) == 2
    assert not (tmp_path / "report.json").exists()
    (aside,) = tmp_path.glob("report-*.json")
    assert aside.read_text() == "an older pass"


def test_two_older_reports_of_one_second_are_both_kept(tmp_path: Path) -> None:
    for text in "ab":
        (tmp_path / "report.json").write_text(text)
        os.utime(tmp_path / "report.json", (1e9, 1e9))
        with Place(tmp_path) as place:
            place.set_aside()
    assert sorted(path.read_text() for path in tmp_path.glob("report-*.json")) == ["a", "b"]


def test_results_survive_the_process_and_a_cut_line(tmp_path: Path) -> None:
    with Place(tmp_path) as place:
        place.begin(ASKED, ["command"])
        about = place.about
        place.add(ROW)
        place.add(ROW | {"id": "1" * 12})
    with (tmp_path / "run.jsonl").open("a") as file:
        file.write('{"id": "22')
    with Place(tmp_path) as place:
        place.resume(ASKED)
        assert [row["id"] for row in place.rows] == ["0" * 12, "1" * 12]
        assert place.about == about
        place.add(ROW | {"id": "3" * 12})
    with Place(tmp_path) as place:
        place.resume(ASKED)
        assert len(place.rows) == 3


def test_only_the_same_run_is_resumed(tmp_path: Path) -> None:
    with Place(tmp_path) as place:
        with pytest.raises(PlaceError, match="no run to resume"):
            place.resume(ASKED)
        place.begin(ASKED, [])
        place.add(ROW)
    with Place(tmp_path) as place, pytest.raises(PlaceError, match="ranks was 1, now it is 2"):
        place.resume({"ranks": 2})
    with (tmp_path / "run.jsonl").open("a") as file:
        file.write(json.dumps(ROW | {"verdict": "perfect"}) + "\n")
    with Place(tmp_path) as place, pytest.raises(PlaceError, match="verdict"):
        place.resume(ASKED)


def test_a_run_has_an_id_a_date_and_its_command_line(tmp_path: Path) -> None:
    assert main([*RUN, "--out", str(tmp_path)]) == 0
    report = reports.load(tmp_path / "report.json")
    assert report["run"]["command"] == ["syncbn-conformance", *RUN, "--out", str(tmp_path)]
    assert report["selection"] == {"clauses": ["CTOR-2", "ERR-3"], "cases": [], "shard": None}
    assert {case["clause"] for case in report["cases"]} == {"CTOR-2", "ERR-3"}
    assert not (tmp_path / "run.jsonl").exists()


def test_an_interrupted_run_keeps_what_it_has_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*RUN, "--out", str(tmp_path)]
    run = progress.run

    def interrupted(pool: Any, cases: Any, oracle: Any, hangs: int, keep: Any) -> None:
        def some(result: Any) -> None:
            keep(result)
            raise KeyboardInterrupt

        run(pool, cases, oracle, hangs, some)

    monkeypatch.setattr(progress, "run", interrupted)
    assert main(arguments) == 130
    assert "--resume" in capsys.readouterr().err
    first = reports.load(tmp_path / "report.json")
    assert first["summary"]["verdict"] == "incomplete"
    assert len(first["cases"]) == 1
    monkeypatch.setattr(progress, "run", run)
    assert main([*arguments, "--resume"]) == 0
    second = reports.load(tmp_path / "report.json")
    assert second["summary"]["verdict"] == "pass"
    assert second["run"] == first["run"]
    assert second["cases"][0] == first["cases"][0]
    ids = [case["id"] for case in second["cases"]]
    assert ids == [case.id for case in Selection(("CTOR-2", "ERR-3")).of(1, "certify")]


def test_a_resumed_run_keeps_the_restarts_of_before(tmp_path: Path) -> None:
    restart = {"case": "0" * 12, "reason": "rank 1 died", "seconds": 2.5}
    with Place(tmp_path) as place:
        place.begin(ASKED, [])
        place.add(ROW, [restart])
    with Place(tmp_path) as place:
        place.resume(ASKED)
        assert (place.rows, place.restarts) == ([ROW], [restart])
    document = report.build(
        RankPool(targets.parse("syncbn.torch"), 1),
        [],
        profile="smoke",
        level="decided",
        seconds=1.0,
        oracle="--oracle none",
        run=place.about,
        restarts_before=place.restarts,
    )
    assert document["restarts"] == [restart]


def test_the_first_failure_ends_a_fast_run(tmp_path: Path) -> None:
    target = "torch:tests/conformance/planted.py:LocalCount"
    arguments = ["run", "--target", target, "--ranks", "2", "--clause", "CTOR-2,STAT-2"]
    assert main([*arguments, "--oracle", "none", "--fail-fast", "--out", str(tmp_path)]) == 1
    report = reports.load(tmp_path / "report.json")
    assert [case["verdict"] for case in report["cases"]].count("fail") == 1
    assert report["cases"][-1]["verdict"] == "fail"
    assert report["must_pass"]["missing"]


@pytest.mark.parametrize("closed", ["stdout", "both"])
def test_a_closed_pipe_changes_nothing(tmp_path: Path, closed: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    error = writer if closed == "both" else subprocess.DEVNULL
    arguments = [*COMMAND, *RUN, "--out", str(tmp_path)]
    done = subprocess.run(arguments, stdout=writer, stderr=error, timeout=300)
    os.close(writer)
    assert done.returncode == 0
    assert reports.load(tmp_path / "report.json")["summary"]["verdict"] == "pass"


@pytest.mark.parametrize(
    ("clauses", "size", "what"),
    [("FWD-1,FWD-2", 4096, "reports to {}"), ("CTOR-2", 2048, "report to {}/report.json")],
    ids=["in the run", "at its end"],
)
def test_a_full_disk_is_one_line_and_the_run_can_go_on(
    clauses: str, size: int, what: str, tmp_path: Path
) -> None:
    arguments = [*COMMAND, "run", "--ranks", "1", "--oracle", "none", "--clause", clauses]
    arguments += ["--out", str(tmp_path)]
    done = subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    what = what.format(tmp_path)
    assert last == f"syncbn-conformance: cannot write {what}: File too large"
    assert [file.name for file in tmp_path.iterdir()] == ["run.jsonl"]
    assert subprocess.run([*arguments, "--resume"], timeout=300).returncode == 0


def test_signals_are_ignored_while_an_interrupted_command_ends() -> None:
    code = """if True:
        import os, signal
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)  # some may be ignored where tests run
        from syncbn.conformance import __main__ as cli
        cli._list = lambda options: os.kill(os.getpid(), signal.SIGINT)
        assert cli.main(["list"]) == 130
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            assert signal.getsignal(number) == signal.SIG_IGN
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("sent", ["SIGHUP", "SIGTERM", "SIGINT, again and again"])
def test_a_signal_leaves_a_report_and_nothing_else(sent: str, tmp_path: Path) -> None:
    name, _, again = sent.partition(",")
    number = signal.Signals[name]
    out, temporary = tmp_path / "out", tmp_path / "temporary"
    temporary.mkdir()
    process = subprocess.Popen(
        [*COMMAND, "run", "--ranks", "1", "--oracle", "none", "--out", str(out)],
        env=os.environ | {"TMPDIR": str(temporary)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Where tests are started by nohup or with &, some are ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    try:
        end = time.monotonic() + 200
        journal = out / "run.jsonl"
        while not journal.exists() or len(journal.read_bytes().splitlines()) < 3:
            assert time.monotonic() < end
            time.sleep(0.05)
        for _ in range(4 if again else 1):
            process.send_signal(number)
            time.sleep(0.05)
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == 130, errors
    finally:
        process.kill()
    assert "Traceback" not in errors
    assert reports.load(out / "report.json")["summary"]["verdict"] == "incomplete"
    assert [file for file in temporary.iterdir() if "inductor" not in file.name] == []


def test_shards_are_the_whole() -> None:
    everything = [case.id for case in catalogue(2, "certify")]
    parts = [Selection(shard=(part, 3)).of(2, "certify") for part in (1, 2, 3)]
    assert sorted(case.id for part in parts for case in part) == sorted(everything)
    assert shard("2/3") == (2, 3)


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/0", "a/b", "1/2/3", "-1/2"])
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(ValueError, match="I/N"):
        shard(text)


@pytest.mark.parametrize(
    ("selection", "text"),
    [
        (Selection(clauses=("FWD-99",)), "clause must be one of the contract, got 'FWD-99'"),
        (Selection(cases=("0" * 12,)), "case must be the id of a case on 2 ranks"),
        (Selection(clauses=("COMM-2",)), "no case of profile smoke on 2 ranks is selected"),
    ],
)
def test_what_cannot_be_selected(selection: Selection, text: str) -> None:
    with pytest.raises(SelectionError, match=text):
        selection.of(2, "smoke")


def test_a_case_of_another_profile_can_be_selected() -> None:
    last = catalogue(2, "full")[-1]
    assert Selection(cases=(last.id,)).of(2, "smoke") == [last]


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main(["targets"]) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
