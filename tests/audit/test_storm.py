"""A short storm, and the one promise of a storm that could be broken without a sign."""

from __future__ import annotations

import functools
import io
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from audit import storm
from audit.storm.one_machine import OneMachine
from audit.storm.run import _Run, main


def test_a_storm_breaks_no_promise() -> None:
    output = io.StringIO()
    console = Console(file=output, width=200)
    run = functools.partial(main, minutes=0.0, seed=7, ranks=2, profile="smoke", rate=0.1)
    status = run(every=4.5, two_hosts=False, console=console)
    shown = output.getvalue()
    assert status == 0, shown
    assert "1 runs of smoke on 2 ranks in " in shown
    assert "0 broke a promise" in shown
    assert "verdicts: " in shown


def test_a_process_that_is_left_breaks_a_promise() -> None:
    command = [sys.executable, "-c", "import time; time.sleep(300)", storm.SLEEP]
    with subprocess.Popen(command) as left:
        run = _Run("left", 2, "smoke", 0.0, 4.5, OneMachine())
        assert left.pid in run._processes()
        left.kill()


def test_a_lost_report_breaks_a_promise(tmp_path: Path) -> None:
    run = _Run("lost", 2, "smoke", 0.0, 4.5, OneMachine())
    (broken,) = run._judge(0, tmp_path, "")
    assert broken.startswith("no report, status 0: ")
