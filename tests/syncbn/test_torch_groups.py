"""Process groups of the PyTorch layer, on three ranks."""

from __future__ import annotations

import copy
import datetime
import gc
import io
import json
import multiprocessing
import pickle
import time
import traceback
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from syncbn.torch import (
    SyncBatchNorm,
    convert_sync_batchnorm,
    create_group,
    revert_sync_batchnorm,
)
from syncbn.torch.groups import Communicator
from tests.syncbn.torch_layers import (
    assert_step,
    assert_tracked,
    assert_untouched,
    make_layer,
    numpy_of,
    randn,
    reference_of,
    state_of,
)

RANKS = 3
DEADLINE = 90.0  # seconds for all that the ranks do
TIMEOUT = datetime.timedelta(seconds=20)  # for a collective, so that a lost rank is soon missed


def _assert_statistics_of(members: list[int], layer: SyncBatchNorm, rank: int) -> None:
    """A training step takes the statistics of these ranks together."""
    expected_layer = reference_of(layer)
    layer(randn(5, 3, seed=rank))
    expected_layer.forward([numpy_of(randn(5, 3, seed=member)) for member in members])
    assert_tracked(layer, expected_layer)


pair_of_first_world: weakref.ref[dist.ProcessGroup] | None = None


def members_make_a_group(rank: int) -> None:
    global pair_of_first_world
    if rank in (0, 1):
        pair = create_group("pair", [1, 0])
        assert isinstance(pair, dist.ProcessGroup)
        assert dist.get_process_group_ranks(pair) == [0, 1]
        pair_of_first_world = weakref.ref(pair)
        assert create_group("pair", (0, np.int64(1))) is pair  # type: ignore[arg-type]
        assert create_group("alias", [0, 1]) is pair
        assert create_group(None, [0, 1]) is pair
        for process_group in ("pair", "alias", [0, 1], (1, 0), pair):
            layer = SyncBatchNorm(3, process_group=process_group)
            assert layer.process_group == process_group
            assert Communicator.of(layer.process_group) == Communicator((0, 1), pair)
        _assert_statistics_of([0, 1], make_layer(process_group="pair"), rank)


def one_outside_evaluates(rank: int) -> None:
    layer = make_layer(process_group=[0, 1])
    if rank != 2:
        return
    assert layer.process_group == [0, 1]
    assert create_group(None, [1, 0]) == dist.GroupMember.NON_GROUP_MEMBER
    handle = make_layer(process_group=dist.GroupMember.NON_GROUP_MEMBER)
    for member in (layer, handle, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_step(member.eval(), randn(5, 3), randn(5, 3, seed=1))
        before = state_of(member)
        with pytest.raises(ValueError, match=r"process_group must contain .* without rank 2"):
            member.train()(randn(5, 3))
        assert_untouched(member, before)


def equal_lists_share_a_communicator(rank: int) -> None:
    first = SyncBatchNorm(3, process_group=[0, 1])
    with mock.patch.object(dist, "new_group") as new_group:
        layers = [SyncBatchNorm(3, process_group=[i % 2, 1 - i % 2]) for i in range(200)]
        if rank != 2:
            assert {Communicator.of(layer.process_group) for layer in layers} == {
                Communicator.of(first.process_group)
            }
    new_group.assert_not_called()


def wrong_groups_are_refused(rank: int) -> None:
    for ids in ([0, 3], [-1], (3,)):
        with pytest.raises(ValueError, match=r"process_group must be in \[0, 3\), got "):
            SyncBatchNorm(3, process_group=ids)
    with pytest.raises(ValueError, match=r"distinct, got \[0, 0\]"):
        SyncBatchNorm(3, process_group=[0, 0])
    with pytest.raises(ValueError, match=r"empty list"):
        SyncBatchNorm(3, process_group=[])
    with pytest.raises(ValueError, match=r"known: .*\), got 'trio'"):
        SyncBatchNorm(3, process_group="trio")
    wrong: Any
    for wrong in ({0, 1}, 1, True, 1.5, -100.0, object, np.array([0, 1]), torch.ones(2)):
        with pytest.raises(TypeError, match="process_group must be None, a ProcessGroup"):
            SyncBatchNorm(3, process_group=wrong)
    with pytest.raises(TypeError, match=r"ints, got 1\.0 of type float in it"):
        SyncBatchNorm(3, process_group=[0, 1.0])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"name must be a str or None, got 7"):
        create_group(7, [0, 1])  # type: ignore[arg-type]
    if rank != 2:
        with pytest.raises(ValueError, match=r"got 'pair' for ranks \[0, 2\].* ranks \[0, 1\]"):
            create_group("pair", [0, 2])


def overlapping_groups(rank: int) -> None:
    """torch alone would hang: it names a group after how many this rank has made (issue 173608)."""
    for members in ([0, 1], [1, 2], [0, 2]):
        if rank in members:
            name = str(members)
            group = create_group(name, members)
            assert isinstance(group, dist.ProcessGroup)
            assert dist.get_process_group_ranks(group) == members
            _assert_statistics_of(members, make_layer(process_group=name), rank)


def torch_still_makes_groups(rank: int) -> None:
    """It counts those that all ranks have made, and the ranks must agree on the number."""
    ones = torch.ones(1)
    dist.all_reduce(ones, group=dist.new_group([0, 1, 2]))
    assert ones.item() == RANKS


def a_copy_shares_the_group(rank: int) -> None:
    world = SyncBatchNorm(3, process_group=dist.group.WORLD)
    layers = [world] if rank == 2 else [make_layer(process_group="pair"), world]
    for layer in layers:
        clone, again = copy.deepcopy(torch.nn.Sequential(layer, layer))
        assert clone is again
        assert isinstance(clone, SyncBatchNorm)
        assert clone.process_group is layer.process_group
        assert clone.weight is not layer.weight
        assert torch.equal(layer(randn(5, 3, seed=rank)), clone(randn(5, 3, seed=rank)))
        assert_untouched(clone, state_of(layer))


def converted_layers(rank: int) -> None:
    """BatchNorm becomes synchronized over all ranks or a group, and is itself again afterwards."""
    for group, members in ((None, [0, 1, 2]), ([rank], [rank]), ("pair", [0, 1])):
        if rank not in members:
            continue
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
        layer: Any = convert_sync_batchnorm(model, group)[0]
        _assert_statistics_of(members, layer, rank)
        revert_sync_batchnorm(model)
        layer.reset_running_stats()
        _assert_statistics_of([rank], layer, rank)


def one_rank_evaluates_alone(rank: int) -> None:
    if rank == 0:
        for track in (True, False):
            layer = make_layer(track_running_stats=track).eval()
            assert_step(layer, randn(5, 3), randn(5, 3, seed=1))


def all_ranks_are_the_world(rank: int) -> None:
    with mock.patch.object(dist, "new_group") as new_group:
        for ids in ([0, 1, 2], (2, 0, 1)):
            assert create_group("world", ids) is dist.group.WORLD
            _assert_statistics_of([0, 1, 2], make_layer(process_group=ids), rank)
    new_group.assert_not_called()


def a_new_group_counts_at_once(rank: int) -> None:
    """process_group is an attribute like others."""
    layer = make_layer(process_group=[rank])
    _assert_statistics_of([rank], layer, rank)
    layer.process_group = None
    _assert_statistics_of([0, 1, 2], layer, rank)
    if rank != 1:
        layer.process_group = [0, 2]
        _assert_statistics_of([0, 2], layer, rank)
    layer.process_group = [0, {}]  # type: ignore[list-item]
    with pytest.raises(TypeError, match="rank_ids must be a list of ints"):
        layer(randn(5, 3))


def destroyed_groups(rank: int) -> None:
    """Rank ids get a new group, the handle of the old one is refused."""
    if rank == 2:
        return
    group = create_group(None, [0, 1])
    assert isinstance(group, dist.ProcessGroup)
    by_ids, by_handle = make_layer(process_group=[0, 1]), make_layer(process_group=group)
    for layer in (by_ids, by_handle):
        _assert_statistics_of([0, 1], layer, rank)
    dist.barrier(group)
    dist.destroy_process_group(group)
    _assert_statistics_of([0, 1], by_ids, rank)
    _assert_refused(by_handle, RuntimeError, "ProcessGroup that was destroyed: set .* rank ids")
    for refused in (lambda: SyncBatchNorm(3, process_group=group), lambda: pickle.dumps(by_handle)):
        with pytest.raises(RuntimeError, match="ProcessGroup that was destroyed"):
            refused()


def saved_and_loaded(rank: int) -> None:
    if rank == 2:
        return
    handle = create_group("couple", [0, 1])
    for given, kept in (
        (None, None),
        ([0, 1], [0, 1]),
        ((1, 0), (1, 0)),
        ("couple", "couple"),
        (handle, [0, 1]),
        (dist.group.WORLD, None),
    ):
        layer = make_layer(process_group=given)
        file = io.BytesIO()
        torch.save(torch.nn.Sequential(layer), file)
        file.seek(0)
        for loaded in (
            pickle.loads(pickle.dumps(layer)),
            torch.load(file, weights_only=False)[0],
        ):
            assert loaded.process_group == kept
            assert_untouched(loaded, state_of(layer))
            if kept is not None:
                _assert_statistics_of([0, 1], loaded, rank)
        assert copy.copy(layer).process_group is given


TRAINED_WITH_OTHERS = "trained with other ranks .*init_process_group.*revert_sync_batchnorm"

kept_layers: dict[str, SyncBatchNorm] = {}
kept_compiled: dict[str, Any] = {}
kept_names: list[str] = []


def keep_layers(rank: int) -> None:
    """For the world after this one."""
    create_group("couple", [0, 1])
    handle = dist.new_group([0, 1, 2])
    kept_layers.update(
        world=make_layer(),
        ids=make_layer(process_group=[0, 1]),
        alone=make_layer(process_group=[rank]),
        name=make_layer(process_group="couple"),
        handle=make_layer(process_group=handle),
    )
    kept_names.append(handle.group_name)
    for kind, layer in kept_layers.items():
        if rank != 2 or layer.process_group not in ("couple", [0, 1]):
            layer(randn(5, 3, seed=rank))
        if kind in ("world", "handle") or (kind == "ids" and rank != 2):
            kept_compiled[kind] = torch.compile(
                copy.deepcopy(layer), backend="aot_eager", fullgraph=True
            )
            kept_compiled[kind](randn(5, 3, seed=rank))


def layers_without_a_world(rank: int) -> None:
    """Between two worlds."""
    assert not dist.is_initialized()
    for kind, layer in kept_layers.items():
        assert_step(layer.eval(), randn(5, 3), randn(5, 3, seed=1))
        layer.train()
        if kind == "world":
            for again in (layer, copy.copy(layer), copy.deepcopy(layer)):
                _assert_refused(again, RuntimeError, TRAINED_WITH_OTHERS)
            # Another process may load it, to train alone.
            loaded = pickle.loads(pickle.dumps(layer))
            assert_step(loaded, randn(5, 3), randn(5, 3, seed=1))
            reverted: Any = convert_sync_batchnorm(revert_sync_batchnorm(copy.deepcopy(layer)))
            assert_step(reverted, randn(5, 3), randn(5, 3, seed=1))
        elif kind == "handle":
            _assert_refused(layer, RuntimeError, "ProcessGroup that was destroyed")
        else:
            _assert_refused(
                layer, RuntimeError, "init_process_group first, or, to train alone, set"
            )


def compiled_layers_without_a_world(rank: int) -> None:
    for kind, message in {
        "world": TRAINED_WITH_OTHERS,
        "handle": "ProcessGroup that was destroyed",
        "ids": "init_process_group first",
    }.items():
        if rank != 2 or kind != "ids":
            with pytest.raises(RuntimeError, match=message):
                kept_compiled[kind](randn(5, 3))


def compiled_layers_of_another_world(rank: int) -> None:
    """A graph holds a handle by its name, which this world may give to other ranks."""
    others = [dist.new_group([0, 1]) for _ in range(9)]
    names = [group.group_name for group in others if isinstance(group, dist.ProcessGroup)]
    assert rank == 2 or kept_names[0] in names
    with pytest.raises(RuntimeError, match="ProcessGroup that was destroyed"):
        kept_compiled["handle"](randn(5, 3))
    kept_compiled["world"](randn(5, 3, seed=rank))
    if rank != 2:
        kept_compiled["ids"](randn(5, 3, seed=rank))


def layers_of_another_world(rank: int) -> None:
    _assert_statistics_of([0, 1, 2], _reset(kept_layers["world"]), rank)
    _assert_statistics_of([rank], _reset(kept_layers["alone"]), rank)
    _assert_refused(kept_layers["name"], ValueError, r"call create_group\('couple', rank_ids\)")
    _assert_refused(kept_layers["handle"], RuntimeError, "ProcessGroup that was destroyed")
    kept_layers["handle"].process_group = None
    _assert_statistics_of([0, 1, 2], _reset(kept_layers["handle"]), rank)
    if rank != 2:
        create_group("couple", [0, 1])
        _assert_statistics_of([0, 1], _reset(kept_layers["ids"]), rank)
        _assert_statistics_of([0, 1], _reset(kept_layers["name"]), rank)
    else:
        _assert_refused(kept_layers["ids"], ValueError, "without rank 2: on this rank call eval")


def _reset(layer: SyncBatchNorm) -> SyncBatchNorm:
    layer.reset_running_stats()
    return layer


def _assert_refused(layer: SyncBatchNorm, error: type[Exception], message: str) -> None:
    before = state_of(layer)
    with pytest.raises(error, match=message):
        layer(randn(5, 3))
    assert_untouched(layer, before)


def groups_went_with_their_world(rank: int) -> None:
    gc.collect()
    # Gloo's threads abort a process that ends while something still holds their group.
    assert pair_of_first_world is None or pair_of_first_world() is None
    with pytest.raises(ValueError, match=r"known: none\), got 'pair'"):
        SyncBatchNorm(3, process_group="pair")


def a_call_from_outside_leaves_no_trace(rank: int) -> None:
    if rank == 2:
        assert create_group(None, [0, 1]) == dist.GroupMember.NON_GROUP_MEMBER
    if rank in (0, 2):
        create_group("pair", [0, 2])
        _assert_statistics_of([0, 2], make_layer(process_group="pair"), rank)


# Each list runs in a world of its own, except the third, which runs without one.
WORLDS: list[list[Callable[[int], None]]] = [
    [
        members_make_a_group,
        one_outside_evaluates,
        equal_lists_share_a_communicator,
        wrong_groups_are_refused,
        overlapping_groups,
        torch_still_makes_groups,
        all_ranks_are_the_world,
        a_new_group_counts_at_once,
        a_copy_shares_the_group,
        converted_layers,
        one_rank_evaluates_alone,
    ],
    [
        groups_went_with_their_world,
        a_call_from_outside_leaves_no_trace,
        saved_and_loaded,
        destroyed_groups,
        keep_layers,
    ],
    [layers_without_a_world, compiled_layers_without_a_world],
    [compiled_layers_of_another_world, layers_of_another_world],
]


def _run_rank(rank: int, folder: Path) -> None:
    """Take the checks in order, up to one that fails: the ranks would no longer be in step."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    outcome: dict[str, str] = {}
    for index, checks in enumerate(WORLDS):
        world = layers_without_a_world not in checks
        if world:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/world-{index}",
                rank=rank,
                world_size=RANKS,
                timeout=TIMEOUT,
            )
        for check in checks:
            try:
                check(rank)
                if world:
                    dist.barrier()
                outcome[check.__name__] = "passed"
            except BaseException:
                outcome[check.__name__] = traceback.format_exc()
                return
            finally:
                (folder / str(rank)).write_text(json.dumps(outcome))
        if world:
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What became of every check on every rank."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_run_rank, args=(rank, folder)) for rank in range(RANKS)]
    ends = time.monotonic() + DEADLINE
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, ends - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.join()
    files = [folder / str(rank) for rank in range(RANKS)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files]


@pytest.mark.parametrize("check", [check.__name__ for checks in WORLDS for check in checks])
def test_groups_on_three_ranks(check: str, outcomes: list[dict[str, str]]) -> None:
    for rank, outcome in enumerate(outcomes):
        found = outcome.get(check, "not reached, or not done by the deadline")
        assert found == "passed", f"rank {rank}: {found}"


@pytest.mark.parametrize("given", [[0, 1], (0,), "pair"])
def test_a_group_without_a_world(given: list[int] | tuple[int, ...] | str) -> None:
    """The layer is built, evaluated, copied and pickled, but does not train alone in silence."""
    layer = make_layer(process_group=given)
    for again in (layer, copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert again.process_group == given
        assert_step(again.eval(), randn(5, 3), randn(5, 3, seed=1))
        _assert_refused(
            again.train(),
            RuntimeError,
            r"process_group .* call .*init_process_group first, or, .* None",
        )
        again.process_group = None
        assert_step(again, randn(5, 3), randn(5, 3, seed=1))
