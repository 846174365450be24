"""The code of docs/checkpoints.md runs here, and what it moved is compared."""

from __future__ import annotations

import doctest
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from syncbn.checkpoints import from_mindspore_nn, to_mindspore_nn

DOCUMENT = Path(__file__).parents[2] / "docs" / "checkpoints.md"
IMAGES = np.random.default_rng(1).normal(2, 3, (4, 3, 6, 6)).astype(np.float32)

# How far apart two implementations of eval may be, in float32's epsilons of the largest output.
# Rounding came to 2.0 of them at most, an eps of 1e-3 instead of 1e-5 to 59.
ALLOWED_EPSILONS = 8


def train(net: torch.nn.Module) -> None:
    """Let no array be one that a new layer has, and no two be equal."""
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, 1, generator=generator)
    for _ in range(3):
        net(torch.from_numpy(IMAGES))


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names of the document, after its code has run on a network that has been trained."""
    pytest.importorskip("mindspore", reason="MindSpore is not installed")
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("checkpoints"))
        for block in blocks:
            exec(compile(block, str(DOCUMENT), "exec"), names)
            if "plain" not in names:  # the first block: it has built the network
                train(names["trained"])
    for name in ("trained", "plain", "back"):
        names[name].eval()
    return names


def arrays(net: Any) -> Mapping[str, np.ndarray[Any, Any]]:
    if isinstance(net, torch.nn.Module):
        return {key: value.numpy() for key, value in net.state_dict().items()}
    return {key: value.asnumpy() for key, value in net.parameters_dict().items()}


def output(net: Any) -> np.ndarray[Any, Any]:
    if isinstance(net, torch.nn.Module):
        return net(torch.from_numpy(IMAGES)).detach().numpy()
    import mindspore

    return net(mindspore.Tensor(IMAGES)).asnumpy()


def differing(
    actual: Mapping[str, np.ndarray[Any, Any]], expected: Mapping[str, np.ndarray[Any, Any]]
) -> list[str]:
    """Keys of which only one side has an array, or another one, bit for bit."""
    return sorted(
        key
        for key in actual.keys() | expected.keys()
        if key not in actual
        or key not in expected
        or actual[key].dtype != expected[key].dtype
        or actual[key].tobytes() != expected[key].tobytes()
    )


@pytest.mark.parametrize("name", ["plain", "moved", "back", "mint", "again"])
def test_a_checkpoint_arrives_bit_for_bit(moved: dict[str, Any], name: str) -> None:
    expected = arrays(moved["trained"])
    assert expected["1.num_batches_tracked"] == 3
    assert differing(arrays(moved[name]), expected) == []


def test_so_it_does_under_the_names_of_mindspore_nn(moved: dict[str, Any]) -> None:
    expected = arrays(moved["trained"])
    found = arrays(moved["classic"])
    there = {
        "0.weight": "0.weight",
        "1.gamma": "1.weight",
        "1.beta": "1.bias",
        "1.moving_mean": "1.running_mean",
        "1.moving_variance": "1.running_var",
    }
    assert differing(found, {new: expected[old] for new, old in there.items()}) == []


@pytest.mark.parametrize("name", ["plain", "moved", "back", "classic", "again"])
def test_it_gives_the_same_output(moved: dict[str, Any], name: str) -> None:
    expected = output(moved["trained"])
    allowed = ALLOWED_EPSILONS * np.finfo(np.float32).eps * np.abs(expected).max()
    assert np.abs(output(moved[name]) - expected).max() <= allowed


@pytest.mark.parametrize(("name", "origin"), [("back", "trained"), ("again", "moved")])
def test_there_and_back_again_the_output_is_equal(
    moved: dict[str, Any], name: str, origin: str
) -> None:
    assert np.array_equal(output(moved[name]), output(moved[origin]))


def test_a_checkpoint_that_does_not_fit_is_refused(moved: dict[str, Any]) -> None:
    import syncbn.mindspore
    import syncbn.torch

    state = syncbn.torch.arrays_of(moved["trained"])
    wide = torch.nn.Sequential(*moved["trained"][:1], torch.nn.BatchNorm2d(9))
    for load, network, message in (
        (syncbn.mindspore.load_arrays, moved["classic"], r"not in the checkpoint: \[.*'1\.gamma'"),
        (syncbn.torch.load_arrays, moved["back"][:1], r"not in the module: \['1\.weight'"),
        (syncbn.torch.load_arrays, wide, r"another shape: \['1\.weight: \(8,\), not \(9,\)'"),
    ):
        before = arrays(network)
        with pytest.raises(ValueError, match=message):
            load(network, state)
        assert differing(arrays(network), before) == []


def test_a_count_may_be_a_number(moved: dict[str, Any]) -> None:
    """The frameworks make a tensor of it."""
    import syncbn.mindspore
    import syncbn.torch

    state = syncbn.mindspore.arrays_of(moved["classic"])
    state = from_mindspore_nn(state, num_batches_tracked=7)
    for load, network in (
        (syncbn.torch.load_arrays, moved["back"]),
        (syncbn.mindspore.load_arrays, moved["again"]),
    ):
        load(network, state)
        assert arrays(network)["1.num_batches_tracked"] == 7
        load(network, state | {"1.num_batches_tracked": np.array(3)})


def test_bfloat16_travels_as_float32() -> None:
    import syncbn.torch

    layer = syncbn.torch.SyncBatchNorm(2, dtype=torch.bfloat16)
    torch.nn.init.constant_(layer.weight, 0.3)
    copy = syncbn.torch.SyncBatchNorm(2, dtype=torch.bfloat16)
    found = syncbn.torch.arrays_of(layer)
    assert found["weight"].dtype == np.float32
    syncbn.torch.load_arrays(copy, found)
    assert torch.equal(copy.weight, layer.weight)


def test_examples_in_docstrings() -> None:
    import syncbn.torch.checkpoints

    for module in (syncbn.checkpoints, syncbn.torch.checkpoints):
        found = doctest.testmod(module)
        assert found.attempted
        assert not found.failed


def test_only_batch_normalization_is_renamed() -> None:
    plain = {
        "fc.weight": 0,
        "bn.weight": 1,
        "bn.bias": 2,
        "bn.running_mean": 3,
        "bn.running_var": 4,
        "bn.num_batches_tracked": 5,
        "ln.gamma": 6,
    }
    of_nn = {
        "fc.weight": 0,
        "bn.gamma": 1,
        "bn.beta": 2,
        "bn.moving_mean": 3,
        "bn.moving_variance": 4,
        "ln.gamma": 6,
    }
    assert to_mindspore_nn(plain) == of_nn
    assert from_mindspore_nn(of_nn, 5) == plain
    of_3d = {key.replace("bn.", "bn.bn2d."): value for key, value in of_nn.items()}
    assert from_mindspore_nn(of_3d, 5) == plain
    alone = {"gamma": 1, "beta": 2, "mean": 3, "variance": 4}
    assert from_mindspore_nn(alone, 5) == {
        key.removeprefix("bn."): value for key, value in plain.items() if key.startswith("bn.")
    }
