"""Process groups of the layer: what `process_group` may be, and what it stands for."""

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

# What a user may give; see `resolve`.
ProcessGroupLike: TypeAlias = "dist.ProcessGroup | str | list[int] | tuple[int, ...] | int | None"

# A handle, as torch.distributed.new_group returns it: a group, or for a rank that is not in it
# the int GroupMember.NON_GROUP_MEMBER. None is the whole world.
Group: TypeAlias = "dist.ProcessGroup | int | None"


@dataclass
class _Registry:
    """Groups created on one world, so that equal rank ids never open a second communicator.

    They belong to torch.distributed: held here beyond destroy_process_group, their threads would
    abort the process at its end.
    """

    world: weakref.ref[dist.ProcessGroup] | None = None
    by_ranks: weakref.WeakValueDictionary[tuple[int, ...], dist.ProcessGroup] = field(
        default_factory=weakref.WeakValueDictionary
    )
    ranks_of_name: dict[str, tuple[int, ...]] = field(default_factory=dict)


_registry = _Registry()


def create_group(
    name: str | None, rank_ids: list[int] | tuple[int, ...]
) -> dist.ProcessGroup | int:
    """Create the process group of these ranks, or return the one that already exists.

    Only the members have to call this, and if they create several groups, in one order. A rank
    outside may call it too: it gets `GroupMember.NON_GROUP_MEMBER`, with which a layer can be
    built and evaluated, but not trained.

    Args:
        name: a name by which `SyncBatchNorm(process_group=name)` finds the group, or None.
        rank_ids: distinct global rank ids.

    Raises:
        TypeError: name is not a str, or rank_ids is not a list of ints.
        ValueError: a rank id is not in [0, world size) (ERR-5) or stands twice; the list is empty;
            the name already stands for other ranks.
        RuntimeError: torch.distributed is not initialized.
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name must be a str or None, got {name!r} of type {type(name).__name__}")
    registry = _current_registry()
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


def resolve(process_group: Any) -> Group:
    """The handle that a layer's `process_group` argument stands for.

    Args:
        process_group: None, a handle, a name given to `create_group`, or a list of rank ids.

    Raises:
        TypeError: it is none of these.
        ValueError: no group has that name, or a rank id is wrong (see `create_group`).
        RuntimeError: a name or rank ids, and torch.distributed is not initialized.
    """
    if process_group is None or isinstance(process_group, dist.ProcessGroup):
        return process_group
    if isinstance(process_group, (list, tuple)):
        return create_group(None, process_group)
    if isinstance(process_group, str):
        registry = _current_registry()
        if process_group not in registry.ranks_of_name:
            known = ", ".join(registry.ranks_of_name) or "none"
            raise ValueError(
                f"process_group must be the name of a group made by create_group (known: "
                f"{known}), got {process_group!r}"
            )
        return _group_of(registry, registry.ranks_of_name[process_group])
    if isinstance(process_group, int) and process_group == dist.GroupMember.NON_GROUP_MEMBER:
        return process_group
    raise TypeError(
        "process_group must be None, a ProcessGroup, the name of a group or a list of rank "
        f"ids, got {process_group!r} of type {type(process_group).__name__}"
    )


@dataclass(frozen=True)
class Communicator:
    """The ranks that take a step together, and their two collectives.

    ranks are global, in group order; a single rank does not communicate.
    """

    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, group: Group) -> Communicator:
        """The members of a group; only this process if torch.distributed is not initialized.

        Raises:
            ValueError: this rank is not a member.
        """
        if isinstance(group, int):
            raise ValueError(
                "process_group must contain the rank that trains, got a group without rank "
                f"{dist.get_rank()}"
            )
        if not _initialized():
            return ALONE
        handle = dist.group.WORLD if group is None else group
        return cls(tuple(dist.get_process_group_ranks(handle)), handle)

    def all_gather(self, message: Tensor) -> Tensor:
        """The (M,) messages of all ranks as (ranks, M)."""
        if len(self.ranks) == 1:
            return message.unsqueeze(0)
        table = message.new_empty(len(self.ranks), message.numel())
        dist.all_gather(list(table.unbind(0)), message, group=self.group)
        return table

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum of the ranks' values, in place."""
        if len(self.ranks) > 1:
            dist.all_reduce(values, group=self.group)
        return values


ALONE = Communicator((0,), None)


def _group_of(registry: _Registry, ranks: tuple[int, ...]) -> dist.ProcessGroup | int:
    if dist.get_rank() not in ranks:
        return dist.GroupMember.NON_GROUP_MEMBER
    group = registry.by_ranks.get(ranks)
    if group is None:
        group = registry.by_ranks[ranks] = _new_group(ranks)
    return group


def _new_group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """A new group of these ranks, made by its members alone.

    torch names such a group after its ranks and the number of groups that this process has made
    (PyTorch issue 173608), so that members which have made different numbers wait for each other
    for ever. They tell each other their numbers first, and who is behind makes groups of its own.
    """
    store = PrefixStore(f"syncbn/{ranks}", distributed_c10d._get_default_store())
    made = len(distributed_c10d._world.pg_names)
    store.set(str(dist.get_rank()), str(made))
    most = max(int(store.get(str(rank))) for rank in ranks)
    for _ in range(most - made):
        dist.new_group([dist.get_rank()], use_local_synchronization=True)
    group = dist.new_group(list(ranks), use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _current_registry() -> _Registry:
    """The registry, emptied if the world it belongs to is gone."""
    if not _initialized():
        raise RuntimeError(
            "process_group given by name or rank ids needs torch.distributed: call "
            "torch.distributed.init_process_group first"
        )
    global _registry
    world = dist.group.WORLD
    assert world is not None
    if _registry.world is None or _registry.world() is not world:
        _registry = _Registry(world=weakref.ref(world))
    return _registry
