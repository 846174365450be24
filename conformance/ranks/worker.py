"""A rank process: it connects to the controller and runs jobs until the connection ends.

A launcher starts it as `python -m syncbn.conformance.ranks.worker` with RANK, WORLD_SIZE and
LOCAL_RANK as torchrun sets them, and SYNCBN_CONTROLLER (host:port), SYNCBN_KEY (hexadecimal) and
SYNCBN_MEMORY (the bytes of data that a rank may have; 0 for any number).
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import queue
import resource
import signal
import socket
import threading
import traceback
from typing import Any

import numpy as np
import numpy.typing as npt

from syncbn.conformance import frameworks
from syncbn.conformance.case import of_document
from syncbn.conformance.ranks import drivers
from syncbn.conformance.ranks.base import MachineError, Rank
from syncbn.conformance.wire import Channel, Message
from syncbn.extras import require
from syncbn.launchers.handshake import connect
from syncbn.launchers.link import WireError


def serve(channel: Channel, rank: int, ranks: int, local_rank: int) -> None:
    """Answer the controller's messages; see syncbn.conformance.pool for the protocol."""
    jobs: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(channel, jobs), daemon=True).start()
    pid = os.getpid()
    member: Rank | None = None
    while True:
        content = jobs.get().content
        answer: dict[str, Any]
        arrays: dict[str, npt.NDArray[Any]] = {}
        try:
            if content["do"] == "load":
                member = _load(content["target"], rank, ranks, local_rank)
                found = member.versions() | drivers.versions(content["target"]["device"])
                answer = {"versions": found, "host": socket.gethostname()}
            elif member is None:
                raise RuntimeError("the first job must be to load a target")
            elif content["do"] == "sources":
                answer = {"sources": member.sources()}
            elif content["do"] == "host":
                answer = {"port": member.host()}
            elif content["do"] == "join":
                member.join(content["port"])
                answer = {}
            else:
                with np.errstate(all="ignore"):
                    answer, arrays = member.run(of_document(content["case"]))
        except MachineError as error:
            answer = {"failed": str(error)}
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error} ({_place(error)})"}
        except BaseException:  # SystemExit ends a rank, and prints nothing by itself
            traceback.print_exc()
            raise
        if os.getpid() != pid:  # a layer has forked, and this is the child
            os._exit(0)
        with contextlib.suppress(OSError):
            channel.send(answer | {"epoch": content["epoch"]}, arrays)


def _listen(channel: Channel, jobs: queue.SimpleQueue[Message]) -> None:
    """Queue the messages of the controller. When it is gone, end this process at once."""
    with contextlib.suppress(EOFError, OSError, WireError):
        while True:
            jobs.put(channel.receive())
    os._exit(0)


def _place(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno} in {frame.name}"


def _load(target: dict[str, Any], rank: int, ranks: int, local_rank: int) -> Rank:
    if target["framework_file"]:
        framework = frameworks.add_file(target["framework_file"])
    else:
        found = frameworks.find(target["framework"])
        assert found is not None  # the controller has found it
        framework = found
        require("the target", framework.name, framework.name)
    if target["setup"]:
        module, _, function = target["setup"].rpartition(":")
        getattr(frameworks.import_module(module), function)(local_rank)
    return framework.rank_class()(target, rank, ranks, local_rank)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the controller handles Ctrl-C
    # Stacks go to a copy of stderr, because a layer may close that.
    stacks = os.fdopen(os.dup(2), "w")
    faulthandler.enable(stacks)  # of a signal that ends this process
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
    if limit := int(os.environ["SYNCBN_MEMORY"]):
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    key = bytes.fromhex(os.environ.pop("SYNCBN_KEY"))  # not for the processes that a layer starts
    link = connect(os.environ["SYNCBN_CONTROLLER"], key, rank)
    serve(Channel(link), rank, ranks, int(os.environ["LOCAL_RANK"]))


if __name__ == "__main__":
    main()
