"""The folder of a package that a stranger wrote: read with limits, and no link is followed."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from syncbn.conformance import ConformanceError

_LARGEST = 64 << 20  # bytes of a file that is read at once
_LARGEST_RAW = 512 << 20  # bytes of a file that is read piece by piece
_MOST_ENTRIES = 1000
_DEEPEST = 4
_PIECE = 1 << 20


class UnreadableError(ConformanceError):
    """There is no package to verify. The message is one line."""


class Folder:
    """The files of a folder.

    Args:
        path: the folder.

    `names` has the paths of all regular files, with `/` between their parts, and `folders` those of
    all folders. `odd` has those of all other entries, which are never opened.

    Raises:
        UnreadableError: there is no such folder, or it has too many entries.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.names: list[str] = []
        self.folders: list[str] = []
        self.odd: list[str] = []
        try:
            for number, (name, kind) in enumerate(self._entries(path, "", 0)):
                kind.append(name)
                if number >= _MOST_ENTRIES:
                    raise UnreadableError(f"{path} must have at most {_MOST_ENTRIES} entries")
        except OSError as error:
            raise UnreadableError(f"cannot read {path}: {error.strerror or error}") from error

    def open(self, name: str) -> IO[bytes]:
        """Open a file of `names`.

        Raises:
            UnreadableError: it is too large, or cannot be read.
        """
        try:
            number = os.open(self._path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            file = os.fdopen(number, "rb")
        except OSError as error:
            raise UnreadableError(f"cannot read {name}: {error.strerror or error}") from error
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode) or about.st_size > _LARGEST_RAW:
            file.close()
            raise UnreadableError(f"{name} must be a file of at most {_LARGEST_RAW} bytes")
        return file

    def read(self, name: str) -> bytes:
        """The content of a file of `names`.

        Raises:
            UnreadableError: it is too large, or cannot be read.
        """
        with self.open(name) as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise UnreadableError(f"{name} must have at most {_LARGEST} bytes")
        return content

    def sha256(self, name: str) -> str:
        digest = hashlib.sha256()
        with self.open(name) as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
        return digest.hexdigest()

    def path(self, name: str) -> Path:
        return self._path / name

    def _entries(self, path: Path, above: str, depth: int) -> Iterator[tuple[str, list[str]]]:
        """The name of each entry below a folder, and the list that it belongs to."""
        with os.scandir(path) as entries:
            for entry in entries:
                name = f"{above}{entry.name}"
                if entry.is_dir(follow_symlinks=False) and depth < _DEEPEST:
                    yield name, self.folders
                    yield from self._entries(Path(entry.path), f"{name}/", depth + 1)
                else:
                    yield name, self.names if entry.is_file(follow_symlinks=False) else self.odd
