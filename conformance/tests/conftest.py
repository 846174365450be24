"""One pool of ranks for the whole session; under pytest-xdist, one for each worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from conformance import targets
from conformance.pool import RankPool

RANKS = 2


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    with RankPool(targets.parse("syncbn.torch"), RANKS) as ranks:
        yield ranks
