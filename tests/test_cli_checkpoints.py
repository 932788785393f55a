"""Weights as people have them: what is read out of a checkpoint, and what is not."""

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery_cli.work.checkpoints import read_weights
from swan_surgery_cli.work.subjects import with_weights


class Whole:
    """What a checkpoint must not bring to life."""


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def _written(tmp_path: Path, content: object, name: str = "x.pth") -> Path:
    torch.save(content, tmp_path / name)  # noqa: TID251 - what others write
    return tmp_path / name


def _state() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return _net().state_dict()


@pytest.mark.parametrize("name", ["x.pth", "x.pt", "x.ckpt", "x.bin", "x.th", "x.tar"])
def test_a_state_dict_under_any_of_its_suffixes(tmp_path: Path, name: str) -> None:
    net = with_weights(_net(), _written(tmp_path, _state(), name))
    assert all(torch.equal(net.state_dict()[key], value) for key, value in _state().items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}},
        lambda state: {"model": state},
        lambda state: {"epoch": 1, "model": {"state_dict": state}},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"module._orig_mod.{k}": v for k, v in state.items()}},
        lambda state: {"state_dict": OrderedDict((f"model.{k}", v) for k, v in state.items())},
    ],
    ids=["lightning", "model", "nested", "ddp", "compiled", "inner"],
)
def test_what_trainers_put_around_it_is_taken_off(tmp_path: Path, wrap) -> None:
    found = read_weights(_written(tmp_path, wrap(_state())), _net().state_dict())
    assert set(found) == set(_state())
    _net().load_state_dict(found)


def test_a_prefix_of_the_model_itself_stays(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(2, 2)

    state = Model().state_dict()
    assert set(read_weights(_written(tmp_path, state), state)) == {"model.weight", "model.bias"}


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    with pytest.raises(swan.InputError, match=r"never run .*; save model.state_dict\(\) alone"):
        with_weights(_net(), _written(tmp_path, {"state_dict": _state(), "args": Whole()}))
    damaged = tmp_path / "y.pth"
    damaged.write_bytes(b"nothing of the kind")
    with pytest.raises(swan.InputError, match="or is damaged"):
        with_weights(_net(), damaged)


def test_a_file_without_weights_says_what_is_in_it(tmp_path: Path) -> None:
    with pytest.raises(swan.InputError, match="no state dict was found; it holds epoch, loss"):
        with_weights(_net(), _written(tmp_path, {"epoch": 3, "loss": [1.0]}))
    with pytest.raises(swan.InputError, match="does not fit Sequential"):
        with_weights(_net(), _written(tmp_path, {"0.weight": torch.zeros(9, 9)}))


def test_safetensors_as_before(tmp_path: Path) -> None:
    save_file(_state(), tmp_path / "x.safetensors")
    net = with_weights(_net(), tmp_path / "x.safetensors")
    assert torch.equal(net.state_dict()["0.weight"], _state()["0.weight"])
    (tmp_path / "z.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(swan.InputError, match="is not a safetensors file"):
        with_weights(_net(), tmp_path / "z.safetensors")
