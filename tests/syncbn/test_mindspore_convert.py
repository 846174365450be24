"""Networks converted to the MindSpore layer and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mindspore", reason="MindSpore is not installed")

import mindspore as ms
from mindspore import Tensor, mint, nn, ops

from syncbn.mindspore import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm
from tests.syncbn.mindspore_layers import forward, randn, step

PLAIN = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    mint.nn.BatchNorm1d,
    mint.nn.BatchNorm2d,
    mint.nn.BatchNorm3d,
)
OURS = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
OF_NN = ["gamma", "beta", "moving_mean", "moving_variance"]
SHAPES = {1: (6, 3), 2: (6, 3, 2, 2), 3: (6, 3, 2, 2, 1)}


class Derived(nn.BatchNorm2d):
    pass


def is_of_nn(cls: type) -> bool:
    return cls.__module__.startswith("mindspore.nn")


def shuffled(network: nn.Cell) -> nn.Cell:
    """The network, with parameters that differ from those of a new one and from each other."""
    for seed, parameter in enumerate(network.get_parameters()):
        if parameter.dtype == ms.float32:
            values = np.random.default_rng(seed).uniform(0.5, 2, parameter.shape)
            parameter.set_data(Tensor(values, ms.float32))
    return network


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cls", [*PLAIN, nn.SyncBatchNorm, mint.nn.SyncBatchNorm], ids=str)
def test_a_layer_keeps_what_it_has(cls: Any, training: bool) -> None:
    network = shuffled(nn.SequentialCell(nn.ReLU(), cls(3, eps=1e-3, momentum=0.75)))
    layer = network[1]
    network.set_train(training)
    layer.add_flags(mine=7)
    layer.remark = "of the user"
    before = {p.name.rpartition(".")[2]: p for p in network.get_parameters()}
    next(iter(before.values())).requires_grad = False
    learns = {id(p) for p in network.trainable_params()}
    assert convert_sync_batchnorm(network) is network
    assert type(network[1]) is SyncBatchNorm
    assert network[1] is layer
    assert (layer.training, layer.mine, layer.remark) == (training, 7, "of the user")
    assert (layer.num_features, layer.eps) == (3, 1e-3)
    assert layer.momentum == pytest.approx(0.25 if is_of_nn(cls) else 0.75)
    assert list(network.parameters_dict()) == [f"1.{name}" for name in OURS]
    after = {p.name.rpartition(".")[2]: p for p in network.get_parameters()}
    theirs = dict(zip(OURS, OF_NN, strict=False)) if is_of_nn(cls) else {}
    for name in OURS[:4]:
        assert after[name] is before[theirs.get(name, name)]
        assert getattr(layer, name) is after[name]
    assert {id(p) for p in network.trainable_params()} == learns


@pytest.mark.parametrize("mode", ["pynative", "graph"])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_a_converted_layer_computes_what_the_plain_one_does(dimensions: int, mode: str) -> None:
    cls = PLAIN[dimensions - 1]
    plain, converted = (shuffled(nn.SequentialCell(cls(3, momentum=0.75))) for _ in range(2))
    convert_sync_batchnorm(converted)
    shape = SHAPES[dimensions]
    for training in (True, False):
        plain.set_train(training)
        converted.set_train(training)
        x, dy = randn(*shape), randn(*shape, seed=1)
        expected, got = step(plain, x, dy, mode), step(converted, x, dy, mode)
        for one, other in ((expected.y, got.y), (expected.dx, got.dx)):
            np.testing.assert_allclose(one.asnumpy(), other.asnumpy(), rtol=1e-4, atol=1e-5)
    for one, other in zip(plain.get_parameters(), sorted_as_in_nn(converted), strict=True):
        np.testing.assert_allclose(one.asnumpy(), other.asnumpy(), rtol=1e-5)


def sorted_as_in_nn(network: nn.Cell) -> list[Any]:
    found = {name.rpartition(".")[2]: p for name, p in network.parameters_dict().items()}
    return [found[name] for name in ("running_mean", "running_var", "weight", "bias")]


@pytest.mark.parametrize("cls", PLAIN, ids=str)
def test_there_and_back_again(cls: Any) -> None:
    network = shuffled(nn.SequentialCell(cls(3, eps=1e-3, momentum=0.75, affine=True)))
    layer, before = network[0], dict(network.parameters_dict())
    convert_sync_batchnorm(network)
    assert revert_sync_batchnorm(network) is network
    assert network[0] is layer
    assert type(layer) is cls
    after = network.parameters_dict()
    assert set(after) == set(before)
    assert all(after[name] is parameter for name, parameter in before.items())
    if not is_of_nn(cls):
        assert repr(layer) == repr(cls(3, eps=1e-3, momentum=0.75))
    else:  # the others have no kernel on CPU
        x = randn(*SHAPES[PLAIN.index(cls) + 1])
        fresh = shuffled(nn.SequentialCell(cls(3, eps=1e-3, momentum=0.75))).set_train()
        got, expected = network.set_train()(x), fresh(x)
        assert np.array_equal(got.asnumpy(), expected.asnumpy())
        kept = [p.asnumpy() for p in network.get_parameters()]
        for one, other in zip(kept, fresh.get_parameters(), strict=True):
            np.testing.assert_allclose(one, other.asnumpy(), rtol=1e-6)


def test_a_shared_layer_stays_shared() -> None:
    norm = nn.BatchNorm2d(3)
    network = nn.SequentialCell(norm, nn.ReLU(), norm)
    convert_sync_batchnorm(network)
    assert network[0] is network[2] is norm
    assert type(norm) is SyncBatchNorm


def test_hooks_stay() -> None:
    network = nn.SequentialCell(nn.BatchNorm1d(3))
    seen = []
    handle = network[0].register_forward_hook(lambda cell, x, y: seen.append(type(cell)))
    convert_sync_batchnorm(network)
    network(randn(5, 3))
    handle.remove()
    network(randn(5, 3))
    assert seen == [SyncBatchNorm]


def test_a_compiled_network_is_compiled_again() -> None:
    network, x = shuffled(nn.SequentialCell(nn.BatchNorm1d(3))).set_train(), randn(5, 3)
    forward(network, x, "graph")
    convert_sync_batchnorm(network)
    forward(network, x, "graph")
    count = network[0].num_batches_tracked
    assert int(count.asnumpy()) == 1


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Derived(3), r"Derived: another class"),
        (nn.InstanceNorm2d(3), r"InstanceNorm2d: another class"),
        (nn.BatchNorm2d(3, use_batch_statistics=True), "use_batch_statistics=True"),
        (nn.BatchNorm3d(3, use_batch_statistics=False), "use_batch_statistics=False"),
    ],
    ids=str,
)
def test_one_warning_names_what_stays(layer: nn.Cell, reason: str) -> None:
    network = nn.SequentialCell(layer, nn.BatchNorm2d(3))
    kind = type(layer)
    with pytest.warns(UserWarning, match=rf"convert_sync_batchnorm left .*'0' \(.*{reason}") as got:
        convert_sync_batchnorm(network)
    assert len(got) == 1
    assert type(layer) is kind
    assert type(network[1]) is SyncBatchNorm


def test_a_replaced_construct_and_recompute_stay() -> None:
    network = nn.SequentialCell(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    object.__setattr__(network[0], "construct", lambda x: x)
    network[1].recompute()
    with pytest.warns(UserWarning, match=r"'0' .*construct was replaced.*'1' .*recompute\(\)"):
        convert_sync_batchnorm(network)


@pytest.mark.parametrize("function", [convert_sync_batchnorm, revert_sync_batchnorm])
def test_what_is_no_network(function: Callable[[Any], Any]) -> None:
    with pytest.raises(
        TypeError, match=r"network must be a mindspore\.nn\.Cell, got builtins\.int"
    ):
        function(3)


def test_nothing_is_half_converted() -> None:
    network = nn.SequentialCell(nn.BatchNorm2d(3), mint.nn.BatchNorm2d(3, momentum=1.5))
    with pytest.raises(ValueError, match=r"layer '1' \(.*BatchNorm2d\): momentum must be in"):
        convert_sync_batchnorm(network)
    with pytest.raises(RuntimeError, match=r"process_group .* needs communication"):
        convert_sync_batchnorm(network, [0])
    assert type(network[0]) is nn.BatchNorm2d


def test_revert_needs_a_class_for_what_was_no_plain_layer() -> None:
    network = nn.SequentialCell(nn.BatchNorm2d(3), SyncBatchNorm(3))
    convert_sync_batchnorm(network)
    with pytest.raises(ValueError, match=r"batch_norm must be given: layer '1' was not"):
        revert_sync_batchnorm(network)
    assert type(network[0]) is SyncBatchNorm
    with pytest.raises(TypeError, match=r"batch_norm must be one of mindspore\.nn"):
        revert_sync_batchnorm(network, nn.Dense)
    revert_sync_batchnorm(network, nn.BatchNorm1d)
    assert [type(cell) for cell in network] == [nn.BatchNorm2d, nn.BatchNorm1d]


def test_revert_leaves_what_mindspore_nn_has_not() -> None:
    network = nn.SequentialCell(
        SyncBatchNorm(3, momentum=None), SyncBatchNorm(3, track_running_stats=False)
    )
    with pytest.warns(UserWarning, match=r"'0' .*momentum is None.*'1' .*no running statistics"):
        revert_sync_batchnorm(network, nn.BatchNorm2d)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        revert_sync_batchnorm(network, mint.nn.BatchNorm2d)
    assert [type(cell) for cell in network] == [mint.nn.BatchNorm2d] * 2


def test_settings_survive_both_ways() -> None:
    layer = SyncBatchNorm(3, momentum=None, affine=False, dtype=ms.float16)
    layer.track_running_stats = False
    revert_sync_batchnorm(layer, mint.nn.BatchNorm2d)
    assert (layer.momentum, layer.weight, layer.track_running_stats) == (None, None, False)
    convert_sync_batchnorm(layer)
    assert type(layer) is SyncBatchNorm
    assert (layer.momentum, layer.weight, layer.track_running_stats) == (None, None, False)
    assert layer.running_mean.dtype == ms.float16
    before = layer.running_mean.asnumpy().copy()
    layer.set_train()(ops.ones((4, 3), ms.float16))
    assert np.array_equal(layer.running_mean.asnumpy(), before)
