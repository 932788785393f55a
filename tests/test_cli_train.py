"""`swan-surgery train`: from a config to what it leaves, and its refusals."""

import json

import pytest
from typer.testing import CliRunner

import swan_surgery as swan
from swan_surgery.experiments.classifier import TrainSettings, read_settings
from swan_surgery.experiments.digits.network import DigitsNet
from swan_surgery_cli.commands import app


CONFIG = """
model = "swan_surgery.experiments.digits.network:DigitsNet"
held_out = 0.9
macs = 0.5
dense_epochs = 1
gate_epochs = 2
finetune_epochs = 1
threads = 1
"""


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "digits.toml"
    path.write_text(CONFIG)
    return path


@pytest.mark.slow
def test_from_a_config_to_a_smaller_model(config, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke("train", config, "--set", "batch=32", "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    folder = tmp_path / "out" / "digits"
    assert result == json.loads((folder / "result.json").read_text())
    assert result["settings"]["batch"] == 32
    small = swan.load(folder / "pruned.swan", DigitsNet())
    assert swan.count_params(small) == result["params"]["pruned"]
    assert result["macs"]["left"] <= 0.5
    assert "weights and gates" in done.stderr

    # The same again trains nothing; other settings are refused until asked for anew.
    again = invoke("train", config, "--set", "batch=32")
    assert again.exit_code == 0
    assert "Going on after epoch 4" in again.stderr
    assert "of the MACs" in again.stdout
    refused = invoke("train", config)
    assert refused.exit_code == 2
    assert "other settings (batch)" in refused.stderr
    fresh = invoke("train", config, "--fresh")
    assert fresh.exit_code == 0
    assert "Going on" not in fresh.stderr


def test_the_template_is_a_config(config, tmp_path) -> None:
    for options, name in (((), "t.toml"), (("--yaml",), "t.yaml")):
        done = invoke("train", "--template", *options)
        (tmp_path / name).write_text(done.stdout)
        assert read_settings(tmp_path / name) == TrainSettings()
    done = invoke("train", config, "--template", "--data", "FOLDER", "--yaml")
    (tmp_path / "own.yaml").write_text(done.stdout)
    own = read_settings(tmp_path / "own.yaml")
    assert (own.data, own.held_out) == ("FOLDER", 0.9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give a config, or settings with --set"),
        (("none.toml",), "cannot read none.toml"),
        (("--set", "mcas=1"), "no setting 'mcas'; there is macs"),
        (("--set", "model=resnet19"), "no model 'resnet19'; nearest torchvision names: resnet18"),
        (("--set", "data=/none"), "no folder /none"),
        (("--set", "weights=none.swan"), "none.swan: no such file"),
        (("--set", "model=fcn_resnet50", "--set", "size=32"), "logits [B, classes]"),
    ],
)
def test_one_line_for_what_cannot_be(words, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke("train", *words)
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
