"""Ranks that msrun places, on one node or several, as MindSpore's users start theirs. Needs Linux.

msrun starts a program once for each rank, and on the first node once more as the scheduler, through
which the ranks meet in mindspore.communication.init(). That program is this file, which becomes the
keeper of a rank or the scheduler. Ranks meet only once through a scheduler, so each start of ranks
is a new start of msrun.
"""

from __future__ import annotations

import importlib.util
import os
import select
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from syncbn.launchers.engine import EngineLauncher
from syncbn.launchers.site import LOOP_BACK, Site, free_port

_PAUSE_SECONDS = 0.5  # between looks for workers
_SCHEDULER = "from mindspore.communication import init; init()"

# msrun starts the first python3 in PATH, which must be that of the suite: $0 is its folder. The
# logs of the workers have only what keepers write, and are of use only if msrun fails.
_SCRIPT = """\
PATH=$0:$PATH
logs=$(mktemp -d) || exit
python3 -m mindspore.parallel.cluster.run "--log_dir=$logs" "$@"
status=$?
test $status = 0 || tail -q -n 1 "$logs"/worker_*.log 2>/dev/null
rm -rf "$logs"
exit $status
"""


class MsrunLauncher(EngineLauncher):
    """Starts one msrun for each node, and new ones for each start of ranks."""

    name = "msrun"
    variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    lasts = False

    def __init__(self, site: Site) -> None:
        site.need_hosts(self.name)
        super().__init__(site)

    def check(self) -> None:
        if importlib.util.find_spec("mindspore") is None:
            raise FileNotFoundError(
                "launcher msrun needs MindSpore, which is not installed: "
                "pip install 'syncbn[mindspore]'"
            )

    def commands(
        self, ranks: int, keeper: Sequence[str], environment: Iterable[str]
    ) -> list[tuple[str, list[str]]]:
        hosts = self.site.hosts or (LOOP_BACK,)
        each = self.site.ranks_per_node(ranks)
        options = {
            "worker_num": ranks,
            "local_worker_num": each,
            "master_addr": hosts[0],
            "master_port": free_port(),  # of this machine, which often has rank 0
            "join": True,
            "tail_worker_log": each,  # of no worker
        }
        common = [f"--{name}={value}" for name, value in options.items()]
        folder = str(Path(sys.executable).parent)
        return [
            (
                host,
                [
                    *("sh", "-c", _SCRIPT, folder, *common, f"--node_rank={node}"),
                    *("python3", __file__, *keeper),
                ],
            )
            for node, host in enumerate(hosts)
        ]

    def reason(self, log: str) -> str:
        """The last line that is not msrun's own."""
        lines = log.splitlines()
        return super().reason("\n".join(line for line in lines if not line.startswith("[")))


def _schedule() -> None:
    """Be the scheduler until the controller ends, which closes the pipe at stdin, or all workers.

    msrun waits for its scheduler, also after a worker that failed.
    """
    # In a child process, because init() lets no other thread run.
    scheduler = subprocess.Popen([sys.executable, "-c", _SCHEDULER], stdin=subprocess.DEVNULL)
    had = has = False
    while has or not had:
        had = had or has
        if select.select([sys.stdin], [], [], _PAUSE_SECONDS)[0]:
            break
        has = any(map(_lives, _children(os.getppid())))
    scheduler.kill()


def _children(pid: int) -> Iterator[int]:
    """The children of a process, except this one."""
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        yield from (int(child) for child in task.read_text().split() if int(child) != os.getpid())


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:  # it has just ended
        return False


def _become(arguments: Sequence[str]) -> None:
    """Be the keeper of a rank: replace this process by it."""
    os.environ["RANK"] = os.environ["MS_NODE_ID"]
    os.environ["WORLD_SIZE"] = os.environ["MS_WORKER_NUM"]
    os.environ["LOCAL_RANK"] = os.environ["DEVICE_ID"]
    os.execv(sys.executable, [sys.executable, *arguments])


if __name__ == "__main__":
    if os.environ["MS_ROLE"] == "MS_SCHED":
        _schedule()
    else:
        _become(sys.argv[1:])
