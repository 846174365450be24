"""A plugin of pytest: every case of a profile is a test of the target, on real ranks.

    pytest --syncbn-target my_module:MySyncBatchNorm --junitxml junit.xml

pytest loads it by an entry point. Without that option it adds nothing and imports nothing more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from syncbn.conformance.case import Case
    from syncbn.conformance.pool import RankPool

_NODE = "syncbn"
_POOL = pytest.StashKey["RankPool"]()


class CaseFailed(Exception):
    """The target did not pass a case. The text has the reason and the command that replays it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("syncbn", "conformance of a SyncBatchNorm layer")
    group.addoption(
        "--syncbn-target",
        metavar="TARGET",
        help="run the cases of a profile as tests on this layer: MODULE:CLASS for PyTorch, or a "
        "target as syncbn-conformance takes it",
    )
    group.addoption("--syncbn-ranks", metavar="N", default="2", help="ranks (default 2)")
    group.addoption("--syncbn-profile", default="certify", help="smoke, certify (default) or full")
    group.addoption(
        "--syncbn-level",
        default="decided",
        choices=("decided", "documented"),
        help="documented: a failure of a clause that the operator's page does not document is "
        "skipped (default decided)",
    )
    group.addoption("--syncbn-device", metavar="DEVICE", default="cpu", help="default cpu")
    group.addoption("--syncbn-backend", metavar="NAME", help="of a target that has several")
    group.addoption("--syncbn-mode", metavar="MODE", help="of a framework that has several")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.syncbn_target is None:
        return
    from syncbn.conformance.clauses import CLAUSES

    config.addinivalue_line("markers", f"{_NODE}: a conformance case")
    for name, clause in CLAUSES.items():
        config.addinivalue_line("markers", f"{name}: {clause.title}")
    config.stash[_POOL] = _pool(config)


def pytest_unconfigure(config: pytest.Config) -> None:
    if _POOL in config.stash:
        config.stash[_POOL].close()


@pytest.hookimpl(tryfirst=True)  # so that -k and -m select among them
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    if _POOL in config.stash:
        items += _collect(session, config)


def _pool(config: pytest.Config) -> RankPool:
    """The ranks, which start with the first case.

    Raises:
        UsageError: an option does not fit.
    """
    from syncbn.conformance import ConformanceError, targets
    from syncbn.conformance.cases import PROFILES
    from syncbn.conformance.pool import RankPool

    options = config.option
    if not options.syncbn_ranks.isdigit() or not 1 <= int(options.syncbn_ranks) <= 1024:
        given = options.syncbn_ranks
        raise pytest.UsageError(f"--syncbn-ranks must be an int from 1 to 1024, got {given!r}")
    if options.syncbn_profile not in PROFILES:
        known, given = ", ".join(PROFILES), options.syncbn_profile
        raise pytest.UsageError(f"--syncbn-profile must be one of {known}, got {given!r}")
    name = options.syncbn_target
    name = f"torch:{name}" if name.count(":") == 1 else name
    try:
        target = targets.parse(
            name, options.syncbn_device, options.syncbn_backend, options.syncbn_mode
        )
        return RankPool(target, int(options.syncbn_ranks))
    except ConformanceError as error:
        raise pytest.UsageError(f"--syncbn-target: {error}") from error


def _collect(session: pytest.Session, config: pytest.Config) -> Iterator[pytest.Item]:
    from syncbn.conformance.cases import catalogue

    clauses: dict[str, ClauseNode] = {}
    for case in catalogue(config.stash[_POOL].ranks, config.option.syncbn_profile):
        if case.clause not in clauses:
            node = f"{_NODE}::{case.clause}"
            clauses[case.clause] = ClauseNode.from_parent(session, name=case.clause, nodeid=node)
        name = f"{case.title} [{case.id}]"
        yield CaseItem.from_parent(clauses[case.clause], name=name, case=case)


class ClauseNode(pytest.Collector):
    """A clause of the contract; its cases are collected with those of all clauses."""

    def collect(self) -> list[pytest.Item]:
        return []


class CaseItem(pytest.Item):
    """A case of the suite."""

    def __init__(self, *, case: Case, **about: Any) -> None:
        super().__init__(**about)
        self.case = case
        self.add_marker(_NODE)
        self.add_marker(case.clause)

    def runtest(self) -> None:
        from syncbn.conformance import ConformanceError, runner, verdict
        from syncbn.reports.table import replay_command
        from syncbn.reports.text import printable

        pool = self.config.stash[_POOL]
        try:
            if not pool.starts:
                pool.start()
        except ConformanceError as error:
            pytest.exit(f"--syncbn-target: {error}", returncode=pytest.ExitCode.USAGE_ERROR)
        judged = runner.run_case(pool, self.case).verdict
        message = printable(judged.message or "")
        if judged.verdict == "pass":
            return
        if judged.verdict in ("unsupported", "not-run"):
            pytest.skip(message or judged.verdict)
        level = self.config.option.syncbn_level
        if judged.verdict != "error" and not verdict.required(self.case.clause, level):
            pytest.skip(f"{judged.verdict}, does not count for level {level}: {message}")
        run = {"target": pool.target.document, "launcher": pool.launcher, "ranks": pool.ranks}
        command = replay_command(run, {"id": self.case.id})
        raise CaseFailed(f"{judged.verdict}: {message}\n{command}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The reason of a failure without the suite's own traceback."""
        if isinstance(excinfo.value, CaseFailed):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        return self.path, None, f"{self.case.clause}: {self.name}"
