"""Who is at fault: the layer, or the suite and its machine, which is an `error` and no verdict."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from syncbn import reports
from syncbn.conformance import runner, targets
from syncbn.conformance.__main__ import main
from syncbn.conformance.case import Case, Data, Step
from syncbn.conformance.cases import catalogue
from syncbn.conformance.pool import Outcome, RankPool
from syncbn.conformance.verdict import Verdict

ROOT = Path(__file__).parents[2]
UNRULY = "torch:tests/conformance/unruly.py:Unruly"


def case(channels: int) -> Case:
    step = Step(((2, channels, 3), (3, channels, 3)), backward=False)
    return Case("FWD-1", f"{channels}", 2, {"num_features": channels}, (step,), ("y",))


def poisoned_outside() -> Case:
    """Rank 0 cannot make its input, and rank 1 waits for it."""
    whole = case(3)
    data = Data(poison=(((0, 5, 0, 0), "nan"),))
    return replace(whole, steps=(replace(whole.steps[0], x=data),))


@pytest.fixture(scope="module")
def unruly() -> Iterator[RankPool]:
    with RankPool(targets.parse(UNRULY), 2) as pool:
        yield pool


def judged(pool: RankPool, of: Case) -> Verdict:
    return runner.run_case(pool, of).verdict


def test_a_case_that_the_suite_cannot_make_is_an_error(unruly: RankPool) -> None:
    found = judged(unruly, poisoned_outside())
    assert found.verdict == "error"
    assert "rank 0: IndexError" in str(found.message)
    assert "conformance/data.py" in str(found.message)
    assert judged(unruly, case(3)).verdict == "pass"


def test_a_full_disk_is_an_error_of_the_machine(unruly: RankPool) -> None:
    found = judged(unruly, case(20))
    assert found.verdict == "error"
    where = f"rank 1: the machine {socket.gethostname()} failed: "
    assert f"{where}[Errno 28] No space left on device" in str(found.message)


def test_a_run_goes_on_when_the_disk_has_space_again(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "syncbn.conformance", "run", "--target", "syncbn.torch"]
    words += ["--ranks", "1", "--profile", "smoke", "--oracle", "none", "--out", str(tmp_path)]
    run, folder = f"{shlex.join(words)} >&2", shlex.quote(str(tmp_path))
    script = f"""
        mount -t tmpfs -o size=12k disk {folder} || exit 77
        {run}
        echo status $? >&2
        mount -o remount,size=1m {folder}
        {run} --resume && cat {folder}/report.json
    """
    own = ("unshare", "--mount", "sh", "-c", script)
    done = subprocess.run(own, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 77 or done.stderr.startswith("unshare: "):
        pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
    assert f"syncbn-conformance: cannot write reports to {tmp_path}: No space" in done.stderr
    assert "\nstatus 2\n" in done.stderr
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["summary"]["verdict"] == "pass"
    assert len(report["cases"]) == len(catalogue(1, "smoke"))


@pytest.mark.parametrize(
    ("channels", "text"),
    [
        (40, "Cannot copy out of meta tensor"),
        (41, "rank 1, step 0: raised"),
        (42, "the layer must return a tensor, got NoneType"),
        (43, "the layer must return a tensor, got tuple"),
        (25, "Mute: its text cannot be read"),
    ],
)
def test_what_a_layer_returns_or_raises_is_its_own_fault(
    unruly: RankPool, channels: int, text: str
) -> None:
    found = judged(unruly, case(channels))
    assert (found.verdict, found.raised) == ("fail", True)
    assert text in str(found.message)


def test_a_tensor_of_another_class_is_noticed(unruly: RankPool) -> None:
    found = judged(unruly, replace(case(39), checks=("y", "format")))
    assert found.verdict == "fail"
    classes = r"class of y is .*unruly\.Marked, expected torch\.Tensor"
    assert re.search(rf"rank 1, step 0: {classes}", str(found.message))


def test_an_argument_that_does_not_exist_is_not_refused_for_the_reason_of_the_clause() -> None:
    cases = [one for one in catalogue(1, "certify") if one.clause in ("ERR-1", "ERR-2")]
    with RankPool(targets.parse("torch:tests/conformance/planted.py:Renamed"), 1) as pool:
        found = {(one.clause, judged(pool, one).verdict) for one in cases}
        refused = judged(pool, cases[-1])
    assert found == {("ERR-1", "pass"), ("ERR-2", "fail")}
    assert "also refuses sound arguments of these names: TypeError" in str(refused.message)


@pytest.mark.parametrize(("channels", "longest"), [(24, 10_000), (26, 1_000)])
def test_a_text_of_any_kind_fits_into_a_report(
    unruly: RankPool, channels: int, longest: int
) -> None:
    found = judged(unruly, case(channels))
    assert found.verdict == "fail"
    assert len(json.dumps(found.message)) < longest


@pytest.mark.parametrize(
    ("channels", "texts"),
    [
        (21, ["exit status 7", "SystemExit: 7"]),
        (22, ["exit status 9"]),
        (23, ["signal 11, SIGSEGV", "unruly.py", "in segfault"]),
    ],
)
def test_a_crash_names_status_or_signal_and_place(
    unruly: RankPool, channels: int, texts: list[str]
) -> None:
    restarts = len(unruly.restarts)
    of = case(channels)
    found = judged(unruly, of)
    assert found.verdict == "crash"
    for text in texts:
        assert text in str(found.message)
    (restart,) = unruly.restarts[restarts:]
    assert (restart.case, restart.reason) == (of.id, found.message)


def test_ranks_that_hang_while_they_form_a_world_are_in_the_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("syncbn.conformance.pool._START_SECONDS", 30.0)
    monkeypatch.setattr("syncbn.conformance.pool._JOIN_SECONDS", 2.0)
    with RankPool(targets.parse("syncbn.torch"), 2) as pool:
        assert judged(pool, case(3)).verdict == "pass"
        pool._must_rejoin = True
        assert pool._job is not None
        os.kill(pool._job.processes()[1], signal.SIGSTOP)
        assert judged(pool, case(3)).verdict == "pass"
        (restart,) = pool.restarts
        assert restart.case == case(3).id
        assert restart.reason.startswith("the ranks did not form a new world: ")
        assert "rank 1 did not answer in time" in restart.reason
        assert restart.seconds >= 2.0


def test_ranks_that_cannot_start_again_cost_errors_and_not_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with RankPool(targets.parse("syncbn.torch"), 2) as pool:
        assert judged(pool, case(3)).verdict == "pass"
        pool.stop()
        pool.target = replace(pool.target, module="no.such.module")
        found = [judged(pool, case(3)) for _ in range(4)]
    assert [one.verdict for one in found] == ["error"] * 4
    assert "No module named 'no'" in str(found[0].message)
    assert found[-1].message == "the ranks failed to start 2 times in a row"
    assert pool.starts == 3


def test_the_end_of_what_keeps_the_ranks_is_no_crash_of_the_layer() -> None:
    with RankPool(targets.parse("syncbn.torch"), 2) as pool:
        assert judged(pool, case(3)).verdict == "pass"
        assert pool._job is not None
        ranks = [Path(f"/proc/{pid}") for pid in pool._job.processes().values()]
        status = (ranks[0] / "stat").read_text()
        os.kill(int(status.rsplit(")", 1)[1].split()[1]), signal.SIGKILL)
        while any(place.exists() for place in ranks):
            time.sleep(0.01)
        found = judged(pool, case(3))
        assert found.verdict == "error"
        assert found.message == "the parent of the ranks ended: signal 9, SIGKILL"
        assert judged(pool, case(3)).verdict == "pass"


def test_what_the_suite_cannot_judge_is_an_error() -> None:
    class Empty:
        def begin(self, _: Case) -> Callable[[], Outcome]:
            return lambda: Outcome([])  # fewer answers than ranks

    found = judged(cast(RankPool, Empty()), case(3))
    assert found.verdict == "error"
    assert "the suite failed to judge: " in str(found.message)


def test_a_run_with_an_error_has_its_own_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "syncbn.conformance.selection.catalogue", lambda *_: [case(3), poisoned_outside()]
    )
    arguments = ["run", "--ranks", "2", "--oracle", "none", "--out", str(tmp_path)]
    assert main([*arguments, "--target", UNRULY]) == 3
    report = reports.load(tmp_path / "report.json")
    assert report["summary"]["verdict"] == "error"
    assert report["summary"]["cases"]["error"] == 1
    assert "NO VERDICT" in capsys.readouterr().out
