"""`swan-surgery adapt`: from a name and inputs to an adaptive model, or one of its widths."""

import json

import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import swan_surgery as swan
from tests.test_cli_shipping import done, refused


NAME = "tests.test_cli_adapt:net"
SHAPE = ("--input", "2,3")


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))


def wide_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 64))


def test_without_data_every_input_takes_all(tmp_path) -> None:
    text = done("adapt", NAME, *SHAPE, "-o", tmp_path / "a.swan")
    assert "every input takes the full width" in text
    adapted = swan.load(tmp_path / "a.swan", net())
    x = torch.randn(4, 3)
    assert torch.allclose(adapted(x), net().eval()(x), atol=1e-6)


def test_with_data_widths_are_fitted(tmp_path) -> None:
    x = torch.randn(200, 3) * torch.rand(200, 1).exp()
    labels = torch.zeros(200, dtype=torch.int64)  # `route` wants them; a file may serve both
    save_file({"inputs": x, "labels": labels}, tmp_path / "x.safetensors")
    options = ("--data", tmp_path / "x.safetensors", "--macs", 0.6, "--per", "network", "--json")
    facts = json.loads(done("adapt", NAME, *options, "-o", tmp_path / "a.swan"))
    assert facts["widths"]["samples"] == 200
    assert facts["widths"]["mean_macs"] <= 0.6 * facts["dense_macs"]
    assert facts["blocks"] == {"": [10, 20, 30, 40]}
    adapted = swan.load(tmp_path / "a.swan", net())
    assert isinstance(adapted, swan.AdaptiveModel)
    assert all(own.has_own for own in adapted.blocks()[""].statistics)  # each width is compensated


@pytest.mark.parametrize("structure", ["free", "blocks"])
def test_other_structures_are_fitted_to_data(tmp_path, structure: str) -> None:
    x = torch.randn(200, 3) * torch.rand(200, 1).exp()
    save_file({"inputs": x}, tmp_path / "x.safetensors")
    options = ("--structure", structure, "--block-size", 8, "--data", tmp_path / "x.safetensors")
    name = "tests.test_cli_adapt:wide_net"
    text = done("adapt", name, *options, "--macs", 0.7, "-o", tmp_path / "a.swan")
    assert "units open" in text
    adapted = swan.load(tmp_path / "a.swan", wide_net())
    assert adapted.structure.kind == structure
    assert float(adapted.taken(x).macs.double().mean()) <= 0.7 * adapted.costs.dense


@pytest.mark.parametrize(
    ("structure", "suffix"), [("nested", ".onnx"), ("nested", ".pt2"), ("free", ".onnx")]
)
def test_what_adapts_is_exported_as_its_file_can_hold_it(tmp_path, structure, suffix) -> None:
    """Groups in ONNX; masks elsewhere."""
    name = "tests.test_cli_adapt:wide_net"
    x = torch.randn(64, 3) * torch.rand(64, 1).exp()
    save_file({"inputs": x}, tmp_path / "x.safetensors")
    options = ("--structure", structure, "--data", tmp_path / "x.safetensors", "--macs", 0.7)
    done("adapt", name, *options, "-o", tmp_path / "a.swan")
    done("export", name, tmp_path / "a.swan", tmp_path / f"a{suffix}")
    if suffix == ".onnx":
        nodes = {node.op_type for node in onnx.load(tmp_path / "a.onnx").graph.node}
        assert ("NonZero" in nodes) == (structure == "nested")


def test_which_tensor_holds_the_inputs_is_not_guessed(tmp_path) -> None:
    save_file({"a": torch.zeros(4, 3), "b": torch.zeros(4, 3)}, tmp_path / "x.safetensors")
    told = refused("adapt", NAME, "--data", tmp_path / "x.safetensors", "-o", tmp_path / "a.swan")
    assert "call the samples 'inputs'" in told


def test_a_static_width(tmp_path) -> None:
    done("adapt", NAME, *SHAPE, "--widths", "0.5,1", "--at", 0.5, "-o", tmp_path / "s.swan")
    assert swan.load(tmp_path / "s.swan", net())[0].out_features == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--widths", "a"), "numbers"),
        (("--per", "layer"), "block or network"),
        (("--structure", "x"), "nested, free or blocks"),
        (("--structure", "blocks", "--at", 0.5), "nested does"),
        (("--data", "nowhere.safetensors"), "is not a safetensors file"),
    ],
    ids=["widths", "per", "structure", "of-nested", "data"],
)
def test_refusals_are_one_line(tmp_path, options, message: str) -> None:
    told = refused("adapt", NAME, *SHAPE, *options, "-o", tmp_path / "a.swan")
    assert message in told
