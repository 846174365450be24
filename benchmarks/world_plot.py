"""Draw docs/world.svg of the kept figures of benchmarks.world. It needs matplotlib.

python -m benchmarks.world_plot
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

KEPT = Path(__file__).parent / "kept" / "world.json"
PLOT = Path(__file__).parents[1] / "docs" / "world.svg"


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """The bytes of all messages, the time of their merge, and its errors, by number of ranks."""
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "world"})
    figure, (size, time, error) = pyplot.subplots(1, 3, figsize=(12, 3.6))
    for number, dtype in enumerate(("float64", "float32")):
        rows = [record for record in records if record["dtype"] == dtype]
        ranks = [row["ranks"] for row in rows]
        color = f"C{number}"
        size.loglog(ranks, [row["table_bytes"] for row in rows], "o-", color=color, label=dtype)
        low, high = zip(*(row["ms"]["quartiles"] for row in rows), strict=True)
        time.loglog(ranks, [row["ms"]["median"] for row in rows], "o-", color=color)
        time.fill_between(ranks, low, high, color=color, alpha=0.3)
        for name, line in (("mean", "o-"), ("var", "s--")):
            values = [max(row[f"{name}_error"], 1e-17) for row in rows]
            error.loglog(ranks, values, line, color=color, label=f"{name}, {dtype}")
    for axes, title in ((size, "all messages, bytes"), (time, "merge, ms"), (error, "error")):
        axes.set_title(title)
        axes.set_xlabel("ranks")
    size.legend()
    error.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    draw(json.loads(KEPT.read_text())["records"], PLOT)


if __name__ == "__main__":
    main()
