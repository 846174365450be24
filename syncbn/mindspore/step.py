"""The statistics of a training step, over all ranks, and the errors that all ranks raise together.

A step costs two collectives: one all_gather of each rank's statistics in the forward, one
all_reduce of two sums per channel in the backward. A rank that fails before a collective still
joins it, with a mark, so that every rank raises and none waits (ERR-9). In PyNative a rank also
takes the memory for its result before the collective.

The cells are written once for PyNative and for graph mode. Where only one of the two can do a
thing there is a branch on `compiling()`: a graph raises by an operator of its own, which cannot
quote another rank, and it cannot find out whether it will be differentiated. A graph also drops a
collective whose result is not used, and reorders two that do not depend on each other, on each rank
by itself. `ops.depend` prevents that on a rank without data.
"""

from __future__ import annotations

from typing import Any, NoReturn

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.graph.api import _pynative_executor

from syncbn import protocol
from syncbn.backends import MINDSPORE
from syncbn.contract import FLOATING, check_input_dtype, check_shape
from syncbn.mindspore.backends import Backend, statistics_dtype
from syncbn.mindspore.graph import compiling, may_sync_host
from syncbn.mindspore.groups import Communicator, Group
from syncbn.mindspore.layout import canonical, count_of, reserve
from syncbn.protocol import COUNT_HIGH, COUNT_LOW, FAIL, HEADER_WORDS, MARK

DTYPES = tuple(getattr(ms, name) for name in FLOATING)

# Where the host reads the messages, the first one has room for so many channels, so that its length
# does not depend on the layer. Those of a wider layer follow in a second all_gather.
INLINE_CHANNELS = 512

_BACKENDS = tuple(MINDSPORE)

# In a graph, where an error cannot show what each rank has.
_DIFFERS = f"the layers of a group must have the same {', '.join(protocol.Settings._fields)}"
_SEE = "take the step in PyNative mode, whose error shows what each rank has"


class BatchStatistics(nn.Cell):
    """Statistics of the inputs of all ranks of a group, by one all_gather; not differentiable.

    Args:
        num_features: C.
        group: the ranks that call the cell together.
        backend: of the five operations.
    """

    def __init__(self, num_features: int, group: Group, backend: Backend) -> None:
        super().__init__()
        self.num_features = num_features
        self.stats, self.combine = backend.stats, backend.combine
        self.communicator = Communicator(group)
        self.rank_ids = Tensor(np.array(group.ranks))

    def construct(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: Tensor,
        problem: tuple[str, str] | None,
        settings: protocol.Settings | Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean, biased variance and 1 / sqrt(var + eps), (C,) each, of n values (a scalar tensor).

        Args:
            x: (N, C, +).
            weight, bias: to find out whether a backward of this rank will reach the layer.
            eps: a scalar.
            problem: see `problem_of`.
            settings: what the layers of all ranks must have in common; in a graph, its words in the
                header. None to compare nothing.

        Raises:
            TypeError, ValueError: there is a problem, or the settings of the ranks differ.
            RuntimeError: some ranks have nothing to differentiate, others have and would wait.
            PeerError: another rank raised any error; in a graph it is a RuntimeError.
        """
        if compiling():  # @jit.cond: True
            table = self._gather_in_graph(x, problem, settings)
        else:
            table = self._gather(x, weight, bias, problem, settings)
        counts = table[:, COUNT_HIGH] * protocol.COUNT_WORD + table[:, COUNT_LOW]
        end = HEADER_WORDS + self.num_features
        means, variances = table[:, HEADER_WORDS:end], table[:, end:]
        return self.combine(means, variances, counts, eps)

    def _gather(
        self,
        x: Any,
        weight: Tensor | None,
        bias: Tensor | None,
        problem: tuple[str, str] | None,
        settings: protocol.Settings | None,
    ) -> Tensor:
        """The messages of all ranks, (ranks, HEADER_WORDS + 2 C), none of which has failed."""
        error: Exception | None = None
        words = [FAIL, *[0.0] * (HEADER_WORDS - 1)]
        local = ops.zeros((2 * self.num_features,), statistics_dtype())
        try:
            raise_problem(problem)
            local = self._local(x)
            reserve(x)  # for y
            mark = protocol.BACKWARD if _differentiates(x, weight, bias) else protocol.NOTHING
            count = count_of(x.shape)
            words = [mark, *divmod(count, protocol.COUNT_WORD), *words[3:]]
            if settings is not None:
                words = protocol.header(mark, count, settings, _BACKENDS)
            if may_sync_host():
                _pynative_executor.sync()  # MindSpore raises errors of operators later
        except Exception as caught:
            error = caught
            words[MARK] = FAIL
            local = ops.zeros((2 * self.num_features,), statistics_dtype())
        header = Tensor(words, statistics_dtype())
        if self.communicator.size == 1 or not may_sync_host():
            if error and self.communicator.size == 1:
                raise error
            table = self.communicator.all_gather(ops.cat([header, local]))
            if error:
                raise error
            return table
        room = ops.zeros((2 * max(INLINE_CHANNELS - self.num_features, 0),), statistics_dtype())
        inline = local[: 2 * INLINE_CHANNELS]
        table = self.communicator.all_gather(ops.cat([header, inline, room]))
        _check_together(table, error, self.communicator)
        table = table[:, : HEADER_WORDS + inline.shape[0]]
        if self.num_features > INLINE_CHANNELS:
            rest = self.communicator.all_gather(local[2 * INLINE_CHANNELS :])
            table = ops.cat([table, rest], 1)
        return table

    def _gather_in_graph(
        self, x: Tensor, problem: tuple[str, str] | None, settings: Tensor | None
    ) -> Tensor:
        """The same, compiled: the compiler finds a wrong input, but not a peer that failed."""
        mark, count = (FAIL, 0) if problem else (protocol.BACKWARD, count_of(x.shape))
        words = Tensor(
            [mark, count // protocol.COUNT_WORD, count % protocol.COUNT_WORD], statistics_dtype()
        )
        room = 0
        if settings is None:
            settings = ops.zeros((HEADER_WORDS - 3,), statistics_dtype())
        else:
            room = 2 * max(INLINE_CHANNELS - self.num_features, 0)
        local = ops.zeros((2 * self.num_features,), statistics_dtype())
        if not problem:
            local = self._local(x)
        message = ops.cat([words, settings, local, ops.zeros((room,), statistics_dtype())])
        table = self.communicator.all_gather(message)
        if problem or may_sync_host():
            marks = table[:, MARK]
            if marks.max() == FAIL:
                # Not by raise_problem: a call, for which the compiler would raise at once.
                if problem is not None:
                    if problem[0] == "TypeError":
                        raise TypeError(problem[1])
                    raise ValueError(problem[1])
                rank = self.rank_ids[marks.argmax()]
                raise RuntimeError(f"rank {rank} failed: see the error that it raised")
            of_ranks = table[:, COUNT_LOW + 1 : HEADER_WORDS]
            differs = ops.not_equal(of_ranks, of_ranks[:1]).any(1)
            if differs.any():
                rank = self.rank_ids[differs.astype(ms.int32).argmax()]
                raise ValueError(f"{_DIFFERS}, but that of rank {rank} differs: {_SEE}")
        return table[:, : HEADER_WORDS + 2 * self.num_features]

    def _local(self, x: Tensor) -> Tensor:
        """Mean and variance of this rank, (2 C,)."""
        x = ops.stop_gradient(x)
        if count_of(x.shape) == 0:
            return ops.depend(ops.zeros((2 * self.num_features,), statistics_dtype()), x)
        mean, var = self.stats(canonical(x))
        return ops.cat([mean.astype(statistics_dtype()), var.astype(statistics_dtype())])


def sum_over_ranks(
    sums: Tensor, error: Exception | None, communicator: Communicator, tag: Tensor
) -> Tensor:
    """In PyNative: the sums (M,) of all ranks, none of which has failed.

    Args:
        sums: of this rank.
        error: what this rank met before.
        communicator: the ranks.
        tag: see `Communicator.all_reduce`.

    Raises:
        PeerError: another rank met any error.
    """
    if communicator.size == 1:
        if error:
            raise error
        return sums
    mark = Tensor([float(error is not None)], sums.dtype)
    reduced = communicator.all_reduce(ops.cat([sums, mark]), tag)
    if may_sync_host():
        if float(reduced[-1:].asnumpy()[0]) > 0:
            _raise_together(error, communicator)
    elif error:
        raise error
    return reduced[:-1]


def problem_of(x: Any, num_features: int, weight: Tensor | None) -> tuple[str, str] | None:
    """Type and text of the error that x deserves, or None if it can be normalized.

    x must be a tensor of shape (N, C, +) with C = num_features, of the dtype of the parameters, or
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
    """The part of `problem_of` that is known when a graph is compiled."""
    try:
        check_shape(shape, num_features)
        check_input_dtype(
            dtype_name(dtype), None if weight_dtype is None else dtype_name(weight_dtype)
        )
    except (TypeError, ValueError) as error:
        return type(error).__name__, str(error)
    return None


@ops.constexpr
def fixed_words(num_features: int, dtype: Any, affine: bool, backend: str) -> tuple[float, ...]:
    """In a graph: the words of the settings in the header, with eps 0 and nothing tracked."""
    name = None if dtype is None else dtype_name(dtype)
    settings = protocol.Settings(num_features, 0.0, None, name, affine, False, backend)
    return tuple(map(float, protocol.header(protocol.NOTHING, 0, settings, _BACKENDS)[3:]))


def dtype_name(dtype: Any) -> str:
    """float32 for mindspore.float32."""
    return str(dtype).lower()


def _differentiates(*tensors: Tensor | None) -> bool:
    """Whether this rank's backward will reach the layer."""
    wanted = any(t is not None and t._requires_grad for t in tensors)
    return wanted and _pynative_executor.requires_grad()


def _check_together(table: Tensor, error: Exception | None, communicator: Communicator) -> None:
    """Raise on every rank if the headers of all ranks show that the step must fail."""
    headers = table[:, :HEADER_WORDS].asnumpy().tolist()
    found = protocol.verdict([row[MARK] for row in headers], communicator.ranks)
    if found.failed:
        _raise_together(error, communicator)
    if differs := protocol.disagreement(headers, communicator.ranks, _BACKENDS):
        raise ValueError(differs)
    if found.idle:
        raise RuntimeError(protocol.nothing_to_differentiate(found.idle))


def _raise_together(error: Exception | None, communicator: Communicator) -> NoReturn:
    """Raise this rank's error, or one that names the ranks that failed.

    A second all_gather, which only failing steps pay, sends the text of every rank's error.
    """
    encoded = np.frombuffer(protocol.encode_error(error), np.uint8).astype(np.float32)
    table = communicator.all_gather(Tensor(encoded).astype(statistics_dtype()))
    texts = [protocol.decode_error(row.tobytes()) for row in table.asnumpy().astype(np.uint8)]
    failed = [place for place, text in enumerate(texts) if text]
    raise error or protocol.peer_error(
        [communicator.ranks[place] for place in failed], [texts[place] for place in failed]
    )
