"""Converting a model's layers to SyncBatchNorm and back."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from syncbn.torch import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm
from syncbn.torch.convert import BatchNorm
from tests.syncbn.torch_layers import assert_untouched, randn, state_of

KINDS: list[tuple[type[Any], tuple[int, ...]]] = [
    (nn.BatchNorm1d, (5, 3)),
    (nn.BatchNorm1d, (5, 3, 4)),
    (nn.BatchNorm2d, (5, 3, 2, 2)),
    (nn.BatchNorm3d, (5, 3, 2, 1, 2)),
    (nn.SyncBatchNorm, (5, 3, 2)),
    (BatchNorm, (5, 3, 2)),
]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"eps": 0.5, "momentum": None},
    {"affine": False},
    {"track_running_stats": False},
    {"dtype": torch.float64},
    {"device": "meta"},
]


class Apex(nn.modules.batchnorm._BatchNorm):
    """As apex.parallel.SyncBatchNorm looks from outside."""

    def __init__(self, num_features: int, fuse_relu: bool = False) -> None:
        super().__init__(num_features)
        self.process_group, self.channel_last, self.fuse_relu = None, False, fuse_relu


Apex.__module__ = "apex.parallel.optimized_sync_batchnorm"
Apex.__name__ = Apex.__qualname__ = "SyncBatchNorm"


class Derived(nn.BatchNorm2d):
    """A user's own layer."""


def with_forward_replaced() -> nn.Module:
    layer: Any = nn.BatchNorm2d(3)
    forward = layer.forward
    layer.forward = lambda x: forward(x).relu()
    return layer


def with_parametrized_weight() -> nn.Module:
    layer = nn.BatchNorm2d(3)
    parametrize.register_parametrization(layer, "weight", nn.Softplus())
    return layer


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_a_layer_keeps_all_that_it_has(
    kind: type[Any], shape: tuple[int, ...], settings: dict[str, Any]
) -> None:
    layer = kind(3, **settings).eval()
    layer.qconfig, layer.label = object(), "mine"
    kept = {name: value for name, value in vars(layer).items() if name != "eps"}
    tensors = dict(layer.named_parameters()) | dict(layer.named_buffers())
    plain = copy.deepcopy(layer)
    converted: Any = SyncBatchNorm.convert_sync_batchnorm(layer)
    assert type(converted) is SyncBatchNorm
    assert all(vars(converted)[name] is value for name, value in kept.items())
    for name, tensor in tensors.items():
        assert getattr(converted, name) is tensor
    assert converted.eps == settings.get("eps", 1e-5)
    assert converted.process_group is None
    assert not converted.training
    if settings.get("device") == "meta":
        return
    x = randn(*shape, dtype=settings.get("dtype", torch.float32))
    for mode in (True, False):
        got, expected = converted.train(mode)(x), plain.train(mode)(x)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    reverted: Any = SyncBatchNorm.revert_sync_batchnorm(converted)
    assert type(reverted) is (BatchNorm if kind is nn.SyncBatchNorm else kind)
    assert all(getattr(reverted, name) is tensor for name, tensor in tensors.items())
    assert set(vars(reverted)) == set(vars(plain)) - {"process_group"}
    torch.testing.assert_close(reverted(x), plain(x), rtol=1e-5, atol=1e-5)


def test_hooks_stay_and_can_be_removed() -> None:
    seen: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_, **__: seen.append(name)

    layer = nn.BatchNorm2d(3)
    handles = [
        layer.register_forward_pre_hook(note("forward_pre")),
        layer.register_forward_hook(note("forward")),
        layer.register_full_backward_pre_hook(note("backward_pre")),
        layer.register_full_backward_hook(note("backward")),
        layer.register_state_dict_pre_hook(note("state_dict_pre")),
        layer.register_state_dict_post_hook(note("state_dict")),
        layer.register_load_state_dict_pre_hook(note("load_pre")),
        layer.register_load_state_dict_post_hook(note("load")),
        layer.weight.register_hook(note("weight")),
    ]
    model = convert_sync_batchnorm(nn.Sequential(layer))

    def use() -> None:
        model(randn(5, 3, 2, 2).requires_grad_()).sum().backward()
        model.load_state_dict(model.state_dict())

    use()
    assert set(seen) == {
        *("forward_pre", "forward", "backward_pre", "backward", "weight"),
        *("state_dict_pre", "state_dict", "load_pre", "load"),
    }
    assert len(seen) == len(handles)
    for handle in handles:
        handle.remove()
    use()
    assert len(seen) == len(handles)


def test_a_model_is_converted_in_place() -> None:
    norm, shared = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    model: Any = nn.Sequential(
        nn.Conv2d(3, 4, 1), norm, nn.ModuleDict({"a": shared}), shared, nn.ReLU()
    )
    model.register_module("absent", None)
    others = [model[0], model[4]]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    keys, before = list(model.state_dict()), state_of(model)
    norm.weight.requires_grad_(False)
    shared.eval()
    assert convert_sync_batchnorm(model) is model
    assert isinstance(model[1], SyncBatchNorm)
    assert model[2]["a"] is model[3] is shared
    assert type(shared) is SyncBatchNorm
    assert [type(other) for other in others] == [nn.Conv2d, nn.ReLU]
    assert list(model.state_dict()) == keys
    assert_untouched(model, before)
    assert not norm.weight.requires_grad
    assert (norm.training, shared.training) == (True, False)
    assert all(any(p is q for q in optimizer.param_groups[0]["params"]) for p in model.parameters())
    revert_sync_batchnorm(model)
    assert [type(layer) for layer in (norm, shared)] == [nn.BatchNorm2d] * 2


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Derived(3), r"test_convert\.Derived: another class"),
        (nn.InstanceNorm2d(3), "InstanceNorm2d: another class"),
        (nn.LazyBatchNorm2d(), "LazyBatchNorm2d: lazy, and has seen no input yet"),
        (with_forward_replaced(), "BatchNorm2d: its forward was replaced"),
        (with_parametrized_weight(), "ParametrizedBatchNorm2d: another class"),
        (Apex(3, fuse_relu=True), "SyncBatchNorm: fuse_relu or channel_last of apex"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_one_warning_names_what_stays(layer: nn.Module, reason: str) -> None:
    model = nn.ModuleDict({"norm": layer, "plain": nn.BatchNorm2d(3), "twice": layer})
    kind = type(layer)
    expected = f"^convert_sync_batchnorm left these layers as they are: 'norm' .*{reason}\\)$"
    with pytest.warns(UserWarning, match=expected) as caught:
        convert_sync_batchnorm(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert type(layer) is kind
    assert type(model["plain"]) is SyncBatchNorm


def test_one_warning_names_all_layers() -> None:
    model = nn.Sequential(Derived(3), nn.InstanceNorm1d(3), nn.BatchNorm1d(3))
    with pytest.warns(UserWarning, match=r"'0' \(.*Derived.*\), '1' \(.*InstanceNorm1d") as caught:
        SyncBatchNorm.convert_sync_batchnorm(model)
    assert len(caught) == 1


def test_a_lazy_layer_that_has_seen_an_input() -> None:
    layer: Any = nn.LazyBatchNorm2d()
    layer(randn(5, 3, 2, 2))
    assert type(convert_sync_batchnorm(layer)) is SyncBatchNorm


@pytest.mark.parametrize("foreign", [nn.SyncBatchNorm, Apex])
def test_layers_of_others_keep_their_group_unless_one_is_given(foreign: type[Any]) -> None:
    layer: Any = foreign(3)
    layer.process_group = [0, 1]
    assert convert_sync_batchnorm(layer).process_group == [0, 1]
    assert isinstance(layer, SyncBatchNorm)
    assert convert_sync_batchnorm(layer).process_group == [0, 1]
    assert convert_sync_batchnorm(layer, "pair").process_group == "pair"
    assert isinstance(revert_sync_batchnorm(layer), BatchNorm)


def test_no_process_group_is_needed_to_convert() -> None:
    model = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), [0, 1])
    assert model[0].process_group == [0, 1]
    with pytest.raises(RuntimeError, match="init_process_group"):
        model(randn(5, 3))


@pytest.mark.parametrize(
    ("last", "group", "error", "message"),
    [
        (nn.BatchNorm2d(3, momentum=2), None, ValueError, r"'1' .*BatchNorm2d.*momentum .* got 2"),
        (nn.BatchNorm2d(3, eps=-1), None, ValueError, r"'1' .*BatchNorm2d.*eps .* got -1"),
        (nn.BatchNorm2d(3), [0, 0], ValueError, "distinct"),
        (nn.BatchNorm2d(3), 3.5, TypeError, "process_group must be None"),
    ],
)
def test_nothing_is_half_converted(
    last: nn.Module, group: Any, error: type[Exception], message: str
) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), last)
    with pytest.raises(error, match=message):
        convert_sync_batchnorm(model, group)
    assert [type(layer) for layer in model] == [nn.BatchNorm2d] * 2


def test_an_integer_eps_becomes_a_float() -> None:
    layer = convert_sync_batchnorm(nn.BatchNorm1d(3, eps=1))
    assert isinstance(layer.eps, float)


@pytest.mark.parametrize("function", [convert_sync_batchnorm, revert_sync_batchnorm])
def test_what_is_no_module(function: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got builtins\.list"):
        function([nn.BatchNorm1d(3)])


def test_revert_to_a_class_of_choice() -> None:
    converted = convert_sync_batchnorm(nn.BatchNorm1d(3))
    model = nn.Sequential(SyncBatchNorm(3, process_group=[0, 1], backend="composed"), converted)
    revert_sync_batchnorm(model, nn.BatchNorm2d)
    assert [type(layer) for layer in model] == [nn.BatchNorm2d, nn.BatchNorm1d]
    assert set(vars(model[0])) == set(vars(nn.BatchNorm2d(3)))
    with pytest.raises(TypeError, match=r"batch_norm must be one of .*BatchNorm1d, .* got <class"):
        revert_sync_batchnorm(model, nn.InstanceNorm2d)  # type: ignore[arg-type]


def test_revert_leaves_subclasses_and_replaced_forwards() -> None:
    class Mine(SyncBatchNorm):
        pass

    replaced: Any = SyncBatchNorm(3)
    replaced.forward = torch.relu
    model = nn.Sequential(Mine(3), replaced, nn.BatchNorm1d(3), SyncBatchNorm(3))
    with pytest.warns(UserWarning, match=r"revert.*'0' \(.*Mine: another class\), '1' \(.*forward"):
        revert_sync_batchnorm(model)
    assert [type(layer) for layer in model] == [Mine, SyncBatchNorm, nn.BatchNorm1d, BatchNorm]


def test_a_converted_model_is_copied_and_saved() -> None:
    model = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert type(again[0]) is SyncBatchNorm
        assert_untouched(again, state_of(model))
        assert type(revert_sync_batchnorm(again)[0]) is nn.BatchNorm1d


def test_a_bias_may_be_left_out() -> None:
    layer = SyncBatchNorm(3, bias=False)
    assert layer.bias is None
    assert "bias" not in layer.state_dict()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 2.0, -1.0]))
    plain = nn.BatchNorm1d(3)
    plain.load_state_dict(layer.state_dict(), strict=False)
    x, y = randn(5, 3).requires_grad_(), randn(5, 3).requires_grad_()
    for mode in (True, False):
        got, expected = layer.train(mode)(x), plain.train(mode)(y)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        for each in (got, expected):
            each.square().sum().backward()
        torch.testing.assert_close(layer.weight.grad, plain.weight.grad, rtol=1e-5, atol=1e-5)
    layer.reset_parameters()
    assert torch.equal(layer.weight, torch.ones(3))
    with pytest.raises(TypeError, match="bias must be a bool, got 0"):
        SyncBatchNorm(3, bias=0)


def test_torchs_converter_takes_our_layers_and_ours_takes_them_back() -> None:
    """As docs/convert.md has it: torch tests for the base class that both share."""
    layer = SyncBatchNorm(3)
    theirs = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer))
    assert type(theirs[0]) is nn.SyncBatchNorm
    ours = convert_sync_batchnorm(theirs)
    assert type(ours[0]) is SyncBatchNorm
    assert ours[0].weight is layer.weight
    assert ours[0].running_var is layer.running_var
