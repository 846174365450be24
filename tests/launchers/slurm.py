"""Slurm of two nodes on one machine, with its own key, ports and folder. Needs root."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from syncbn.launchers.site import free_port

NODES = ("n1", "n2")
TOOLS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "sinfo")
PACKAGES = "apt-get install slurmctld slurmd slurm-client munge"
_FREEZER = Path("/sys/fs/cgroup/freezer")

_CONFIGURATION = """\
ClusterName=syncbn
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=3
TreeWidth=1000
PartitionName=main Nodes=ALL Default=YES MaxTime=10:00 OverSubscribe=FORCE:4 State=UP
"""


def why_not() -> str:
    """Why Slurm cannot start here; empty if it may."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"Slurm is not installed, it lacks {', '.join(missing)}: {PACKAGES}"
    return "Slurm needs root to start here" if os.geteuid() else ""


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands find the cluster.

    Raises:
        RuntimeError: it does not start.
    """
    proctrack = "cgroup" if os.access(_FREEZER, os.W_OK) else "linuxproc"
    words = {"host": socket.gethostname(), "folder": folder, "proctrack": proctrack}
    text = _CONFIGURATION.format(port=free_port(), **words)
    for name in NODES:
        text += f"NodeName={name} NodeHostname={words['host']} NodeAddr=127.0.0.1 "
        text += f"Port={free_port()} CPUs=8 State=UNKNOWN\n"
    folder.joinpath("slurm.conf").write_text(text)
    folder.joinpath("cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    folder.joinpath("state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    environment = {"SLURM_CONF": str(folder / "slurm.conf")}
    munge = {"key-file": key, "socket": folder / "munge.sock", "pid-file": folder / "munged.pid"}
    munge |= {"log-file": folder / "munged.log", "seed-file": folder / "munge.seed"}
    daemons = [["munged", "--foreground", "--force", *(f"--{n}={v}" for n, v in munge.items())]]
    daemons += [["slurmctld", "-D", "-c"], *(["slurmd", "-D", "-N", name] for name in NODES)]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for number, daemon in enumerate(daemons):
            process = subprocess.Popen(
                daemon,
                env=os.environ | environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            started.append(process)
            if number == 0:
                _wait(lambda: (folder / "munge.sock").exists(), folder)
        _wait(lambda: _idle(environment) == len(NODES), folder)
        yield environment
    finally:
        _end_steps(environment)
        for process in reversed(started):
            process.terminate()
        for process in reversed(started):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


def _end_steps(environment: dict[str, str]) -> None:
    """Wait until the daemons of all steps have ended, for which they need slurmctld."""
    end = time.monotonic() + 20
    while (steps := list(_steps(environment))) and time.monotonic() < end:
        time.sleep(0.1)
    for step in steps:
        with contextlib.suppress(ProcessLookupError):
            os.kill(step, signal.SIGKILL)


def _steps(environment: dict[str, str]) -> Iterator[int]:
    mark = f"SLURM_CONF={environment['SLURM_CONF']}".encode()
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            step = (place / "cmdline").read_bytes().startswith(b"slurmstepd")
            if step and mark in (place / "environ").read_bytes().split(b"\0"):
                yield int(place.name)


def _idle(environment: dict[str, str]) -> int:
    command = ["sinfo", "-h", "-N", "-o", "%t"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    return done.stdout.split().count("idle")


def _wait(true: Callable[[], bool], folder: Path) -> None:
    end = time.monotonic() + 30
    while not true():
        if time.monotonic() > end:
            logs = [log.read_text().splitlines()[-1:] for log in folder.glob("*.log")]
            raise RuntimeError(f"Slurm does not start here: {logs}")
        time.sleep(0.1)
