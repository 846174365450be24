"""The training step as operators of PyTorch, with gradients: what a graph or autograd records.

Compilers, export and shape inference see each operator as a whole, with its fake implementation;
what it does on a rank is in step.py. Groups and backends are given by name and looked up when the
operator runs.

A compiler may reorder operators that do not depend on each other, on each rank by itself: those of
parallel branches, by the memory that the rank's shapes need. The ranks would meet in different
collectives. So while AOTAutograd traces a graph, the operators with a collective are replaced by
others that pass on a tensor, `order`, which keeps the order of the program.

An operator in Python takes the host 0.1 ms for forward and backward, torch.autograd.Function a
third of it. So eager code on plain tensors takes the latter, with the same functions.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.autograd import forward_ad

from syncbn.contract import check_count
from syncbn.torch import layout, step
from syncbn.torch.backends import Running
from syncbn.torch.groups import ALONE_KEY, Communicator
from syncbn.torch.messages import move

_library = torch.library.Library("syncbn", "DEF")


def statistics(x: Tensor, weight: Tensor | None, *given: Any) -> tuple[Tensor, ...]:
    """`step.statistics`; not differentiable, because `normalize` is as a function of x."""
    if _is_plain(x):
        return step.statistics(x, weight, *given)
    if not torch.compiler.is_compiling():
        if _is_transformed():
            return _transformed_statistics(x, weight, *given)
        if x.is_meta or isinstance(x, FakeTensor):
            _, _, _, num_features, *_, problem, _, _ = given
            step.raise_problem(problem)
            step.check_input(x, num_features, weight)
    with torch.no_grad():
        return _statistics(x, weight, *given)


def normalize(x: Tensor, *given: Any) -> Tensor:
    """`step.normalize` with gradients."""
    if _is_plain(x):
        return _Normalize.apply(x, *given)
    if _is_transformed() and not torch.compiler.is_compiling():
        return _transformed_normalize(x, *given)
    return _normalize(x, *given)


def _is_plain(x: Tensor) -> bool:
    """Whether nothing but autograd watches what is done with x."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and not x.is_meta
        and not _is_transformed()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._functorch.is_legacy_batchedtensor(x)  # of is_grads_batched
    )


# torch.func and forward-mode differentiation: the formulas in operations that they can transform,
# on one rank


def _is_transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _transformed_statistics(
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    num_features: int,
    eps: float,
    momentum: float | None,
    dtype: str | None,
    *given: Any,
) -> tuple[Tensor, ...]:
    *_, problem, group, _ = given
    if len(Communicator.of_key(group).ranks) > 1:
        raise RuntimeError(
            "SyncBatchNorm in training can be transformed by torch.func, or differentiated in "
            "forward mode, on one rank only, got a group of several: call eval(), or set its "
            "process_group to one rank"
        )
    step.raise_problem(problem)
    step.check_input(x, num_features, weight)
    count = x.numel() // num_features
    if group != ALONE_KEY:
        check_count(count)
    values = x.to(step.dtype_of_statistics(x, weight, dtype))
    dims, per_channel = _per_channel(x)
    mean = values.sum(dims) / max(count, 1)
    var = (values - mean.view(per_channel)).square().sum(dims) / max(count, 1)
    if running_mean is not None and running_var is not None and count:
        running = Running(running_mean, running_var, num_batches_tracked, momentum)
        unbiased = var * (count / max(count - 1, 1))
        try:
            move(running, mean.detach(), unbiased.detach())
        except RuntimeError as error:
            raise RuntimeError(
                "SyncBatchNorm cannot move running statistics that are no part of what torch.func "
                "transforms: build it with track_running_stats=False, or give them to "
                "torch.func.functional_call as inputs"
            ) from error
    return mean, (var + eps).rsqrt(), mean.new_full((), count)


def _transformed_normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    *given: Any,
) -> Tensor:
    _, per_channel = _per_channel(x)
    scale = invstd if weight is None else invstd * weight
    y = (x - mean.view(per_channel)) * scale.view(per_channel)
    return (y if bias is None else y + bias.view(per_channel)).to(x.dtype)


def _per_channel(x: Tensor) -> tuple[list[int], list[int]]:
    """The dimensions of x that a channel spans, and the shape of a vector that goes with x."""
    return [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)


# Shapes, dtypes and strides of the results, for tensors without data


def _fake_statistics(
    x: Tensor,
    weight: Any,
    running_mean: Any,
    running_var: Any,
    num_batches_tracked: Any,
    num_features: int,
    eps: Any,
    momentum: Any,
    dtype: str | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    mean = x.new_empty(num_features, dtype=step.dtype_of_statistics(x, weight, dtype))
    return mean, torch.empty_like(mean), mean.new_empty(())


def _fake_normalize(x: Tensor, *_: Any) -> Tensor:
    return layout.empty_like(x)


def _fake_backward(
    dy: Any,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Any,
    n: Any,
    wants_x: bool,
    *_: Any,
) -> tuple[Tensor, ...]:
    vector = torch.empty_like(mean if weight is None else weight)
    dx = layout.empty_like(x) if wants_x else x.new_empty(0)
    return dx, vector, torch.empty_like(vector)


def _fake_double_backward(
    ddx: Any, ddweight: Any, ddbias: Any, dy: Tensor, x: Tensor, weight: Any, mean: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    vector = torch.empty_like(mean if weight is None else weight)
    return layout.empty_like(x).to(dy.dtype), layout.empty_like(x), vector


# Definitions


def _define(arguments: str, results: str, function: Any, fake: Any) -> Any:
    """The operator that calls a function of step.py."""
    name = function.__name__
    _library.define(f"{name}({arguments}) -> ({results})")
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"syncbn::{name}", fake, lib=_library)
    return getattr(torch.ops.syncbn, name).default


def _define_in_order(arguments: str, results: str, function: Any, fake: Any) -> Any:
    """The same, with a tensor that it takes and passes on."""

    def passing_on(call: Any) -> Any:
        def in_order(*given: Any) -> tuple[Tensor, ...]:
            *others, order = given
            return *call(*others), torch.empty_like(order)

        return in_order

    name = f"{function.__name__}_in_order"
    _library.define(f"{name}({arguments}, Tensor order) -> ({results}, Tensor)")
    _library.impl(name, passing_on(function), "CompositeExplicitAutograd")
    torch.library.register_fake(f"syncbn::{name}", passing_on(fake), lib=_library)
    return getattr(torch.ops.syncbn, name).default


_STATISTICS = (
    "Tensor x, Tensor? weight, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches_tracked, int num_features, float eps, float? momentum, str? dtype, "
    "bool differentiates, str problem, str group, str backend",
    "Tensor mean, Tensor invstd, Tensor n",
    step.statistics,
    _fake_statistics,
)
_BACKWARD = (
    "Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor invstd, Tensor n, bool wants_x, "
    "str group, str backend",
    "Tensor dx, Tensor grad_weight, Tensor grad_bias",
    step.backward,
    _fake_backward,
)
_statistics = _define(*_STATISTICS)
_normalize = _define(
    "Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor invstd, Tensor n, str group, "
    "str backend",
    "Tensor",
    step.normalize,
    _fake_normalize,
)
_backward = _define(*_BACKWARD)
_double_backward = _define(
    "Tensor? ddx, Tensor? ddweight, Tensor? ddbias, Tensor dy, Tensor x, Tensor? weight, "
    "Tensor mean, Tensor invstd, Tensor n, str group",
    "Tensor grad_dy, Tensor grad_x, Tensor grad_weight",
    step.double_backward,
    _fake_double_backward,
)
_IN_ORDER = {
    _statistics: _define_in_order(*_STATISTICS),
    _backward: _define_in_order(*_BACKWARD),
}


# The order of a graph that AOTAutograd traces

_last: WeakKeyDictionary[FunctionalTensorMode, Tensor] = WeakKeyDictionary()


def _in_order(mode: FunctionalTensorMode, operator: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Trace an operator so that it comes after the one that was traced last."""
    if mode.export:
        return mode.__torch_dispatch__(operator, types, args, kwargs)
    last = _last.get(mode)
    if last is None:
        last = torch.empty(1, device=args[0].device)
    *results, _last[mode] = mode.__torch_dispatch__(
        _IN_ORDER[operator], types, (*args, last), kwargs
    )
    return tuple(results)


for _operator in _IN_ORDER:
    torch.library.register_torch_dispatch(_operator, FunctionalTensorMode, _in_order, lib=_library)


# Gradients


def _saved(ctx: Any, sums: int) -> tuple[Any, ...]:
    """The tensors that the forward saved.

    Reading them may raise, for example after an in-place change. The other ranks wait for this one
    in an all_reduce of so many sums, so it joins that with its error.
    """
    try:
        saved: tuple[Any, ...] = ctx.saved_tensors
    except Exception as error:
        num_features, dtype, device = ctx.statistics
        nothing = torch.zeros(sums * num_features + 1, dtype=dtype, device=device)
        step.sum_over_ranks(nothing, error, Communicator.of_key(ctx.group))
        raise
    return saved


def _save_normalize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, mean, invstd, n, ctx.group, ctx.backend = inputs
    ctx.statistics = mean.shape[0], mean.dtype, mean.device
    ctx.save_for_backward(x, weight, mean, invstd, n)


def _differentiate_normalize(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, mean, invstd, n = _saved(ctx, sums=2)
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    twice = torch.is_grad_enabled() or not _is_plain(dy)
    function = _backward if twice else step.backward
    dx, dweight, dbias = function(dy, x, weight, mean, invstd, n, wants_x, ctx.group, ctx.backend)
    return (
        dx if wants_x else None,
        dweight if wants_weight else None,
        dbias if wants_bias else None,
        *(None,) * 5,
    )


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *saved, ctx.wants_x, ctx.group, _ = inputs
    mean = saved[3]
    ctx.statistics = mean.shape[0], mean.dtype, mean.device
    ctx.save_for_backward(*saved)
    ctx.set_materialize_grads(False)


def _differentiate_backward(
    ctx: Any, ddx: Tensor | None, ddweight: Tensor | None, ddbias: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved = _saved(ctx, sums=7)
    grad_dy, grad_x, grad_weight = _double_backward(
        ddx if ctx.wants_x else None, ddweight, ddbias, *saved, ctx.group
    )
    weight = saved[2]
    return grad_dy, grad_x, None if weight is None else grad_weight, *(None,) * 6


def _differentiate_double_backward(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("SyncBatchNorm can be differentiated twice in training, not three times")


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None: ...


for _operator, _formula, _save in (
    (_normalize, _differentiate_normalize, _save_normalize),
    (_backward, _differentiate_backward, _save_backward),
    (_double_backward, _differentiate_double_backward, _save_nothing),
):
    torch.library.register_autograd(_operator, _formula, setup_context=_save, lib=_library)


# Batched gradients: one call for each


def _one_by_one(operator: Any) -> Any:
    """The rule by which torch.vmap batches an operator."""

    def batched(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        calls = [
            operator(
                *(
                    argument if dim is None else argument.select(dim, place)
                    for argument, dim in zip(arguments, in_dims, strict=True)
                )
            )
            for place in range(info.batch_size)
        ]
        results = tuple(torch.stack(result) for result in zip(*calls, strict=True))
        return results, (0,) * len(results)

    return batched


for _operator in (_backward, _double_backward):
    torch.library.register_vmap(_operator, _one_by_one(_operator), lib=_library)


# Without the cost of an operator


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y = step.normalize(*inputs)
        _save_normalize(ctx, inputs, y)
        return y

    backward = staticmethod(_differentiate_normalize)
