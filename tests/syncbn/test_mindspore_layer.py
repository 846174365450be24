"""The MindSpore layer, as far as one process shows it, and branches of a graph on two ranks.

Nothing here makes MindSpore wait for each operation, as the conformance suite does.
"""

from __future__ import annotations

import copy
import dataclasses
import doctest
import inspect
import itertools
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mindspore", reason="MindSpore is not installed")

import mindspore as ms
from mindspore import Tensor, nn, ops
from mindspore.communication import GlobalComm
from mindspore.graph.api import _pynative_executor

from syncbn import protocol, reference
from syncbn.conformance import targets
from syncbn.conformance.case import Case, ExpectedError
from syncbn.conformance.case import Step as CaseStep
from syncbn.conformance.data import grad_output, initial_state, shard
from syncbn.conformance.pool import RankPool
from syncbn.conformance.ranks.substitutes import mindspore as substitutes
from syncbn.mindspore import (
    SyncBatchNorm,
    backends,
    checkpoints,
    convert,
    create_group,
    groups,
    settings,
)
from syncbn.mindspore import layer as layer_module
from syncbn.mindspore import step as step_module
from syncbn.mindspore.backends import aclnn, composed
from syncbn.reference import bounds, formulas
from tests.syncbn.mindspore_layers import (
    MODES,
    assert_step,
    assert_tracked,
    assert_untouched,
    assert_within,
    dtype_name,
    forward,
    make_layer,
    numpy_of,
    randn,
    reference_of,
    same,
    state_of,
    step,
)

DTYPES = (ms.float16, ms.float32, ms.float64)


@pytest.fixture(autouse=True)
def tidy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("SYNCBN_BACKEND", "SYNCBN_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    yield
    ms.set_context(mode=ms.PYNATIVE_MODE)
    _pynative_executor.clear_res()  # an error inside of a gradient leaves traces


class TestConstruction:
    def test_signature(self) -> None:
        parameters = list(inspect.signature(SyncBatchNorm).parameters.values())
        assert [(p.name, p.default) for p in parameters] == [
            ("num_features", inspect.Parameter.empty),
            ("eps", 1e-5),
            ("momentum", 0.1),
            ("affine", True),
            ("track_running_stats", True),
            ("process_group", None),
            ("dtype", None),
            ("backend", "auto"),
        ]
        keyword = inspect.Parameter.KEYWORD_ONLY
        assert [p.name for p in parameters if p.kind is keyword] == ["backend"]

    @pytest.mark.parametrize("dtype", [None, *DTYPES], ids=str)
    @pytest.mark.parametrize("track", [True, False])
    @pytest.mark.parametrize("affine", [True, False])
    def test_parameters(self, affine: bool, track: bool, dtype: Any) -> None:
        layer = SyncBatchNorm(3, affine=affine, track_running_stats=track, dtype=dtype)
        learned = {"weight": 1.0, "bias": 0.0} if affine else {}
        tracked = {"running_mean": 0.0, "running_var": 1.0} if track else {}
        counted = {"num_batches_tracked": 0} if track else {}
        parameters = layer.parameters_dict()
        assert list(parameters) == list(learned | tracked | counted)
        assert [p.name for p in layer.trainable_params()] == list(learned)
        for name, value in (learned | tracked).items():
            assert same(parameters[name], Tensor(np.full(3, value), dtype or ms.float32))
        for name in counted:
            assert same(parameters[name], Tensor(0, ms.int64))
        for name in {"weight", "bias", "running_mean", "running_var"} - set(parameters):
            assert getattr(layer, name) is None

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"num_features": 3.0}, TypeError, r"num_features must be an int, got 3\.0"),
            ({"num_features": 0}, ValueError, "num_features must be at least 1, got 0"),
            ({"eps": 1}, TypeError, "eps must be a float, got 1"),
            ({"eps": -1e-5}, ValueError, "eps must be zero or positive, got -1e-05"),
            ({"momentum": 1.5}, ValueError, r"momentum must be in \[0, 1\], got 1.5"),
            ({"affine": 1}, TypeError, "affine must be a bool, got 1"),
            ({"track_running_stats": None}, TypeError, "track_running_stats .* got None"),
            ({"dtype": ms.int64}, TypeError, "dtype must be .* Float32.* got mindspore.int64"),
            ({"dtype": "float32"}, TypeError, "dtype .* got 'float32'"),
            ({"process_group": {0, 1}}, TypeError, r"process_group .* got \{0, 1\}"),
            ({"process_group": 3}, TypeError, "process_group .* got 3"),
            ({"process_group": False}, TypeError, "process_group .* got False"),
            (
                {"process_group": "pair"},
                RuntimeError,
                "process_group .*communication: call mindspore",
            ),
            ({"process_group": ""}, RuntimeError, "process_group .*communication: call mindspore"),
            ({"process_group": [0]}, RuntimeError, "process_group .*communication: call mindspore"),
            ({"process_group": []}, RuntimeError, "process_group .*communication: call mindspore"),
            ({"backend": "cudnn"}, ValueError, "backend .* auto, composed, aclnn, got 'cudnn'"),
            ({"backend": None}, ValueError, "backend .* auto, composed, aclnn, got None"),
        ],
    )
    def test_refused(self, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            SyncBatchNorm(**({"num_features": 3} | arguments))

    def test_numpy_arguments(self) -> None:
        layer = SyncBatchNorm(np.int64(3), np.float32(1e-3), np.float32(0.25))  # type: ignore[arg-type]
        assert type(layer.num_features) is int
        for mode in ("pynative", "jit"):
            assert_step(layer.set_train(), randn(5, 3), randn(5, 3, seed=1), mode)

    def test_new_one_is_in_eval_mode(self) -> None:
        layer = SyncBatchNorm(3)
        assert not layer.training
        before = state_of(layer)
        assert_step(layer, randn(5, 3), randn(5, 3, seed=1))
        assert_untouched(layer, before)

    @pytest.mark.parametrize(
        "module", [layer_module, convert, checkpoints], ids=lambda m: m.__name__
    )
    def test_examples_in_docstrings(self, module: Any) -> None:
        found = doctest.testmod(module)
        assert found.attempted
        assert not found.failed

    def test_repr(self) -> None:
        shown = SyncBatchNorm(3, affine=False).extend_repr()
        assert shown == "3, eps=1e-05, momentum=0.1, affine=False, track_running_stats=True"
        layer = SyncBatchNorm(3, momentum=None, backend="composed")
        assert layer.extend_repr().endswith(", backend='composed'")
        assert repr(layer) == f"SyncBatchNorm({layer.extend_repr()})"

    def test_deepcopy(self) -> None:
        layer = make_layer(momentum=None, backend="composed")
        before = state_of(layer)
        clone = copy.deepcopy(layer)
        assert_untouched(clone, before)
        assert (repr(clone), clone.training) == (repr(layer), True)
        for mode in ("pynative", "jit"):
            assert_step(clone, randn(4, 3), randn(4, 3, seed=1), mode)
        assert_untouched(layer, before)


class Pair(nn.Cell):
    """Two layers, one of them in a SequentialCell."""

    def __init__(self) -> None:
        super().__init__()
        self.a = SyncBatchNorm(3)
        self.rest = nn.SequentialCell(nn.ReLU(), SyncBatchNorm(3))

    def construct(self, x: Tensor) -> Tensor:
        return self.rest(self.a(x))


class TestNetwork:
    def test_names(self) -> None:
        learned, tracked = (
            ["weight", "bias"],
            ["running_mean", "running_var", "num_batches_tracked"],
        )
        places = ("a", "rest.1")
        network = Pair()
        assert list(network.parameters_dict()) == [
            f"{place}.{name}" for place in places for name in (*learned, *tracked)
        ]
        assert [p.name for p in network.trainable_params()] == [
            f"{place}.{name}" for place in places for name in learned
        ]

    @pytest.mark.parametrize("mode", ["pynative", "graph"])
    def test_set_train_switches_every_layer(self, mode: str) -> None:
        network, alone = Pair(), Pair()
        for training in (True, False, True):
            network.set_train(training)
            before = state_of(network)
            taken_y = forward(network, randn(5, 3), mode)
            hidden = alone.a.set_train(training)(randn(5, 3))
            y = alone.rest[1].set_train(training)(ops.relu(hidden))
            assert np.allclose(taken_y.asnumpy(), y.asnumpy(), rtol=1e-5, atol=1e-6)
            for name, parameter in alone.parameters_dict().items():
                found = network.parameters_dict()[name].asnumpy()
                assert np.allclose(found, parameter.asnumpy(), rtol=1e-5, atol=1e-6), name
            if not training:
                assert_untouched(network, before)

    @pytest.mark.parametrize("mode", ["jit"])
    def test_compiled_is_what_pynative_is(self, mode: str) -> None:
        eager, compiled = Pair().set_train(), Pair().set_train()
        for seed in range(2):
            x, dy = randn(5, 3, 2, seed=seed), randn(5, 3, 2, seed=9)
            ours, theirs = step(eager, x, dy), step(compiled, x, dy, mode)
            for one, other in (
                (ours.y, theirs.y),
                (ours.dx, theirs.dx),
                *zip(ours.gradients.values(), theirs.gradients.values(), strict=True),
                *zip(eager.get_parameters(), compiled.get_parameters(), strict=True),
            ):
                assert np.allclose(one.asnumpy(), other.asnumpy(), rtol=1e-5, atol=1e-6)

    def test_checkpoint(self, tmp_path: Path) -> None:
        network = Pair().set_train()
        network(randn(5, 3))
        before = state_of(network)
        file = str(tmp_path / "network.ckpt")
        ms.save_checkpoint(network, file)
        loaded = ms.load_checkpoint(file)
        assert set(loaded) == set(before)
        fresh = Pair()
        assert ms.load_param_into_net(fresh, loaded, strict_load=True) == ([], [])
        assert_untouched(fresh, before)

    @pytest.mark.parametrize("mode", ["pynative", "jit"])
    def test_layer_twice(self, mode: str) -> None:
        layer = make_layer()
        expected_layer = reference_of(layer)

        def twice(x: Tensor) -> Tensor:
            return layer(layer(x))

        cell = _Calls(twice, layer)
        y = forward(cell, randn(5, 3), mode)
        (hidden,) = expected_layer.forward([numpy_of(randn(5, 3))])
        (expected,) = expected_layer.forward([hidden.value])
        assert np.allclose(numpy_of(y), expected.value, atol=1e-5)
        assert expected_layer.num_batches_tracked == 2
        tracked = layer.num_batches_tracked
        assert tracked is not None
        assert int(tracked.asnumpy()) == 2
        assert np.allclose(numpy_of(layer.running_var), expected_layer.running_var.value, atol=1e-6)


class _Calls(nn.Cell):
    def __init__(self, function: Any, *cells: nn.Cell) -> None:
        super().__init__()
        self.inner = nn.CellList(list(cells))
        self.function = function

    def construct(self, x: Tensor) -> Tensor:
        return self.function(x)


# Shape and dtype of the input, arguments of the layer.
CALLS: dict[str, tuple[tuple[int, ...], Any, dict[str, Any]]] = {
    "2-D": ((5, 3), ms.float32, {}),
    "3-D": ((5, 3, 2), ms.float32, {"momentum": 0}),
    "4-D": ((3, 3, 2, 4), ms.float32, {"momentum": 1.0}),
    "5-D": ((2, 3, 2, 4, 1), ms.float32, {"eps": 0.5}),
    "6-D": ((2, 3, 2, 4, 1, 3), ms.float32, {}),
    "one channel": ((5, 1, 2), ms.float32, {"eps": 0.0}),
    "momentum None": ((5, 3, 2), ms.float32, {"momentum": None}),
    "not affine": ((5, 3, 2), ms.float32, {"affine": False}),
    "untracked": ((5, 3, 2), ms.float32, {"track_running_stats": False}),
    "neither": ((5, 3), ms.float32, {"affine": False, "track_running_stats": False}),
    "float16": ((5, 3, 2), ms.float16, {}),
    "all float16": ((5, 3, 2), ms.float16, {"dtype": ms.float16}),
    "float64": ((5, 3, 2), ms.float64, {"dtype": ms.float64}),
    "many": ((300, 3, 40), ms.float16, {}),
}


# What takes another way through the compiler; to compile a step takes about a second.
COMPILED = [
    *itertools.product(("not affine", "momentum None", "float16", "float64"), ("jit",)),
    *itertools.product(("5-D", "untracked", "float64"), ("graph",)),
]


class TestValues:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize(("call", "mode"), [*((c, "pynative") for c in CALLS), *COMPILED])
    def test_within_bounds(self, call: str, training: bool, mode: str) -> None:
        shape, dtype, arguments = CALLS[call]
        layer = make_layer(shape[1], **arguments).set_train(training)
        for seed in range(2 if mode == "pynative" else 1):
            x, dy = (randn(*shape, dtype=dtype, seed=s) for s in (seed, 9))
            assert_step(layer, x, dy, mode)

    def test_momentum_near_one_with_float32_statistics(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As on Ascend. In float32, 1 - 0.999 has four digits left."""
        monkeypatch.setattr(layer_module, "statistics_dtype", lambda: ms.float32)
        monkeypatch.setattr(settings, "number", lambda value: Tensor(value, ms.float32))
        layer = make_layer(momentum=0.999)
        before = {name: numpy_of(value) for name, value in state_of(layer).items()}
        zeros = ops.zeros((3,), ms.float32)
        layer._update_running(zeros, zeros, Tensor(8.0, ms.float32))
        for name in ("running_mean", "running_var"):
            got, expected = numpy_of(getattr(layer, name)), (1 - 0.999) * before[name]
            np.testing.assert_allclose(got, expected, rtol=2.0**-22)

    @pytest.mark.parametrize("training", [True, False])
    def test_mean_far_above_deviation(self, training: bool) -> None:
        layer = make_layer().set_train(training)
        assert_step(layer, 1e4 + randn(500, 3, 20), randn(500, 3, 20, seed=1))

    @pytest.mark.parametrize(
        ("shape", "mode"),
        [((0, 3), "pynative"), ((5, 3, 2, 0), "pynative"), ((0, 3), "jit")],
    )
    @pytest.mark.parametrize("track", [True, False])
    @pytest.mark.parametrize("training", [True, False])
    def test_empty(self, training: bool, track: bool, shape: tuple[int, ...], mode: str) -> None:
        layer = make_layer(track_running_stats=track).set_train(training)
        before = state_of(layer)
        x = Tensor(np.zeros(shape), ms.float16)
        taken = step(layer, x, x, mode)
        assert same(taken.y, x)
        assert same(taken.dx, x)
        for gradient in taken.gradients.values():
            assert same(gradient, Tensor(np.zeros(3), ms.float32))
        assert_untouched(layer, before)

    @pytest.mark.parametrize("mode", ["pynative", "jit"])
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("frozen", ["weight", "bias"])
    def test_frozen_parameter(self, frozen: str, training: bool, mode: str) -> None:
        layer = make_layer().set_train(training)
        getattr(layer, frozen).requires_grad = False
        taken = assert_step(layer, randn(5, 3), randn(5, 3, seed=1), mode)
        assert set(taken.gradients) == {"weight", "bias"} - {frozen}

    @pytest.mark.parametrize("mode", ["pynative", "graph"])
    def test_without_gradients(self, mode: str) -> None:
        layer, clone = make_layer(), make_layer()
        y = forward(layer, randn(5, 3), mode)
        expected = assert_step(clone, randn(5, 3), randn(5, 3, seed=1), mode)
        assert same(y, expected.y)
        assert_untouched(layer, state_of(clone))

    @pytest.mark.parametrize("mode", ["pynative", "jit"])
    def test_untracked_eval_takes_the_statistics_of_its_input(self, mode: str) -> None:
        layer = make_layer(track_running_stats=False)
        trained = assert_step(layer, randn(5, 3), randn(5, 3, seed=1), mode)
        evaluated = assert_step(layer.set_train(False), randn(5, 3), randn(5, 3, seed=1), mode)
        assert same(trained.y, evaluated.y)
        assert same(trained.dx, evaluated.dx)
        assert same(
            forward(layer, ops.ones((1, 3)), mode), layer.parameters_dict()["bias"].reshape(1, 3)
        )

    @pytest.mark.parametrize("dtype", [ms.float32, ms.float64], ids=str)
    def test_a_training_step_after_eval_does_not_disturb_its_backward(self, dtype: Any) -> None:
        layer, x = make_layer(dtype=dtype), randn(5, 3, dtype=dtype)

        def evaluate(x: Tensor) -> Tensor:
            return ops.square(layer.set_train(False)(x)).sum()

        def evaluate_and_train(x: Tensor) -> Tensor:
            y = layer.set_train(False)(x)
            layer.set_train()(x)
            return ops.square(y).sum()

        weights = layer.trainable_params()
        dx, expected = ms.grad(evaluate, 0, weights)(x)
        again, got = ms.grad(evaluate_and_train, 0, weights)(x)
        assert all(map(same, (again, *got), (dx, *expected)))

    def test_backward_does_not_see_a_later_training_step(self) -> None:
        layer, x = make_layer(dtype=ms.float64), randn(5, 3, dtype=ms.float64)

        def once(x: Tensor) -> Tensor:
            return ops.square(layer(x)).sum()

        def with_another(x: Tensor) -> Tensor:
            y = layer(x)
            layer(x + 1)
            return ops.square(y).sum()

        assert same(ms.grad(once)(x), ms.grad(with_another)(x))


def penalty_of(layer: Any) -> Any:
    """x -> sum of squares of a gradient in x and of gradients of the parameters, by `layer(x)`."""

    def loss(x: Tensor) -> Tensor:
        y = layer(x)
        return (y * y * y).sum() + (y * ops.sin(x)).sum()

    weights = layer.trainable_params()
    first = ms.grad(loss, 0, weights or None)

    def penalty(x: Tensor) -> Tensor:
        if not weights:
            dx = first(x)
            return (dx * dx * dx).sum()
        dx, (grad_weight, grad_bias) = first(x)
        of_parameters = (grad_weight * grad_weight * grad_bias).sum()
        return (dx * dx * dx).sum() + of_parameters

    return penalty


class TestSecondDerivative:
    """The gradient of a penalty on gradients, compared with PyTorch's own BatchNorm in float64."""

    @pytest.mark.parametrize(
        ("training", "mode"), [(True, "pynative"), *((False, mode) for mode in MODES)]
    )
    @pytest.mark.parametrize("affine", [True, False])
    def test_is_that_of_batch_norm(self, affine: bool, training: bool, mode: str) -> None:
        layer = make_layer(dtype=ms.float64, affine=affine).set_train(training)
        weights = layer.trainable_params()
        x = randn(4, 3, 2, dtype=ms.float64)
        expected = _second_derivative_of_torch(layer, x)
        ms.set_context(mode=ms.GRAPH_MODE if mode == "graph" else ms.PYNATIVE_MODE)
        second = ms.grad(penalty_of(layer), 0, weights or None)
        found = (ms.jit(second) if mode == "jit" else second)(x)
        found = (found[0], *found[1]) if weights else (found,)
        for name, got, value in zip(("x", "weight", "bias"), found, expected, strict=False):
            np.testing.assert_allclose(got.asnumpy(), value, rtol=1e-9, atol=1e-9, err_msg=name)

    @pytest.mark.parametrize("mode", ["jit", "graph"])
    def test_is_refused_in_a_graph_that_trains(self, mode: str) -> None:
        layer = make_layer()
        ms.set_context(mode=ms.GRAPH_MODE if mode == "graph" else ms.PYNATIVE_MODE)
        second = ms.grad(penalty_of(layer))
        with pytest.raises(RuntimeError, match=r"SyncBatchNorm has no second .* in PyNative mode"):
            (ms.jit(second) if mode == "jit" else second)(randn(4, 3))

    def test_the_third_is_refused(self) -> None:
        layer = make_layer()
        second = ms.grad(penalty_of(layer))

        def third(x: Tensor) -> Tensor:
            return second(x).sum()

        with pytest.raises(RuntimeError, match=r"SyncBatchNorm has no third derivative"):
            ms.grad(third)(randn(4, 3))

    def test_of_an_empty_input(self) -> None:
        layer = make_layer(dtype=ms.float64)
        found, _ = ms.grad(penalty_of(layer), 0, layer.trainable_params())(
            Tensor(np.zeros((0, 3)), ms.float64)
        )
        assert found.shape == (0, 3)

    @pytest.mark.parametrize("shapes", [((5, 3, 2), (2, 3, 4)), ((5, 3, 2), (0, 3, 2))])
    def test_of_a_group(self, shapes: tuple[tuple[int, ...], ...]) -> None:
        """It is that of one BatchNorm on the whole batch, also of uneven and empty shards."""
        torch = pytest.importorskip("torch", reason="PyTorch, the other opinion, is not installed")
        target = targets.parse("mindspore:tests/syncbn/mindspore_layers.py:FirstGradient")
        steps = (CaseStep(shapes, "train"),)
        layer = {"num_features": 3}
        case = Case("FWD-1", "second", 2, layer, steps, ("y", "grad_input"), state="initial")
        with RankPool(target, 2) as pool:
            outcome = pool.run(case)
        assert outcome.details == ""
        xs, dys = ([make(case, 0, rank) for rank in range(2)] for make in (shard, grad_output))
        values, cotangents = (
            torch.tensor(np.concatenate([np.moveaxis(a, 1, 2).reshape(-1, 3) for a in arrays]))
            for arrays in (xs, dys)
        )
        values.requires_grad = True
        y = torch.nn.BatchNorm1d(3, dtype=torch.float64)(values)
        (dx,) = torch.autograd.grad((y**3).sum(), values, create_graph=True)
        (second,) = torch.autograd.grad((dx * cotangents).sum(), values)
        found: dict[str, list[Any]] = {"y": [], "grad_input": []}
        for answer in outcome.answers:
            assert answer is not None
            assert [s.get("error") for s in answer.content["steps"]] == [None]
            for name, rows in found.items():
                rows.append(np.moveaxis(answer.arrays[f"0/{name}"], 1, 2).reshape(-1, 3))
        for name, expected in (("y", dx.detach()), ("grad_input", second)):
            got = np.concatenate(found[name])
            np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-5, err_msg=name)


def _second_derivative_of_torch(layer: SyncBatchNorm, x: Tensor) -> list[Any]:
    torch = pytest.importorskip("torch", reason="PyTorch, the other opinion, is not installed")
    other = torch.nn.BatchNorm1d(3, affine=layer.affine, dtype=torch.float64)
    other.train(layer.training)
    state = {name: torch.tensor(p.asnumpy()) for name, p in layer.parameters_dict().items()}
    other.load_state_dict(state)
    x = torch.tensor(x.asnumpy(), requires_grad=True)
    y = other(x)
    loss = (y**3).sum() + (y * x.sin()).sum()
    inputs = (x, *other.parameters())
    dx, *of_parameters = torch.autograd.grad(loss, inputs, create_graph=True)
    penalty = (dx**3).sum()
    if of_parameters:
        penalty = penalty + (of_parameters[0] ** 2 * of_parameters[1]).sum()
    return [
        gradient.numpy() if gradient is not None else 0.0
        for gradient in torch.autograd.grad(penalty, inputs, allow_unused=True)
    ]


class TestLiveAttributes:
    """What is set after construction holds from the next step on, also in a compiled graph."""

    @pytest.mark.parametrize("mode", ["pynative", "graph"])
    def test_training_follows(self, mode: str) -> None:
        layer = make_layer()
        for changes in (
            {},
            {"eps": 0.5},
            {"momentum": None},
            {"momentum": 0.75, "eps": 2.0},
            {"momentum": 0},
            {"track_running_stats": False},
            {"track_running_stats": True, "momentum": 1.0},
            {"momentum": None},
        ):
            for name, value in changes.items():
                setattr(layer, name, value)
                assert getattr(layer, name) == value
            expected_layer, x = reference_of(layer), randn(5, 3, seed=len(str(changes)))
            before = state_of(layer)
            y = forward(layer, x, mode)
            (expected,) = expected_layer.forward([numpy_of(x)])
            assert_within(f"y after {changes}", y, expected)
            if layer.track_running_stats:
                assert_tracked(layer, expected_layer)
            else:
                assert_untouched(layer, before)

    @pytest.mark.parametrize("mode", ["pynative", "graph"])
    def test_eval_follows(self, mode: str) -> None:
        layer, x = make_layer().set_train(False), randn(5, 3)
        forward(layer, x, mode)
        layer.eps = 0.5
        (expected,) = reference_of(layer).forward([numpy_of(x)], training=False)
        y = forward(layer, x, mode)
        assert_within("y", y, expected)
        layer.track_running_stats = False
        assert same(forward(layer, x, mode), y)  # as in mint.nn: they exist, so eval takes them

    def test_a_jitted_step_follows(self) -> None:
        layer, x = make_layer(), randn(5, 3)

        @ms.jit
        def loss(x: Tensor) -> Tensor:
            return ops.square(layer(x)).sum()

        loss(x)
        layer.eps = 0.5
        (expected,) = reference_of(layer).forward([numpy_of(x)])
        got = float(loss(x).asnumpy())
        assert got == pytest.approx(np.square(expected.value).sum(), rel=1e-5)

    def test_a_copy_has_settings_of_its_own(self) -> None:
        layer = make_layer()
        clone = copy.deepcopy(layer)
        clone.eps, clone.momentum = 0.5, None
        assert (layer.eps, layer.momentum) == (1e-5, 0.1)
        x = randn(5, 3)
        (hidden,) = reference_of(layer).forward([numpy_of(x)])
        (expected,) = reference_of(clone).forward([hidden.value])
        network = nn.SequentialCell(layer, clone).set_train()
        got = forward(network, x, "graph").asnumpy()
        assert np.allclose(got, expected.value, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        ("name", "value", "error", "message"),
        [
            ("eps", 1, TypeError, "eps must be a float, got 1"),
            ("eps", -1.0, ValueError, r"eps must be zero or positive, got -1\.0"),
            ("momentum", 1.5, ValueError, r"momentum must be in \[0, 1\], got 1\.5"),
            ("momentum", "x", TypeError, "momentum must be a number or None, got 'x'"),
            ("track_running_stats", 1, TypeError, "track_running_stats must be a bool, got 1"),
            ("process_group", 3, TypeError, "process_group .* got 3"),
            ("backend", "cudnn", ValueError, "backend .* got 'cudnn'"),
        ],
    )
    def test_refused(self, name: str, value: Any, error: type[Exception], message: str) -> None:
        layer = make_layer()
        before = getattr(layer, name)
        with pytest.raises(error, match=message):
            setattr(layer, name, value)
        assert getattr(layer, name) == before
        assert_step(layer, randn(5, 3), randn(5, 3, seed=1))

    def test_statistics_that_do_not_exist_cannot_be_tracked(self) -> None:
        layer = make_layer(track_running_stats=False)
        with pytest.raises(ValueError, match=r"track_running_stats .* built without"):
            layer.track_running_stats = True
        assert not layer.track_running_stats

    def test_a_pruned_layer(self) -> None:
        layer = make_layer()
        for name in ("weight", "bias", "running_mean", "running_var"):
            parameter = getattr(layer, name)
            kept = Tensor(parameter.asnumpy()[1:])
            learns = parameter.requires_grad
            setattr(layer, name, ms.Parameter(kept, name=name, requires_grad=learns))
        with pytest.raises(TypeError, match="num_features must be an int, got '2'"):
            layer.num_features = "2"  # type: ignore[assignment]
        layer.num_features = 2
        assert_step(layer, randn(5, 2), randn(5, 2, seed=1))
        with pytest.raises(ValueError, match="num_features=2 channels"):
            layer(randn(5, 3))

    def test_a_group_may_come_late(self) -> None:
        target = targets.parse("mindspore:tests/syncbn/mindspore_layers.py:LateGroups")
        shapes = ((5, 3, 2), (2, 3, 2))
        steps = (CaseStep(shapes, "train"),)
        case = Case("FWD-5", "late", 2, {"num_features": 3}, steps, ("y",), state="initial")
        with RankPool(target, 2) as pool:
            outcome = pool.run(case)
        xs = [shard(case, 0, rank) for rank in range(2)]
        expected = reference.SyncBatchNorm(3).forward(xs)
        for rank, answer in enumerate(outcome.answers):
            assert answer is not None
            assert [s.get("error") for s in answer.content["steps"]] == [None]
            got = answer.arrays["0/y"] / 2
            np.testing.assert_allclose(got, expected[rank].value, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("mode", ["pynative", "graph"])
    def test_communication_that_begins_late(
        self, mode: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A graph refuses to train with the group that it would keep."""
        layer, x = make_layer(), randn(5, 3)
        forward(layer.set_train(False), x, mode)
        group = groups.Group((0,), None, 0)
        monkeypatch.setattr(GlobalComm, "INITED", True)
        monkeypatch.setattr(layer_module, "resolve", lambda process_group: group)
        layer.set_train()
        if mode == "graph":
            with pytest.raises(RuntimeError, match=r"layer\.process_group = None"):
                forward(layer, x, mode)
            layer.process_group = None
        (expected,) = reference_of(layer).forward([numpy_of(x)])
        assert_within("y", forward(layer, x, mode), expected)

    def test_a_compiled_graph_keeps_its_group_and_backend(self) -> None:
        """They cannot be changed there, so that is refused."""
        layer, x = make_layer(), randn(5, 3)
        layer.process_group, layer.backend = None, "composed"
        assert layer.backend == "composed"
        assert_step(layer, x, randn(5, 3, seed=1))
        forward(layer, x, "graph")
        for name, value in (("process_group", None), ("backend", "auto"), ("num_features", 2)):
            with pytest.raises(RuntimeError, match=f"{name} cannot be set: .* compiled .* new"):
                setattr(layer, name, value)


class TestWrongInput:
    @pytest.mark.parametrize(
        ("track", "training", "mode"),
        [
            *(
                (track, training, "pynative")
                for track in (True, False)
                for training in (True, False)
            ),
            (True, True, "jit"),
            (True, False, "graph"),
        ],
    )
    @pytest.mark.parametrize(
        ("shape", "dtype", "error", "message"),
        [
            ((3,), ms.float32, ValueError, r"input must have at least 2 dimensions.* got 1 in"),
            ((5, 4), ms.float32, ValueError, r"num_features=3 channels.* got 4 in shape \(5, 4\)"),
            ((5, 0), ms.float32, ValueError, r"at least 1 channel, got 0 in shape \(5, 0\)"),
            ((5, 3), ms.int32, TypeError, "one of the dtypes .* got int32"),
            ((5, 3), ms.float64, TypeError, "parameters, float32 .*got float64"),
        ],
        ids=["1-D", "4 channels", "no channel", "int32", "float64"],
    )
    def test_raises_and_changes_nothing(
        self,
        shape: tuple[int, ...],
        dtype: Any,
        error: type[Exception],
        message: str,
        track: bool,
        training: bool,
        mode: str,
    ) -> None:
        layer = make_layer(track_running_stats=track).set_train(training)
        before = state_of(layer)
        with pytest.raises(error, match=message):
            forward(layer, Tensor(np.ones(shape), dtype), mode)
        assert_untouched(layer, before)
        assert_step(layer, randn(5, 3), randn(5, 3, seed=1))

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("wrong", [None, 1.0, np.ones((5, 3)), [1.0]], ids=repr)
    def test_no_tensor(self, wrong: Any, training: bool) -> None:
        layer = make_layer().set_train(training)
        with pytest.raises(TypeError, match=r"input must be a mindspore\.Tensor"):
            layer(wrong)

    @pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)])
    def test_one_value(self, shape: tuple[int, ...]) -> None:
        layer = make_layer()
        before = state_of(layer)
        with pytest.raises(ValueError, match="more than 1 value per channel when training"):
            step(layer, ops.ones(shape), ops.ones(shape))
        assert_untouched(layer, before)

    @pytest.mark.parametrize("mode", ["jit"])
    def test_one_value_in_a_graph(self, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A graph does not look, but if it is asked to."""
        quiet = make_layer()
        assert np.isfinite(forward(quiet, ops.ones((1, 3)), mode).asnumpy()).all()
        assert np.isfinite(quiet.running_var.asnumpy()).all()
        monkeypatch.setenv("SYNCBN_DEBUG", "1")
        layer = make_layer()
        before = state_of(layer)
        with pytest.raises(ValueError, match="more than 1 value per channel when training"):
            forward(layer, ops.ones((1, 3)), mode)
        assert_untouched(layer, before)


class TestFailingTogether:
    @pytest.mark.parametrize("place", ["stats", "y", "reduce_grad", "dx"])
    def test_out_of_memory_on_one_rank(self, place: str) -> None:
        target = targets.parse("mindspore:tests/syncbn/mindspore_layers.py:OutOfMemory")
        steps = (CaseStep(((5, 3), (4, 3)), "train"),)
        layer = {"num_features": 3, "place": place}
        case = Case("ERR-9", "memory", 2, layer, steps, ("y", "grad_input"), state="initial")
        with RankPool(target, 2) as pool:
            outcome = pool.run(case)
        errors = []
        for answer in outcome.answers:
            assert answer is not None
            errors.append(answer.content["steps"][0]["error"])
        assert errors[0]["types"][0] == "PeerError"
        kind, text = (
            ("RuntimeError", "Allocate memory failed")
            if place == "y"
            else ("MemoryError", "no memory for 4 bytes")
        )
        assert f"rank 1 failed: {kind}: {text}" in errors[0]["message"]
        assert errors[1]["types"][0] == kind

    def test_layers_that_differ_in_a_graph(self) -> None:
        """The suite sets SYNCBN_DEBUG=1 for a step with an error."""
        target = targets.parse("syncbn.mindspore", mode="graph")
        good = CaseStep(((5, 3), (4, 3)), "train")
        error = ExpectedError("ValueError", (1,))
        settings = protocol.Settings._fields
        with RankPool(target, 2) as pool:
            for step, own in (
                (CaseStep(((5, 3), (4, 4)), "train", error=error), {"num_features": 4}),
                (dataclasses.replace(good, error=error), {"eps": 0.5}),
                (dataclasses.replace(good, error=error), {"momentum": None}),
            ):
                case = Case(
                    "ERR-9", "differs", 2, {"num_features": 3}, (step,), ("y",), layers=((1, own),)
                )
                for answer in pool.run(case).answers:
                    assert answer is not None
                    message = answer.content["steps"][0]["error"]["message"]
                    assert f"must have the same {', '.join(settings)}, but" in message
                    assert "rank 1 differs: take the step in PyNative" in message

    def test_a_wide_layer_that_differs(self) -> None:
        """Its statistics do not go into the first message, whose length all ranks share."""
        wide = step_module.INLINE_CHANNELS + 3
        target = targets.parse("syncbn.mindspore")
        shapes = ((5, wide), (4, wide))
        case = Case(
            "ERR-9", "wide", 2, {"num_features": wide}, (CaseStep(shapes, "train"),), ("y",)
        )
        narrow = (CaseStep(((5, wide), (4, 3)), "train"),)
        differs = Case(
            "ERR-9",
            "differs",
            2,
            {"num_features": wide},
            narrow,
            ("y",),
            layers=((1, {"num_features": 3}),),
        )
        with RankPool(target, 2) as pool:
            agreeing, differing = pool.run(case), pool.run(differs)
        xs = [shard(case, 0, rank) for rank in range(2)]
        state = initial_state(case)
        weight, bias = state["weight"], state["bias"]
        expected = reference.SyncBatchNorm(wide, weight=weight, bias=bias).forward(xs)
        for rank, (good, bad) in enumerate(zip(agreeing.answers, differing.answers, strict=True)):
            assert good is not None
            assert bad is not None
            got = good.arrays["0/y"]
            np.testing.assert_allclose(got, expected[rank].value, rtol=1e-4, atol=1e-5)
            message = bad.content["steps"][0]["error"]["message"]
            assert f"same num_features on all ranks, got {wide} on rank 0; 3 on rank 1" in message


class TestWithMindSpore:
    """The layer under what users put around it."""

    @pytest.mark.parametrize("mode", ["pynative", "graph"])
    @pytest.mark.parametrize("training", [True, False])
    def test_to_float(self, training: bool, mode: str) -> None:
        cast, plain = (make_layer().set_train(training) for _ in range(2))
        cast.to_float(ms.float16)
        x, dy = randn(5, 3), randn(5, 3, seed=1)
        taken = step(cast, x, dy, mode)
        expected = assert_step(plain, x, dy, mode)
        assert same(taken.y, expected.y)
        assert same(taken.dx, expected.dx)
        assert all(map(same, taken.gradients.values(), expected.gradients.values()))
        assert_untouched(cast, state_of(plain))

    @pytest.mark.parametrize("mode", ["pynative", "graph"])
    @pytest.mark.parametrize("level", ["O1", "O2", "O3", "auto"])
    def test_amp(
        self, level: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)  # MindSpore writes what it rewrites where it runs
        network = DenseAndNorm().set_train()
        layer = network.norm
        network = ms.amp.auto_mixed_precision(network, level)
        forward(network, randn(500, 3), mode).asnumpy()
        assert np.allclose(layer.running_var.asnumpy(), 0.9, atol=0.5)
        assert layer.running_var.dtype == ms.float32

    @pytest.mark.parametrize("mode", ["pynative", "graph"])
    def test_model_train(self, mode: str) -> None:
        """mindspore.Model trains a network with it as with BatchNorm1d."""
        batches = [
            (randn(8, 4, seed=i).asnumpy(), np.arange(8, dtype=np.int32) % 2) for i in (1, 2)
        ]
        weights = []
        ms.set_context(mode=ms.GRAPH_MODE if mode == "graph" else ms.PYNATIVE_MODE)
        for norm in (SyncBatchNorm(5), nn.BatchNorm1d(5)):
            first, last = (
                nn.Dense(*size, weight_init=randn(*size[::-1]), bias_init="zeros")
                for size in ((4, 5), (5, 2))
            )
            network = nn.SequentialCell(first, norm, nn.ReLU(), last)
            loss = nn.SoftmaxCrossEntropyWithLogits(sparse=True, reduction="mean")
            optimizer = nn.SGD(network.trainable_params(), 0.1)
            data = ms.dataset.GeneratorDataset(batches, ["x", "label"], shuffle=False)
            ms.Model(network, loss, optimizer).train(2, data, dataset_sink_mode=False)
            weights.append([first.weight.asnumpy(), last.weight.asnumpy()])
        for ours, theirs in zip(*weights, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(("mode", "forwards"), [("pynative", 2), ("graph", 1)])
    def test_recompute(self, mode: str, forwards: int) -> None:
        """In a graph MindSpore recomputes operations, so that the statistics move once."""
        plain, recomputed = make_layer(), make_layer()
        network = nn.SequentialCell(recomputed, nn.ReLU())
        recomputed.recompute()
        x, dy = randn(5, 3), randn(5, 3, seed=1)
        expected = step(nn.SequentialCell(plain, nn.ReLU()), x, dy, mode)
        taken = step(network, x, dy, mode)
        assert same(taken.dx, expected.dx)
        assert int(recomputed.num_batches_tracked) == forwards  # type: ignore[arg-type]
        theirs = nn.BatchNorm1d(3).set_train()
        theirs.recompute()
        step(nn.SequentialCell(theirs, nn.ReLU()), x, dy, mode)
        kept = theirs.moving_mean.asnumpy() / x.asnumpy().mean(0)
        assert np.allclose(kept, 1 - 0.9**forwards, rtol=1e-5)  # as MindSpore's own does

    @pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 5)], ids=str)
    @pytest.mark.parametrize("affine", [True, False])
    def test_onnx(self, affine: bool, shape: tuple[int, ...], tmp_path: Path) -> None:
        layer, x = make_layer(affine=affine).set_train(False), randn(*shape)
        file = tmp_path / "layer.onnx"
        ms.onnx.export(layer, x, file_name=str(file), input_names=["x"], output_names=["y"])
        runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        (y,) = runtime.InferenceSession(str(file)).run(["y"], {"x": x.asnumpy()})
        (expected,) = reference_of(layer).forward([numpy_of(x)], training=False)
        assert_within("y", Tensor(y), expected)

    def test_mindir(self, tmp_path: Path) -> None:
        network, x = DenseAndNorm().set_train(False), randn(5, 3)
        network.norm.eps = 0.5
        file = str(tmp_path / "network.mindir")
        ms.export(network, x, file_name=file, file_format="MINDIR")
        loaded = nn.GraphCell(ms.load(file))
        expected = forward(network, x, "graph")
        assert np.allclose(forward(loaded, x, "graph").asnumpy(), expected.asnumpy(), atol=1e-6)
        with pytest.raises(RuntimeError, match=r"eps cannot be set: .* exported, .* new layer"):
            network.norm.eps = 1.0

    @pytest.mark.parametrize("momentum", [0.3, None])
    def test_mindir_in_training(self, momentum: float | None, tmp_path: Path) -> None:
        network, x = DenseAndNorm().set_train(), randn(5, 3)
        network.norm.momentum = momentum
        file = str(tmp_path / "network.mindir")
        ms.export(network, x, file_name=file, file_format="MINDIR")
        loaded = nn.GraphCell(ms.load(file))
        expected = forward(network, x, "graph")
        assert np.allclose(forward(loaded, x, "graph").asnumpy(), expected.asnumpy(), atol=1e-6)
        moved = {parameter.name: parameter.asnumpy() for parameter in loaded.get_parameters()}
        for parameter in network.get_parameters():
            assert np.allclose(moved[parameter.name], parameter.asnumpy(), atol=1e-6)
        with pytest.raises(
            RuntimeError, match=r"momentum cannot be set: .* exported, .* new layer"
        ):
            network.norm.momentum = 0.5


class TestDynamicShapes:
    def test_eval(self) -> None:
        layer = make_layer().set_train(False)
        network = nn.SequentialCell(layer, nn.ReLU())
        network.set_inputs(Tensor(shape=[None, 3, None], dtype=ms.float32))
        for shape in ((4, 3, 2), (5, 3, 6)):
            x = randn(*shape)
            expected = np.maximum(forward(layer, x, "pynative").asnumpy(), 0)
            assert np.allclose(forward(network, x, "graph").asnumpy(), expected, atol=1e-6)

    def test_training_is_refused(self) -> None:
        network = nn.SequentialCell(make_layer(), nn.ReLU()).set_train()
        network.set_inputs(Tensor(shape=[None, 3], dtype=ms.float32))
        with pytest.raises(ValueError, match=r"must be known .* got \(None, 3\)"):
            forward(network, randn(4, 3), "graph")


class DenseAndNorm(nn.Cell):
    """A cell of a user, whose source amp level O1 rewrites."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Dense(3, 3)
        self.norm = SyncBatchNorm(3)

    def construct(self, x: Tensor) -> Tensor:
        return self.norm(self.dense(x))


class TestBackend:
    def test_names(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert backends.load("auto") is backends.load("composed") is composed
        monkeypatch.setenv("SYNCBN_BACKEND", "aclnn")
        assert backends.load("auto") is aclnn
        monkeypatch.setenv("SYNCBN_BACKEND", "auto")
        assert backends.load("auto") is composed

    @pytest.mark.parametrize("name", ["", "cudnn"])
    def test_unknown_in_the_environment(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.setenv("SYNCBN_BACKEND", name)
        message = f"SYNCBN_BACKEND must be one of auto, composed, aclnn, got '{name}'"
        with pytest.raises(ValueError, match=message):
            SyncBatchNorm(3)
        SyncBatchNorm(3, backend="composed")

    def test_aclnn_needs_its_kernels(self) -> None:
        layer = make_layer(backend="aclnn")
        with pytest.raises(RuntimeError, match="BatchNormStats"):
            layer(randn(5, 3)).asnumpy()

    def test_aclnn(self) -> None:
        """On substitutes for its kernels, which stay in a process of their own."""
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            process.submit(_check_aclnn).result()

    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
    @pytest.mark.parametrize("shape", [(1, 3, 1), (7, 1, 5), (129, 65, 1), (129, 3, 500)], ids=str)
    def test_composed(self, shape: tuple[int, int, int], dtype: Any) -> None:
        """All five operations on (R, C, S), one after the other, each within its bound."""
        x = (1 + 2 * randn(*shape, dtype=ms.float64)).astype(dtype)
        dy = randn(*shape, dtype=dtype, seed=1)
        rows, channels, spatial = shape
        weight = Tensor(np.linspace(-2, 2, channels), ms.float32)
        bias = Tensor(np.linspace(3, -1, channels), ms.float32)
        u = reference.Precision(dtype_name(dtype)).u
        matrix, dy_matrix = (numpy_of(t).transpose(1, 0, 2).reshape(channels, -1) for t in (x, dy))
        exact = bounds.of_stats(matrix, *formulas.stats(matrix), u)
        exact_sums = formulas.reduce_grad(dy_matrix, matrix, exact.mean.value)
        sum_bounds = bounds.of_reduce_grad(dy_matrix, matrix, exact.mean, exact_sums[0], 1, u)
        expected_layer = reference.SyncBatchNorm(
            channels, track_running_stats=False, weight=numpy_of(weight), bias=numpy_of(bias)
        )
        (exact_y,) = expected_layer.forward([numpy_of(x)], training=False, dtype=dtype_name(dtype))
        (exact_gradients,) = expected_layer.backward([numpy_of(dy)])

        mean, var = composed.stats(x)
        assert_within("mean", mean, exact.mean)
        assert_within("var", var, exact.var)
        count = Tensor([float(rows * spatial)], ms.float64)
        mean, _, invstd, n = composed.combine(
            mean.reshape(1, -1), var.reshape(1, -1), count, backends.number(expected_layer.eps)
        )
        y = composed.normalize(x, mean, invstd, weight, bias)
        assert_within("y", y, exact_y)
        sums = composed.reduce_grad(dy, x, mean)
        for name, got, value, bound in zip(
            ("sum_dy", "sum_dy_xmu"), sums, exact_sums, sum_bounds, strict=True
        ):
            assert_within(name, got, reference.Bounded(value, bound))
        dx = composed.input_grad(dy, x, mean, invstd, weight, *sums, n)
        assert_within("dx", dx, exact_gradients.input)
        assert y.dtype == dx.dtype == dtype

    def test_combine(self) -> None:
        parts = [5 + numpy_of(randn(3, size, dtype=ms.float64, seed=size)) for size in (1, 40, 300)]
        whole = np.concatenate(parts, axis=1)
        expected = bounds.of_combine(
            whole, *formulas.stats(whole), 3, reference.Precision("float64").u
        )
        moments = [formulas.stats(part) for part in parts]
        moments.insert(1, (np.full(3, 7.0), np.full(3, 9.0)))  # an empty part may have any values
        means, variances = (Tensor(np.stack(m)) for m in zip(*moments, strict=True))
        counts = Tensor([1.0, 0.0, 40.0, 300.0], ms.float64)
        mean, var, invstd, n = composed.combine(means, variances, counts, backends.number(0.25))
        assert_within("mean", mean, expected.mean)
        assert_within("var", var, expected.var)
        assert np.array_equal(invstd.asnumpy(), 1 / np.sqrt(var.asnumpy() + 0.25))
        assert n == 341


def _check_aclnn() -> None:
    ms.set_device("CPU")
    substitutes.install()
    for training, (shape, dtype, arguments) in itertools.product((True, False), CALLS.values()):
        if dtype == ms.float64 or "momentum" in arguments:
            continue  # it has no float64; the momentum is not the backend's
        layer = make_layer(shape[1], backend="aclnn", **arguments).set_train(training)
        assert_step(layer, randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1))
    far = make_layer(backend="aclnn")
    assert_step(far, 1e4 + randn(500, 3), randn(500, 3, seed=1))
    small = make_layer(backend="aclnn")
    assert_step(small, 1e-6 * randn(500, 3), randn(500, 3, seed=1))


class TestGroups:
    def test_without_communication(self) -> None:
        with pytest.raises(RuntimeError, match=r"process_group .*communication: call"):
            create_group("pair", [0, 1])
        with pytest.raises(TypeError, match=r"name must be a str or None, got 7 of type int"):
            create_group(7, [0, 1])  # type: ignore[arg-type]
        assert groups.resolve(None) is groups.ALONE

    @pytest.mark.parametrize("mode", MODES)
    def test_float64_travels_in_three_words(self, mode: str) -> None:
        """Exactly, all over float32's normal numbers; compiled code has no others."""
        values = np.random.default_rng(0).uniform(-2, 2, 2000)
        values += np.sign(values)
        scales = np.ldexp(1.0, np.linspace(-126, 125, values.size).astype(int))
        specials = [0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 2**53 - 1.0, 1 + 2**-52]
        sent = np.concatenate([values * scales, specials])
        received = forward(_Journey(), Tensor(sent, ms.float64), mode).asnumpy()
        assert np.array_equal(received, sent, equal_nan=True)

    def test_beyond_float32(self) -> None:
        sent = np.array([1e300, -1e300, 1e-300])
        assert _Journey()(Tensor(sent)).asnumpy().tolist() == [np.inf, -np.inf, 0.0]


class _Journey(nn.Cell):
    """A table of one row."""

    def construct(self, values: Tensor) -> Tensor:
        return groups._join(groups._split(values).reshape(1, -1))[0]


@pytest.fixture(scope="module")
def branches() -> Iterator[RankPool]:
    target = "mindspore:tests/syncbn/mindspore_layers.py:Branches"
    with RankPool(targets.parse(target, mode="graph"), 2) as ranks:
        yield ranks


class TestBranches:
    """y = c(a(x) + b(2 x)) on two ranks, whose graphs may reorder what does not depend."""

    @pytest.mark.parametrize("mode", ["train", "eval"])
    def test_equal_graphs_give_what_pynative_does(self, branches: RankPool, mode: str) -> None:
        eager, compiled = self.run(branches, ((5, 3, 2), (5, 3, 2)), mode)
        for rank in range(2):
            assert set(eager[rank]) == set(compiled[rank])
            for name, expected in eager[rank].items():
                got = compiled[rank][name]
                assert np.allclose(got, expected, rtol=1e-4, atol=1e-5), (rank, name)

    @pytest.mark.parametrize("shapes", [((0, 3, 2), (5, 3, 2)), ((5, 3, 2), (0, 3, 2))])
    def test_an_empty_rank(self, branches: RankPool, shapes: tuple[tuple[int, ...], ...]) -> None:
        """Graphs that differ may lose gradients to NaN, but never to another number."""
        eager, compiled = self.run(branches, shapes, "train")
        for rank in range(2):
            for name, expected in eager[rank].items():
                got = compiled[rank][name]
                close = np.isclose(got, expected, rtol=1e-4, atol=1e-5)
                lost = np.isnan(got) & ("grad" in name)
                assert (close | lost).all(), (rank, name)

    def run(
        self, pool: RankPool, shapes: tuple[tuple[int, ...], ...], mode: str
    ) -> list[list[dict[str, Any]]]:
        """What each rank got, in PyNative and compiled."""
        found = []
        for eager in (True, False):
            layer = {"num_features": 3, "eager": eager}
            checks = ("y", "grad_input", "running_mean", "running_var")
            steps = (CaseStep(shapes, mode), CaseStep(shapes, mode))
            case = Case("FWD-1", "branches", 2, layer, steps, checks, state="initial")
            outcome = pool.run(case)
            assert outcome.details == ""
            answers = []
            for answer in outcome.answers:
                assert answer is not None
                assert [s.get("error") for s in answer.content["steps"]] == [None, None]
                assert len(answer.arrays) == 8
                answers.append(answer.arrays)
            found.append(answers)
        return found
