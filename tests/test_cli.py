"""The command line: what `inspect` shows, and that every error is one line with exit code 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from typer.testing import CliRunner

import swan_surgery as swan
from swan_surgery.cli import app
from swan_surgery.cli.models import build_model


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def inspect_json(*words):
    result = invoke("inspect", *words, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def tiny():
    """A model of the user's own, found as tests.test_cli:tiny."""
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))


def broken():
    raise RuntimeError("first line\nsecond line")


def number():
    return 3


def test_inspect_resnet18_agrees_with_the_library():
    shown = inspect_json("resnet18", "--input", "1,3,64,64")
    model = torchvision.models.resnet18(weights=None)
    channels = swan.channel_map(model, torch.randn(1, 3, 64, 64))
    assert shown["macs"] == swan.count_macs(model, torch.randn(1, 3, 64, 64))
    assert shown["flops"] == 2 * shown["macs"]
    assert shown["params"] == swan.count_params(model)
    assert shown["units"] == channels.num_units
    assert shown["input_shapes"] == [[1, 3, 64, 64]]
    assert [layer["name"] for layer in shown["layers"]] == [la.name for la in channels.layers]
    assert sum(layer["macs"] for layer in shown["layers"]) == shown["macs"]


def test_inspect_says_who_shares_and_what_stays():
    layers = {la["name"]: la for la in inspect_json("resnet18", "--input", "1,3,64,64")["layers"]}
    assert layers["conv1"]["shares_with"] == ["layer1.0.conv2", "layer1.1.conv2"]
    assert layers["layer1.0.conv1"]["shares_with"] == []
    assert (layers["conv1"]["units"], layers["conv1"]["gated_channels"]) == (64, 64)
    assert layers["fc"]["units"] == 0
    assert layers["fc"]["pinned"] == ["1000 stay: part of the model's output"]


def test_inspect_prints_tables_with_units_of_measure():
    text = invoke("inspect", "resnet18", "--input", "1,3,64,64").stdout
    assert "149 MMACs (297 MFLOPs)" in text
    assert "layer2.0.downsample.0" in text
    assert "layer1.0.conv2 + 1 more" in text
    assert "1000 stay: part of the model's output" in text


def test_all_shows_every_layer_and_the_default_says_how_many_it_hides():
    words = ("inspect", "densenet121", "--input", "1,3,64,64")
    short, full = invoke(*words).stdout, invoke(*words, "--all").stdout
    assert "classifier" not in short
    assert "and 81 more layers; --all shows them" in short
    assert "classifier" in full
    assert "more layers" not in full


def test_input_shape_is_guessed():
    assert inspect_json("resnet18")["input_shapes"] == [[1, 3, 224, 224]]


def test_inspect_takes_a_factory():
    shown = inspect_json("tests.test_cli:tiny", "--input", "2,3,5,5")
    assert shown["class_name"] == "Sequential"
    assert shown["macs"] == 2 * 25 * (3 * 4 + 4 * 2)
    assert [layer["units"] for layer in shown["layers"]] == [4, 0]


@pytest.mark.parametrize("name", ["fcn_resnet50", "torchvision:resnet18", "googlenet"])
def test_no_weights_are_ever_asked_for(name, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    model = build_model(name)
    assert all(parameter.is_meta for parameter in model.parameters())


ERRORS = {
    "unknown model": (("inspect", "resnat18"), "nearest torchvision names: resnet18"),
    "unknown module": (("inspect", "no.such:thing"), "cannot import 'no.such'"),
    "unknown factory": (("inspect", "tests.test_cli:nothing"), "has no function 'nothing'"),
    "failing factory": (("inspect", "tests.test_cli:broken"), "first line second line"),
    "not a module": (("inspect", "tests.test_cli:number"), "returned int"),
    "no shape": (("inspect", "resnet18", "--input", "1,3,x"), "'1,3,x' is not a shape"),
    "wrong shape": (("inspect", "resnet18", "--input", "1,4,64,64"), "1, 4, 64, 64"),
    "shape not guessable": (("inspect", "r3d_18"), "--input 1,3,224,224"),
    "no argument": (("inspect",), "Missing argument"),
    "unknown option": (("inspect", "resnet18", "--deep"), "No such option"),
    "unknown command": (("cut",), "No such command 'cut'"),
    "too few epochs": (("demo", "--epochs", "2"), "at least 3 epochs"),
    "no seed": (("demo", "--seeds", "0"), "greater than or equal to 1"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line_with_exit_code_2(case):
    words, expected = ERRORS[case]
    result = invoke(*words)
    assert result.exit_code == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert expected in lines[0]
    assert "Traceback" not in result.output


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke("demo", "--epochs", "3", "--out", tmp_path / "file")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: cannot write to ")


@pytest.mark.parametrize(
    "words", [("--debug", "inspect", "resnat18"), ("inspect", "resnat18", "--debug")]
)
def test_debug_lets_the_traceback_through(words):
    result = invoke(*words)
    assert isinstance(result.exception, swan.InputError)


def test_an_unexpected_error_names_its_class(monkeypatch):
    def fail(*args):
        raise KeyError("odd")

    monkeypatch.setattr("swan_surgery.cli.commands.inspect_model", fail)
    result = invoke("inspect", "resnet18")
    assert result.exit_code == 2
    assert "KeyError: 'odd'" in result.stderr
    assert "--debug" in result.stderr


def test_version():
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("swan-surgery ")


@pytest.mark.slow
def test_the_process_itself_exits_with_2_and_keeps_stdout_clean():
    code = "from swan_surgery.cli import main; main()"
    command = [sys.executable, "-W", "ignore", "-c", code, "inspect", "resnat18"]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
