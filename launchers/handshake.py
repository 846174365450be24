"""How ranks connect to the controller: over a socket, with a random key that both sides prove.

The controller sends a nonce. A rank answers with its id, a nonce of its own, and a proof: an HMAC
of all three with the key. The controller answers with its own proof. All of it has fixed lengths.
Both sides then derive the two keys of the link from the same three, one for each direction.

Any process that reaches the port can connect. A stranger that leaves, sends something else or
nothing costs the controller one entry in a table, and delays no rank.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import selectors
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from syncbn.launchers.link import Link
from syncbn.launchers.site import LOOP_BACK

_NONCE = 32  # bytes
_PROOF = hashlib.sha256().digest_size
_RANK = struct.Struct("<I")
_ANSWER = _RANK.size + _NONCE + _PROOF
_MAX_STRANGERS = 100  # at a time; of more, the oldest are dropped
_BACKLOG = 1024  # connections that wait until the controller looks
_PAUSE_SECONDS = 0.2  # between looks at the processes
_CLIENT_SECONDS = 60.0  # in which the controller must answer a rank


class HandshakeError(ConnectionError):
    """The other side does not have the key."""


@dataclass
class _Visitor:
    """Any process that has connected and has not proven yet what it is."""

    connection: socket.socket
    nonce: bytes
    answer: bytearray = field(default_factory=bytearray)


class Reception:
    """A listener for the ranks of one start. Use it as a context manager.

    Args:
        ranks: how many there are.
        key: the key that each must have.
        host: the address, or its name, on which it listens.
        port: 0 for any.

    Raises:
        OSError: it cannot listen there.
    """

    def __init__(self, ranks: int, key: bytes, host: str = LOOP_BACK, port: int = 0) -> None:
        self._ranks = ranks
        self._key = key
        self._host = host
        try:
            self._listener = socket.create_server((host, port), backlog=_BACKLOG)
        except OSError as error:
            raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from error
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._visitors: dict[int, _Visitor] = {}  # by file descriptor, the oldest first

    @property
    def address(self) -> str:
        """HOST:PORT, as `connect` takes it."""
        return f"{self._host}:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Reception:
        return self

    def __exit__(self, *_: object) -> None:
        for visitor in list(self._visitors.values()):
            self._drop(visitor)
        self._selector.close()
        self._listener.close()

    def gather(self, seconds: float, look: Callable[[set[int]], None]) -> dict[int, Link]:
        """Wait for a connection of every rank.

        Args:
            seconds: how long to wait.
            look: called now and then with the ranks that are missing; it may raise.

        Returns:
            The links by rank. Ranks that did not connect in time are missing.
        """
        links: dict[int, Link] = {}
        end, next_look = time.monotonic() + seconds, 0.0
        try:
            while len(links) < self._ranks and (now := time.monotonic()) < end:
                if now >= next_look:
                    look(set(range(self._ranks)) - set(links))
                    next_look = now + _PAUSE_SECONDS
                for key, _ in self._selector.select(_PAUSE_SECONDS):
                    if key.fileobj is self._listener:
                        self._accept()
                    elif (visitor := self._visitors.get(key.fd)) is not None:
                        self._hear(visitor, links)
        except BaseException:
            for link in links.values():
                link.close()
            raise
        return links

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it has left already
            return
        connection.setblocking(False)
        visitor = _Visitor(connection, secrets.token_bytes(_NONCE))
        self._visitors[connection.fileno()] = visitor
        self._selector.register(connection, selectors.EVENT_READ)
        try:
            connection.send(visitor.nonce)
        except OSError:
            self._drop(visitor)
        if len(self._visitors) > _MAX_STRANGERS + self._ranks:
            self._drop(next(iter(self._visitors.values())))

    def _hear(self, visitor: _Visitor, links: dict[int, Link]) -> None:
        try:
            piece = visitor.connection.recv(_ANSWER - len(visitor.answer))
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        visitor.answer += piece
        if piece and len(visitor.answer) < _ANSWER:
            return
        rank = self._rank(visitor)
        if rank is None or rank in links:
            self._drop(visitor)
            return
        self._forget(visitor)
        said = bytes(visitor.answer[:-_PROOF])
        try:
            visitor.connection.send(_derive(self._key, b"controller", visitor.nonce, said))
        except OSError:
            visitor.connection.close()
        else:
            keys = _keys(self._key, visitor.nonce, said)
            links[rank] = Link(visitor.connection, sends=keys.to_rank, receives=keys.to_controller)

    def _rank(self, visitor: _Visitor) -> int | None:
        """The rank that a visitor has proven to be, or None."""
        if len(visitor.answer) < _ANSWER:
            return None
        said, proof = bytes(visitor.answer[:-_PROOF]), bytes(visitor.answer[-_PROOF:])
        if not hmac.compare_digest(proof, _derive(self._key, b"rank", visitor.nonce, said)):
            return None
        rank: int = _RANK.unpack_from(said)[0]
        return rank if rank < self._ranks else None

    def _forget(self, visitor: _Visitor) -> None:
        del self._visitors[visitor.connection.fileno()]
        self._selector.unregister(visitor.connection)

    def _drop(self, visitor: _Visitor) -> None:
        self._forget(visitor)
        visitor.connection.close()


def connect(address: str, key: bytes, rank: int) -> Link:
    """Connect a rank to the controller at HOST:PORT.

    Raises:
        HandshakeError: what listens there is not the controller.
        OSError: nothing listens there, or it does not answer.
    """
    host, port = address.rsplit(":", 1)
    connection = socket.create_connection((host, int(port)), timeout=_CLIENT_SECONDS)
    with contextlib.ExitStack() as stack:
        stack.callback(connection.close)
        nonce = _read(connection, _NONCE)
        said = _RANK.pack(rank) + secrets.token_bytes(_NONCE)
        connection.sendall(said + _derive(key, b"rank", nonce, said))
        expected = _derive(key, b"controller", nonce, said)
        if not hmac.compare_digest(_read(connection, _PROOF), expected):
            raise HandshakeError(f"what listens at {address} does not have the key of this run")
        stack.pop_all()
    keys = _keys(key, nonce, said)
    return Link(connection, sends=keys.to_controller, receives=keys.to_rank)


def _read(connection: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        piece = connection.recv(count - len(found))
        if not piece:
            raise HandshakeError("the controller closed the connection")
        found += piece
    return found


class _Keys(NamedTuple):
    to_rank: bytes
    to_controller: bytes


def _keys(key: bytes, nonce: bytes, said: bytes) -> _Keys:
    """The keys of a link."""
    return _Keys(*(_derive(key, use, nonce, said) for use in (b"to rank", b"to controller")))


def _derive(key: bytes, use: bytes, nonce: bytes, said: bytes) -> bytes:
    """A proof or a key. No two uses have the same length, so no two give the same bytes to HMAC."""
    return hmac.digest(key, use + nonce + said, "sha256")
