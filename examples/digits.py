"""DistributedDataParallel with SyncBatchNorm on the CPU: handwritten digits on several ranks.

Every global batch is cut unevenly over the ranks. The ranks together must follow one process that
trains the same network with torch.nn.BatchNorm2d on whole batches, from the same weights: both
compute the same sums, in another order, so that they differ by rounding and by nothing else.

    python -m examples.digits
    python -m examples.digits --ranks 2 --dtype float64
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from syncbn.torch import SyncBatchNorm

State = Mapping[str, Tensor]  # a state_dict; both kinds of batch normalization have the same keys
DTYPES = {"float64": torch.float64, "float32": torch.float32}

BATCH = 64  # images in a global batch
TEST_IMAGES = 360

# How far the two runs may be apart, in units of the dtype's epsilon. Rounding came to 44 of them
# at most, over 1 to 12 ranks and up to 30 epochs, and did not grow with the epochs. The mildest of
# seven planted bugs, a running_var without Bessel's correction, came to 2800 in float32.
ALLOWED_EPSILONS = 1000


def network(norm: Callable[[int], nn.Module], dtype: torch.dtype) -> nn.Module:
    """Three blocks of convolution and normalization, and a linear head; weights never vary."""
    torch.manual_seed(0)
    # SiLU is smooth. At the kink of a ReLU, rounding decides whether a gradient passes at all.
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), norm(16), nn.SiLU()),
        *(nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False), norm(32), nn.SiLU()),
        *(nn.Conv2d(32, 32, 3, padding=1, stride=2, bias=False), norm(32), nn.SiLU()),
        *(nn.Flatten(), nn.Linear(32 * 2 * 2, 10)),
    ).to(dtype)


def shard(batch: Tensor, rank: int, ranks: int) -> Tensor:
    """What this rank takes of a global batch: rank r has r + 1 shares of it."""
    start, end = (len(batch) * r * (r + 1) // (ranks * (ranks + 1)) for r in (rank, rank + 1))
    return batch[start:end]


class Plan(NamedTuple):
    """What every process gets: images (N, 1, 8, 8), labels (N,), and how long to train."""

    images: Tensor
    labels: Tensor
    epochs: int
    steps: int | None  # of an epoch; None for all


def train(
    model: nn.Module, dtype: torch.dtype, plan: Plan, rank: int = 0, ranks: int = 1
) -> list[State]:
    """Train on this rank's shard of every batch; the state after each epoch.

    With one rank, the shard is the batch: that is the single process.
    """
    images, labels = plan.images.to(dtype), plan.labels
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    history: list[State] = []
    for epoch in range(plan.epochs):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for batch in islice(order.split(BATCH), plan.steps):
            mine = shard(batch, rank, ranks)
            # Wanted is the gradient of the mean over the global batch, which is the sum over all
            # ranks of loss_sum / len(batch). DistributedDataParallel does not sum over ranks, it
            # averages: hence `* ranks`. A mean over the shard would be right only if all shards
            # were of one size.
            loss_sum = F.cross_entropy(model(images[mine]), labels[mine], reduction="sum")
            optimizer.zero_grad()
            (loss_sum * ranks / len(batch)).backward()
            optimizer.step()
        module = model.module if isinstance(model, DistributedDataParallel) else model
        history.append({key: value.clone() for key, value in module.state_dict().items()})
    return history


def run_rank(rank: int, ranks: int, dtypes: list[str], plan: Plan, folder: Path) -> None:
    """One rank, a process of its own; rank 0 leaves its histories in the folder."""
    torch.set_num_threads(1)
    meeting_point = (folder / "ranks").as_uri()
    dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=ranks)
    histories = {}
    for name in dtypes:
        model = DistributedDataParallel(network(SyncBatchNorm, DTYPES[name]))
        histories[name] = train(model, DTYPES[name], plan, rank, ranks)
    if rank == 0:
        torch.save(histories, folder / "histories")
    dist.destroy_process_group()


def largest_difference(state: State, expected: State) -> float:
    """The largest over all tensors of max |state - expected| / max |expected|; NaN if there is one.

    Raises:
        ValueError: the states do not have the same keys.
    """
    if state.keys() != expected.keys():
        raise ValueError(
            f"state must have the keys {list(expected)} of expected, got {list(state)}"
        )
    differences = []
    for key, value in expected.items():
        value = value.double()
        differences.append((state[key].double() - value).abs().max() / value.abs().max())
    return float(torch.stack(differences).max())


def allowed_difference(dtype: torch.dtype) -> float:
    """How far apart rounding may have brought two runs in this dtype."""
    return ALLOWED_EPSILONS * torch.finfo(dtype).eps


@torch.no_grad()
def evaluate(state: State, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy of a network with this state."""
    # What SyncBatchNorm has learned is a checkpoint of BatchNorm.
    model = network(nn.BatchNorm2d, images.dtype).eval()
    model.load_state_dict(state)
    scores = model(images)
    accuracy = (scores.argmax(1) == labels).double().mean()
    return F.cross_entropy(scores, labels).item(), accuracy.item()


def load_images() -> tuple[Tensor, Tensor]:
    """1797 images (1797, 1, 8, 8) float64 in [0, 1], and their digits (1797,) int64."""
    # Imported here, because every rank imports this module and only one process reads the images.
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.from_numpy(digits.images / 16).unsqueeze(1), torch.from_numpy(digits.target)


def report(history: list[State], expected: list[State], images: Tensor, labels: Tensor) -> bool:
    """Print a table of epochs and the verdict: whether history follows the expected states."""
    print("epoch  test loss  test accuracy  largest relative difference")
    differences = []
    for epoch, (state, single) in enumerate(zip(history, expected, strict=True), start=1):
        loss, accuracy = evaluate(state, images, labels)
        differences.append(largest_difference(state, single))
        print(f"{epoch:5}  {loss:9.4f}  {accuracy:13.1%}  {differences[-1]:27.1e}")
    allowed = allowed_difference(images.dtype)
    good = all(difference <= allowed for difference in differences)  # NaN is not
    print(f"test accuracy {accuracy:.1%}")
    print(
        f"{'follows' if good else 'DOES NOT FOLLOW'} full-batch BatchNorm: largest relative "
        f"difference {max(differences):.1e} (allowed {allowed:.1e})"
    )
    return good


def positive(text: str) -> int:
    """An argument of the command line that must be a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=positive, default=4, help="processes (default 4)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        nargs="+",
        default=list(DTYPES),
        help="float64 is the proof, float32 what one trains in (default both)",
    )
    parser.add_argument("--epochs", type=positive, default=3, help="(default 3)")
    parser.add_argument("--steps", type=positive, help="per epoch (default: the whole epoch)")
    args = parser.parse_args()

    torch.set_num_threads(1)
    images, labels = load_images()
    plan = Plan(images[:-TEST_IMAGES], labels[:-TEST_IMAGES], args.epochs, args.steps)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spawn(run_rank, (args.ranks, args.dtype, plan, folder), nprocs=args.ranks)
        histories = torch.load(folder / "histories")

    verdicts = []
    for name in args.dtype:
        dtype = DTYPES[name]
        single = train(network(nn.BatchNorm2d, dtype), dtype, plan)
        print(f"\n{name} on {args.ranks} ranks")
        test = images[-TEST_IMAGES:].to(dtype), labels[-TEST_IMAGES:]
        verdicts.append(report(histories[name], single, *test))
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
