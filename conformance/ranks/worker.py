"""A rank process: it connects to the controller and runs jobs until the connection ends.

A launcher starts it as `python -m syncbn.conformance.ranks.worker` with RANK, WORLD_SIZE and
LOCAL_RANK as torchrun sets them, and SYNCBN_CONTROLLER (host:port) and SYNCBN_KEY (hexadecimal).
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import queue
import signal
import threading
import traceback
from multiprocessing.connection import Client, Connection
from typing import Any

import numpy as np
import numpy.typing as npt

from syncbn.conformance import wire
from syncbn.conformance.case import load
from syncbn.conformance.frameworks import FRAMEWORKS
from syncbn.conformance.ranks.base import MachineError, Rank
from syncbn.extras import require


def serve(connection: Connection, rank: int, ranks: int, local_rank: int) -> None:
    """Answer the controller's messages; see syncbn.conformance.pool for the protocol."""
    jobs: queue.SimpleQueue[wire.Message] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, jobs), daemon=True).start()
    member: Rank | None = None
    while True:
        content = jobs.get().content
        answer: dict[str, Any]
        arrays: dict[str, npt.NDArray[Any]] = {}
        try:
            if content["do"] == "load":
                member = _load(content["target"], rank, ranks, local_rank)
                answer = {"versions": member.versions()}
            elif member is None:
                raise RuntimeError("the first job must be to load a target")
            elif content["do"] == "host":
                answer = {"port": member.host()}
            elif content["do"] == "join":
                member.join(content["port"])
                answer = {}
            else:
                with np.errstate(all="ignore"):
                    answer, arrays = member.run(load(content["case"]))
        except MachineError as error:
            answer = {"failed": str(error)}
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error} ({_place(error)})"}
        except BaseException:  # SystemExit ends a rank, and prints nothing by itself
            traceback.print_exc()
            raise
        with contextlib.suppress(OSError):
            wire.send(connection, answer | {"epoch": content["epoch"]}, arrays)


def _listen(connection: Connection, jobs: queue.SimpleQueue[wire.Message]) -> None:
    """Queue the messages of the controller. When it is gone, end this process at once."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            jobs.put(wire.receive(connection))
    os._exit(0)


def _place(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno} in {frame.name}"


def _load(target: dict[str, Any], rank: int, ranks: int, local_rank: int) -> Rank:
    framework = FRAMEWORKS[target["framework"]]
    require("the target", framework.name, framework.name)
    for name, value in framework.environment.items():
        os.environ.setdefault(name, value)
    return framework.rank_class()(target, rank, ranks, local_rank)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the controller handles Ctrl-C
    # Stacks go to a copy of stderr, because a layer may close that.
    stacks = os.fdopen(os.dup(2), "w")
    faulthandler.enable(stacks)  # of a signal that ends this process
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
    host, port = os.environ["SYNCBN_CONTROLLER"].rsplit(":", 1)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    connection = Client((host, int(port)), authkey=bytes.fromhex(os.environ["SYNCBN_KEY"]))
    wire.send(connection, {"rank": rank, "pid": os.getpid()})
    serve(connection, rank, ranks, int(os.environ["LOCAL_RANK"]))


if __name__ == "__main__":
    main()
