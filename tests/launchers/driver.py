"""A set-up function after which each rank of a CPU has the driver that a file of its own states."""

from __future__ import annotations

import os

from syncbn.conformance.ranks import drivers


def of_rank(local_rank: int) -> None:
    file = f"{os.environ['DRIVER_FILE']}.{local_rank}"
    (name, _, pattern), *_ = drivers.FILES["npu"]
    drivers.FILES["cpu"] = ((name, file, pattern),)
