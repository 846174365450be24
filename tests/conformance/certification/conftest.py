"""One package that passed and one that failed, for all tests here; a test changes a copy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.certification.packages import few_listed, make

PLANTED = "torch:tests/conformance/planted.py:LocalCount"  # running_var is wrong on 2 ranks


@pytest.fixture(scope="package", autouse=True)
def _few() -> Iterator[None]:
    with few_listed():
        yield


@pytest.fixture(scope="package")
def passed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("passed")
    assert make(folder, "syncbn.torch") == "PASSED"
    return folder


@pytest.fixture(scope="package")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failed")
    assert make(folder, PLANTED) == "FAILED"
    return folder
