"""`swan-surgery compress`: images in, a smaller model out, one line of JSON."""

import json
from pathlib import Path

import torch
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
