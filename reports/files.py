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
