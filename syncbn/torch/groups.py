"""Process groups of the layer.

A layer keeps what the user gave as `process_group`: None, rank ids, a name or a handle. What it
stands for in the present world is looked up in every training step, so that a layer can be
pickled, and used again after torch.distributed was destroyed and initialized again.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch.distributed as dist
from torch import Tensor
from torch.distributed import (  # type: ignore[attr-defined]  # public, but not marked so
    PrefixStore,
    distributed_c10d,
)

from syncbn.contract import check_rank_ids

# What a user may give: None (all ranks), rank ids, a name given to `create_group`, or a handle as
# torch.distributed.new_group returns it: a group, or for a rank that is not in it the int
# GroupMember.NON_GROUP_MEMBER.
ProcessGroupLike: TypeAlias = "dist.ProcessGroup | str | list[int] | tuple[int, ...] | int | None"

_SET_GROUP = "set the layer's process_group to"
_STALE = (
    "process_group must be a group of the present world, got a ProcessGroup that was destroyed: "
    f"{_SET_GROUP} a new group, or to a list of rank ids, which stays valid"
)

_NO_WORLD = (
    "process_group None stands for the ranks of torch.distributed's world, which was destroyed "
    "after this layer trained with other ranks in it: call init_process_group again, or, to train "
    "alone, turn the layer into a BatchNorm by revert_sync_batchnorm"
)


@dataclass
class _Registry:
    """Groups of one world, so that equal rank ids never open a second communicator.

    The groups belong to torch.distributed and are held weakly: if they outlived
    destroy_process_group, their threads would abort the process at its end.
    """

    world: weakref.ref[dist.ProcessGroup]
    by_ranks: weakref.WeakValueDictionary[tuple[int, ...], dist.ProcessGroup] = field(
        default_factory=weakref.WeakValueDictionary
    )
    ranks_of_name: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ranks_of_ids: dict[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict)

    def ranks_of(self, rank_ids: list[int] | tuple[int, ...]) -> tuple[int, ...]:
        """Rank ids in ascending order, checked the first time that they are met."""
        try:
            return self.ranks_of_ids[tuple(rank_ids)]
        except (KeyError, TypeError):  # new ids, or what cannot be a key and is no id
            ranks = check_rank_ids(rank_ids, dist.get_world_size())
        self.ranks_of_ids[tuple(rank_ids)] = ranks
        return ranks


_registry: _Registry | None = None


def create_group(
    name: str | None, rank_ids: list[int] | tuple[int, ...]
) -> dist.ProcessGroup | int:
    """Create the process group of these ranks, or return the one that already exists.

    Only the members have to call this, and if they create several groups, in one order. A rank
    outside may call it too: it gets `GroupMember.NON_GROUP_MEMBER`, with which a layer can be
    built and evaluated, but not trained.

    Args:
        name: a name by which `SyncBatchNorm(process_group=name)` finds the group, or None. Names
            end with the world: call this again after torch.distributed was initialized again.
        rank_ids: distinct global rank ids. All of them together are the world's own group.

    Raises:
        TypeError: name is not a str, or rank_ids is not a list of ints.
        ValueError: a rank id is not in [0, world size) (ERR-5) or stands twice; the list is empty;
            the name already stands for other ranks.
        RuntimeError: torch.distributed is not initialized.
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name must be a str or None, got {name!r} of type {type(name).__name__}")
    registry = _registry_of_world(rank_ids)
    ranks = check_rank_ids(rank_ids, dist.get_world_size())
    if name is not None and registry.ranks_of_name.get(name, ranks) != ranks:
        raise ValueError(
            f"name must stand for one group, got {name!r} for ranks {list(ranks)}: it is the "
            f"group of ranks {list(registry.ranks_of_name[name])}"
        )
    group = _group_of(registry, ranks)
    if name is not None:
        registry.ranks_of_name[name] = ranks
    return group


def check_group(process_group: Any) -> None:
    """Check what a layer is given as its `process_group`, as far as that is possible now.

    In an initialized world, a group of rank ids is created here: all members build their layers,
    whereas the order of their first training steps is the user's.

    Raises:
        TypeError: it is not one of `ProcessGroupLike`.
        ValueError: a rank id is not in [0, world size) (ERR-5) or stands twice; the list is empty;
            the world has no group of that name.
        RuntimeError: the handle is of a world that was destroyed.
    """
    if isinstance(process_group, (list, tuple)):
        check_rank_ids(process_group, dist.get_world_size() if _initialized() else None)
    else:
        _check_type(process_group)
    if _initialized() or isinstance(process_group, dist.ProcessGroup):
        _handle_of(process_group)


def portable(process_group: Any) -> Any:
    """The same `process_group`, with rank ids for a handle, which cannot be pickled.

    The handle of the world becomes None.

    Raises:
        RuntimeError: the handle is of a world that was destroyed.
    """
    if not isinstance(process_group, dist.ProcessGroup):
        return process_group
    ranks = list(Communicator.of(process_group).ranks)
    return None if process_group is dist.group.WORLD else ranks


@dataclass(frozen=True)
class Communicator:
    """The ranks that take a step together, and their two collectives.

    ranks are global, in group order; a single rank does not communicate.
    """

    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, process_group: ProcessGroupLike) -> Communicator:
        """The members of a layer's process_group in the present world.

        None is this process alone if torch.distributed is not initialized.

        Raises:
            TypeError, ValueError, RuntimeError: see `check_group`.
            ValueError: this rank is not a member.
            RuntimeError: process_group is not None and torch.distributed is not initialized.
        """
        if process_group is None and not _initialized():
            return ALONE
        handle = _handle_of(process_group)
        if isinstance(handle, int):
            given = "" if isinstance(process_group, int) else f" {process_group!r},"
            raise ValueError(
                f"process_group must contain the rank that trains, got{given} a group without rank "
                f"{dist.get_rank()}: on this rank call eval(), or {_SET_GROUP} a group with it"
            )
        return cls(tuple(dist.get_process_group_ranks(handle)), handle)

    @classmethod
    def of_key(cls, key: str) -> Communicator:
        """The same, of a process_group that `key_of` has turned into a string."""
        if key == ALONE_KEY:
            return ALONE
        if key == _WORLD_KEY:
            check_world()
        return cls.of(_process_group_of(key))

    def all_gather(self, message: Tensor) -> Tensor:
        """The (M,) messages of all ranks as (ranks, M)."""
        if len(self.ranks) == 1:
            return message.unsqueeze(0)
        table = message.new_empty(len(self.ranks) * message.numel())
        _all_gather(table, message, group=self.group)
        return table.view(len(self.ranks), -1)

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum of the ranks' values, in place."""
        if len(self.ranks) > 1:
            dist.all_reduce(values, group=self.group)
        return values


# Into one tensor, which Gloo wants flat: into a list, an accelerator's transport copies each row.
# PyTorch 2.13 has renamed it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

ALONE = Communicator((0,), None)
ALONE_KEY = "alone"
_WORLD_KEY = "world"  # of a graph that was compiled for several ranks


def has_peers() -> bool:
    """Whether there is a world of several ranks."""
    return _initialized() and dist.get_world_size() > 1


def check_world() -> None:
    """Refuse to train alone what trained with other ranks (process_group None).

    Raises:
        RuntimeError: torch.distributed is not initialized.
    """
    if not _initialized():
        raise RuntimeError(_NO_WORLD)


def key_of(process_group: ProcessGroupLike) -> str:
    """A process_group as a string, which a compiled graph can hold.

    It is looked up when the graph runs, so that a graph outlives torch.distributed's world as
    far as a layer does. A handle is found by its name, which another world may give to a group of
    other ranks. So its ranks are part of the string.

    Raises:
        TypeError, ValueError: see `check_group`.
        RuntimeError: the handle is of a world that was destroyed.
    """
    if process_group is None:
        return _WORLD_KEY if has_peers() else ""
    if isinstance(process_group, (list, tuple)):
        return "ranks " + ",".join(map(str, check_rank_ids(process_group, None)))
    if isinstance(process_group, str):
        return f"name {process_group}"
    if isinstance(process_group, dist.ProcessGroup):
        if not _is_live(process_group):
            raise RuntimeError(_STALE)
        return f"handle {_identity(process_group)}"
    _check_type(process_group)
    return "outside"


# A compiler calls it once and keeps the result. The decorator torch.compiler.assume_constant_result
# sets this attribute, but also imports the compiler.
key_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _process_group_of(key: str) -> ProcessGroupLike:
    """The inverse of `key_of`."""
    kind, _, name = key.partition(" ")
    if kind in ("", _WORLD_KEY):
        return None
    if kind == "name":
        return name
    if kind == "outside":
        return dist.GroupMember.NON_GROUP_MEMBER
    if kind == "handle":
        for group in distributed_c10d._world.pg_names:
            if _identity(group) == name:
                return group
        raise RuntimeError(_STALE)
    assert kind == "ranks"
    return tuple(int(rank) for rank in name.split(","))


def _identity(group: dist.ProcessGroup) -> str:
    return f"{group.group_name} {dist.get_process_group_ranks(group)}"


def _handle_of(process_group: Any) -> dist.ProcessGroup | int:
    """The handle that process_group stands for in the present world."""
    if isinstance(process_group, dist.ProcessGroup):
        if not _is_live(process_group):
            raise RuntimeError(_STALE)
        return process_group
    registry = _registry_of_world(process_group)
    if process_group is None:
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    if isinstance(process_group, (list, tuple)):
        return _group_of(registry, registry.ranks_of(process_group))
    _check_type(process_group)
    if isinstance(process_group, str):
        if process_group not in registry.ranks_of_name:
            known = ", ".join(registry.ranks_of_name) or "none"
            raise ValueError(
                f"process_group must be the name of a group made by create_group (known: "
                f"{known}), got {process_group!r}: call create_group({process_group!r}, rank_ids) "
                "on its members, after every init_process_group"
            )
        return _group_of(registry, registry.ranks_of_name[process_group])
    return dist.GroupMember.NON_GROUP_MEMBER


def _check_type(process_group: Any) -> None:
    if process_group is None or isinstance(process_group, (dist.ProcessGroup, str)):
        return
    if isinstance(process_group, int) and process_group == dist.GroupMember.NON_GROUP_MEMBER:
        return
    raise TypeError(
        "process_group must be None, a ProcessGroup, the name of a group or a list of rank "
        f"ids, got {process_group!r} of type {type(process_group).__name__}"
    )


def _group_of(registry: _Registry, ranks: tuple[int, ...]) -> dist.ProcessGroup | int:
    if dist.get_rank() not in ranks:
        return dist.GroupMember.NON_GROUP_MEMBER
    if len(ranks) == dist.get_world_size():
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    group = registry.by_ranks.get(ranks)
    if group is None or not _is_live(group):
        group = registry.by_ranks[ranks] = _new_group(ranks)
    return group


def _new_group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """A new group of these ranks, made by its members alone.

    torch names such a group after its ranks and the number of groups that this process has
    (PyTorch issue 173608). Members that have different numbers would wait for each other for ever,
    and a name that a destroyed group had leads to the addresses of that group. So the members agree
    on a number that no group of these ranks had before, and who has fewer groups makes more.
    """
    store = PrefixStore(f"syncbn/{ranks}", distributed_c10d._get_default_store())

    def agreed(meeting: int) -> int:
        return max(int(store.get(f"{meeting}/{rank}")) for rank in ranks)

    meeting = (store.add("arrivals", 1) - 1) // len(ranks)  # how often these ranks met before
    made = len(distributed_c10d._world.pg_names)
    number = max(made, agreed(meeting - 1) + 1) if meeting else made
    store.set(f"{meeting}/{dist.get_rank()}", str(number))
    for _ in range(agreed(meeting) - made):
        dist.new_group([dist.get_rank()], use_local_synchronization=True)
    group = dist.new_group(list(ranks), use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _is_live(group: dist.ProcessGroup) -> bool:
    """Whether neither the group nor its world was destroyed."""
    return group in distributed_c10d._world.pg_group_ranks


def _registry_of_world(process_group: Any) -> _Registry:
    """The registry of the present world."""
    if not _initialized():
        raise RuntimeError(
            f"process_group {process_group!r} needs torch.distributed: call "
            f"torch.distributed.init_process_group first, or, to train alone, {_SET_GROUP} None"
        )
    global _registry
    world = dist.group.WORLD
    assert world is not None
    if _registry is None or _registry.world() is not world:
        _registry = _Registry(weakref.ref(world))
    return _registry
