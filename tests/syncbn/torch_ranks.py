"""Runs checks on several ranks: processes of their own, one world of torch.distributed."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
import torch.distributed as dist

TIMEOUT = datetime.timedelta(seconds=60)  # for a collective, so that a lost rank is soon missed

# A function of a test module, which every rank calls with its rank.
Check: TypeAlias = Callable[[int], None]


def run(checks: Sequence[Check], ranks: int, folder: Path, deadline: float) -> list[dict[str, str]]:
    """What became of every check on every rank: "passed", or a traceback.

    A rank stops after a check that fails, because the ranks would no longer be in step.

    Args:
        checks: are run in this order.
        ranks: the number of ranks.
        folder: for their files.
        deadline: seconds for all checks together.
    """
    spawn = multiprocessing.get_context("spawn")
    processes = [
        spawn.Process(target=_run_rank, args=(checks, rank, ranks, folder)) for rank in range(ranks)
    ]
    ends = time.monotonic() + deadline
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, ends - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.join()
    files = [folder / str(rank) for rank in range(ranks)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files]


def assert_passed(check: str, outcomes: list[dict[str, str]]) -> None:
    for rank, outcome in enumerate(outcomes):
        found = outcome.get(check, "not reached, or not done by the deadline")
        assert found == "passed", f"rank {rank}: {found}"


def _run_rank(checks: Sequence[Check], rank: int, ranks: int, folder: Path) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    outcome: dict[str, str] = {}
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/world", rank=rank, world_size=ranks, timeout=TIMEOUT
    )
    for check in checks:
        try:
            check(rank)
            dist.barrier()
            outcome[check.__name__] = "passed"
        except BaseException:
            outcome[check.__name__] = traceback.format_exc()
            return
        finally:
            (folder / str(rank)).write_text(json.dumps(outcome))
    dist.destroy_process_group()
