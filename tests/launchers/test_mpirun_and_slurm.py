"""Open MPI and Slurm place ranks: the engines themselves, from their packages."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from syncbn import reports
from syncbn.conformance import runner, targets
from syncbn.conformance.__main__ import main
from syncbn.conformance.case import Case, Step
from syncbn.conformance.pool import RankPool, StartError
from syncbn.launchers import engine
from tests.launchers import slurm
from tests.launchers.processes import (
    assert_a_killed_rank_is_replaced,
    assert_an_error_of_the_machine,
    keepers,
    wait_until_ended,
)

ROOT = Path(__file__).parents[2]
STEP = Step(((2, 3, 3), (3, 3, 3)))
GOOD = Case("FWD-1", "good", 2, {"num_features": 3}, (STEP,), ("y",))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    if reason := slurm.why_not():
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        try:
            started = slurm.cluster(tmp_path_factory.mktemp("slurm"))
            environment = stack.enter_context(started)
        except RuntimeError as error:
            pytest.skip(str(error))
        yield environment


@pytest.fixture(params=["mpirun", "slurm"])
def launcher(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a launcher whose engine is there, and an allocation if it needs one."""
    name: str = request.param
    if name == "mpirun":
        if shutil.which("mpirun") is None:
            pytest.skip("Open MPI is not installed: apt-get install openmpi-bin")
        yield name
        return
    for variable, value in request.getfixturevalue("cluster").items():
        monkeypatch.setenv(variable, value)
    made = subprocess.run(
        ["salloc", "--no-shell", "--nodes=1", "--ntasks=2"], capture_output=True, text=True
    )
    found = re.search(r"Granted job allocation (\d+)", made.stderr)
    assert found, made.stderr
    monkeypatch.setenv("SLURM_JOB_ID", found[1])
    yield name
    subprocess.run(["scancel", found[1]], check=True)


def test_ranks_are_placed_lost_and_placed_again(launcher: str) -> None:
    with RankPool(targets.parse("syncbn.torch"), 2, launcher) as pool:
        assert runner.run_case(pool, GOOD).verdict.verdict == "pass"
        first = keepers(pool)
        assert_a_killed_rank_is_replaced(pool, GOOD)
        os.kill(first[0], signal.SIGKILL)
        wait_until_ended(first[0])
        assert_an_error_of_the_machine(pool, GOOD)
        last = keepers(pool)
    wait_until_ended(*first, *last)


def test_a_keeper_that_is_stopped_is_named_and_ended(
    launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_ANSWER_SECONDS", 3.0)
    monkeypatch.setattr(engine, "_END_SECONDS", 1.0)
    with RankPool(targets.parse("syncbn.torch"), 2, launcher) as pool:
        assert runner.run_case(pool, GOOD).verdict.verdict == "pass"
        assert pool._job is not None
        stopped, rank = keepers(pool)[1], pool._job.processes()[1]
        os.kill(stopped, signal.SIGSTOP)
        os.kill(rank, signal.SIGKILL)
        found = runner.run_case(pool, GOOD).verdict
        assert found.verdict == "error"
        assert "the keeper of rank 1 on " in str(found.message)
        assert "does not answer" in str(found.message)
        wait_until_ended(stopped)
        assert runner.run_case(pool, GOOD).verdict.verdict == "pass"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_that_is_killed_or_stopped_leaves_nothing(
    launcher: str, how: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm ends the tasks of an srun that was killed. Otherwise the keepers go on alone."""
    monkeypatch.setattr(engine, "_END_SECONDS", 1.0)
    monkeypatch.setattr(engine, "_KILL_SECONDS", 3.0)
    with RankPool(targets.parse("syncbn.torch"), 2, launcher) as pool:
        assert runner.run_case(pool, GOOD).verdict.verdict == "pass"
        assert pool._job is not None
        left = [*keepers(pool), *pool._job.processes().values()]
        (node,) = pool._job._keepers._nodes  # type: ignore[attr-defined]
        os.kill(node._process.pid, how)
        if launcher == "slurm" and how == signal.SIGKILL:
            wait_until_ended(*left)
            assert_an_error_of_the_machine(pool, GOOD)
        else:
            assert runner.run_case(pool, GOOD).verdict.verdict == "pass"
            assert pool.starts == 1
    wait_until_ended(*left)


def test_what_the_engine_says_is_the_reason(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with RankPool(targets.parse("syncbn.torch"), 2, launcher) as pool:
        name = {"slurm": "srun"}.get(launcher, launcher)
        with pytest.raises(StartError, match=f"^{name} on 127.0.0.1 ended: exit status .*no/such"):
            pool.start()


def test_slurm_needs_an_allocation(
    cluster: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--launcher", "slurm", "--ranks", "2", "--out", str(tmp_path)]) == 2
    assert "launcher slurm needs an allocation" in capsys.readouterr().err.splitlines()[-1]


def test_the_batch_script_of_the_examples(cluster: dict[str, str], tmp_path: Path) -> None:
    """Two nodes of two ranks each leave a report."""
    script = ROOT / "examples/cluster/slurm.sbatch"
    options = ["run", "--profile", "smoke", "--clause", "FWD-1", "--oracle", "none"]
    own = {"PYTHONPATH": str(ROOT), "SYNCBN_PYTHON": sys.executable}
    done = subprocess.run(
        ["sbatch", "--parsable", "--time=5", "--ntasks-per-node=2", script, *options],
        cwd=tmp_path,
        env=os.environ | cluster | own,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    report = tmp_path / f"syncbn-conformance-{job}" / "report.json"
    end = time.monotonic() + 120
    while not report.exists():
        log = tmp_path / f"syncbn-conformance-{job}.out"
        said = log.read_text() if log.exists() else ""
        assert "syncbn-conformance: " not in said, said
        assert time.monotonic() < end, said
        time.sleep(0.2)
    found = reports.load(report)
    assert (found["ranks"], found["launcher"]) == (4, "slurm")
    assert found["summary"]["verdict"] == "pass"
    left = ["squeue", "--noheader", "--jobs", job]
    while subprocess.run(left, env=os.environ | cluster, capture_output=True).stdout.strip():
        assert time.monotonic() < end, "the job does not end"
        time.sleep(0.2)
