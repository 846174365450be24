"""The network of a rank: how the others reach it, as follows from where the ranks meet."""

from __future__ import annotations

import fcntl
import os
import socket
import struct

_SIOCGIFADDR = 0x8915  # Linux: the address of an interface


def meeting() -> str:
    """The host where the ranks meet, as the launcher has set it."""
    return os.environ["MASTER_ADDR"]


def own_address() -> str:
    """The address of this machine on the way to where the ranks meet.

    Raises:
        OSError: there is no way.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((meeting(), 9))  # sends nothing
        address: str = probe.getsockname()[0]
        return address


def own_interface() -> str:
    """The name of the network interface that has `own_address`. Needs Linux except on loop-back."""
    names = [name for _, name in socket.if_nameindex()]
    address = own_address()
    if address.startswith("127."):
        return names[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for name in names:
            request = struct.pack("256s", name.encode())
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, request)
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    raise OSError(f"no network interface has the address {address}")
