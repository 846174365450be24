"""The page of the figures, what it is made of, and the comparison of times."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import check, peers, performance_page, tiny, world, world_plot


def test_the_page_is_made_of_the_kept_figures() -> None:
    assert performance_page.PAGE.read_text() == performance_page.text()


def test_the_merge_stays_exact_as_the_world_grows() -> None:
    for ranks in (2, 64):
        in_float64, in_float32 = world.measure(ranks, repeat=1)
        assert in_float64["mean_error"] < 1e-12
        assert in_float64["var_error"] < 1e-12
        unit = torch.finfo(torch.float32).eps / 2
        assert in_float32["mean_error"] < 4 * unit * world.MEAN
        assert in_float32["var_error"] < 1e-4


def test_the_merge_of_a_recorded_step_stays_exact() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    for ranks in (2, 64):
        in_float64, in_float32 = world.measure(ranks, 1, world.recorded)
        assert max(in_float64["mean_error"], in_float64["var_error"]) < 1e-12
        assert max(in_float32["mean_error"], in_float32["var_error"]) < 1e-4


def test_the_plot_of_the_kept_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    records = json.loads(world_plot.KEPT.read_text())["records"]
    world_plot.draw(records, tmp_path / "world.svg")
    assert "var, float32" in (tmp_path / "world.svg").read_text()


def test_every_rank_sends_a_share_of_n_and_of_n_minus_1() -> None:
    table, _, _ = world.payloads(64, world.generated(64))
    n = 64 * world.SHARD[0] * world.SHARD[2]
    torch.testing.assert_close(table[:, 10:12].sum(0), torch.tensor([n, n - 1.0]).double())


def test_a_slower_ratio_is_found(tmp_path: Path) -> None:
    kept: dict[str, Any] = json.loads(check.KEPT.read_text())
    assert check.slower(kept, kept) == []
    new = copy.deepcopy(kept)
    case = new["cases"][0]
    case["contiguous"]["ratio"]["composed"]["quartiles"] = [9.0, 9.5]
    (line,) = check.slower(kept, new)
    assert str(tuple(case["shape"])) in line
    assert "contiguous, composed: 9.00 to 9.50, was" in line


def test_the_parts_of_a_tiny_step_are_all_of_it() -> None:
    for record in tiny.measure(ranks=1, steps=3):
        parts = dict(record["us"])
        whole, plain = parts.pop("the step"), parts.pop("BatchNorm2d")
        assert set(parts) >= {*tiny.BACKEND, *tiny.LAYOUT, "the rest"}
        assert min(*parts.values(), plain) >= 0
        assert max(parts.values()) < whole


def test_peers_take_turns() -> None:
    quartiles = peers.measure(["torch"], repeat=1)
    assert len(quartiles) == 2 * 3  # layers in two layouts
    assert all(0 < low <= median <= high for low, median, high in quartiles.values())
