"""Process groups of the layer: what `process_group` may be, and the two collectives of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.communication import (
    GlobalComm,
    get_group_size,
    get_process_group_ranks,
    get_rank,
)
from mindspore.communication import create_group as _ms_create_group

from syncbn.contract import check_rank_ids
from syncbn.mindspore.backends import statistics_dtype
from syncbn.mindspore.graph import InOrder

# Words of float32 that carry one float64 exactly, 24 bits each.
_WORDS = 3


@dataclass(frozen=True)
class Group:
    """Global rank ids in ascending order, MindSpore's name for them, and this rank's place.

    name is None without communication; place is None if this rank is not a member.
    """

    ranks: tuple[int, ...]
    name: str | None
    place: int | None


ALONE = Group((0,), None, 0)

# Groups made by `create_group`, by name, and the one name that stands for each set of ranks.
_ranks_of_name: dict[str, tuple[int, ...]] = {}
_name_of_ranks: dict[tuple[int, ...], str] = {}


def create_group(name: str | None, rank_ids: list[int] | tuple[int, ...]) -> str:
    """Create the process group of these ranks, or find the one that already exists.

    Only the members have to call this. If they create several groups, they do so in one order. A
    rank outside may call it as well: with the name, a layer can be built and evaluated, but not
    trained.

    Args:
        name: a name by which `SyncBatchNorm(process_group=name)` finds the group; None for one
            made of the rank ids.
        rank_ids: distinct global rank ids.

    Returns:
        The name.

    Raises:
        TypeError: name is not a str, or rank_ids is not a list of ints.
        ValueError: a rank id is not in [0, world size) (ERR-5) or stands twice; the list is empty;
            the name already stands for other ranks.
        RuntimeError: communication is not initialized.
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name must be a str or None, got {name!r} of type {type(name).__name__}")
    _need_communication()
    ranks = check_rank_ids(rank_ids, get_group_size())
    name = name or _name_of_ranks.get(ranks) or f"syncbn-{'-'.join(map(str, ranks))}"
    if _ranks_of_name.get(name, ranks) != ranks:
        raise ValueError(
            f"name must stand for one group, got {name!r} for ranks {list(ranks)}: it is the "
            f"group of ranks {list(_ranks_of_name[name])}"
        )
    if ranks not in _name_of_ranks:
        if get_rank() in ranks:
            _ms_create_group(name, list(ranks))
        _name_of_ranks[ranks] = name
    _ranks_of_name[name] = ranks
    return name


def resolve(process_group: Any) -> Group:
    """The group that a layer's `process_group` argument stands for.

    Args:
        process_group: None for all ranks (this process alone, if communication is not
            initialized), the name of a group made here or by MindSpore, or a list of rank ids.

    Raises:
        TypeError: it is none of these.
        ValueError: no group has that name, or a rank id is wrong (see `create_group`).
        RuntimeError: a name or rank ids, and communication is not initialized.
    """
    if process_group is None:
        if not GlobalComm.INITED:
            return ALONE
        return _member(tuple(range(get_group_size())), GlobalComm.WORLD_COMM_GROUP)
    if isinstance(process_group, (list, tuple)):
        process_group = create_group(None, process_group)
    if not isinstance(process_group, str):
        raise TypeError(
            "process_group must be None, the name of a group or a list of rank ids, got "
            f"{process_group!r} of type {type(process_group).__name__}"
        )
    _need_communication()
    if process_group in _ranks_of_name:
        ranks = _ranks_of_name[process_group]
        return _member(ranks, _name_of_ranks[ranks])
    try:
        return _member(tuple(get_process_group_ranks(process_group)), process_group)
    except (RuntimeError, ValueError) as error:
        known = ", ".join(_ranks_of_name) or "none"
        raise ValueError(
            "process_group must be the name of a group made by create_group (known: "
            f"{known}), got {process_group!r}"
        ) from error


@ops.constexpr
def communication_began(everyone: bool, before: bool) -> bool:
    """Whether a layer for all ranks (process_group=None) was built before communication began."""
    return everyone and not before and bool(GlobalComm.INITED)


class Communicator(nn.Cell):
    """The ranks that take a step together, and their two collectives, which also compile.

    On Ascend they are HCCL's. On CPU, MindSpore reduces only float16 and float32, and gathers
    only over the whole world. There a table is added up that is 0 except in each rank's own row,
    and float64 goes in three float32 words, which is exact within float32's normal numbers.
    """

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.ranks, self.size = group.ranks, len(group.ranks)
        self.on_cpu = ms.get_context("device_target") == "CPU"
        if self.size > 1:
            self.reduce = ops.AllReduce(ops.ReduceOp.SUM, group.name)
            self.gather = InOrder(self.reduce if self.on_cpu else ops.AllGather(group.name))
            self.own_row = Tensor(np.arange(self.size).reshape(-1, 1) == group.place)

    def all_gather(self, message: Tensor) -> Tensor:
        """The (M,) messages of all ranks, of the dtype `statistics_dtype()`, as (ranks, M)."""
        if self.size == 1:
            return message.reshape(1, -1)
        if self.on_cpu:
            return _join(self.gather(self._padded(message)))
        return self.gather(message).reshape(self.size, -1)

    def all_reduce(self, values: Tensor, tag: Tensor) -> Tensor:
        """The sum of the ranks' values (M,).

        `tag` is a number that identifies the call: equal on all ranks, and different for other
        calls. On CPU, ranks that meet here with different tags get NaN and not a sum of different
        things. That happens because graphs that differ between ranks may reorder the backward of
        parallel branches.
        """
        if self.size == 1:
            return values
        if not self.on_cpu:
            return self.reduce(values)
        table = _join(self.reduce(self._padded(ops.cat([values, tag.reshape(1)]))))
        together = ops.equal(table[:, -1], table[0, -1]).all()
        return ops.where(together, table[:, :-1].sum(0), float("nan"))

    def _padded(self, values: Tensor) -> Tensor:
        """The table that is 0 except in this rank's row, in words of float32."""
        return ops.where(self.own_row, _split(values), ops.zeros((1,), ms.float32))


def _split(values: Tensor) -> Tensor:
    """float64 (M,) as float32 (3 M,): the value, then the remainder relative to it in two words."""
    word = values.astype(ms.float32)
    whole = word.astype(statistics_dtype())
    # An infinity has no remainder: infinity - infinity would be NaN.
    rest = ops.where(ops.isfinite(word), values - whole, 0.0)
    rest = rest / ops.where(ops.equal(whole, 0.0), 1.0, whole)
    second = rest.astype(ms.float32)
    return ops.cat([word, second, (rest - second.astype(statistics_dtype())).astype(ms.float32)])


def _join(table: Tensor) -> Tensor:
    """The inverse of `_split` for each row: float32 (R, 3 M) as float64 (R, M)."""
    words = table.astype(statistics_dtype()).reshape(table.shape[0], _WORDS, -1)
    word = words[:, 0]
    rest = word * (words[:, 1] + words[:, 2])
    return word + ops.where(ops.isfinite(word), rest, 0.0)


def _member(ranks: tuple[int, ...], name: str) -> Group:
    rank = get_rank()
    return Group(ranks, name, ranks.index(rank) if rank in ranks else None)


def _need_communication() -> None:
    if not GlobalComm.INITED:
        raise RuntimeError(
            "process_group given by name or rank ids needs communication: call "
            "mindspore.communication.init first"
        )
