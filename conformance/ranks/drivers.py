"""The versions of the drivers below a framework, as files of the machine state them.

No device is opened and nothing is started. What cannot be read is left out.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

# By type of device: name, file and pattern. {ASCEND_HOME_PATH} is the environment's.
FILES = {
    "cuda": (
        ("nvidia driver", "/proc/driver/nvidia/version", r"^NVRM version:.*?\s(\d+\.[\d.]+)"),
    ),
    "npu": (
        ("ascend driver", "/usr/local/Ascend/driver/version.info", r"^Version=(\S+)"),
        # HCCL is a part of CANN.
        (
            "cann",
            "{ASCEND_HOME_PATH}/{machine}-linux/ascend_toolkit_install.info",
            r"^version=(\S+)",
        ),
    ),
}
_MOST = 1 << 16  # characters of a file


def versions(device: str) -> dict[str, str]:
    """By name, for a type of device."""
    home = os.environ.get("ASCEND_HOME_PATH", "")
    places = {"ASCEND_HOME_PATH": home, "machine": os.uname().machine}
    found = {}
    for name, place, pattern in FILES.get(device, ()):
        with contextlib.suppress(OSError), Path(place.format(**places)).open(errors="replace") as f:
            if version := re.search(pattern, f.read(_MOST), re.MULTILINE):
                found[name] = version[1]
    return found
