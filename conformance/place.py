"""The folder of a run: no two runs share it, and what a run found is in it whatever happens.

A run locks its folder, moves an older report aside, and appends every result to `run.jsonl` as it
comes. Its report replaces that file when all cases have run. A run that ended before that is taken
up by `--resume`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from syncbn import reports
from syncbn.conformance import ConformanceError
from syncbn.reports.schema import Schema, parse

REPORT, JOURNAL, LOCK = "report.json", "run.jsonl", "run.lock"

_ROW, _RESTART = (
    Schema(reports.SCHEMA["properties"][name]["items"] | {"$defs": reports.SCHEMA["$defs"]})
    for name in ("cases", "restarts")
)


class PlaceError(ConformanceError):
    """The folder of a run cannot be used. The message is one line."""


class Place:
    """The folder of a run. Use it as a context manager, which locks the folder.

    Args:
        folder: made if it does not exist.

    `rows` holds the results so far, as the cases of a report. `restarts` holds those of the run
    before it was resumed, also as in a report. `about` holds the id, the date and the command line
    of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        self.restarts: list[dict[str, Any]] = []
        self.about: dict[str, Any] = {}
        self._lock: IO[str] | None = None
        self._journal: IO[str] | None = None

    def __enter__(self) -> Place:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / LOCK, "a")  # held until the end
        except FileExistsError as error:
            raise self._unusable("it is not a directory") from error
        except OSError as error:
            raise self._unusable(error.strerror) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A run that has just ended may have removed the file since it was opened.
            held = os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self._lock.name))
        except OSError:
            held = False
        if not held:
            self._lock.close()
            self._lock = None
            raise PlaceError(f"another run writes its report to {self.folder}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._journal is not None:
            with contextlib.suppress(OSError):  # of a full disk, of which `_write` has told
                self._journal.close()
            if not self.rows:  # nothing to take up
                (self.folder / JOURNAL).unlink(missing_ok=True)
        if self._lock is not None:
            Path(self._lock.name).unlink(missing_ok=True)
            self._lock.close()

    def set_aside(self) -> None:
        """Rename the report and the results of an older run, so that none is taken for this one."""
        for name in (REPORT, JOURNAL):
            old = self.folder / name
            try:
                if old.exists():
                    date = datetime.fromtimestamp(old.stat().st_mtime, timezone.utc)
                    old.rename(_free(old.with_stem(f"{old.stem}-{date:%Y%m%dT%H%M%SZ}")))
            except OSError as error:
                raise self._unusable(error.strerror) from error

    def begin(self, asked: dict[str, Any], command: list[str]) -> None:
        """Start a run.

        Args:
            asked: what the run is to do; one that resumes it must be asked the same.
            command: its command line.
        """
        self.about = about_run(command)
        try:
            self._journal = open(self.folder / JOURNAL, "w", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise self._unusable(error.strerror) from error
        self._write({"run": self.about, "asked": asked})

    def resume(self, asked: dict[str, Any]) -> None:
        """Take up the run that ended here before all its cases had run.

        Raises:
            PlaceError: there is none, or it was asked something else.
        """
        path = self.folder / JOURNAL
        try:
            whole, _, _ = path.read_bytes().rpartition(b"\n")  # the last line may be cut off
            first, *lines = [parse(line) for line in whole.splitlines()]
            self.about, before = first["run"], first["asked"]
            rows = [line for line in lines if "restart" not in line]
            self.restarts = [line["restart"] for line in lines if "restart" in line]
        except FileNotFoundError:
            raise PlaceError(f"there is no run to resume in {self.folder}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PlaceError(f"cannot resume the run in {path}: {error}") from error
        for name in asked:
            if before.get(name) != asked[name]:
                raise PlaceError(
                    f"cannot resume the run in {path}: {name} was {before.get(name)!r}, now it is "
                    f"{asked[name]!r}"
                )
        for schema, ones in ((_ROW, rows), (_RESTART, self.restarts)):
            for one in ones:
                if violation := schema.violation(one):
                    raise PlaceError(f"cannot resume the run in {path}: {violation}")
        self.rows = [row for row in rows if row["verdict"] != "not-run"]
        os.truncate(path, len(whole) + 1)
        self._journal = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def add(self, row: dict[str, Any], restarts: Sequence[dict[str, Any]] = ()) -> None:
        """Keep a result, and the restarts of the ranks that it cost."""
        self.rows.append(row)
        self._write(row)
        for restart in restarts:
            self._write({"restart": restart})

    def finish(self, report: dict[str, Any]) -> Path:
        """Write the report. The results are kept only if it is incomplete."""
        path = self.folder / REPORT
        reports.save(report, path)
        if report["summary"]["verdict"] != "incomplete":
            (self.folder / JOURNAL).unlink(missing_ok=True)
        return path

    def _write(self, line: dict[str, Any]) -> None:
        assert self._journal is not None
        try:
            self._journal.write(json.dumps(line) + "\n")
            self._journal.flush()
        except OSError as error:
            raise self._unusable(error.strerror) from error

    def _unusable(self, reason: str | None) -> PlaceError:
        return PlaceError(f"cannot write reports to {self.folder}: {reason}")


def about_run(command: list[str]) -> dict[str, Any]:
    """The id, the date and the command line of a run that begins now."""
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"id": secrets.token_hex(8), "started": started, "command": command}


def _free(path: Path) -> Path:
    """The path, or one with a number if there is such a file."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free
