"""Tools that trace, export, fuse, vectorize or differentiate a BatchNorm do it with the layer.

Each is used on the layer and on torch.nn.BatchNorm2d with the same state, and gives the same.
"""

from __future__ import annotations

import copy
import functools
import io
import itertools
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func  # type: ignore[attr-defined]
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.ao.quantization import fuse_modules
from torch.ao.quantization.fuser_method_mappings import fuse_conv_bn_relu
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from syncbn.torch import SyncBatchNorm, revert_sync_batchnorm
from tests.syncbn.torch_layers import make_layer, randn

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

X = randn(4, 3, 5, 2)
OTHER = randn(6, 3, 5, 2, seed=1)


def batch_norm_of(layer: SyncBatchNorm) -> nn.BatchNorm2d:
    """A BatchNorm2d with the same settings and state."""
    norm = nn.BatchNorm2d(
        layer.num_features,
        layer.eps,
        layer.momentum,
        layer.affine,
        layer.track_running_stats,
    )
    norm.load_state_dict(layer.state_dict())
    return norm.train(layer.training)


def network(norm: nn.Module) -> nn.Module:
    """A small network around a norm, always with the same weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.ReLU()).train(norm.training)


@pytest.fixture
def layer() -> SyncBatchNorm:
    return make_layer().eval()


class TestEval:
    """With running statistics it is plain batch normalization."""

    @pytest.mark.parametrize("frozen", [True, False])
    @pytest.mark.parametrize("grad", [True, False])
    def test_jit_trace_and_save(self, layer: SyncBatchNorm, grad: bool, frozen: bool) -> None:
        layer.requires_grad_(not frozen)
        with torch.set_grad_enabled(grad):
            traced = torch.jit.trace(layer, X)
            file = io.BytesIO()
            torch.jit.save(traced, file)
            file.seek(0)
            loaded = torch.jit.load(file)
            assert torch.equal(loaded(OTHER), layer(OTHER))
        kinds = {node.kind() for node in traced.inlined_graph.nodes()}
        assert "aten::batch_norm" in kinds

    def test_fx(self, layer: SyncBatchNorm) -> None:
        model = network(layer)
        traced = torch.fx.symbolic_trace(model)
        assert torch.equal(traced(OTHER), model(OTHER))

    def test_fx_follows_mode_and_settings(self, layer: SyncBatchNorm) -> None:
        """They are not those of the moment of tracing."""
        models = [network(norm.train()) for norm in (layer, batch_norm_of(layer))]
        traced = [torch.fx.symbolic_trace(model) for model in models]
        for model in (*models, *traced):
            torch.testing.assert_close(model.eval()(X), models[1].eval()(X))
        for model in traced:
            norm: Any = model.get_submodule("1")
            norm.momentum = 0.5
            model.train()(X)
        torch.testing.assert_close(traced[0].state_dict(), traced[1].state_dict())

    def test_fx_of_the_layer_itself(self, layer: SyncBatchNorm) -> None:
        assert torch.equal(torch.fx.symbolic_trace(layer)(OTHER), layer(OTHER))

    def test_fx_of_a_subclass(self) -> None:
        traced = torch.fx.symbolic_trace(network(_Doubled(3).eval()))
        expected = network(_Doubled(3).eval())(X)
        assert torch.equal(traced(X), expected)

    def test_fuse_conv_bn_eval(self, layer: SyncBatchNorm) -> None:
        model = network(layer)
        fused = nn.utils.fuse_conv_bn_eval(model[0], layer)  # type: ignore[index]
        expected = nn.utils.fuse_conv_bn_eval(model[0], batch_norm_of(layer))  # type: ignore[index]
        assert torch.equal(fused(X), expected(X))

    # Their tables name exact classes. docs/convert.md shows both ways.
    @pytest.mark.parametrize("way", ["revert", "mapping"])
    def test_fusion_for_quantization(self, layer: SyncBatchNorm, way: str) -> None:
        model = network(layer)
        theirs = network(batch_norm_of(layer))
        expected = fuse_modules(theirs, [["0", "1", "2"]])
        if way == "revert":
            model = revert_sync_batchnorm(model, nn.BatchNorm2d)
            fused = fuse_modules(model, [["0", "1", "2"]])
        else:
            mapping = {(nn.Conv2d, SyncBatchNorm, nn.ReLU): fuse_conv_bn_relu}
            custom = {"additional_fuser_method_mapping": mapping}
            fused = fuse_modules(model, [["0", "1", "2"]], fuse_custom_config_dict=custom)
        assert [type(m) for m in fused.modules()] == [type(m) for m in expected.modules()]
        assert torch.equal(fused(X), expected(X))

    # torch's exporters to ONNX use what torch deprecates.
    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    @pytest.mark.parametrize("frozen", [True, False])
    @pytest.mark.parametrize("dynamo", [True, False])
    def test_onnx(self, layer: SyncBatchNorm, dynamo: bool, frozen: bool, tmp_path: Path) -> None:
        for needed in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(needed, reason=f"{needed} is not installed")
        import onnxruntime

        model = network(layer.requires_grad_(not frozen))
        file = str(tmp_path / "network.onnx")
        names: Any = {"input_names": ["x"], "output_names": ["y"]}
        if dynamo:
            names["dynamic_shapes"] = ({0: torch.export.Dim("batch")},)
        else:
            names["dynamic_axes"] = {"x": {0: "batch"}}
        torch.onnx.export(model, (X,), file, dynamo=dynamo, **names)
        (y,) = onnxruntime.InferenceSession(file).run(None, {"x": OTHER.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(OTHER).detach())

    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize("dynamic", [True, False])
    def test_export(self, layer: SyncBatchNorm, dynamic: bool, strict: bool) -> None:
        shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
        exported = torch.export.export(layer, (X,), dynamic_shapes=shapes, strict=strict)
        x = OTHER if dynamic else X
        assert torch.equal(exported.module()(x), layer(x))

    def test_vmap(self, layer: SyncBatchNorm) -> None:
        batches = torch.stack([X, X + 1])
        expected = torch.stack([layer(x) for x in batches])
        torch.testing.assert_close(torch.vmap(layer)(batches), expected)

    def test_functional_transforms(self, layer: SyncBatchNorm) -> None:
        norm = batch_norm_of(layer)
        for transform in (
            lambda f: torch.func.grad(lambda x: f(x).square().sum())(X),
            lambda f: torch.func.jvp(f, (X,), (randn(*X.shape, seed=2),)),
            lambda f: torch.func.jacrev(f)(X),
            lambda f: torch.func.jacfwd(f)(X),
            lambda f: torch.func.hessian(lambda x: f(x).pow(3).sum())(X[:1]),
        ):
            torch.testing.assert_close(transform(layer), transform(norm))

    def test_batched_gradients(self, layer: SyncBatchNorm) -> None:
        gradients = []
        for module in (layer, batch_norm_of(layer)):
            x = X.clone().requires_grad_()
            rows = torch.stack([randn(*X.shape, seed=2), randn(*X.shape, seed=3)])
            gradients.append(torch.autograd.grad(module(x), x, rows, is_grads_batched=True))
        torch.testing.assert_close(gradients[0], gradients[1])

    @pytest.mark.parametrize("affine", [True, False])
    def test_second_derivative(self, affine: bool) -> None:
        layer = make_layer(dtype=torch.float64, affine=affine).eval()
        inputs = [t.detach().requires_grad_() for t in (X.double(), *layer.parameters())]
        assert torch.autograd.gradgradcheck(_call(layer), inputs)

    def test_second_derivative_with_constant_dy(self, layer: SyncBatchNorm) -> None:
        for ours, theirs in zip(
            _penalty_gradients(layer), _penalty_gradients(batch_norm_of(layer)), strict=True
        ):
            torch.testing.assert_close(ours, theirs)

    def test_meta(self, layer: SyncBatchNorm) -> None:
        y = copy.deepcopy(layer).to("meta")(X.to("meta"))
        assert y.is_meta
        assert y.shape == X.shape

    def test_fake_tensors(self, layer: SyncBatchNorm) -> None:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            y = layer(mode.from_tensor(X))
        assert y.shape == X.shape


class _Doubled(SyncBatchNorm):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


# Layers that normalize with the statistics of the batch.
BATCH: dict[str, Callable[..., SyncBatchNorm]] = {
    "training": make_layer,
    "untracked training": functools.partial(make_layer, track_running_stats=False),
    "untracked eval": lambda *c, **given: make_layer(*c, track_running_stats=False, **given).eval(),
}


class TestBatchStatistics:
    """In training, and in eval without running statistics."""

    @pytest.mark.parametrize("affine", [True, False])
    @pytest.mark.parametrize("kind", BATCH)
    def test_second_derivative(self, kind: str, affine: bool) -> None:
        layer = BATCH[kind](2, dtype=torch.float64, affine=affine, momentum=0)
        small = X[:3, :2, :2]
        for x in (small, small.to(memory_format=torch.channels_last), small[:, :, 0, 0]):
            inputs = [t.detach().requires_grad_() for t in (x.double(), *layer.parameters())]
            assert torch.autograd.gradgradcheck(_call(layer), inputs)

    @pytest.mark.parametrize("kind", BATCH)
    def test_second_derivative_with_constant_dy(self, kind: str) -> None:
        layer = BATCH[kind]()
        expected = _penalty_gradients(batch_norm_of(layer))
        assert all(gradient is not None for gradient in expected[:3])
        for ours, theirs in zip(_penalty_gradients(layer), expected, strict=True):
            if theirs is None:
                assert ours is None or not ours.any()
            else:
                torch.testing.assert_close(ours, theirs)

    @pytest.mark.parametrize("frozen", ["input", "parameters"])
    def test_second_derivative_of_a_frozen_part(self, frozen: str) -> None:
        layer = make_layer(dtype=torch.float64)
        gradients = []
        for norm in (layer, batch_norm_of(layer).double()):
            x = X.double().requires_grad_(frozen != "input")
            norm.requires_grad_(frozen != "parameters")
            dy = randn(*X.shape, dtype=torch.float64, seed=4).requires_grad_()
            wanted = [tensor for tensor in (x, *norm.parameters()) if tensor.requires_grad]
            first = torch.autograd.grad(norm(x), wanted, dy, create_graph=True)
            loss = torch.stack([tensor.square().sum() for tensor in first]).sum()
            inputs = [dy] if frozen == "input" else [dy, x]
            gradients.append(torch.autograd.grad(loss, inputs))
        torch.testing.assert_close(gradients[0], gradients[1])

    def test_third_derivative(self) -> None:
        x = X.clone().requires_grad_()
        (first,) = torch.autograd.grad(make_layer()(x).pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="SyncBatchNorm can be differentiated twice"):
            torch.autograd.grad(second.sum(), x)

    def test_fx(self) -> None:
        model = network(make_layer())
        traced = torch.fx.symbolic_trace(copy.deepcopy(model))
        assert torch.equal(traced(OTHER), model(OTHER))
        assert _equal_state(traced, model)

    def test_meta(self) -> None:
        layer, x = make_layer().to("meta"), X.to("meta").requires_grad_()
        y = layer(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert y.is_meta
        assert y.shape == dx.shape == X.shape
        with pytest.raises(ValueError, match="num_features=3"):
            layer(X.to("meta")[:, :2])

    def test_fake_tensors(self) -> None:
        with FakeTensorMode() as mode:
            layer, x = make_layer(), mode.from_tensor(X).requires_grad_()
            y = layer(x)
            (dx,) = torch.autograd.grad(y.sum(), x)
            with pytest.raises(ValueError, match="num_features=3"):
                layer(x[:, :2])
        assert y.shape == dx.shape == X.shape

    @pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 2), (0, 3, 5, 2), (4, 3, 1, 1)])
    @pytest.mark.parametrize("channels_last", [True, False])
    def test_fake_results_are_like_real_ones(
        self, channels_last: bool, shape: tuple[int, ...]
    ) -> None:
        """Shapes, dtypes and strides; compiled code relies on them."""
        x = randn(*shape).bfloat16()
        if channels_last:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        layer = make_layer()
        buffers = (layer.running_mean, layer.running_var, layer.num_batches_tracked)
        settings = (3, 1e-5, 0.1, "float32", True, "", "alone", "auto")
        statistics = (x, layer.weight, *buffers, *settings)
        mean, invstd, n = torch.ops.syncbn.statistics(*statistics)
        given = (x, layer.weight, layer.bias, mean, invstd, n, "alone", "auto")
        backward = (x, x, layer.weight, mean, invstd, n, True, "alone", "auto")
        twice = (x, layer.weight, layer.bias, x, x, layer.weight, mean, invstd, n, "alone")
        for name, arguments in (
            ("statistics", statistics),
            ("normalize", given),
            ("backward", backward),
            ("double_backward", twice),
        ):
            operator = getattr(torch.ops.syncbn, name).default
            torch.library.opcheck(operator, arguments, test_utils="test_schema")
            torch.library.opcheck(operator, arguments, test_utils="test_faketensor")

    def test_functional_transforms(self) -> None:
        layer = make_layer(track_running_stats=False, dtype=torch.float64)
        norm = batch_norm_of(layer).double()
        x = X.double()
        for transform in (
            lambda f: torch.func.grad(lambda x: f(x).pow(3).sum())(x),
            lambda f: torch.func.jvp(f, (x,), (randn(*X.shape, seed=2).double(),)),
            lambda f: torch.func.jacrev(f)(x),
            lambda f: torch.func.jacfwd(f)(x),
            lambda f: torch.func.hessian(lambda x: f(x).pow(3).sum())(x[:1]),
            lambda f: torch.vmap(f, randomness="error")(torch.stack([x, x + x.square()])),
        ):
            torch.testing.assert_close(transform(layer), transform(norm))

    def test_functional_call(self) -> None:
        """It moves the buffers that it is given, and not those of the layer."""
        layer = make_layer()
        given = [{k: v.clone() for k, v in layer.state_dict().items()} for _ in range(2)]
        results = [
            torch.func.functional_call(module, state, (X,))
            for module, state in zip((layer, batch_norm_of(layer)), given, strict=True)
        ]
        torch.testing.assert_close(results[0], results[1])
        torch.testing.assert_close(given[0], given[1])
        assert given[0]["num_batches_tracked"] == 1
        assert layer.num_batches_tracked == 0

    @pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr")  # linearize does it
    @pytest.mark.parametrize("kind", BATCH)
    def test_forward_mode(self, kind: str) -> None:
        """Without torch.func; the running statistics move by the values."""
        layer = BATCH[kind]()
        norm = batch_norm_of(layer)
        tangents = []
        for module in (layer, norm):
            with forward_ad.dual_level():
                y = module(forward_ad.make_dual(X, randn(*X.shape, seed=2)))
                tangents.append(forward_ad.unpack_dual(y).tangent)
        torch.testing.assert_close(tangents[0], tangents[1])
        torch.testing.assert_close(layer.state_dict(), norm.state_dict())
        _, linear = torch.func.linearize(layer, X)
        torch.testing.assert_close(linear(randn(*X.shape, seed=2)), tangents[1])

    def test_vmap_with_running_statistics_says_what_to_do(self) -> None:
        with pytest.raises(RuntimeError, match="track_running_stats=False"):
            torch.vmap(make_layer())(torch.stack([X, X]))

    def test_jit_trace_is_refused_in_words(self) -> None:
        with pytest.raises(RuntimeError, match=r"torch\.jit: call eval\(\) first"):
            torch.jit.trace(make_layer(), X)

    def test_jit_trace_without_running_statistics(self) -> None:
        layer = BATCH["untracked eval"]()
        torch.testing.assert_close(torch.jit.trace(layer, X)(OTHER), layer(OTHER))

    def test_export_without_running_statistics(self) -> None:
        """It has no operator of this package, which other tools would not find."""
        layer = BATCH["untracked eval"]()
        exported = torch.export.export(layer, (X,))
        torch.testing.assert_close(exported.module()(X), layer(X))
        assert "syncbn" not in str(exported.graph)

    def test_functional_transforms_check_the_input(self) -> None:
        layer = make_layer(track_running_stats=False)
        with pytest.raises(ValueError, match="num_features=3"):
            torch.vmap(layer)(X.unsqueeze(0)[:, :, :2])
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            torch.vmap(layer)(torch.ones(2, 1, 3))

    def test_batched_gradients(self) -> None:
        layer = make_layer()
        gradients = []
        for module in (layer, batch_norm_of(layer)):
            x = X.clone().requires_grad_()
            rows = torch.stack([randn(*X.shape, seed=2), randn(*X.shape, seed=3)])
            wanted = [x, *module.parameters()]
            gradients.append(torch.autograd.grad(module(x), wanted, rows, is_grads_batched=True))
        torch.testing.assert_close(gradients[0], gradients[1])

    def test_gradients_in_vmap(self) -> None:
        layer = make_layer()
        rows = torch.stack([randn(*X.shape, seed=seed) for seed in (2, 3, 4)])
        gradients = []
        for module in (layer, batch_norm_of(layer)):
            x = X.clone().requires_grad_()
            y, wanted = module(x), [x, *module.parameters()]
            of_row = functools.partial(torch.autograd.grad, y, wanted, retain_graph=True)
            gradients.append(torch.vmap(lambda row, of=of_row: of(row))(rows))
        torch.testing.assert_close(gradients[0], gradients[1])

    def test_hessian(self) -> None:
        layer = make_layer(dtype=torch.float64)
        read_out = randn(*X.shape, dtype=torch.float64, seed=5)
        hessians = [
            torch.autograd.functional.hessian(lambda x, f=f: (f(x) * read_out).sum(), X.double())
            for f in (layer, batch_norm_of(layer).double())
        ]
        assert hessians[1].norm() > 1
        torch.testing.assert_close(hessians[0], hessians[1])

    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize("dynamic", [True, False])
    def test_export(self, dynamic: bool, strict: bool) -> None:
        layer = make_layer()
        shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
        exported = torch.export.export(layer, (X,), dynamic_shapes=shapes, strict=strict)
        x = OTHER if dynamic else X
        module = exported.module()
        assert torch.equal(module(x), layer(x))
        assert _equal_state(module, layer)


@pytest.mark.parametrize("training", [True, False])
def test_inductor(training: bool) -> None:
    """One graph, for all batch sizes."""
    layer = make_layer(momentum=None).train(training)
    again = torch.compile(copy.deepcopy(layer), fullgraph=True, dynamic=True)
    for batch in (4, 6):
        x = randn(batch, 3, 2).requires_grad_()
        gradients = []
        for module in (layer, again):
            y = module(x)
            wanted = [x, *module.parameters()]  # type: ignore[attr-defined]
            gradients.append([y, *torch.autograd.grad(y.pow(3).sum(), wanted)])
        torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(layer.state_dict(), again._orig_mod.state_dict())  # type: ignore[attr-defined]
    torch._dynamo.reset()


class _Branches(nn.Module):
    """Norms that do not depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(SyncBatchNorm(3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([norm(x * place) for place, norm in enumerate(self.norms, 1)]).sum()


def test_compiled_collectives_keep_their_order() -> None:
    """Else Inductor orders those of parallel branches by the shapes of each rank."""
    graphs: list[torch.fx.Graph] = []

    def keep(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(module.graph)
        return make_boxed_func(module)

    model = torch.compile(_Branches(), backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    model(X.clone().requires_grad_()).backward()
    forward, backward = graphs
    for graph, name in ((forward, "statistics_in_order"), (backward, "backward_in_order")):
        calls = [node for node in graph.nodes if _calls(node, f"syncbn.{name}.default")]
        assert len(calls) == 3
        for before, after in itertools.pairwise(calls):
            order = after.kwargs["order"] if after.kwargs else after.args[-1]
            assert order.target is operator.getitem
            assert order.args[0] is before
    torch._dynamo.reset()


def test_a_compiled_step_launches_what_an_eager_one_does() -> None:
    """The graph has the three operators of a step, whose order costs only an allocation."""
    operations: list[list[str]] = []

    def keep(module: torch.fx.GraphModule, _: Any) -> Any:
        called = [node for node in module.graph.nodes if node.op == "call_function"]
        called = [node for node in called if node.target is not operator.getitem]
        targets = (
            node.args[0] if "functionalized" in str(node.target) else node.target for node in called
        )
        operations.append([str(target) for target in targets])
        return make_boxed_func(module)

    model = torch.compile(make_layer(), backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    y = model(X.clone().requires_grad_())
    y.backward(torch.ones_like(y))
    assert operations == [
        [
            "aten.empty.memory_format",
            "syncbn.statistics_in_order.default",
            "syncbn.normalize.default",
        ],
        ["syncbn.backward_in_order.default"],
    ]
    torch._dynamo.reset()


def _calls(node: torch.fx.Node, operation: str) -> bool:
    """Whether the node is that operator, or a call of it that returns what it changes in place."""
    functional = str(node.target) == "auto_functionalized_v2"
    return str(node.args[0] if functional else node.target) == operation


def _equal_state(ours: nn.Module, theirs: nn.Module) -> bool:
    first, second = ours.state_dict(), theirs.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def _call(layer: SyncBatchNorm) -> Callable[..., Tensor]:
    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        names = ("weight", "bias")[: len(parameters)]
        given = dict(zip(names, parameters, strict=True))
        y: Tensor = torch.func.functional_call(layer, given, (x,))
        return y

    return call


def _penalty_gradients(norm: nn.Module) -> list[Any]:
    """Gradients of a penalty on the gradient of the input, whose dy is a constant."""
    model = network(norm)
    x = X.clone().requires_grad_()
    (dx,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    parameters = [*model.parameters()]
    return list(torch.autograd.grad(dx.square().sum(), parameters, allow_unused=True))


class TestEvalOfOtherDevicesAndVersions:
    """What PyTorch's batch norm does not take, or does wrong, on a device or in a version."""

    def test_an_eps_of_0_does_not_reach_the_function_that_refuses_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any, eps: float, **__: Any) -> Any:  # as PyTorch 2.11 does
            raise ValueError(f"batch_norm eps must be positive, but got {eps}")

        monkeypatch.setattr(torch.nn.functional, "batch_norm", refuse)
        make_layer(eps=0.0).eval()(X)

    @pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 5, 2), (2, 3, 2, 2, 2, 2)], ids=str)
    def test_at_most_5_dimensions_reach_the_kernel(
        self, layer: SyncBatchNorm, shape: tuple[int, ...]
    ) -> None:
        with BatchNormCalls() as calls:
            assert layer(randn(*shape)).shape == shape
        assert [values.dim() <= 5 for values in calls.inputs] == [True]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize("frozen", [True, False])
    def test_cuda_adds_up_the_gradients_of_halves_in_float32(
        self, dtype: torch.dtype, frozen: bool
    ) -> None:
        with FakeTensorMode(), BatchNormCalls() as calls:
            layer = SyncBatchNorm(3, device="cuda").eval().requires_grad_(not frozen)
            y = layer(torch.empty(4, 3, 5, dtype=dtype, device="cuda"))
        assert y.dtype == dtype
        expected = dtype if frozen else torch.float32
        assert [values.dtype for values in calls.inputs] == [expected]


class BatchNormCalls(TorchFunctionMode):
    """Notes the inputs of PyTorch's batch norm, and answers for CUDA's."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.batch_norm:
            self.inputs.append(args[0])
            if args[0].is_cuda:
                return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))
