"""The plugin of pytest, in a project of somebody else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from syncbn.conformance.cases import catalogue
from tests.test_imports import ROOT, loaded_by

PLANTED = f"{ROOT}/tests/conformance/planted.py:LocalCount"


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit status and output of pytest in a folder, with the plugin as its entry point loads it."""
    command = [sys.executable, "-m", "pytest", "-p", "syncbn.conformance.plugin"]
    command += ["-p", "no:cacheprovider", "--strict-markers", "-rs", *arguments]
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def test_every_case_of_the_profile_is_a_test(tmp_path: Path) -> None:
    arguments = ("--syncbn-target", "syncbn.torch", "--syncbn-ranks", "4", "--collect-only", "-q")
    status, shown = run(tmp_path, *arguments)
    assert status == 0
    names = [line for line in shown.splitlines() if line.startswith("syncbn::")]
    cases = catalogue(4, "certify")
    assert names == [f"syncbn::{case.clause}::{case.title} [{case.id}]" for case in cases]


def test_a_clause_is_a_mark_and_xdist_shares_the_cases(tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text("def test_own():\n    pass\n")
    arguments = ("--syncbn-target", "syncbn.torch:SyncBatchNorm", "--syncbn-ranks", "1")
    status, shown = run(
        tmp_path, *arguments, "-m", "CTOR-1 or ERR-3", "-n", "2", "--junitxml", "junit.xml"
    )
    assert status == 0, shown
    tests = list(ElementTree.parse(tmp_path / "junit.xml").getroot().iter("testcase"))
    wanted = [case for case in catalogue(1, "certify") if case.clause in ("CTOR-1", "ERR-3")]
    assert {(test.get("classname"), test.get("name")) for test in tests} == {
        (f"syncbn.{case.clause}", f"{case.title} [{case.id}]") for case in wanted
    }


def test_a_failure_has_its_reason_and_its_command(tmp_path: Path) -> None:
    arguments = ("--syncbn-target", PLANTED, "--syncbn-profile", "smoke", "-m", "STAT-2 or CTOR-1")
    status, shown = run(tmp_path, *arguments, "--tb", "short")
    assert status == 1
    assert "1 failed, 1 passed" in shown
    assert re.search(r"^fail: rank \d, step \d: running_var\[", shown, re.MULTILINE), shown
    (case,) = (case for case in catalogue(2, "smoke") if case.clause == "STAT-2")
    command = f"syncbn-conformance replay {case.id} --target torch:{PLANTED} --ranks 2"
    assert command in shown
    assert "runtest" not in shown  # no traceback of the suite
    status, shown = run(tmp_path, *arguments, "--syncbn-level", "documented")
    assert status == 0
    assert "fail, does not count for level documented: rank" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--syncbn-target", "missing"), "--syncbn-target: target must be"),
        (("--syncbn-target", "a:B", "--syncbn-backend", "x"), "--syncbn-target: backend must not"),
        (("--syncbn-target", "a:B", "--syncbn-ranks", "0"), "--syncbn-ranks must be an int from"),
        (("--syncbn-target", "a:B", "--syncbn-profile", "x"), "--syncbn-profile must be one of"),
        (("--syncbn-target", "missing:Layer"), "--syncbn-target: "),
    ],
)
def test_bad_options_end_before_a_case(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    status, shown = run(tmp_path, *arguments, "-m", "CTOR-1")
    assert status == pytest.ExitCode.USAGE_ERROR
    assert message in shown
    assert "Traceback" not in shown


def test_without_the_option_it_is_nothing(tmp_path: Path) -> None:
    status, shown = run(tmp_path)
    assert status == pytest.ExitCode.NO_TESTS_COLLECTED
    assert "collected 0 items" in shown
    known = loaded_by("import pytest") | sys.stdlib_module_names
    assert loaded_by("import syncbn.conformance.plugin") - known <= {"syncbn"}
