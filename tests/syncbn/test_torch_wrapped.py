"""What users wrap around the layer, on two ranks: compilers, data parallelism, checkpoints."""

from __future__ import annotations

import contextlib
import copy
import tempfile
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from syncbn import PeerError
from syncbn.torch import SyncBatchNorm, revert_sync_batchnorm
from tests.syncbn import torch_ranks
from tests.syncbn.torch_layers import make_layer, randn

RANKS = 2


def network(**arguments: Any) -> nn.Sequential:
    """Two norms between small layers, with the same weights on all ranks."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 1),
        SyncBatchNorm(4, **arguments),
        nn.ReLU(),
        nn.Conv2d(4, 5, 1),
        SyncBatchNorm(5, **arguments),
    )


def shard(rank: int, step: int = 0) -> Tensor:
    """Ranks have batches of their own size."""
    return randn(3 + rank + step, 3, 4, 2, seed=10 * step + rank)


def train(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and the gradients of one step."""
    model.zero_grad()
    y = model(x)
    y.float().square().mean().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for first, second in zip(ours, theirs, strict=True):
        assert torch.equal(first, second)


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for first, second in zip(ours, theirs, strict=True):
        torch.testing.assert_close(first, second)


def buffers(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


# Compilers


def compile_(model: nn.Module, fullgraph: bool = False) -> Any:
    """Not by Inductor, which takes minutes; test_torch_tools.py has a net for it."""
    return torch.compile(model, fullgraph=fullgraph, backend="aot_eager")


def compiled(rank: int) -> None:
    """In one graph; a new batch size is compiled once more at most, then never again."""
    handle = dist.new_group([0, 1])
    for arguments in (
        {},
        {"momentum": None},
        {"track_running_stats": False},
        {"process_group": [0, 1]},
        {"process_group": handle},
    ):
        eager = network(**arguments)
        model = copy.deepcopy(eager)
        again = compile_(model, fullgraph=True)
        for step in range(4):
            with torch._dynamo.config.patch(error_on_recompile=step > 1):
                assert_same(train(again, shard(rank, step)), train(eager, shard(rank, step)))
            assert_same(buffers(model), buffers(eager))
        again.eval(), eager.eval()
        assert torch.equal(again(shard(rank)), eager(shard(rank)))
        assert_same(train(again, shard(rank)), train(eager, shard(rank)))
        torch._dynamo.reset()


def compiled_with_a_checkpoint(rank: int) -> None:
    """A checkpoint in a graph may change no attribute of a layer."""
    eager = network()
    model = copy.deepcopy(eager)

    def run(x: Tensor) -> Any:
        return checkpoint(model, x, use_reentrant=False)

    y = torch.compile(run, fullgraph=True, backend="aot_eager")(shard(rank))
    y.square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert_close([y.detach(), *gradients], train(eager, shard(rank)))
    torch._dynamo.reset()


def no_graph_breaks(rank: int) -> None:
    for training in (True, False):
        model = nn.Sequential(*(SyncBatchNorm(3) for _ in range(6))).train(training)
        found = torch._dynamo.explain(model)(shard(rank))
        assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
        torch._dynamo.reset()


def compiled_steps_fail_together(rank: int) -> None:
    layer = SyncBatchNorm(3)
    again = compile_(layer, fullgraph=True)
    again(shard(rank))
    before = buffers(layer)
    wrong = randn(3, 5, 4, 2)
    if rank == 1:
        with pytest.raises(ValueError, match="num_features=3"):
            again(wrong)
    else:
        with pytest.raises(PeerError, match=r"rank 1 failed: ValueError: .*num_features=3"):
            again(shard(rank))
    assert_same(buffers(layer), before)
    again(shard(rank))
    torch._dynamo.reset()


def compiled_data_parallel(rank: int) -> None:
    # Dynamo looks whether tensors have gradients.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
    eager = network()
    expected = [train(DistributedDataParallel(eager), shard(rank, step)) for step in range(2)]
    inside = DistributedDataParallel(compile_(network()))
    around = compile_(DistributedDataParallel(network()))
    for model in (inside, around):
        for step in range(2):
            assert_close(train(model, shard(rank, step)), expected[step])
        torch._dynamo.reset()


# Data parallelism


def data_parallel(rank: int) -> None:
    """Two optimizer steps, each of two accumulated batches, give what BatchNorm does with both
    shards in one process, whatever the options are."""
    shards = [
        [randn(3, 3, 4, 2, dtype=torch.float64, seed=10 * batch + r) for r in range(RANKS)]
        for batch in range(4)
    ]
    single = revert_sync_batchnorm(network()).double()
    _two_steps(single, [torch.cat(both) for both in shards])
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    choices: list[dict[str, Any]] = [
        {},
        {"static_graph": True},  # with which DistributedDataParallel has no no_sync
        {"find_unused_parameters": True},
        {"gradient_as_bucket_view": True, "broadcast_buffers": False},
    ]
    for options in choices:
        model = network().double()
        wrapped = DistributedDataParallel(model, **options)
        mine = [both[rank] for both in shards]
        _two_steps(wrapped, mine, no_sync="static_graph" not in options)
        assert_close(list(model.state_dict().values()), list(single.state_dict().values()))


def _two_steps(model: Any, batches: list[Tensor], no_sync: bool = False) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for start in range(0, len(batches), 2):
        optimizer.zero_grad()
        with model.no_sync() if no_sync else contextlib.nullcontext():
            model(batches[start]).square().mean().backward()
        model(batches[start + 1]).square().mean().backward()
        optimizer.step()


def saved_by_ranks(rank: int) -> None:
    """A distributed checkpoint keeps all that a layer has."""
    model, other = network(), network()
    model(shard(rank))
    folder = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    save(model.state_dict(), checkpoint_id=folder[0])
    loaded = other.state_dict()
    load(loaded, checkpoint_id=folder[0])
    assert_same(list(loaded.values()), list(model.state_dict().values()))


def distributed_tensors(rank: int) -> None:
    """Eval takes them as BatchNorm does; training refuses them in words."""
    mesh = init_device_mesh("cpu", (RANKS,))
    x = randn(4, 3)
    layer: Any = distribute_module(make_layer(), mesh)
    sharded = distribute_tensor(x, mesh, [Shard(0)])
    evaluated = layer.eval()(sharded).full_tensor()
    torch.testing.assert_close(evaluated, make_layer().eval()(x))
    with pytest.raises(TypeError, match=r"input .* got DTensor: .* input\.to_local\(\)"):
        layer.train()(sharded)


def shard_fully(model: nn.Module, **arguments: Any) -> Any:
    return fully_shard(model, **arguments)


def fully_sharded(rank: int) -> None:
    """FSDP2: parameters are DTensors; those of halves have gradients of float32."""
    plain = network()
    wrapped = DistributedDataParallel(copy.deepcopy(plain))
    sharded = shard_fully(copy.deepcopy(plain))
    for step in range(2):
        y = train(wrapped, shard(rank, step))[0]
        assert_close([y], train(sharded, shard(rank, step))[:1])
    for ours, theirs in zip(sharded.parameters(), wrapped.parameters(), strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)
    assert_close(buffers(sharded), buffers(wrapped))

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    half = shard_fully(copy.deepcopy(plain), mp_policy=policy)
    y = half(shard(rank))
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert {buffer.dtype for buffer in buffers(half)} == {torch.float32, torch.int64}
    torch.testing.assert_close(
        buffers(half)[0], buffers(_after_one_step(plain, rank))[0], rtol=0.05, atol=0.01
    )

    again = compile_(shard_fully(copy.deepcopy(plain)))
    assert_close([again(shard(rank))], [copy.deepcopy(plain)(shard(rank))])
    torch._dynamo.reset()


def _after_one_step(model: nn.Module, rank: int) -> nn.Module:
    model = copy.deepcopy(model)
    model(shard(rank))
    return model


def checkpointed(rank: int) -> None:
    """Gradients of one step; the statistics move twice, as those of BatchNorm do."""
    plain = network()
    for reentrant in (True, False):
        model, twice = copy.deepcopy(plain), copy.deepcopy(plain)

        def run(x: Tensor, model: nn.Module = model, reentrant: bool = reentrant) -> Any:
            return checkpoint(model, x, use_reentrant=reentrant)

        x = shard(rank).requires_grad_()
        run(x).square().mean().backward()
        expected = train(copy.deepcopy(plain), shard(rank))[1:]
        assert_same([p.grad for p in model.parameters() if p.grad is not None], expected)
        for _ in range(2):
            twice(shard(rank))
        assert_same(buffers(model), buffers(twice))


def joined(rank: int) -> None:
    """Uneven numbers of batches: a training layer cannot shadow the others, so DDP raises."""
    model = DistributedDataParallel(network())

    def steps() -> None:
        with Join([model], throw_on_early_termination=True):
            for step in range(2 + rank):
                train(model, shard(rank, step))

    with pytest.raises(RuntimeError, match="exhausted"):
        steps()


def averaged(rank: int) -> None:
    """EMA of parameters and buffers is equal on all ranks."""
    model = DistributedDataParallel(network())
    ema = AveragedModel(model.module, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for step in range(2):
        train(model, shard(rank, step))
        ema.update_parameters(model.module)
    ema.module.eval()(shard(rank))
    for tensor in ema.module.state_dict().values():
        rows = [torch.empty_like(tensor) for _ in range(RANKS)]
        dist.all_gather(rows, tensor)
        assert torch.equal(rows[0], rows[1])


def mixed(rank: int) -> None:
    """autocast on CPU."""
    model = DistributedDataParallel(network())
    with torch.autocast("cpu", torch.bfloat16):
        y = model(shard(rank))
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32


CHECKS = [
    compiled,
    compiled_with_a_checkpoint,
    no_graph_breaks,
    compiled_steps_fail_together,
    compiled_data_parallel,
    data_parallel,
    saved_by_ranks,
    distributed_tensors,
    fully_sharded,
    checkpointed,
    averaged,
    mixed,
    joined,
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return torch_ranks.run(CHECKS, RANKS, tmp_path_factory.mktemp("ranks"), deadline=300.0)


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_on_two_ranks(check: str, outcomes: list[dict[str, str]]) -> None:
    torch_ranks.assert_passed(check, outcomes)
