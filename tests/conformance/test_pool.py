"""The pool of ranks: a bad case costs one case, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from syncbn.conformance import pool as pool_module
from syncbn.conformance import runner, targets
from syncbn.conformance.case import Case, Step
from syncbn.conformance.cases import catalogue
from syncbn.conformance.pool import RankPool
from syncbn.conformance.targets import TargetError
from syncbn.conformance.verdict import Verdict
from syncbn.conformance.wire import Channel
from syncbn.launchers.handshake import Reception

ROOT = Path(__file__).parents[2]
UNRULY = "torch:tests/conformance/unruly.py:Unruly"
PLANTED = "torch:tests/conformance/planted.py"


def case(channels: int, deadline: float = 20.0) -> Case:
    step = Step(((2, channels, 3), (3, channels, 3)))
    layer = {"num_features": channels}
    return Case("FWD-1", f"{channels}", 2, layer, (step,), ("y",), deadline=deadline)


def pids(pool: RankPool) -> list[int]:
    assert pool._job is not None
    return list(pool._job.processes().values())


def without_backward(channels: int) -> Case:
    of = case(channels)
    return replace(of, steps=(replace(of.steps[0], backward=False),))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_bad_case_costs_one_case() -> None:
    """A rank that dies, one that never returns, one that raises: each between good cases."""
    channels = (3, 64, 3, 65, 3, 257, 3)
    with RankPool(targets.parse(f"{PLANTED}:FailsByChannels"), 2) as pool:
        # 65 channels never return. The others have time enough on a busy machine.
        cases = [case(count, deadline=4.0 if count == 65 else 20.0) for count in channels]
        results = [runner.run_case(pool, each).verdict for each in cases]
        assert pool.starts == 4
        left = pids(pool)
    found = [result.verdict for result in results]
    # The layer that raises leaves its peer waiting in a collective, which is a hang.
    assert found == ["pass", "crash", "pass", "hang", "pass", "hang", "pass"]
    assert "rank 1 died" in str(results[1].message)
    # On a busy machine 5 s of processor time come before the deadline.
    assert "rank 1 did not answer in" in str(results[3].message)
    assert "planted.py" in str(results[3].message)
    assert "rank 0 did not answer, and no rank did anything for 1" in str(results[5].message)
    assert "groups.py" in str(results[5].message)
    assert "rank 1 raised RuntimeError: planted" in str(results[5].message)
    assert not any(alive(pid) for pid in left)


def test_ranks_that_wait_for_one_that_has_left_cost_seconds() -> None:
    """Each time new ranks start; --max-hangs ends that."""
    step = Step(((3, 3, 3), (3, 3, 3)))
    cases = [replace(case(3), steps=(step,), seed=seed) for seed in range(3)]
    with RankPool(targets.parse(f"{PLANTED}:LeavesItsPeers"), 2) as pool:
        found = runner.run(pool, cases, lambda _: None, max_hangs=2)
        assert pool.starts == 2
    assert [one.verdict.verdict for one in found] == ["hang", "hang", "not-run"]
    assert "rank 1 did not answer, and no rank did anything for 1" in str(found[0].verdict.message)


def test_an_endless_loop_is_seen_by_the_time_of_its_processor() -> None:
    """However long the deadline is, and however busy the machine."""
    with RankPool(targets.parse(f"{PLANTED}:FailsByChannels"), 2) as pool:
        found = runner.run_case(pool, case(65)).verdict
    assert found.verdict == "hang"
    assert "rank 1 did not answer in 5 s of processor time" in str(found.message)
    assert "planted.py" in str(found.message)


def test_a_constructor_that_ignores_signals_is_ended() -> None:
    with RankPool(targets.parse(f"{PLANTED}:NeverBuilt"), 2) as pool:
        found = runner.run_case(pool, case(65)).verdict
        assert runner.run_case(pool, case(3)).verdict.verdict == "pass"
    assert found.verdict == "hang"
    assert "rank 1 did not answer in 5 s of processor time" in str(found.message)


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs /proc/PID/schedstat")
def test_ranks_that_wait_for_a_processor_do_not_hang() -> None:
    """Ranks and busy processes share one processor, and the deadline is short."""
    burner = [sys.executable, "-c", "while True: pass"]
    with RankPool(targets.parse(f"{PLANTED}:Computes"), 2) as pool:
        pool.start()
        burners = [subprocess.Popen(burner) for _ in range(4)]
        try:
            processor = {min(os.sched_getaffinity(0))}
            for pid in [*pids(pool), *(process.pid for process in burners)]:
                for thread in os.listdir(f"/proc/{pid}/task"):
                    os.sched_setaffinity(int(thread), processor)
            found = runner.run_case(pool, case(3, deadline=1.0))
        finally:
            for process in burners:
                process.kill()
                process.wait()
    assert found.verdict.verdict == "pass", found.verdict.message
    assert found.seconds > 1.0


def test_a_busy_machine_changes_no_result() -> None:
    """Neither a verdict nor a bit of a ratio, of passes and of failures."""
    cases = catalogue(2, "smoke")

    def verdicts() -> list[Verdict]:
        with RankPool(targets.parse(f"{PLANTED}:LocalCount"), 2) as pool:
            return [runner.run_case(pool, one).verdict for one in cases]

    alone = verdicts()
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:
        assert verdicts() == alone
    finally:
        for process in burners:
            process.kill()
            process.wait()
    assert {one.verdict for one in alone} >= {"pass", "fail"}


RESTORED = (
    "rank 1: the environment, the working directory, the umask, sys.path, the errors of "
    "NumPy, the default dtype, grad mode, autocast, the number of threads, deterministic "
    "algorithms, denormal numbers"
)


def test_what_a_layer_changes_in_its_process_is_put_back() -> None:
    with RankPool(targets.parse(UNRULY), 2) as pool:
        assert runner.run_case(pool, case(3)).changed == ()
        found = runner.run_case(pool, case(44))
        assert found.changed == (RESTORED,)
        after = runner.run_case(pool, case(3))
        assert (after.verdict.verdict, after.changed) == ("pass", ())
        assert runner.run_case(pool, case(44)).changed == found.changed
        assert pool.starts == 1


def test_random_numbers_are_put_back_without_a_report() -> None:
    with RankPool(targets.parse(UNRULY), 2) as pool:
        found = [runner.run_case(pool, without_backward(27)) for _ in range(2)]
        assert pool.starts == 1
    assert "RuntimeError: 0." in str(found[0].verdict.message)
    assert found[0].verdict.message == found[1].verdict.message
    assert [one.changed for one in found] == [(), ()]


@pytest.mark.parametrize(
    ("channels", "changed", "verdict"),
    [
        (45, "the threads of Python", "pass"),
        (46, "stdout and stderr", "pass"),
        (47, "the default process group", "pass"),
        (48, "syncbn.conformance.ranks.base.Rank._run", "fail"),
    ],
)
def test_ranks_are_replaced_after_what_cannot_be_put_back(
    channels: int, changed: str, verdict: str
) -> None:
    with RankPool(targets.parse(UNRULY), 2) as pool:
        found = runner.run_case(pool, without_backward(channels))
        assert found.verdict.verdict == verdict
        assert found.changed == (f"rank 1: {changed}",)
        (restart,) = pool.restarts
        assert restart.reason == f"the layer changed its process: rank 1: {changed}"
        assert runner.run_case(pool, case(3)).verdict.verdict == "pass"


def test_a_rank_has_its_share_of_memory() -> None:
    """A layer that wants more gets an error, and the machine stays usable."""
    with RankPool(targets.parse(UNRULY), 2, memory=4 << 30) as pool:
        found = runner.run_case(pool, without_backward(49)).verdict
        assert found.verdict == "fail"
        assert "can't allocate memory" in str(found.message)
        assert runner.run_case(pool, case(3)).verdict.verdict == "pass"


@pytest.mark.parametrize(("rung", "verdict"), [("device", "hang"), ("interpreted", "pass")])
def test_an_interpreter_is_given_longer(rung: str, verdict: str) -> None:
    target = replace(targets.parse(f"{PLANTED}:FailsByChannels"), rung=rung)
    with RankPool(target, 2) as pool:
        assert runner.run_case(pool, case(63, deadline=1.0)).verdict.verdict == verdict


def test_kill_9_of_a_rank_between_cases() -> None:
    with RankPool(targets.parse("syncbn.torch"), 2) as pool:
        assert runner.run_case(pool, case(3)).verdict.verdict == "pass"
        os.kill(pids(pool)[0], signal.SIGKILL)
        found = runner.run_case(pool, case(3)).verdict
        assert found.verdict == "crash"
        assert "rank 0 died" in str(found.message)
        assert runner.run_case(pool, case(3)).verdict.verdict == "pass"


def test_a_rank_that_is_stopped_at_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    connected = RankPool._receive_ranks

    def stop_one(self: RankPool, reception: Reception) -> list[Channel]:
        channels = connected(self, reception)
        os.kill(pids(self)[1], signal.SIGSTOP)
        left.extend(pids(self))
        monkeypatch.setattr(pool_module, "_START_SECONDS", 5.0)
        return channels

    left: list[int] = []
    with RankPool(targets.parse(UNRULY), 2) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(RankPool, "_receive_ranks", stop_one)
            found = runner.run_case(pool, case(3)).verdict
        assert found.verdict == "error"
        assert "rank 1 did not answer in time" in str(found.message)
        assert not any(alive(pid) for pid in left)
        monkeypatch.undo()
        assert runner.run_case(pool, case(3)).verdict.verdict == "pass"


def test_an_answer_that_comes_late_is_not_taken_for_the_next_one(pool: RankPool) -> None:
    """After an exchange that was given up, its answer carries an old epoch."""
    assert runner.run_case(pool, case(3)).verdict.verdict == "pass"
    for channel in pool._channels:
        channel.send({"do": "run", "case": {}, "epoch": -1})
    assert runner.run_case(pool, case(3)).verdict.verdict == "pass"


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("torch:no_such_module:Layer", "No module named 'no_such_module'"),
        ("torch:torch.nn:NoSuchClass", "NoSuchClass"),
        ("torch:no/such/file.py:Layer", "no/such/file.py"),
        (f"{PLANTED}:CannotBeBuilt", "RuntimeError: planted constructor"),
    ],
)
def test_a_target_that_cannot_be_used(target: str, text: str) -> None:
    pool = RankPool(targets.parse(target), 1)
    with pytest.raises(TargetError, match="cannot be used") as caught:
        pool.start()
    assert text in str(caught.value)
    assert pool._job is None


@pytest.mark.parametrize("name", ["", "syncbn", "torch", "torch:x", "jax:m:c", "torch::C"])
def test_a_target_with_a_wrong_name(name: str) -> None:
    with pytest.raises(TargetError, match="target must be"):
        targets.parse(name)


def test_a_backend_for_a_target_that_has_none() -> None:
    with pytest.raises(TargetError, match="backend must not be given"):
        targets.parse("torch.nn", backend="composed")


def test_an_unknown_backend() -> None:
    offered = "auto, composed, numba, aten, triton"
    with pytest.raises(TargetError, match=f"backend must be one of {offered}, got 'tritium'"):
        targets.parse("syncbn.torch", backend="tritium")


def test_an_unknown_mode() -> None:
    with pytest.raises(TargetError, match=r"mode must be one of pynative, graph .* got 'eager'"):
        targets.parse("syncbn.mindspore", mode="eager")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_orphans_when_the_controller_ends(how: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C, and even kill -9 of the controller, end all ranks, one of which never returns."""
    document = tmp_path / "case.json"
    document.write_text(json.dumps(case(65, deadline=100.0).document))
    command = [sys.executable, "-m", "syncbn.conformance", "replay", str(document)]
    command += ["--target", f"{PLANTED}:FailsByChannels"]
    controller = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # Where tests are started by nohup or with &, Ctrl-C is ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    (guard,) = wait_for_children(controller.pid, 1)
    (keeper,) = wait_for_children(guard, 1)
    family = [guard, keeper, *wait_for_children(keeper, 2)]
    time.sleep(4.0)  # the case has begun, or is about to: no process may stay
    controller.send_signal(how)
    _, errors = controller.communicate(timeout=30)
    end = time.monotonic() + 15
    while any(alive(pid) for pid in family) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in family)
    if how == signal.SIGINT:
        assert controller.returncode == 130
        assert errors == "syncbn-conformance: interrupted\n"


def wait_for_children(pid: int, count: int) -> list[int]:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if len(children) >= count:
            return [int(child) for child in children]
        time.sleep(0.1)
    raise AssertionError("they did not start")
