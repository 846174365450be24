"""The files from which the layer of a target was loaded, with their digests."""

from __future__ import annotations

import hashlib
import sys
from importlib import metadata
from pathlib import Path
from typing import Any


def sources_of(module_name: str) -> dict[str, Any]:
    """The files of a module's package that are loaded, and the distribution that has the package.

    The package is the top-level one. A module without a package stands for all modules of its
    folder.

    Returns:
        `files`: the SHA-256 of each file, by its path below the folder that holds the package.
        `distributions`: the name and version of each distribution that has the package, with the
        SHA-256 of its list of files, "" if it has none.
    """
    top = module_name.partition(".")[0]
    own = sys.modules[top]
    files = {path for path in map(_file, list(sys.modules.values())) if path is not None}
    place = _file(own)
    if hasattr(own, "__path__"):
        roots = [Path(path) for path in own.__path__]
        found = {
            path
            for name, module in list(sys.modules.items())
            if name == top or name.startswith(f"{top}.")
            if (path := _file(module)) is not None
        }
    else:
        roots = [place.parent / "-"] if place else []
        found = {path for path in files if place and path.parent == place.parent}
    folders = [root.parent for root in roots]
    return {
        "files": {_below(path, folders): _sha256(path) for path in sorted(found)},
        "distributions": {
            f"{name} {metadata.version(name)}": _record(name)
            for name in sorted(set(metadata.packages_distributions().get(top, [])))
        },
    }


def _file(module: Any) -> Path | None:
    """The file of a module; None if it has none."""
    name = getattr(module, "__file__", None)
    return Path(name) if isinstance(name, str) and Path(name).is_file() else None


def _below(path: Path, folders: list[Path]) -> str:
    for folder in folders:
        if path.is_relative_to(folder):
            return path.relative_to(folder).as_posix()
    return path.name


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _record(name: str) -> str:
    text = metadata.distribution(name).read_text("RECORD")
    return "" if text is None else hashlib.sha256(text.encode()).hexdigest()
