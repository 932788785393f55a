"""`swan-surgery compress`: images in, a smaller model out, one line of JSON."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import swan_surgery as swan
from swan_surgery_cli.commands import app


NAME = "tests.test_cli_compress:digit_net"


def digit_net() -> torch.nn.Module:
    torch.manual_seed(3)
    nn = torch.nn
    body = [nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def _run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(own) for own in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_smaller_model_is_written_and_told(tmp_path: Path) -> None:
    out = tmp_path / "small.swan"
    text = _run(
        *("compress", NAME, "--data", "sklearn:digits", "--macs", 0.4, "--steps", 3, "--labels"),
        *("-o", out, "--set", "batch=32", "--threads", 1, "--json"),
    )
    facts = json.loads(text)
    before, after = facts["macs"]
    assert 0.3 < after / before <= 0.4
    small = swan.load(out, digit_net())
    assert isinstance(small, torch.nn.Module)
    assert swan.count_macs(small, torch.zeros(1, 1, 8, 8)) == after
    assert "trained for 3 steps" in facts["steps"]


def test_widths_fit_a_runtime_or_a_configuration(tmp_path: Path) -> None:
    out = tmp_path / "small.swan"
    data = ("compress", NAME, "--data", "sklearn:digits", "--macs", 0.6, "-o", out)
    _run(*data, "--round-to", 8, "--set", "batch=32", "--threads", 1)
    small = swan.load(out, digit_net())
    assert {small[0].out_channels % 8, small[3].out_channels % 8} == {0}
    for wrong, message in (
        (("--round-to", "many"), "--round-to many"),
        (("--runtime", "tpu"), "runtime"),
    ):
        refused = CliRunner().invoke(app, [str(own) for own in (*data, *wrong)])
        assert refused.exit_code == 2
        assert message in refused.output


def test_without_a_budget_it_says_what_is_missing(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["compress", NAME, "--data", "sklearn:digits", "-o", str(tmp_path / "x.swan")]
    )
    assert done.exit_code == 2
    assert "say how small" in done.output


def token_net() -> torch.nn.Module:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.body = torch.nn.Embedding(20, 8), torch.nn.Linear(8, 16)
            self.head = torch.nn.Linear(16, 2)

        def forward(self, ids: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return self.head((self.body(self.words(ids)) * scale[:, None, None]).relu())

    return Net()


TOKENS = "tests.test_cli_compress:token_net"


def test_data_may_be_tensors_in_one_file_or_in_many(tmp_path: Path) -> None:
    x, labels = torch.rand(40, 1, 8, 8), torch.randint(10, (40,))
    save_file({"inputs": x, "labels": labels}, tmp_path / "all.safetensors")
    parts = tmp_path / "parts"
    parts.mkdir()
    for index, (own, name) in enumerate(zip(x.split(20), ("b", "a"), strict=True)):
        save_file({"inputs": own}, parts / f"{name}{index}.safetensors")
    out = tmp_path / "small.swan"
    fast = ("--macs", 0.5, "-o", out, "--set", "batch=8", "--threads", 1, "--json")
    by_labels = json.loads(
        _run("compress", NAME, "--data", tmp_path / "all.safetensors", "--labels", *fast)
    )
    without = json.loads(_run("compress", NAME, "--data", parts, *fast))
    assert by_labels["macs"][1] <= 0.5 * by_labels["macs"][0]
    assert without["macs"][1] <= 0.5 * without["macs"][0]
    refused = CliRunner().invoke(
        app, ["compress", NAME, "--data", str(parts), "--labels", "--macs", "0.5", "-o", str(out)]
    )
    assert refused.exit_code == 2
    assert "has none" in refused.output


def test_data_may_be_several_inputs_by_name(tmp_path: Path) -> None:
    save_file(
        {"ids": torch.randint(20, (16, 5)), "scale": torch.rand(16)}, tmp_path / "x.safetensors"
    )
    out = tmp_path / "small.swan"
    data = ("--data", tmp_path / "x.safetensors", "--set", "batch=4", "--threads", 1)
    told = json.loads(_run("compress", TOKENS, *data, "--macs", 0.5, "-o", out, "--json"))
    assert told["macs"][1] <= 0.5 * told["macs"][0]
    # No layer of it suggests these: the file remembers them.
    timed = json.loads(_run("latency", TOKENS, out, "--seconds", 0.01, "--json"))
    assert timed["batch"] == 1
    known = swan.models.provenance.provenance_of(swan.load(out, token_net())).inputs
    assert known is not None
    assert known.kwargs["ids"].shape == (1, 5)
    assert known.kwargs["ids"].unique().tolist() == [
        int(known.kwargs["ids"].max())
    ]  # one value alone


def test_data_may_be_images_without_labels(tmp_path: Path) -> None:
    for index in range(6):
        folder = tmp_path / "deep" if index % 2 else tmp_path
        folder.mkdir(exist_ok=True)
        pixels = (torch.rand(9, 8, 3) * 255).byte().numpy()
        Image.fromarray(pixels).save(folder / f"{index}.png")
    data = ("--data", tmp_path, "--set", "size=8", "--set", "batch=2", "--threads", 1)
    curve = json.loads(_run("tradeoff", NAME, *data, "--macs", "0.5,0.3", "--json"))
    assert curve["quality"] == "outputs explained"
    assert [own["budget"] for own in curve["points"]] == [0.5, 0.3]


def test_a_curve_of_accuracies_and_its_picture(tmp_path: Path) -> None:
    data = ("--data", "sklearn:digits", "--set", "batch=32", "--threads", 1, "--labels")
    svg = tmp_path / "curve.svg"
    text = _run("tradeoff", NAME, *data, "--params", "0.5", "--svg", svg)
    assert "accuracy in %" in text
    assert svg.read_text().startswith('<svg xmlns="http://www.w3.org/2000/svg"')


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"inputs": torch.zeros(3, 1, 8, 8), "labels": torch.zeros(2)}, "as many samples"),
        ({"labels": torch.zeros(2)}, "call the samples 'inputs'"),
        ({"a": torch.zeros(2), "b": torch.zeros(3)}, "as many samples"),
        ({"inputs": torch.zeros(0, 1, 8, 8)}, "one or more"),
    ],
    ids=["labels", "alone", "names", "empty"],
)
def test_tensors_that_are_no_samples(tmp_path: Path, tensors, message) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    given = ["tradeoff", NAME, "--data", str(tmp_path / "x.safetensors")]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 2
    assert message in done.output


def test_how_images_are_normalised_is_told_unless_it_was_said(tmp_path: Path) -> None:
    data = ("compress", NAME, "--data", "sklearn:digits", "--macs", 0.6, "--threads", 1)
    words = [str(own) for own in (*data, "-o", tmp_path / "x.swan")]
    assert "normalised with mean [0.5] and std [0.5]" in CliRunner().invoke(app, words).stderr
    said = CliRunner().invoke(app, [*words, "--set", "mean=[0.0]", "--set", "std=[1.0]"])
    assert said.exit_code == 0
    assert "normalised" not in said.stderr
