"""The conformance suite: is a SyncBatchNorm right, on any number of ranks?

`syncbn-conformance run --target syncbn.torch --ranks 4`
"""

from __future__ import annotations

from pathlib import Path


class ConformanceError(Exception):
    """A request that cannot be carried out. A command prints the text and exits with status 2."""


def checkout() -> Path | None:
    """The checkout that this suite is run from; None if it was installed from a wheel."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").is_file() else None
