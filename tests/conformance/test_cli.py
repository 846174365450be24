"""The command line as a user meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from syncbn import reports
from syncbn.conformance import __main__ as command_line
from syncbn.conformance.__main__ import main
from syncbn.conformance.cases import catalogue

ROOT = Path(__file__).parents[2]
PLANTED = "torch:tests/conformance/planted.py"


def failing(out: Path) -> dict[str, str]:
    """The clauses of a written report that did not pass, and their verdicts."""
    report = reports.load(out / "report.json")
    return {c["id"]: c["verdict"] for c in report["clauses"] if c["verdict"] != "pass"}


NOT_ASKED = {"COMM-2": "not-run"}


def test_our_layer_passes_and_the_report_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "run"
    arguments = ["run", "--ranks", "2", "--profile", "smoke", "--out", str(out)]
    assert main(arguments) == 0
    assert failing(out) == NOT_ASKED
    report = reports.load(out / "report.json")
    assert report["target"]["rung"] == "device"
    assert report["summary"]["verdict"] == "pass"
    assert {case["id"] for case in report["cases"]} == {c.id for c in catalogue(2, "smoke")}
    shown = capsys.readouterr().out
    assert "49 of 49 required clauses" in shown
    assert str(out / "report.json") in shown


INTERRUPTED = """
import sys

class Interrupted:
    def find_spec(self, name, *_):
        if name == "rich.console":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupted())
import syncbn.conformance.__main__
"""


def test_ctrl_c_during_the_imports_ends_in_one_line() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "syncbn-conformance: interrupted\n")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--memory", "0"], "must be a positive number of GiB, got '0'"),
        (["--memory", "1e9"], "must be a positive number of GiB, got '1e9'"),
        (["--memory", "2", "--device", "cuda"], "--memory must be left out on cuda"),
    ],
)
def test_what_is_no_limit_of_memory(
    arguments: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["run", "--oracle", "none", "--out", str(tmp_path), *arguments])
    except SystemExit as ended:
        status = int(str(ended.code))
    assert status == 2
    assert text in capsys.readouterr().err


def test_a_planted_fault_fails_its_clauses(tmp_path: Path) -> None:
    """running_var from the local count: its own clauses, and those that look at every number."""
    arguments = ["run", "--target", f"{PLANTED}:LocalCount", "--ranks", "2", "--oracle", "none"]
    assert main([*arguments, "--profile", "certify", "--out", str(tmp_path)]) == 1
    wrong = ("STAT-2", "STAT-3", "FWD-8", "CTOR-8", "NUM-1", "NUM-2", "NUM-3")
    expected = NOT_ASKED | dict.fromkeys(wrong, "fail") | {"ERR-5": "unsupported"}
    assert failing(tmp_path) == expected
    # None of them is documented: the page does not say which variance is tracked.
    documented = [*arguments, "--level", "documented", "--profile", "smoke"]
    assert main([*documented, "--out", str(tmp_path)]) == 0


def test_torch_fails_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "--target", "torch.nn", "--ranks", "2", "--profile", "smoke"]
    arguments += ["--oracle", "none"]
    assert main([*arguments, "--out", str(tmp_path)]) == 1
    found = failing(tmp_path)
    assert found["FWD-1"] == found["ERR-3"] == found["ERR-4"] == found["COMM-1"] == "fail"
    assert "EVAL-1" not in found
    shown = capsys.readouterr().out
    assert "expected input tensor to be on GPU" in " ".join(shown.split())
    assert "FAIL: " in shown


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["run", "--ranks", "0"], "must be an int from 1 to 1024, got '0'"),
        (["run", "--ranks", "two"], "must be an int from 1 to 1024, got 'two'"),
        (["run", "--profile", "quick"], "invalid choice: 'quick'"),
        (["run", "--layer-args", "{"], "must be JSON, got '{'"),
        (["run", "--layer-args", "[]"], "must be an object by name"),
        (["run", "--shard", "5/4"], "must be I/N with I from 1 to N, got '5/4'"),
    ],
)
def test_bad_options(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("syncbn-conformance run: ")
    assert text in line
    assert line.endswith("; see syncbn-conformance run --help")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    commands = ("run", "certify", "verify", "replay", "report", "targets", "list", "show")
    for command in (*commands, "explore", "freeze"):
        assert f"\n    {command} " in shown
    assert "Exit status: 0 pass, 1 fail, 2 an error" in shown


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["run", "--target", "missing"], "target must be"),
        (["run", "--target", "torch:missing:C", "--ranks", "1"], "No module named 'missing'"),
        (["run", "--target", f"{PLANTED}:CannotBeBuilt", "--ranks", "1"], "planted constructor"),
        (["run", "--device", "npu", "--ranks", "1"], "torch_npu"),
        (["run", "--device", "cuda", "--ranks", "1"], "there is no device cuda"),
        (["run", "--device", "tpu", "--ranks", "1"], "device must be a type of device of torch"),
        (["run", "--device", "privateuseone", "--ranks", "1"], "got 'privateuseone'"),
        (["run", "--setup", "nothing", "--ranks", "1"], "setup must be MODULE:FUNCTION"),
        (["run", "--framework", "pyproject.toml"], "framework must be a Python file"),
        (["run", "--backend", "tritium", "--ranks", "1"], "'tritium'"),
        (["replay", "0123456789ab"], "case must be a file or the id of a case on 4 ranks"),
        (["show", "pyproject.toml"], "pyproject.toml holds no case"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    more = ["--out", str(tmp_path)] if arguments[0] == "run" else []
    assert main([*arguments, *more]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "starting" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("syncbn-conformance: ")
    assert text in lines[0]
    assert not (tmp_path / "report.json").exists()


def test_a_finding_is_kept_with_the_reports_of_the_user() -> None:
    """Also in a checkout, whose suite no exploration changes."""
    options = command_line._parser().parse_args(["explore"])
    assert options.out == Path("reports/out/explored")


def test_a_checkout_on_the_path_works_anywhere(tmp_path: Path) -> None:
    """Also next to packages of the same names, and where no temporary folder can be written."""
    for name in ("reference", "reports", "conformance"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('not yours')")
    command = [sys.executable, "-m", "syncbn.conformance", "run", "--ranks", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": "/proc"}
    done = subprocess.run(
        [*command, "--clause", "FWD-1", "--oracle", "none"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = reports.load(tmp_path / "reports/out/syncbn.torch/report.json")
    assert report["summary"]["verdict"] == "pass"


def test_a_report_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["run", "--out", str(tmp_path / "file" / "below")]) == 2
    assert "cannot write reports to" in capsys.readouterr().err
    assert main(["run", "--out", str(tmp_path / "file")]) == 2
    assert "it is not a directory" in capsys.readouterr().err


def test_list_show_and_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--ranks", "2", "--profile", "smoke"]) == 0
    listed = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert [clause for _, clause in listed] == [c.clause for c in catalogue(2, "smoke")]
    wanted = next(case_id for case_id, clause in listed if clause == "GRAD-1")
    assert main(["show", wanted, "--ranks", "2"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["clause"] == "GRAD-1"
    (tmp_path / "case.json").write_text(json.dumps(document))
    assert main(["replay", str(tmp_path / "case.json")]) == 0
    shown = capsys.readouterr().out
    assert wanted in shown
    assert "pass, largest ratio" in shown
    assert main(["targets"]) == 0
    assert "torch:MODULE:CLASS" in capsys.readouterr().out
