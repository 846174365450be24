"""A critic trained with a gradient penalty: its layers are differentiated twice.

On uneven shards over ranks it must follow torch.nn.BatchNorm2d on the whole batch, to rounding.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn.torch import convert_sync_batchnorm
from tests.syncbn import torch_ranks
from tests.syncbn.torch_layers import randn

RANKS = 4
BATCH = 14
STEPS = 3
ROUNDING = 1e-12  # relative to the largest parameter; the critic is in float64


def critic(frozen: bool) -> nn.Sequential:
    """A critic with a linear head; a frozen head makes the gradient of the last layer constant."""
    torch.manual_seed(0)
    layers = [
        *(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.SiLU()),
        *(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)),
        *(nn.Flatten(), nn.Linear(16, 1)),
    ]
    layers[-1].requires_grad_(not frozen)
    return nn.Sequential(*layers).double()


def loss_of(model: nn.Module, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    """The loss of WGAN-GP (Gulrajani et al. 2017, algorithm 1), summed over these samples."""
    between = (mix * real + (1 - mix) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(model(between).sum(), between, create_graph=True)
    penalty = (gradient.flatten(1).norm(dim=1) - 1).square()
    return (model(fake) - model(real)).sum() + 10 * penalty.sum()


def parameters_after_training(model: nn.Module, rank: int, ranks: int) -> list[Tensor]:
    """Rank r takes r + 1 shares of every batch, and gradients are summed over ranks."""
    optimizer = torch.optim.SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01
    )
    start, end = (BATCH * r * (r + 1) // (ranks * (ranks + 1)) for r in (rank, rank + 1))
    for step in range(STEPS):
        real, fake = (randn(BATCH, 2, 6, 6, dtype=torch.float64, seed=2 * step + i) for i in (0, 1))
        mix = torch.linspace(0, 1, BATCH, dtype=torch.float64).view(-1, 1, 1, 1)
        optimizer.zero_grad()
        loss = loss_of(model, real[start:end], fake[start:end], mix[start:end]) / BATCH
        loss.backward()
        if ranks > 1:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    dist.all_reduce(parameter.grad)
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def assert_follows_the_whole_batch(frozen: bool, rank: int, ranks: int) -> None:
    expected = parameters_after_training(critic(frozen), 0, 1)
    got = parameters_after_training(convert_sync_batchnorm(critic(frozen)), rank, ranks)
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).abs().max() <= ROUNDING * theirs.abs().max().clamp(min=1)
    for weight, untrained in zip(
        expected[::3], list(critic(frozen).parameters())[::3], strict=True
    ):
        assert torch.equal(weight, untrained) == (frozen and weight is expected[-2])


def trained_head(rank: int) -> None:
    assert_follows_the_whole_batch(False, rank, RANKS)


def frozen_head(rank: int) -> None:
    assert_follows_the_whole_batch(True, rank, RANKS)


CHECKS = [trained_head, frozen_head]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return torch_ranks.run(CHECKS, RANKS, tmp_path_factory.mktemp("ranks"), deadline=120.0)


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_on_four_ranks(check: str, outcomes: list[dict[str, str]]) -> None:
    torch_ranks.assert_passed(check, outcomes)


@pytest.mark.parametrize("frozen", [False, True])
def test_on_one_rank(frozen: bool) -> None:
    assert_follows_the_whole_batch(frozen, 0, 1)
