"""`swan-surgery route`: from a name and inputs to a model with a short way."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import swan_surgery as swan
from tests.test_cli_shipping import done, refused


NAME = "tests.test_cli_route:net"
SHAPE = ("--input", "2,6")


def net() -> nn.Module:
    torch.manual_seed(3)
    layers = [part for _ in range(4) for part in (nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 6))]
    return nn.Sequential(*layers, nn.Linear(6, 3)).eval()


@pytest.fixture
def data(tmp_path):
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    file = tmp_path / "data.safetensors"
    save_file({"inputs": x, "labels": net()(x).argmax(1)}, file)
    return file


def test_without_data_every_input_takes_the_full_way(tmp_path) -> None:
    text = done("route", NAME, *SHAPE, "--after", "3", "-o", tmp_path / "r.swan")
    assert "every input takes the full way" in text
    x = torch.randn(4, 6)
    assert torch.equal(swan.load(tmp_path / "r.swan", net())(x), net()(x))


def test_with_data_the_threshold_is_set(tmp_path, data) -> None:
    out = tmp_path / "r.swan"
    options = ("--data", data, "--after", "2", "--after", "5", "--light", 0.5, "--share", 0.5)
    facts = json.loads(done("route", NAME, *SHAPE, *options, "--steps", 3, "--json", "-o", out))
    assert facts["after"] == ["2", "5"]
    assert facts["certificate"]["samples"] == facts["routes"]["samples"] == 150
    assert facts["routes"]["shares"][-1] == pytest.approx(0.5, abs=0.02)
    assert facts["routes"]["full_p95_ms"] > 0
    routed = swan.load(out, net())
    assert isinstance(routed, swan.RoutedModel)
    assert routed.thresholds == facts["certificate"]["thresholds"]


def test_the_place_is_found_and_the_harm_is_kept(tmp_path, data) -> None:
    options = ("--data", data, "--harm", 0.1, "--light", 0.1, "--decide", "margin")
    page = tmp_path / "r.html"
    text = done("route", NAME, *SHAPE, *options, "-o", tmp_path / "r.swan", "--html", page)
    assert text.count("of the MACs, ") >= 2  # places
    assert "harm <= 0.1 with confidence 0.9" in text
    assert "accuracy" in text
    assert "all on the full way: mean" in text
    assert "Places for a switch" in page.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--share", 0.5, "--after", "3"), "need --data"),
        ((), "name --after"),
        (("--data", "x.safetensors", "--after", "3"), "one of --harm"),
        (("--after", "3", "--steps", 2), "need --data"),
        (("--after", "3", "--html", "r.html"), "need --data"),
        (("--after", "nowhere"), "no module 'nowhere'"),
    ],
    ids=map(str, range(6)),
)
def test_refusals(options, message: str, tmp_path) -> None:
    assert message in refused("route", NAME, *SHAPE, *options, "-o", tmp_path / "r.swan")
    assert not (tmp_path / "r.swan").exists()


def test_harm_without_labels_is_refused(tmp_path) -> None:
    save_file({"inputs": torch.randn(8, 6)}, tmp_path / "x.safetensors")
    options = ("--data", tmp_path / "x.safetensors", "--after", "3", "--harm", 0.1)
    assert "labels" in refused("route", NAME, *SHAPE, *options, "-o", tmp_path / "r.swan")
