"""A training step of the layer: statistics of the group, and the gradients that go with them.

A step costs two collectives: one all_gather of each rank's statistics in the forward, one
all_reduce of two sums per channel in the backward. A rank that fails before the all_gather still
joins it, with a mark, so that every rank raises and none waits (ERR-9).

The cells are written once for PyNative and for graph mode. Where only one of the two can do a
thing there is a branch on `compiling()`: a graph raises by an operator of its own, which cannot
quote another rank, and it does not know whether it will be differentiated. A graph also drops a
collective whose result is not used, and reorders two that do not depend on each other, each rank by
itself; `ops.depend` stands where a rank without data would otherwise have such collectives.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.graph.api import _pynative_executor

from syncbn.contract import check_shape
from syncbn.mindspore.backends import Backend, statistics_dtype
from syncbn.mindspore.graph import compiling, may_sync_host
from syncbn.mindspore.groups import ALONE, Communicator, Group
from syncbn.mindspore.layout import LeadingOnes, canonical, count_of
from syncbn.mindspore.normalize import Normalize, NormalizeByConstants
from syncbn.protocol import PeerError, nothing_to_differentiate

FLOATING = (ms.float16, ms.bfloat16, ms.float32, ms.float64)

_COUNT_WORD = 2**20  # a count travels in two words, each exact in float32
_ERROR_BYTES = 512  # of the text that a failing rank sends round

# The last word of a rank's message: what the rank is going to do after the all_gather.
_NOTHING, _BACKWARD, _FAIL = 0, 1, 2


class BatchStatistics(nn.Cell):
    """Statistics of the inputs of all ranks of a group, by one all_gather; not differentiable.

    Args:
        num_features: C.
        group: whose ranks call the cell together.
        backend: of the five operations.
    """

    def __init__(self, num_features: int, group: Group, backend: Backend) -> None:
        super().__init__()
        self.num_features = num_features
        self.stats, self.combine = backend.stats, backend.combine
        self.ranks = Communicator(group)
        self.rank_ids = list(group.ranks)
        self.rank_id_tensor = Tensor(np.array(group.ranks))

    def construct(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: Tensor,
        problem: tuple[str, str] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean, biased variance and 1 / sqrt(var + eps), (C,) each, of n values (a scalar tensor).

        Raises:
            TypeError, ValueError: there is a `problem_of` x.
            RuntimeError: some ranks have nothing to differentiate, others have and would wait.
            PeerError: another rank raised one of these, or anything else; in a graph it is a
                RuntimeError.
        """
        if compiling():  # @jit.cond: True
            table = self._gather_in_graph(x, problem)
        else:
            table = self._gather(x, weight, bias, problem)
        counts = table[:, -3] * _COUNT_WORD + table[:, -2]
        means, variances = table[:, : self.num_features], table[:, self.num_features : -3]
        return self.combine(means, variances, counts, eps)

    def _gather(
        self, x: Any, weight: Tensor | None, bias: Tensor | None, problem: tuple[str, str] | None
    ) -> Tensor:
        """The messages of all ranks, none of which has failed."""
        failure: Exception | None = None
        try:
            raise_problem(problem)
            todo = _BACKWARD if _differentiates(x, weight, bias) else _NOTHING
            message = self._message(x, todo)
        except Exception as error:
            failure = error
            message = self._failure()
        table = self.ranks.all_gather(message)
        if may_sync_host():
            self._check_together(table, failure)
        elif failure:
            raise failure
        return table

    def _gather_in_graph(self, x: Tensor, problem: tuple[str, str] | None) -> Tensor:
        """The same, compiled: a wrong input is known to the compiler, a failed peer is not."""
        message = self._failure() if problem else self._message(x, _BACKWARD)
        table = self.ranks.all_gather(message)
        if problem or may_sync_host():
            marks = table[:, -1]
            if marks.max() == _FAIL:
                # Not by raise_problem: a call, for which the compiler would raise at once.
                if problem is not None:
                    if problem[0] == "TypeError":
                        raise TypeError(problem[1])
                    raise ValueError(problem[1])
                rank = self.rank_id_tensor[marks.argmax()]
                raise RuntimeError(f"rank {rank} failed: see the error that it raised")
        return table

    def _message(self, x: Tensor, todo: int) -> Tensor:
        """What this rank tells the others, 2 C + 3 words: mean, var, count, what it will do."""
        x = ops.stop_gradient(x)
        count = count_of(x.shape)
        words = Tensor([count // _COUNT_WORD, count % _COUNT_WORD, todo], statistics_dtype())
        if count == 0:
            message = ops.cat([ops.zeros((2 * self.num_features,), statistics_dtype()), words])
            return ops.depend(message, x)
        mean, var = self.stats(canonical(x))
        return ops.cat([mean.astype(statistics_dtype()), var.astype(statistics_dtype()), words])

    def _failure(self) -> Tensor:
        nothing = ops.zeros((2 * self.num_features + 2,), statistics_dtype())
        return ops.cat([nothing, Tensor([_FAIL], statistics_dtype())])

    def _check_together(self, table: Tensor, failure: Exception | None) -> None:
        """Raise on every rank if the ranks' messages show that the step must fail."""
        marks = table[:, -1].asnumpy().tolist()
        failed = [place for place, said in enumerate(marks) if said == _FAIL]
        idle = [self.rank_ids[place] for place, said in enumerate(marks) if said == _NOTHING]
        if failed:
            errors = self._exchange_errors(failure)
            if failure:
                raise failure
            raise PeerError(
                "; ".join(f"rank {self.rank_ids[at]} failed: {errors[at]}" for at in failed)
            )
        if idle and len(idle) < len(marks):
            raise RuntimeError(nothing_to_differentiate(idle))

    def _exchange_errors(self, failure: Exception | None) -> list[str]:
        """Every rank's error text, by a second all_gather that only failing steps pay."""
        text = f"{type(failure).__name__}: {failure}" if failure else ""
        encoded = text.encode()[:_ERROR_BYTES].ljust(_ERROR_BYTES, b"\0")
        message = Tensor(np.frombuffer(encoded, np.uint8).astype(np.float32)).astype(
            statistics_dtype()
        )
        table = self.ranks.all_gather(message).asnumpy().astype(np.uint8)
        return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in table]


@ms.jit_class
class StepCells:
    """The cells of a step, by the statistics that they use.

    This holder is no cell: tools for mixed precision rewrite the child cells of a layer.
    """

    def __init__(self, num_features: int, group: Group, backend: Backend) -> None:
        self.group_statistics = BatchStatistics(num_features, group, backend)
        self.own_statistics = BatchStatistics(num_features, ALONE, backend)
        self.normalize_by_group = Normalize(backend, group)
        self.normalize_by_own = Normalize(backend, ALONE)
        self.normalize_by_running = NormalizeByConstants()
        self.leading_ones = LeadingOnes()


def problem_of(x: Any, num_features: int, weight: Tensor | None) -> tuple[str, str] | None:
    """Type and text of the error that x deserves, or None if it can be normalized.

    x must be a tensor of shape (N, C, +) with C = num_features, of the dtype of the parameters or
    of float16 or bfloat16 with float32 parameters.
    """
    if not isinstance(x, Tensor):
        return "TypeError", "input must be a mindspore.Tensor"
    weight_dtype = None if weight is None else weight.dtype
    return _problem_of_form(x.shape, x.dtype, num_features, weight_dtype)


def raise_problem(problem: tuple[str, str] | None) -> None:
    """Raise the error that `problem_of` has found, if any."""
    if problem is not None:
        kind, text = problem
        if kind == "TypeError":
            raise TypeError(text)
        raise ValueError(text)


@ops.constexpr
def _problem_of_form(
    shape: Any, dtype: Any, num_features: int, weight_dtype: Any
) -> tuple[str, str] | None:
    """What of `problem_of` is known when a graph is compiled."""
    try:
        check_shape(shape, num_features)
    except ValueError as error:
        return "ValueError", str(error)
    if dtype not in FLOATING:
        names = ", ".join(str(known) for known in FLOATING)
        return "TypeError", f"input must have one of the dtypes {names}, got {dtype}"
    half = dtype in (ms.float16, ms.bfloat16)
    if weight_dtype not in (None, dtype) and not (half and weight_dtype == ms.float32):
        return "TypeError", (
            f"input must have the dtype of the parameters, {weight_dtype} (Float16 and BFloat16 "
            f"also go with Float32), got {dtype}"
        )
    return None


def _differentiates(*tensors: Tensor | None) -> bool:
    """Whether this rank's backward will reach the layer."""
    wanted = any(t is not None and t._requires_grad for t in tensors)
    return wanted and _pynative_executor.requires_grad()
