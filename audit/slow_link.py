"""A link between two network namespaces that delays every packet, for kernels without netem.

Each namespace gets a TAP device, and this program carries the frames between the two. It ends, and
the devices with it, when stdin is closed.

    python -m audit.slow_link DEVICE SECONDS NAMESPACE NAMESPACE
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque

_SET_DEVICE = 0x400454CA  # TUNSETIFF of linux/if_tun.h
_TAP_OF_FRAMES = 0x1002  # IFF_TAP | IFF_NO_PI
_REQUEST = struct.Struct("16sH22x")  # an ifreq with flags
_FRAME = 1 << 16  # bytes; longer than any frame
_MOST = 10_000  # frames under way in one direction; more are dropped, as by a router


def _tap(device: str, namespace: str) -> int:
    """The file of a new device in a namespace. It exists as long as the file is open."""
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    made = fcntl.ioctl(file, _SET_DEVICE, _REQUEST.pack(b"", _TAP_OF_FRAMES))
    name = _REQUEST.unpack(made)[0].rstrip(b"\0").decode()
    move = ["ip", "link", "set", name, "netns", namespace, "name", device]
    subprocess.run(move, check=True)
    return file


def _carry(files: tuple[int, int], seconds: float) -> None:
    """Carry frames between two devices until stdin is closed."""
    ways = {files[0]: files[1], files[1]: files[0]}
    waiting: deque[tuple[float, int, bytes]] = deque()  # when, where to, and what, in this order
    while True:
        left = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        ready = select.select([0, *files], [], [], left)[0]
        if 0 in ready and not os.read(0, 1):
            return
        for file in ready:
            if file in ways:
                frame = os.read(file, _FRAME)
                if len(waiting) < 2 * _MOST:
                    waiting.append((time.monotonic() + seconds, ways[file], frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, to, frame = waiting.popleft()
            with contextlib.suppress(OSError):  # the device is down, so the frame is lost
                os.write(to, frame)


def main(device: str, seconds: str, first: str, second: str) -> None:
    files = (_tap(device, first), _tap(device, second))
    print("ready", flush=True)
    _carry(files, float(seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
