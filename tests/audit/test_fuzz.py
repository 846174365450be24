"""The fuzzer runs every reader, and a fault of a reader is a finding."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from audit.fuzz import READERS, run

PLANTED = """
import pathlib, sys
from audit.fuzz import reader

def planted(text):
    if len(text) > 3:
        raise KeyError("planted")

reader._READERS["wire"] = planted
reader.main("wire", pathlib.Path(sys.argv[1]), 20, [f"-artifact_prefix={sys.argv[1]}/found-"])
"""
needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="Atheris is not installed"
)


@needs_atheris
def test_no_reader_has_a_finding(tmp_path: Path) -> None:
    output = io.StringIO()
    console = Console(file=output, width=200)
    status = run.main(readers=READERS, seconds=1, seed=1, out=tmp_path, console=console)
    assert status == 0, output.getvalue()
    assert output.getvalue().count("no finding") == len(READERS)


@needs_atheris
def test_an_exception_of_a_reader_is_a_finding(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PLANTED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "KeyError" in done.stdout + done.stderr
    assert [*tmp_path.glob("found-*")]


def test_without_atheris_the_fuzzer_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(run.FuzzError, match="pip install"):
        run.main(readers=READERS, seconds=1, seed=1, out=tmp_path, console=Console())
