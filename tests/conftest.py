"""One pool of ranks for the whole session; under pytest-xdist, one for each worker."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

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
