"""Make a package: run every case of a plan, and keep what is needed to judge it again."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from syncbn import reports
from syncbn.conformance import progress, report, runner
from syncbn.conformance.certification import contents, signature
from syncbn.conformance.certification.environment import TOOLS, differences, environment
from syncbn.conformance.certification.folder import Folder
from syncbn.conformance.certification.kept import CertificationError, whole_runs
from syncbn.conformance.certification.plan import CERTIFIED, Plan
from syncbn.conformance.certification.raw import RawWriter
from syncbn.conformance.place import about_run
from syncbn.conformance.pool import HERE, RankPool
from syncbn.conformance.targets import Target
from syncbn.launchers.site import Site
from syncbn.reports.junit import junit

NO_ORACLE = "--oracle none"
_SCHEMA = "syncbn-environment/1"


class Maker:
    """Makes one package. Use it as a context manager.

    Args:
        target: the layer.
        product: what syncbn.conformance.certification.product.load returns.
        folder: made if it does not exist; must be empty unless `resume`.
        level: "decided" or "documented".
        launcher, site, memory: see RankPool. A run with fewer ranks than machines takes the first
            machines of the site.
        command: the command line.
        devices: how many accelerators there are; see Plan.runs.
        plan: the runs. Only CERTIFIED is one of a certificate.
        resume: go on with the certification that was interrupted in the folder.

    `runs` has the numbers of ranks of all runs, and `left` those of the runs that are not made yet.

    Raises:
        CertificationError: no tool of the driver reports the accelerators of the target's device.
    """

    def __init__(
        self,
        target: Target,
        product: dict[str, Any],
        folder: Path,
        *,
        level: str,
        launcher: str,
        command: Sequence[str],
        site: Site = HERE,
        memory: int | None = None,
        devices: int | None = None,
        plan: Plan = CERTIFIED,
        resume: bool = False,
    ) -> None:
        self._target = target
        self._product = product
        self._folder = folder
        self._launcher = launcher
        self._site = site
        self._memory = memory
        self._plan = plan
        self._resume = resume
        self.runs = plan.runs(target.device, devices)
        self._environment: dict[str, Any] = {
            "schema": _SCHEMA,
            "plan": {"name": plan.name, "profile": plan.profile, "ranks": [*self.runs]},
            "level": level,
            "devices": devices,
            "target": report.target_document(target),
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": [*command],
            "here": environment(),
        }
        tool = TOOLS.get(target.device)
        if tool and tool not in self._environment["here"]["accelerator"]:
            raise CertificationError(f"a certificate for {target.device} needs {tool}")
        self._reports: dict[int, reports.Report] = {}
        self._sources: dict[str, Any] = {"files": {}, "distributions": {}}
        self._log: IO[str]

    @property
    def left(self) -> list[int]:
        return [ranks for ranks in self.runs if ranks not in self._reports]

    def __enter__(self) -> Maker:
        begun = contents.begin_line(self._product, self._environment)
        try:
            if self._resume:
                self._take_up(json.loads(json.dumps(begun)))  # as it is read
                return self
            self._folder.mkdir(parents=True, exist_ok=True)
            if any(self._folder.iterdir()):
                raise CertificationError(f"the folder of a package must be empty: {self._folder}")
            self._log = self._opened("x")
        except OSError as error:
            raise CertificationError(
                f"cannot write a package to {self._folder}: {error.strerror or error}"
            ) from error
        self._write_line(begun)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._log.close()

    def run(self, ranks: int) -> reports.Report:
        """Make one run, and write its report, its JUnit file and its raw results."""
        place = self._folder / contents.name_of(ranks, "")
        place.mkdir(parents=True)
        about, began = about_run(self._environment["command"]), time.monotonic()
        rows: list[dict[str, Any]] = []
        options: dict[str, Any] = {"profile": self._plan.profile, "run": about}
        options |= {"level": self._environment["level"], "oracle": NO_ORACLE}
        with (
            RankPool(
                self._target, ranks, self._launcher, self._memory, self._site.part(ranks)
            ) as pool,
            RawWriter(place / contents.RAW) as raw,
        ):

            def keep(result: runner.Result) -> None:
                row = report.row(result)
                rows.append(row)
                self._write_line(contents.case_line(ranks, row, raw.digests.get(row["id"])))

            self._write_line(contents.run_line(report.build(pool, [], seconds=0.0, **options)))
            cases = self._plan.cases(ranks)
            progress.run(pool, cases, NO_ORACLE, runner.MAX_HANGS, keep, raw.add)
            sources = pool.sources()
            seconds = time.monotonic() - began
            made = report.build(pool, rows, seconds=seconds, **options)
        self._keep_sources(sources)
        self._write_line(contents.ran_line(made, sources))
        reports.save(made, place / contents.REPORT)
        (place / contents.JUNIT).write_text(junit(made), encoding="utf-8")
        self._reports[ranks] = made
        return made

    def finish(self, key: Path | None = None) -> str:
        """Write the certificate after all runs.

        Args:
            key: an SSH key that signs it.

        Returns:
            PASSED or FAILED.

        Raises:
            CertificationError: something changed during the runs.
        """
        if changed := list(differences(self._environment["here"], environment())):
            raise CertificationError(f"changed during the runs: {', '.join(changed[:5])}")
        known = self._environment | {"sources": self._sources}
        result = contents.result_of(self._reports, self._plan, known["level"])
        self._write_line(contents.end_line(result))
        self._log.close()
        self._write(contents.PRODUCT, self._product)
        self._write(contents.ENVIRONMENT, known)
        text = contents.text(self._product, known, self._reports, result, self._plan)
        (self._folder / contents.TEXT).write_text(text, encoding="utf-8")
        folder = Folder(self._folder)
        digests = {name: folder.sha256(name) for name in contents.names(self.runs)}
        self._write(contents.CERTIFICATE, contents.statement(digests, self._reports, result))
        if key is not None:
            signature.sign(self._folder / contents.CERTIFICATE, key)
        return result

    @property
    def title(self) -> str:
        """What was certified, in one line."""
        result = contents.result_of(self._reports, self._plan, self._environment["level"])
        return contents.title(self._environment, result)

    def _opened(self, mode: str) -> IO[str]:
        """The log, locked until it is closed."""
        log = open(self._folder / contents.LOG, mode, encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            log.close()
            raise CertificationError(f"another certification writes to {self._folder}") from error
        return log

    def _take_up(self, begun: dict[str, Any]) -> None:
        """Keep the whole runs of the certification that was interrupted, and nothing else of it."""
        if not (self._folder / contents.LOG).exists():
            raise CertificationError(f"there is no certification to resume in {self._folder}")
        self._log = self._opened("a")
        try:
            found = whole_runs(self._folder, begun, self.runs)
            self._reports = found.reports
            self._environment |= {"started": found.started, "command": found.command}
            for sources in found.sources:
                self._keep_sources(sources)
            for ranks in self.left:
                if (place := self._folder / contents.name_of(ranks, "")).exists():
                    shutil.rmtree(place)
            self._log.truncate(found.size)
        except BaseException:
            self._log.close()
            raise

    def _keep_sources(self, sources: dict[str, Any]) -> None:
        for kind, kept in self._sources.items():
            for name, digest in sources[kind].items():
                if kept.setdefault(name, digest) != digest:
                    raise CertificationError(f"changed during the runs: {name}")

    def _write(self, name: str, document: dict[str, Any]) -> None:
        text = json.dumps(document, indent=1, allow_nan=False)
        reports.write(self._folder / name, f"{text}\n", name)

    def _write_line(self, line: dict[str, Any]) -> None:
        self._log.write(json.dumps(line, allow_nan=False) + "\n")
        self._log.flush()
