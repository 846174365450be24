"""Options of a process that only Linux has; elsewhere nothing happens."""

from __future__ import annotations

import ctypes
import sys

END_WITH_PARENT = 1  # PR_SET_PDEATHSIG: the signal that comes when the parent ends
ADOPT = 36  # PR_SET_CHILD_SUBREAPER: take the processes that descendants leave behind


def control(option: int, value: int) -> None:
    """Set an option of this process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
