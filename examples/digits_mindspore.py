"""Data parallel training with SyncBatchNorm for MindSpore on the CPU: handwritten digits.

What examples.digits shows with PyTorch, in float32: ranks that share every global batch unevenly
follow one process that trains the same network with mindspore.nn.BatchNorm2d on whole batches.
msrun starts the ranks. examples.digits judges the trained networks, so this needs PyTorch as well,
which evaluates what MindSpore has learned. The 1000 epsilons that it allows separate rounding from
bugs here as well: rounding came to 9 of them at most, a running_var without Bessel's correction to
2200 and statistics of each rank alone to 460000.

    python -m examples.digits_mindspore
    python -m examples.digits_mindspore --ranks 2 --epochs 3
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import mindspore as ms
import torch
from mindspore import Parameter, Tensor, nn, ops
from mindspore.communication import get_group_size, get_rank, init

from examples import digits
from syncbn.mindspore import SyncBatchNorm

# nn.BatchNorm2d's names, and those of every other batch normalization for the same.
NAMES = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def network(norm: Callable[[int], nn.Cell]) -> nn.Cell:
    """The network of examples.digits; weights never vary."""
    ms.set_seed(0)

    def convolution(inputs: int, outputs: int, stride: int) -> nn.Cell:
        return nn.Conv2d(inputs, outputs, 3, stride, "pad", padding=1)

    return nn.SequentialCell(
        *(convolution(1, 16, 1), norm(16), nn.SiLU()),
        *(convolution(16, 32, 2), norm(32), nn.SiLU()),
        *(convolution(32, 32, 2), norm(32), nn.SiLU()),
        *(nn.Flatten(), nn.Dense(32 * 2 * 2, 10)),
    )


def train(
    net: nn.Cell, plan: digits.Plan, rank: int = 0, ranks: int = 1
) -> Iterator[Mapping[str, Parameter]]:
    """Train on this rank's shard of every batch; the parameters, as they are after each epoch.

    With one rank, the shard is the batch: that is the single process.
    """
    images, labels = plan.images.float().numpy(), plan.labels.int().numpy()
    weights = net.trainable_params()
    optimizer = nn.SGD(weights, learning_rate=0.05, momentum=0.9)
    sum_over_ranks = ops.AllReduce() if ranks > 1 else lambda gradient: gradient

    def loss(mine: Tensor, truth: Tensor, whole: int) -> Tensor:
        # Wanted is the gradient of the mean over the global batch, which is the sum over all ranks
        # of loss_sum / whole. A mean over the shard, averaged over ranks, would be right only if
        # all shards were of one size.
        return ops.cross_entropy(net(mine), truth, reduction="sum") / whole

    gradients = ms.value_and_grad(loss, None, weights)
    net.set_train()
    for epoch in range(plan.epochs):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for batch in islice(order.split(digits.BATCH), plan.steps):
            mine = digits.shard(batch, rank, ranks).numpy()
            _, own = gradients(Tensor(images[mine]), Tensor(labels[mine]), len(batch))
            optimizer(tuple(sum_over_ranks(gradient) for gradient in own))
        yield net.parameters_dict()


def run_rank(folder: Path) -> None:
    """One rank, a process that msrun has started; rank 0 leaves its checkpoints in the folder."""
    init()
    # For more ranks than cores, where ranks that run ahead take the time of those they wait for.
    ms.runtime.launch_blocking()
    rank, ranks = get_rank(), get_group_size()
    plan = digits.Plan(**torch.load(folder / "plan"))
    net = network(SyncBatchNorm)
    for epoch, _ in enumerate(train(net, plan, rank, ranks)):
        if rank == 0:
            ms.save_checkpoint(net, str(folder / f"{epoch}.ckpt"))


def run_ranks(ranks: int, folder: Path) -> None:
    """Start the ranks and wait for them.

    Raises:
        SystemExit: one has failed; with what all of them and msrun have printed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {
        "worker_num": ranks,
        "local_worker_num": ranks,
        "master_port": port,
        "log_dir": folder,
        "join": True,
    }
    # msrun starts the first python3 that it finds: it must be this one.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    run = subprocess.run(
        [
            *(sys.executable, "-m", "mindspore.parallel.cluster.run"),
            *(f"--{name}={value}" for name, value in options.items()),
            *("python3", "-m", "examples.digits_mindspore", "--as-rank-in", folder),
        ],
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if run.returncode:
        logs = {log.name: log.read_text(errors="replace") for log in sorted(folder.glob("*.log"))}
        # A rank that died of a signal has no last words, but msrun names its exit status.
        logs["msrun"] = f"{run.stdout}\nexit status {run.returncode}"
        sys.exit("\n".join(f"--- {name}\n{text}" for name, text in logs.items()))


def to_torch(parameters: Mapping[str, Parameter]) -> digits.State:
    """The state_dict of the same network in PyTorch."""
    state = {}
    for key, parameter in parameters.items():
        cell, _, name = key.rpartition(".")
        state[f"{cell}.{NAMES.get(name, name)}"] = torch.tensor(parameter.asnumpy())
    return state


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=digits.positive, default=4, help="processes (default 4)")
    parser.add_argument("--epochs", type=digits.positive, default=1, help="(default 1)")
    parser.add_argument("--steps", type=digits.positive, help="per epoch (default: all)")
    parser.add_argument("--as-rank-in", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_rank_in:
        run_rank(args.as_rank_in)
        return 0

    images, labels = digits.load_images()
    images = images.float()
    seen, test = slice(None, -digits.TEST_IMAGES), slice(-digits.TEST_IMAGES, None)
    plan = digits.Plan(images[seen], labels[seen], args.epochs, args.steps)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(plan._asdict(), folder / "plan")
        run_ranks(args.ranks, folder)
        checkpoints = [ms.load_checkpoint(str(folder / f"{i}.ckpt")) for i in range(args.epochs)]
    history = [to_torch(checkpoint) for checkpoint in checkpoints]

    steps = min(args.steps or sys.maxsize, -(-len(plan.images) // digits.BATCH))
    single: list[digits.State] = []
    for epoch, parameters in enumerate(train(network(nn.BatchNorm2d), plan), start=1):
        # nn.BatchNorm2d does not count its steps.
        counts = {key: torch.tensor(epoch * steps) for key in history[0] if "num_batches" in key}
        single.append({**to_torch(parameters), **counts})
    print(f"float32 on {args.ranks} ranks")
    return 0 if digits.report(history, single, images[test], labels[test]) else 1


if __name__ == "__main__":
    sys.exit(main())
