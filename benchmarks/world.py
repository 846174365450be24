"""What the merge of the ranks' statistics costs as the world grows, and how exact it stays.

Every rank has a shard of its own, from which it makes its message. The table of all messages is
merged as a step does it (`syncbn.torch.messages`), in float64 as on CPU and in float32 as on an
accelerator, with running statistics that move. Timed is the merge alone, in one thread. The error
is that of mean and variance against NumPy's float64 on all values together: of the mean in standard
deviations, of the variance relative to it; the largest of all channels.

There are two kinds of shards. Generated ones have a large mean. Recorded ones are the inputs of the
second normalization of a small network in a training step on handwritten digits, two for each rank.

    python -m benchmarks.world
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.layer import environment
from syncbn.torch import messages
from syncbn.torch.backends import Running, composed

RANKS = (2, 8, 64, 512, 4096)
SHARD = (2, 256, 32)  # of a rank, (R, C, S)
MEAN = 1000.0  # in standard deviations
IMAGES = 2  # of a rank in the recorded step
EPS = 1e-5
OUT = Path(__file__).parent / "out" / "world.json"


def generated(ranks: int) -> Iterator[Tensor]:
    """The shards of all ranks."""
    for rank in range(ranks):
        torch.manual_seed(rank)
        yield torch.randn(SHARD) + MEAN


@torch.no_grad()
def recorded(ranks: int) -> Iterator[Tensor]:
    """The shards of all ranks, (IMAGES, C, 4, 4).

    The step is that of one process on the batch of all ranks, which the ranks together must equal.
    """
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    images = torch.from_numpy(load_digits().images / 16).float().unsqueeze(1)
    batch = images[torch.randint(len(images), (ranks * IMAGES,))]
    first = nn.Sequential(nn.Conv2d(1, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())
    second = nn.Conv2d(64, SHARD[1], 3, stride=2, padding=1)
    yield from second(first(batch)).split(IMAGES)


def payloads(ranks: int, shards: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The messages of all ranks in float64, and mean and variance of all values together."""
    table, values = [], []
    for x in shards:
        count = x.numel() // x.shape[1]
        words = messages.first_words([0.0] * (messages.WORDS - 2), count, ranks)
        table.append(composed.pack_stats(x, torch.tensor(words, dtype=torch.float64)))
        values.append(x.double().transpose(0, 1).flatten(1))
    whole = torch.cat(values, 1).numpy()
    return torch.stack(table), torch.from_numpy(whole.mean(1)), torch.from_numpy(whole.var(1))


def measure(
    ranks: int, repeat: int, shards: Callable[[int], Iterable[Tensor]] = generated
) -> list[dict[str, Any]]:
    """One record for each dtype of the statistics."""
    exact, mean, var = payloads(ranks, shards(ranks))
    records = []
    for dtype in (torch.float64, torch.float32):
        table = exact.to(dtype)
        buffers = torch.zeros(2, SHARD[1])
        running = Running(buffers[0], buffers[1], torch.tensor(0), 0.1)
        times = []
        for _ in range(repeat + 3):
            start = perf_counter()
            merged, invstd, _ = messages.combine_ranks(table, None, True, EPS, running)
            times.append((perf_counter() - start) * 1e3)
        away = (merged.double() - mean).abs() / var.sqrt()
        of_var = ((invstd.double().pow(-2) - EPS) / var - 1).abs()
        low, median, high = torch.tensor(times[3:]).quantile(torch.tensor([0.25, 0.5, 0.75]))
        records.append(
            {
                "ranks": ranks,
                "dtype": str(dtype).removeprefix("torch."),
                "message_bytes": table[0].numel() * table.element_size(),
                "table_bytes": table.numel() * table.element_size(),
                "ms": {"median": median.item(), "quartiles": [low.item(), high.item()]},
                "mean_error": away.max().item(),
                "var_error": of_var.max().item(),
            }
        )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=50, help="merges that are timed (default 50)")
    parser.add_argument("--most", type=int, default=RANKS[-1], help="the largest world")
    parser.add_argument("--out", type=Path, default=OUT, help="(default benchmarks/out/world.json)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    worlds = [ranks for ranks in RANKS if ranks <= args.most]
    found = {
        name: [record for ranks in worlds for record in measure(ranks, args.repeat, shards)]
        for name, shards in (("records", generated), ("recorded", recorded))
    }
    for name, records in found.items():
        for record in records:
            print(name, record)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "environment": environment(),
        "words": messages.WORDS,
        "shard": SHARD,
        "mean": MEAN,
        **found,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
