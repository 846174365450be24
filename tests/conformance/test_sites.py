"""The options that say where ranks start: what fits together, and what is refused in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from syncbn.conformance.__main__ import main
from syncbn.launchers.site import Site

ROOT = Path(__file__).parents[2]


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line on stderr of a command that is refused."""
    try:
        status = main(["run", *arguments])
    except SystemExit as error:
        status = int(error.code or 0)
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--nodes 2", "listen must be an address that the other nodes reach"),
        ("--nodes 2 --launcher torchrun --listen a:0", "hosts must name the 2 nodes for launcher"),
        ("--nodes 2 --hosts a", "hosts must name 2 nodes, got a"),
        ("--nodes 2 --hosts 127.0.0.1,127.0.0.1", "launcher local starts ranks here"),
        ("--nodes 2 --hosts a,b --launcher torchrun", "listen must be an address that the other"),
        ("--listen 0.0.0.0:0", "listen must be an address that ranks can connect to"),
        ("--listen 127.0.0.1", "must be HOST:PORT"),
        ("--listen 127.0.0.1:65535", "must be HOST:PORT"),
        ("--hosts=-oProxyCommand=x", "must be names or IPv4 addresses"),
        ("--hosts a,,b", "must be names or IPv4 addresses with commas, got ''"),
        ("--agent=", "must name a program"),
        ("--nodes 2 --ranks-per-node 2 --ranks 3", "--ranks must be --nodes times"),
        ("--nodes 0", "must be an int from 1"),
        (
            "--launcher torchrun --nodes 2 --hosts 127.0.0.1,127.0.0.1 --ranks 3",
            "ranks must be a multiple of the 2 nodes, got 3",
        ),
    ],
)
def test_what_does_not_fit_together(
    arguments: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert text in refusal(arguments.split(" "), capsys)


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        ({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4"}, "torchrun"),
        ({"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "4"}, "msrun"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}, "mpirun"),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}, "srun"),
    ],
)
def test_inside_a_launcher_there_is_no_second_controller(
    variables: dict[str, str],
    launcher: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    line = refusal([], capsys)
    assert f"{launcher} has started this command 4 times" in line
    assert "--ranks 4` once" in line
    for name in variables:
        if variables[name] == "4":
            monkeypatch.setenv(name, "1")  # one process may be the controller
    assert main(["run", "--dry-run"]) == 0


def test_a_dry_run_prints_the_command_of_every_node(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--launcher torchrun --nodes 2 --ranks-per-node 3 --hosts 127.0.0.1,b.test"
    arguments += " --agent my-agent --listen a.test:7000"
    assert main(["run", "--dry-run", *arguments.split(" ")]) == 0
    here, there = capsys.readouterr().out.splitlines()
    assert here.startswith("127.0.0.1: sh -c 'read -r SYNCBN_KEY")
    assert there.startswith("b.test: my-agent b.test ")
    for number, line in enumerate((here, there)):
        assert f"--node-rank={number} --nproc-per-node=3" in line
        assert "--nnodes=2 --master-addr=127.0.0.1" in line
        assert "-m syncbn.launchers.keeper a.test:7001 RANK WORLD_SIZE LOCAL_RANK" in line


@pytest.mark.parametrize(
    ("script", "given"),
    [("two_nodes.sh", ["a.test", "b.test"]), ("mpirun.sh", ["hostfile"])],
)
def test_the_scripts_of_the_examples(script: str, given: list[str], tmp_path: Path) -> None:
    tmp_path.joinpath("hostfile").write_text("# a comment\na.test slots=4\nb.test slots=4\n")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [ROOT / "examples/cluster" / script, *given, "--dry-run"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "-m syncbn.launchers.keeper a.test:7001" in done.stdout
    assert "b.test" in done.stdout
    assert "nproc-per-node=4" in done.stdout or "--host a.test:4,b.test:4" in done.stdout


@pytest.mark.parametrize(
    ("ranks", "hosts"), [(1, "a"), (2, "a b"), (4, "a b"), (6, "a b c"), (9, "a b c")]
)
def test_the_machines_of_fewer_ranks(ranks: int, hosts: str) -> None:
    part = Site(3, ("a", "b", "c"), listen="d").part(ranks)
    assert part.hosts == tuple(hosts.split())
    assert part.nodes * part.ranks_per_node(ranks) == ranks
