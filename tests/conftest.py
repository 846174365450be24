"""One pool of ranks for the session (pytest-xdist: for each worker), and the time by subject."""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import PurePosixPath

import pytest

from audit.ladder import toolchain
from syncbn.conformance import targets
from syncbn.conformance.pool import RankPool

RANKS = 2

# The kernels are tested with the triton-ascend of the tool-chain (make kernels), if it is there.
if (toolchain.FOLDER / "triton-ascend").is_dir():
    toolchain.use("triton-ascend")

# For tests that import MindSpore: errors only, and nothing written to where pytest was started.
os.environ.setdefault("GLOG_v", "3")
os.environ.setdefault("MS_OM_PATH", tempfile.gettempdir())


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    with RankPool(targets.parse("syncbn.torch"), RANKS) as ranks:
        yield ranks


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the seconds of each subject, a directory of tests/; workers of xdist are added up."""
    seconds: defaultdict[str, float] = defaultdict(float)
    tests: defaultdict[str, set[str]] = defaultdict(set)
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if isinstance(report, pytest.TestReport):
            path = PurePosixPath(report.nodeid.partition("::")[0])
            subject = path.parts[1] if path.parts[0] == "tests" else str(path)
            seconds[subject] += report.duration
            tests[subject].add(report.nodeid)
    terminalreporter.section("time by subject")
    for subject in sorted(seconds, key=lambda name: -seconds[name]):
        line = f"{seconds[subject]:8.1f} s  {subject} ({len(tests[subject])} tests)"
        terminalreporter.write_line(line)
