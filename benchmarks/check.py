"""Compare the newest times of `make bench` with the kept ones: the ratios, which travel best.

A ratio of SyncBatchNorm to BatchNorm2d is slower if its lower quartile is above the kept upper one
by more than a tenth. Times on another machine, or on a busy one, show nothing.

    python -m benchmarks.check
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.layer import LAYOUTS, OUT

KEPT = Path(__file__).parent / "kept" / "layer.json"
_ALLOWED = 1.1


def slower(kept: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for every case, layout and backend that became slower."""
    before, after = _quartiles(kept), _quartiles(new)
    lines = []
    for key in [key for key in after if key in before]:
        was, now = before[key], after[key]
        if now[0] > _ALLOWED * was[1]:
            shape, *others = key
            quartiles = [f"{low:.2f} to {high:.2f}" for low, high in (now, was)]
            lines.append(f"{shape} {', '.join(others)}: {quartiles[0]}, was {quartiles[1]}")
    return lines


def _quartiles(times: dict[str, Any]) -> dict[tuple[Any, ...], list[float]]:
    return {
        (tuple(case["shape"]), case["dtype"], case["memory"], layout, backend): ratio["quartiles"]
        for case in times["cases"]
        for layout in LAYOUTS
        for backend, ratio in case[layout]["ratio"].items()
    }


def main() -> int:
    """0 if nothing became slower, else 1."""
    new_path = Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    kept, new = (json.loads(path.read_text()) for path in (KEPT, new_path))
    if kept["environment"] != new["environment"]:
        print(f"kept on {kept['environment']}, compared with {new['environment']}")
    found = slower(kept, new)
    print("\n".join(found) or "no ratio became slower")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
