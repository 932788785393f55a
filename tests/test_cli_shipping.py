"""`prune`, `report`, `export`, `latency`: from a name to what is shipped; every error is one line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import swan_surgery as swan
from swan_surgery_cli.commands import app


NAME = "tests.test_cli_shipping:net"
SHAPE = ("--input", "1,3,6,6")


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)
    )


def wide() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 2, 3))


def other() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2))


def invoke(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def done(*words: object) -> str:
    result = invoke(*words)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def refused(*words: object) -> str:
    result = invoke(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture
def small(tmp_path) -> Path:
    done("prune", NAME, *SHAPE, "--macs", 0.5, "-o", tmp_path / "small.swan")
    return tmp_path / "small.swan"


class TestPrune:
    def test_in_one_shot(self, tmp_path) -> None:
        out = tmp_path / "x.swan"
        text = done("prune", NAME, *SHAPE, "--macs", 0.5, "--round-to", 2, "-o", out, "--json")
        facts = json.loads(text)
        loaded = swan.load(out, model=net())
        x = torch.randn(1, 3, 6, 6)
        assert facts["macs"] == [swan.count_macs(net(), x), swan.count_macs(loaded, x)]
        assert facts["params"] == [swan.count_params(net()), swan.count_params(loaded)]
        assert facts["macs"][1] <= 0.5 * facts["macs"][0]
        assert loaded[0].out_channels % 2 == 0
        # The kept rows are rows of the weights that were given.
        rows = {tuple(row.flatten().tolist()) for row in net()[0].weight}
        assert {tuple(row.flatten().tolist()) for row in loaded[0].weight} <= rows

    def test_a_budget_left_unused_is_told_in_one_line(self, tmp_path) -> None:
        options = ("--macs", 0.7, "--round-to", 8, "-o", tmp_path / "x.swan", "--json")
        result = invoke("prune", NAME.replace("net", "wide"), *SHAPE, *options)
        assert json.loads(result.stdout)["macs"]
        (line,) = result.stderr.splitlines()
        assert line.startswith("warning: multiples of 8 channels leave ")

    @pytest.mark.filterwarnings("ignore::swan_surgery.SwanWarning")  # the machine may be busy
    def test_with_a_measured_multiple(self, tmp_path) -> None:
        gated = swan.swanify(net(), torch.randn(1, 3, 6, 6))
        swan.save(gated, tmp_path / "gated.swan")
        for weights in ((), ("--weights", tmp_path / "gated.swan")):
            out = tmp_path / "x.swan"
            auto = ("--round-to", "auto", "--macs", 0.5)
            facts = json.loads(done("prune", NAME, *weights, *SHAPE, *auto, "-o", out, "--json"))
            assert 0 < facts["macs"][1] <= 0.5 * facts["macs"][0]

    @pytest.mark.parametrize("budget", ["macs", "params"])
    def test_gates_are_cut_to_the_budget_asked_for(self, budget, tmp_path) -> None:
        swan.save(swan.swanify(net(), torch.randn(1, 3, 6, 6)), tmp_path / "gated.swan")
        out, weights = tmp_path / "x.swan", ("--weights", tmp_path / "gated.swan")
        facts = json.loads(
            done("prune", NAME, *weights, *SHAPE, f"--{budget}", 0.5, "-o", out, "--json")
        )
        before, after = facts[budget]
        assert 0 < after <= 0.5 * before

    def test_says_what_is_left(self, tmp_path) -> None:
        text = done("prune", NAME, *SHAPE, "--params", 0.5, "-o", tmp_path / "x.swan")
        assert "MACs (" in text
        assert "parameters (" in text

    def test_from_weights_of_a_file(self, tmp_path) -> None:
        model = net()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
        save_file(model.state_dict(), tmp_path / "w.safetensors")
        out = tmp_path / "x.swan"
        weights = ("--weights", tmp_path / "w.safetensors")
        done("prune", NAME, *SHAPE, *weights, "--macs", 0.9, "-o", out)
        rows = {tuple(row.flatten().tolist()) for row in model[0].weight}
        loaded = swan.load(out, model=net())
        assert {tuple(row.flatten().tolist()) for row in loaded[0].weight} <= rows

    def test_by_the_gates_of_a_file(self, tmp_path) -> None:
        gated = swan.swanify(net(), torch.randn(1, 3, 6, 6))
        with torch.no_grad():
            gated.gates.logits[:3] = -3.0
        swan.save(gated, tmp_path / "gated.swan")
        out = tmp_path / "x.swan"
        done("prune", NAME, "--weights", tmp_path / "gated.swan", *SHAPE, "-o", out)
        assert swan.load(out, model=net())[0].out_channels == swan.prune(gated)[0].out_channels

    def test_by_the_gates_of_what_a_first_cut_left(self, tmp_path) -> None:
        x = torch.randn(1, 3, 6, 6)
        whole = swan.swanify(net(), x)
        small = swan.prune_by_score(whole, swan.importance(whole, "magnitude"), macs=0.7)
        swan.save(swan.swanify(small, x), tmp_path / "gated.swan")
        weights = ("--weights", tmp_path / "gated.swan")
        command = ("prune", NAME, *weights, "--macs", 0.5, "-o", tmp_path / "x.swan")
        before, after = json.loads(done(*command, "--json"))["macs"]
        assert before == swan.count_macs(net(), x)
        assert 0.4 * before < after <= 0.5 * before

    def test_refusals(self, tmp_path) -> None:
        out = ("-o", tmp_path / "x.swan")
        assert "--macs 0.5 or --params 0.5" in refused("prune", NAME, *SHAPE, *out)
        assert "without data there are magnitude" in refused(
            "prune", NAME, *SHAPE, *out, "--macs", 0.5, "--score", "taylor"
        )
        assert "a number of channels, or auto" in refused(
            "prune", NAME, *SHAPE, *out, "--macs", 0.5, "--round-to", "-8"
        )
        assert "no such file" in refused(
            "prune", NAME, *SHAPE, *out, "--macs", 0.5, "--weights", tmp_path / "none"
        )
        assert "cannot be reached" in refused("prune", NAME, *SHAPE, *out, "--macs", 0.001)
        assert "there is no folder" in refused(
            "prune", NAME, *SHAPE, "--macs", 0.5, "-o", tmp_path / "none" / "x.swan"
        )
        assert not list(tmp_path.iterdir())

    def test_weights_that_are_none(self, tmp_path) -> None:
        (tmp_path / "w.safetensors").write_bytes(b"junk")
        weights = ("--macs", 0.5, "--weights", tmp_path / "w.safetensors")
        out = ("-o", tmp_path / "x.swan")
        assert "is not a safetensors file" in refused("prune", NAME, *SHAPE, *out, *weights)
        save_file(other().state_dict(), tmp_path / "w.safetensors")
        assert "does not fit Sequential" in refused("prune", NAME, *SHAPE, *out, *weights)


class TestReport:
    def test_text_markdown_json_and_html(self, small, tmp_path) -> None:
        command = ("report", NAME, small, *SHAPE, "--threads", 1)
        assert "before and after, batch 1" in done(*command)
        assert done(*command, "--markdown").startswith("## Sequential before and after")
        page = tmp_path / "r.html"
        found = swan.Report.from_json(done(*command, "--json", "--html", page))
        assert found.after.macs < found.before.macs
        assert page.read_text().startswith("<!doctype html>")

    def test_a_second_cut_beside_the_first(self, small, tmp_path) -> None:
        smaller = tmp_path / "smaller.swan"
        done("prune", NAME, *SHAPE, "--weights", small, "--macs", 0.5, "-o", smaller)
        command = (NAME, smaller, "--weights", small, *SHAPE, "--threads", 1, "--json")
        found = swan.Report.from_json(done("report", *command))
        alone = swan.Report.from_json(done("report", NAME, small, *SHAPE, "--json"))
        assert found.before.macs == alone.after.macs
        assert found.after.macs <= 0.5 * found.before.macs
        timed = json.loads(done("latency", *command, "--seconds", 0.01))
        assert set(timed["median_ms"]) == {"before", "after"}
        assert "no such file" in refused("report", NAME, small, "--weights", tmp_path / "none")

    def test_another_model(self, small) -> None:
        name = "tests.test_cli_shipping:other"
        assert "was saved from another model" in refused("report", name, small, "--input", "1,3")


class TestExport:
    @pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
    def test_agrees(self, small, tmp_path, suffix) -> None:
        out = tmp_path / f"x{suffix}"
        facts = json.loads(done("export", NAME, small, out, *SHAPE, "--json"))
        assert facts["relative_error"] <= 1e-4
        assert facts["batches"] == [1, 2, 5]
        assert facts["size_bytes"] == out.stat().st_size

    def test_fixed_batch(self, small, tmp_path) -> None:
        text = done("export", NAME, small, tmp_path / "x.pt2", *SHAPE, "--fixed-batch")
        assert "batch 1 only, agrees to" in text

    def test_suffix(self, small, tmp_path) -> None:
        assert "must be one of .onnx, .pt2" in refused(
            "export", NAME, small, tmp_path / "x.tf", *SHAPE
        )


class TestLatency:
    def test_one_model(self) -> None:
        facts = json.loads(done("latency", NAME, *SHAPE, "--seconds", 0.01, "--json"))
        assert list(facts["median_ms"]) == ["dense"]
        assert facts["runtime"] == "eager"

    def test_two_models_in_turns(self, small) -> None:
        text = done("latency", NAME, small, *SHAPE, "--seconds", 0.01, "--threads", 1)
        assert text.splitlines()[0].startswith("eager, batch 1, 1 threads")
        assert text.splitlines()[-1].endswith("times as fast")

    def test_runtime(self) -> None:
        assert "runtime must be one of" in refused("latency", NAME, *SHAPE, "--runtime", "x")
