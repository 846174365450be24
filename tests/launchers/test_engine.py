"""Launchers whose engine places a keeper for every rank: what is started, and what is refused."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from syncbn.conformance import runner, targets
from syncbn.conformance.case import Case, Step
from syncbn.conformance.pool import RankPool, StartError, _same_versions
from syncbn.conformance.ranks import drivers
from syncbn.conformance.wire import Message
from syncbn.launchers import LAUNCHERS, engine
from syncbn.launchers.site import Site
from tests.launchers.processes import (
    assert_a_killed_rank_is_replaced,
    assert_an_error_of_the_machine,
    keepers,
    parent,
    wait_until_ended,
)

STEP = Step(((2, 3, 3), (3, 3, 3)))
GOOD = Case("FWD-1", "good", 2, {"num_features": 3}, (STEP,), ("y",))
HERE = "127.0.0.1"
TWO_NODES = Site(nodes=2, hosts=(HERE, HERE))  # that are the same machine


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torchrun that has lost a node waits for it in vain, 40 s if it may."""
    monkeypatch.setattr(engine, "_END_SECONDS", 2.0)
    monkeypatch.setattr(engine, "_KILL_SECONDS", 5.0)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Two nodes of torchrun with a rank each."""
    with RankPool(targets.parse("syncbn.torch"), 2, "torchrun", site=TWO_NODES) as found:
        found.start()
        yield found


def engines(pool: RankPool) -> set[int]:
    """The processes of torchrun, which are the parents of the keepers."""
    return {parent(pid) for pid in keepers(pool)}


def test_each_node_has_a_torchrun_of_its_own(pool: RankPool) -> None:
    assert runner.run_case(pool, GOOD).verdict.verdict == "pass"
    assert len(engines(pool)) == 2
    words = [Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in engines(pool)]
    assert {"--node-rank=0", "--node-rank=1"} <= {word for each in words for word in each}


def test_the_secret_stands_on_no_command_line(pool: RankPool) -> None:
    secret = pool._launcher.secret.hex()
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
    assert not any(secret.encode() in line for line in lines)
    shown = " ".join(command for _, command in pool.plan())
    assert "torch.distributed.run" in shown
    assert secret not in shown


def test_new_ranks_need_no_new_engine(pool: RankPool) -> None:
    assert_a_killed_rank_is_replaced(pool, GOOD)


def test_a_rank_that_is_stopped_is_named(pool: RankPool) -> None:
    before = keepers(pool)
    assert pool._job is not None
    os.kill(pool._job.processes()[1], signal.SIGSTOP)
    found = runner.run_case(pool, GOOD).verdict
    assert found.verdict == "hang"
    assert "rank 1 did not answer" in str(found.message)
    assert runner.run_case(pool, GOOD).verdict.verdict == "pass"
    assert keepers(pool) == before


def test_what_was_written_by_a_rank_comes_back(pool: RankPool) -> None:
    assert pool._job is not None
    pool._job.dump_stacks()
    end = time.monotonic() + 20
    while "in serve" not in pool._job.output(1) and time.monotonic() < end:
        time.sleep(0.1)
    assert "in serve" in pool._job.output(1)


@pytest.mark.parametrize("of", ["keeper", "torchrun"])
def test_the_end_of_the_engine_is_no_fault_of_the_layer(pool: RankPool, of: str) -> None:
    assert runner.run_case(pool, GOOD).verdict.verdict == "pass"
    old, secret = [*keepers(pool), *engines(pool)], pool._launcher.secret
    if of == "keeper":
        os.kill(old[1], signal.SIGKILL)
        wait_until_ended(old[1])
    else:
        os.kill(old[-1], signal.SIGTERM)  # which it passes on to its keepers
        wait_until_ended(old[-1])
    assert_an_error_of_the_machine(pool, GOOD)
    assert pool._launcher.secret != secret  # so that what is left of the old ones is refused
    wait_until_ended(*old)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_keepers_go_on_without_their_torchrun(pool: RankPool, how: signal.Signals) -> None:
    assert runner.run_case(pool, GOOD).verdict.verdict == "pass"
    old = max(engines(pool))
    os.kill(old, how)
    starts = pool.starts
    assert runner.run_case(pool, GOOD).verdict.verdict == "pass"
    assert pool.starts == starts
    left = keepers(pool)
    os.kill(left[1], how)  # which nothing is there to end, or nothing that runs
    pool.close()
    wait_until_ended(old, *left)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server((HERE, 0)) as taken:
        port: int = taken.getsockname()[1]
        with (
            RankPool(targets.parse("syncbn.torch"), 2, "torchrun", site=Site(port=port)) as pool,
            pytest.raises(StartError, match=f"cannot listen on {HERE}:{port}: Address already in"),
        ):
            pool.start()


def test_another_version_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"syncbn": "9.9", "python": "3.11"}
    monkeypatch.setattr(engine, "versions", lambda: own)
    with (
        contextlib.closing(LAUNCHERS["torchrun"](Site())) as launcher,
        pytest.raises(
            engine.EngineError, match=r"rank 0 on \S+ has syncbn .* controller has syncbn 9\.9 and"
        ),
    ):
        launcher.start([sys.executable, "-c", ""], 1, {})


def test_another_version_of_the_framework_is_refused_by_name() -> None:
    def loaded(host: str, version: str) -> Message:
        return Message({"host": host, "versions": {"torch": version}}, {})

    assert _same_versions([loaded("a", "2.13"), loaded("b", "2.13")]) == {
        "torch": "2.13",
        "hosts": "a, b",
    }
    with pytest.raises(StartError, match=r"rank 0 on a has torch 2\.13, and rank 1 on b has 2\.12"):
        _same_versions([loaded("a", "2.13"), loaded("b", "2.12")])


@pytest.mark.parametrize("second", ["24.1.rc2", ""])
def test_another_driver_is_refused_by_name(
    second: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank has another one, or none that can be read."""
    for local_rank, version in enumerate(("24.1.rc3", second)):
        tmp_path.joinpath(f"version.{local_rank}").write_text(f"Version={version}\n")
    monkeypatch.setenv("DRIVER_FILE", str(tmp_path / "version"))
    target = targets.parse("syncbn.torch", setup="tests/launchers/driver.py:of_rank")
    with (
        RankPool(target, 2) as pool,
        pytest.raises(
            StartError,
            match=rf"rank 0 on \S+ has ascend driver 24\.1\.rc3, and rank 1 on \S+ has "
            rf"{second or 'unknown'}$",
        ),
    ):
        pool.start()


@pytest.mark.parametrize(
    ("device", "name", "text", "version"),
    [
        (
            "cuda",
            "nvidia driver",
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC\n"
            "GCC version:  gcc version 12.3.0\n",
            "535.104.05",
        ),
        (
            "cuda",
            "nvidia driver",
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build\n",
            "550.54.15",
        ),
        ("npu", "cann", "package_name=Ascend-cann-toolkit\nversion=8.5.0\narch=x86_64\n", "8.5.0"),
    ],
)
def test_the_version_of_a_driver_is_read(
    device: str, name: str, text: str, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patterns = {found: pattern for found, _, pattern in drivers.FILES[device]}
    (tmp_path / "info").write_text(text)
    file = (name, "{ASCEND_HOME_PATH}/info", patterns[name])
    monkeypatch.setitem(drivers.FILES, device, (file,))
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    assert drivers.versions(device) == {name: version}
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / "nowhere"))
    assert drivers.versions(device) == {}


def test_an_engine_that_cannot_start_names_the_host_and_the_reason() -> None:
    agent = ("sh", "-c", "echo no route to $0 >&2; exit 255")
    # An address that RFC 5737 keeps for documents is no machine of anyone.
    site = Site(nodes=2, hosts=(HERE, "192.0.2.1"), agent=agent, listen=socket.gethostname())
    pool = RankPool(targets.parse("syncbn.torch"), 2, "torchrun", site=site)
    with pytest.raises(
        StartError,
        match=r"torchrun on 192\.0\.2\.1 ended: exit status 255 \(no route to 192\.0\.2\.1\)",
    ):
        pool.start()
