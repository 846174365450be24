"""A connection whose messages are authenticated, numbered and bounded. It does not hide them.

A message is its length (8 bytes, little endian), its bytes, and a proof: the HMAC-SHA256 of its
number, its length and its bytes. Each direction of each connection has a key and numbers of its
own, so a message that was changed, moved, repeated or sent back is refused, and so is one from a
process that does not have the key. A layer shares its process with the rank and can write to the
connection, so any bytes may arrive.
"""

from __future__ import annotations

import hmac
import select
import socket
import struct
import sys
import time

_LENGTH = struct.Struct("<Q")
_NUMBER = struct.Struct("<Q")
_PROOF = 32  # bytes
_MAX_LENGTH = 512 << 20  # bytes; the largest answers have a few megabytes
_PIECE = 1 << 18  # bytes that are read at once
_KEEP_ALIVE_SECONDS = 10  # between signs of life while nothing is sent
_LOST_SECONDS = 40  # without a sign of life, after which the other side is gone
_MIN_RTT = struct.Struct("148xI")  # of struct tcp_info in linux/tcp.h, in microseconds
_NO_RTT = 0xFFFFFFFF  # nothing has come back yet


class WireError(ValueError):
    """Bytes that are no message of this connection."""


class Seal:
    """The proofs of the messages of one direction, in their order.

    Args:
        key: the key of this direction.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._number = 0

    def next(self, length: bytes, message: bytes) -> bytes:
        """The proof of the next message."""
        proof = hmac.new(self._key, _NUMBER.pack(self._number), "sha256")
        proof.update(length)
        proof.update(message)
        self._number += 1
        return proof.digest()


class Opener:
    """Messages from bytes that arrive in pieces of any size.

    Args:
        seal: of the direction from which they come.
    """

    def __init__(self, seal: Seal) -> None:
        self._seal = seal
        self._bytes = bytearray()

    def feed(self, piece: bytes) -> None:
        self._bytes += piece

    def next(self) -> bytes | None:
        """The next message; None until all of its bytes have arrived.

        Raises:
            WireError: the bytes are no message, whatever may follow.
        """
        if len(self._bytes) < _LENGTH.size:
            return None
        length = bytes(self._bytes[: _LENGTH.size])
        count: int = _LENGTH.unpack(length)[0]
        if count > _MAX_LENGTH:
            raise WireError(f"a message must have at most {_MAX_LENGTH} bytes, got {count}")
        end = _LENGTH.size + count
        if len(self._bytes) < end + _PROOF:
            return None
        message, proof = bytes(self._bytes[_LENGTH.size : end]), bytes(self._bytes[end:][:_PROOF])
        del self._bytes[: end + _PROOF]
        if not hmac.compare_digest(proof, self._seal.next(length, message)):
            raise WireError("its proof is wrong: it was changed, moved, repeated or forged")
        return message


class Link:
    """One end of a connection.

    Args:
        connection: the socket, which belongs to the link from now on.
        sends: the key of the messages that this end sends.
        receives: the key of those that it receives.
    """

    def __init__(self, connection: socket.socket, sends: bytes, receives: bytes) -> None:
        self._socket = connection
        self._socket.setblocking(True)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if sys.platform == "linux":  # the end of a machine, or of the way to it, is seen in time
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEP_ALIVE_SECONDS)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEP_ALIVE_SECONDS)
            self._socket.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _LOST_SECONDS
            )
        self._seal = Seal(sends)
        self._opener = Opener(Seal(receives))

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def round_trip(self) -> float:
        """The seconds that bytes take to the other side and back at best; 0 if unknown."""
        if sys.platform == "linux":
            found = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _MIN_RTT.size)
            if len(found) == _MIN_RTT.size:  # since Linux 4.6
                microseconds: int = _MIN_RTT.unpack(found)[0]
                return 0.0 if microseconds == _NO_RTT else microseconds / 1e6
        return 0.0

    def send(self, message: bytes, seconds: float | None = None) -> None:
        """Send a message.

        Args:
            message: its bytes.
            seconds: the time in which the other side must take all bytes; None for any time.

        Raises:
            TimeoutError: the other side did not take all bytes.
            OSError: the other side is gone.
        """
        length = _LENGTH.pack(len(message))
        rest = memoryview(b"".join([length, message, self._seal.next(length, message)]))
        end = None if seconds is None else time.monotonic() + seconds
        flags = 0 if end is None else socket.MSG_DONTWAIT
        while rest:
            try:
                rest = rest[self._socket.send(rest, flags) :]
            except BlockingIOError:
                left = 0.0 if end is None else end - time.monotonic()
                if left <= 0 or not select.select([], [self], [], left)[1]:
                    raise TimeoutError(f"{len(rest)} bytes of a message were not taken") from None

    def receive(self, seconds: float | None = None) -> bytes:
        """Wait for the next message.

        Args:
            seconds: the time in which it must have arrived; None for any time.

        Raises:
            TimeoutError: it has not arrived in time.
            EOFError, OSError: the other side is gone.
            WireError: what arrived is no message.
        """
        end = None if seconds is None else time.monotonic() + seconds
        while (message := self._opener.next()) is None:
            left = None if end is None else max(0.0, end - time.monotonic())
            if not select.select([self], [], [], left)[0]:
                raise TimeoutError("no message arrived")
            self._read(0)
        return message

    def arrived(self) -> bytes | None:
        """The next message if all of it has arrived. It never waits.

        Raises:
            EOFError, OSError: the other side is gone.
            WireError: what arrived is no message.
        """
        message = self._opener.next()
        if message is None:
            try:
                self._read(socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            message = self._opener.next()
        return message

    def _read(self, flags: int) -> None:
        piece = self._socket.recv(_PIECE, flags)
        if not piece:
            raise EOFError("the connection was closed")
        self._opener.feed(piece)
