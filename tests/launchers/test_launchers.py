"""Every way to start ranks: the same processes come to life, are watched, and leave nothing."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from syncbn.conformance import runner, targets
from syncbn.conformance.__main__ import main
from syncbn.conformance.case import Case, Step
from syncbn.conformance.pool import RankPool
from syncbn.conformance.targets import TargetError
from syncbn.launchers import LAUNCHERS, Job, local
from syncbn.launchers.site import Site
from tests.launchers.processes import parent, wait_until_ended

ROOT = Path(__file__).parents[2]
MARK = f"SYNCBN_TEST_{os.getpid()}"  # these tests may run twice at the same time
KEEPER = "syncbn.launchers.keeper"
PLANTED = "torch:tests/conformance/planted.py"

needs_mindspore = pytest.mark.skipif(
    importlib.util.find_spec("mindspore") is None, reason="MindSpore is not installed"
)
# mpirun and slurm need engines that pip does not install: see test_mpirun_and_slurm.py. Their ranks
# have the same keepers as those of torchrun.
each_launcher = pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(name, marks=needs_mindspore if name == "msrun" else ())
        for name in LAUNCHERS
        if name not in ("mpirun", "slurm")
    ],
    scope="module",
)

RANK = """
import faulthandler, os, signal, subprocess, sys, time
faulthandler.register(signal.SIGUSR1)
place = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SAID")]
print(*place, os.getcwd(), sys.executable, repr(sys.stdin.read()), flush=True)
print("on stderr", file=sys.stderr, flush=True)
def waits():
    time.sleep(600)
if os.environ["RANK"] == os.environ.get("FAILS"):
    child = subprocess.Popen(["sleep", "10"])
    sys.exit(f"failed, child {child.pid}")
waits()
"""

MEETS = """
import mindspore
from mindspore import communication, ops
communication.init()
total = ops.AllReduce()(mindspore.Tensor([10.0 + communication.get_rank()]))
print("rank", communication.get_rank(), "has", float(total[0]), flush=True)
"""

CONTROLLER = """
import os, sys, time
from syncbn.launchers import LAUNCHERS
from syncbn.launchers.site import Site
name, mark, value = sys.argv[1:]
launcher = LAUNCHERS[name](Site())
job = launcher.start([sys.executable, "-c", ""], 2, {mark: value})
while sorted(job.ended()) != [0, 1]:
    time.sleep(0.1)
os.kill(os.getpid(), 9)
"""

LOSES_A_NODE = """
import os, signal, sys, time
from syncbn.launchers import LAUNCHERS
from syncbn.launchers.site import LOOP_BACK, Site
mark, value = sys.argv[1:]
launcher = LAUNCHERS["torchrun"](Site(2, (LOOP_BACK, LOOP_BACK)))
job = launcher.start(["sleep", "1000"], 2, {mark: value})
os.kill(launcher._keepers._nodes[1]._process.pid, signal.SIGKILL)
os.kill(os.getpid(), signal.SIGKILL)
"""

WAITS_FOR_A_NODE = """
import sys
from syncbn.launchers import LAUNCHERS
from syncbn.launchers.site import LOOP_BACK, Site
mark, value = sys.argv[1:]
launcher = LAUNCHERS["torchrun"](Site(2, (LOOP_BACK, LOOP_BACK)))
commands = launcher.commands
launcher.commands = lambda *given: [commands(*given)[0], (LOOP_BACK, ["sleep", "1000"])]
launcher.start(["sleep", "1000"], 2, {mark: value})
"""

JUDGE = """
import sys
from syncbn.conformance import runner, targets
from syncbn.conformance.case import Case, Step
from syncbn.conformance.pool import RankPool

step = Step(((2, 64, 3), (3, 64, 3)))
case = Case("FWD-1", "waits", 2, {"num_features": 64}, (step,), ("y",), deadline=2.0)
with RankPool(targets.parse("torch:tests/launchers/slow.py:Waits"), 2, sys.argv[1]) as pool:
    pool.start()
    verdict = runner.run_case(pool, case).verdict
    print(verdict.verdict, verdict.message, pool.starts)
"""


def processes(mark: str, without: str = "") -> list[int]:
    """The processes started with this mark in the environment, by themselves or by an ancestor.

    Args:
        mark: the value of MARK.
        without: a word of the command of processes that do not count.
    """
    found = []
    for place in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            words = (place.parent / "cmdline").read_bytes().split(b"\0")
            marked = f"{MARK}={mark}".encode() in place.read_bytes().split(b"\0")
            if marked and not (without and without.encode() in words):
                found.append(int(place.parent.name))
    return found


def wait_until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


@contextlib.contextmanager
def started(launcher: str, mark: str, script: str, **environment: str) -> Iterator[Job]:
    command = [sys.executable, "-c", script]
    starter = LAUNCHERS[launcher](Site())
    with contextlib.closing(starter):
        job = starter.start(command, 2, {MARK: mark, "SAID": "hello"} | environment)
        try:
            yield job
        finally:
            job.stop()


@pytest.fixture(scope="module")
def job(launcher: str) -> Iterator[Job]:
    """Two ranks that have written what they are to write, and wait."""
    with started(launcher, f"waits-{launcher}", RANK) as found:
        wait_until(lambda: all("on stderr" in found.output(rank) for rank in (0, 1)))
        yield found


@each_launcher
def test_a_rank_gets_its_place(job: Job) -> None:
    for rank in (0, 1):
        said, error = job.output(rank).splitlines()
        assert said == f"{rank} 2 {rank} hello {Path.cwd()} {sys.executable} ''"
        assert error == "on stderr"


@each_launcher
def test_no_process_gets_the_ctrl_c_of_the_controller(launcher: str, job: Job) -> None:
    found = processes(f"waits-{launcher}")
    assert len(found) >= 2
    assert os.getsid(0) not in {os.getsid(pid) for pid in found}


@each_launcher
def test_stacks_are_dumped_and_no_rank_dies(launcher: str, job: Job) -> None:
    before = processes(f"waits-{launcher}")
    job.dump_stacks()
    wait_until(lambda: all("in waits" in job.output(rank) for rank in (0, 1)))
    assert sorted(processes(f"waits-{launcher}")) == sorted(before)
    assert job.ended() == {}


@each_launcher
def test_a_rank_that_fails_has_ended_and_its_peer_has_not(launcher: str) -> None:
    mark = f"fails-{launcher}"
    with started(launcher, mark, RANK, FAILS="1") as job:
        wait_until(lambda: job.ended() != {})
        assert list(job.ended()) == [1]
        failed, child = job.output(1).splitlines()[-1].split(", child ")
        assert failed == "failed"
        assert int(child) in processes(mark)  # it outlived its rank
        os.kill(int(child), signal.SIGKILL)
        wait_until(lambda: "on stderr" in job.output(0))
        job.dump_stacks()  # of the one that lives
        wait_until(lambda: "in waits" in job.output(0))
        assert list(job.ended()) == [1]


LEAVES = """
import os, signal, subprocess, sys, time
subprocess.Popen(["sleep", "300"])  # a child
subprocess.Popen(["sleep", "300"], start_new_session=True)  # in a session of its own
if os.fork() == 0:  # a child that ignores signals
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    time.sleep(300)
if os.fork() == 0:  # a daemon without the environment
    os.setsid()
    if os.fork() == 0:
        os.execve("/bin/sleep", ["sleep", "300.25"], {})
    os._exit(0)
print("has left", flush=True)
if os.environ["RANK"] == "1":
    os._exit(0)
time.sleep(300)
"""

CONTROLLER_OF_LEAVES = """
import os, sys, time
from syncbn.launchers import LAUNCHERS
from syncbn.launchers.site import Site
mark, value, leaves = sys.argv[1:]
launcher = LAUNCHERS["local"](Site())
job = launcher.start([sys.executable, "-c", leaves], 2, {mark: value})
while "has left" not in job.output(0) or "has left" not in job.output(1):
    time.sleep(0.1)
os.kill(os.getpid(), 9)
"""


def daemons() -> list[int]:
    """The daemons of LEAVES, which nothing but their argument tells from other processes."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if place.read_bytes() == b"sleep\x00300.25\x00":
                found.append(int(place.parent.name))
    return found


def test_what_a_rank_starts_ends_with_it() -> None:
    before = daemons()
    with started("local", "leaves", LEAVES) as job:
        wait_until(lambda: all("has left" in job.output(rank) for rank in (0, 1)))
        wait_until(lambda: len(daemons()) == len(before) + 2)
        job.stop()
        assert processes("leaves", without=KEEPER) == []
        assert daemons() == before


def test_what_a_rank_starts_ends_with_a_controller_that_is_killed() -> None:
    before = daemons()
    command = [sys.executable, "-c", CONTROLLER_OF_LEAVES, MARK, "abandoned", LEAVES]
    assert subprocess.Popen(command, cwd=ROOT).wait(60) == -signal.SIGKILL
    wait_until(lambda: processes("abandoned") == [] and daemons() == before, 20.0)


CONTROLLER_THAT_PRELOADS = """
import sys
from syncbn.launchers import LAUNCHERS
from syncbn.launchers.site import Site
mark, value = sys.argv[1:]
command = [sys.executable, "-m", "slow_framework"]
LAUNCHERS["local"](Site()).start(command, 2, {mark: value}, preload=["slow_framework"])
"""


def test_an_import_ends_with_a_controller_that_is_killed(tmp_path: Path) -> None:
    """Meanwhile the keeper reads nothing."""
    importing = tmp_path / "importing"
    (tmp_path / "slow_framework.py").write_text(
        f"import pathlib, time\npathlib.Path({str(importing)!r}).touch()\ntime.sleep(60)\n"
    )
    search = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", CONTROLLER_THAT_PRELOADS, MARK, "imports"]
    controller = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": search})
    wait_until(importing.exists)
    controller.kill()
    controller.wait()
    wait_until(lambda: processes("imports") == [], 10.0)


LONG = """
import time
print("word " * 20_000_000, "the end", flush=True)
for second in range(300):
    print(f"second {second}", flush=True)
    time.sleep(0.1)
"""


@each_launcher
def test_the_end_of_a_long_output_is_kept(
    launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with started(launcher, "long", LONG) as job:
        wait_until(lambda: all("second 1\n" in job.output(rank) for rank in (0, 1)))
        assert len(job.output(0)) <= 1 << 16
        assert job.ended() == {}
        wait_until(lambda: all("second 19\n" in job.output(rank) for rank in (0, 1)))
        on_disk = sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*"))
        assert on_disk < 1 << 20


@pytest.mark.parametrize("which", ["guard", "keeper"])
def test_what_a_rank_starts_ends_with_what_keeps_it(which: str) -> None:
    before = daemons()
    with started("local", "kept", LEAVES) as job:
        wait_until(lambda: all("has left" in job.output(rank) for rank in (0, 1)))
        wait_until(lambda: len(daemons()) == len(before) + 2)
        both = set(processes("kept")) - set(processes("kept", without=KEEPER))
        (guard,) = (pid for pid in both if parent(pid) == os.getpid())
        (keeper,) = both - {guard}
        os.kill(guard if which == "guard" else keeper, signal.SIGKILL)
        wait_until(lambda: set(job.ended()) == {0, 1})
        assert job.ended()[0] == "the parent of the ranks ended: signal 9, SIGKILL"
        wait_until(lambda: processes("kept") == [] and daemons() == before, 20.0)


@each_launcher
@pytest.mark.parametrize("when", ["at once", "while it starts", "when all have started"])
def test_stop_leaves_nothing(
    launcher: str, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mark = f"stops-{launcher}-{when}"
    with started(launcher, mark, RANK) as job:
        if when == "while it starts":
            wait_until(lambda: processes(mark) != [])
        elif when == "when all have started":
            wait_until(lambda: all("on stderr" in job.output(rank) for rank in (0, 1)))
        job.stop()
        assert processes(mark, without=KEEPER) == []
    assert list(tmp_path.iterdir()) == []
    assert processes(mark) == []


@each_launcher
@pytest.mark.parametrize("condition", ["os.environ.get('RANK') == '1'", "True"])
def test_the_pool_sees_what_dies_at_its_start(
    launcher: str, condition: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if launcher == "local" and condition != "True":
        pytest.skip("a fork reads no sitecustomize; see test_a_rank_that_fails_has_ended")
    (tmp_path / "sitecustomize.py").write_text(
        f"import os, sys\nif {condition}:\n    sys.exit('planted end')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pool = RankPool(targets.parse("syncbn.torch"), 2, launcher)
    with pytest.raises(TargetError, match=r"(died at its start|exit status 1) .*planted end"):
        pool.start()


@needs_mindspore
def test_ranks_of_pytorch_under_msrun() -> None:
    """They only need to know their place; what died is started again."""
    step = Step(((2, 3, 3), (3, 3, 3)))
    good = Case("FWD-1", "good", 2, {"num_features": 3}, (step,), ("y",))
    step = Step(((2, 64, 3), (3, 64, 3)))
    fatal = Case("FWD-1", "fatal", 2, {"num_features": 64}, (step,), ("y",))
    with RankPool(targets.parse(f"{PLANTED}:FailsByChannels"), 2, "msrun") as pool:
        found = [runner.run_case(pool, case).verdict for case in (good, fatal, good)]
        assert [verdict.verdict for verdict in found] == ["pass", "crash", "pass"]
        assert str(found[1].message).count("died") == 1
        assert "rank 1 died" in str(found[1].message)
        assert pool.starts == 2


@needs_mindspore
def test_ranks_of_mindspore_meet_while_others_do() -> None:
    """Through a scheduler of their own, with a port of its own."""
    with started("msrun", "meets", MEETS) as first, started("msrun", "meets", MEETS) as second:
        wait_until(lambda: sorted(first.ended()) == sorted(second.ended()) == [0, 1], 200.0)
        for rank in (0, 1):
            assert f"rank {rank} has 21.0" in first.output(rank)
            assert f"rank {rank} has 21.0" in second.output(rank)


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("msrun", marks=needs_mindspore)])
def test_an_engine_ends_with_a_controller_that_is_killed(launcher: str, tmp_path: Path) -> None:
    """Also msrun's scheduler, which waits long for ranks."""
    command = [sys.executable, "-c", CONTROLLER, launcher, MARK, f"killed-{launcher}"]
    controller = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)})
    assert controller.wait(120) == -signal.SIGKILL
    wait_until(lambda: processes(f"killed-{launcher}") == [], 30.0)


def test_msrun_without_mindspore(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "mindspore", None)
    assert main(["run", "--launcher", "msrun", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "syncbn-conformance: launcher msrun needs MindSpore, which is not installed: "
        "pip install 'syncbn[mindspore]'"
    )
    assert not (tmp_path / "report.json").exists()


def test_a_torchrun_does_not_wait_for_a_lost_node_when_the_controller_is_killed() -> None:
    """Which it does for 300 s if its own keepers end well."""
    mark = "lost node"
    command = [sys.executable, "-c", LOSES_A_NODE, MARK, mark]
    assert subprocess.Popen(command, cwd=ROOT).wait(120) == -signal.SIGKILL
    wait_until(lambda: processes(mark) == [])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_torchrun_that_waits_for_a_node_ends_with_a_controller_that_is_killed() -> None:
    """It has no keepers yet, which would notice."""
    mark = "waits for a node"
    controller = subprocess.Popen([sys.executable, "-c", WAITS_FOR_A_NODE, MARK, mark], cwd=ROOT)
    wait_until(lambda: processes(mark) != [])
    time.sleep(5.0)  # it imports PyTorch
    controller.kill()
    controller.wait()
    wait_until(lambda: processes(mark) == [], 30.0)


@pytest.mark.parametrize("launcher", ["local", "torchrun"])
def test_a_controller_that_is_stopped_judges_what_has_come_meanwhile(
    launcher: str, tmp_path: Path
) -> None:
    """For longer than the deadline of the case. The ranks have answered, so none hangs."""
    file, mark = tmp_path / "in a backward", f"stopped-{launcher}"
    controller = subprocess.Popen(
        [sys.executable, "-c", JUDGE, launcher],
        cwd=ROOT,
        env=os.environ | {"SLOW_FILE": str(file), "PYTHONPATH": str(ROOT), MARK: mark},
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_until(file.exists)
    controller.send_signal(signal.SIGSTOP)
    file.unlink()
    time.sleep(4.0)
    controller.send_signal(signal.SIGCONT)
    said, _ = controller.communicate(timeout=60)
    assert said == "pass None 1\n"
    assert processes(mark) == []


def test_a_parent_of_the_ranks_that_is_stopped_is_named_and_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once it has not answered, nothing waits for it again, so the verdict is there in time."""
    monkeypatch.setattr(local, "_ANSWER_SECONDS", 5.0)
    step = Step(((2, 3, 3), (3, 3, 3)))
    good = Case("FWD-1", "good", 2, {"num_features": 3}, (step,), ("y",))
    with RankPool(targets.parse("syncbn.torch"), 2) as pool:
        assert runner.run_case(pool, good).verdict.verdict == "pass"
        assert pool._job is not None
        ranks = pool._job.processes()
        keeper = parent(ranks[1])
        os.kill(keeper, signal.SIGSTOP)
        os.kill(ranks[1], signal.SIGKILL)
        began = time.monotonic()
        found = runner.run_case(pool, good).verdict
        seconds = time.monotonic() - began
        assert (found.verdict, found.message) == (
            "error",
            "the parent of the ranks does not answer",
        )
        assert seconds < 15.0
        wait_until_ended(keeper, *ranks.values())
        assert runner.run_case(pool, good).verdict.verdict == "pass"
