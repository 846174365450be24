"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


class ReportError(ValueError):
    """A report that cannot be read or written, or is not valid. The message is one line."""


def write(path: str | os.PathLike[str], text: str, what: str) -> None:
    """Write a text as UTF-8; its directory must exist.

    If writing is interrupted, an older file stays as it was, and no other file is left.

    Args:
        what: what the file holds, for the error.

    Raises:
        ReportError: the system refuses, as in
            "cannot write report to report.json: No space left on device".
    """
    path = Path(path)
    # Not tempfile: only the owner can read its files, but a CI artifact must be readable for all.
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ReportError(f"cannot write {what} to {path}: {error.strerror or error}") from error


def read(path: str | os.PathLike[str], limit: int, what: str) -> bytes:
    """The content of a file of at most `limit` bytes.

    Raises:
        ReportError: the file cannot be read, or is larger.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise ReportError(f"cannot read {what} {path}: {error.strerror or error}") from error
    if len(content) > limit:
        raise ReportError(f"{what} {path} must have at most {limit} bytes")
    return content
