"""Every recipe runs in small, every configuration can be run, and several processes arrive where one does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import swan_surgery as swan
from swan_surgery.environment.extras import named_function
from swan_surgery.experiments.classifier import read_settings
from swan_surgery.experiments.classifier.checkpoint import read_checkpoint
from tests.two_processes import SETTINGS, net, run


ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
CONFIGS = sorted((RECIPES / "configs").glob("*.toml"))
TWO = ("-m", "torch.distributed.run", "--nproc_per_node", "2")


def python(*words, cwd=ROOT) -> str:
    """What a process of Python prints that ends well."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MASTER_PORT": "0"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.thorough
def test_a_pruned_vit_is_within_its_budget_and_finetuning_improves_it(tmp_path) -> None:
    output = tmp_path / "vit.json"
    python(RECIPES / "finetune_pruned_vit.py", "--smoke", "--output", output)
    found = json.loads(output.read_text())
    result = found["result"]
    scores = result["scores"]
    assert scores["finetuned"]["train_loss"] < scores["pruned"]["train_loss"]
    assert scores["finetuned"]["test_loss"] < scores["pruned"]["test_loss"]
    assert result["macs"]["pruned"] <= found["settings"]["macs"] * result["macs"]["dense"]
    dense, pruned = result["widths"]["dense"], result["widths"]["pruned"]
    assert pruned["trunk"] < dense["trunk"]
    assert sum(pruned["heads"]) < sum(dense["heads"])
    assert sum(pruned["mlp"]) < sum(dense["mlp"])


@pytest.mark.thorough
def test_an_audio_encoder_gets_a_switch_without_labels(tmp_path) -> None:
    output = tmp_path / "audio.json"
    python(RECIPES / "route_audio.py", "--smoke", "--output", output)
    found = json.loads(output.read_text())
    assert found["light_fewer_macs"] > 20
    shares = [found[kind]["light_share"] for kind in ("speech", "silence")]
    assert 0 < sum(shares) < 2
    for kind in ("speech", "silence"):
        row = found[kind]
        full, light = row["full_spectral_distance"], row["light_spectral_distance"]
        assert full != light
        assert row["latency_saving"] == 1 - row["latency_ms"] / row["full_latency_ms"]


@pytest.mark.thorough
def test_other_activations_before_and_after_a_cut_keep_the_budget(tmp_path) -> None:
    output = tmp_path / "swap.json"
    told = python(RECIPES / "swap_then_cut.py", "--smoke", "--output", output)
    assert "cut then swap, before fine-tuning" in told
    (row,) = json.loads(output.read_text())["rows"]
    assert set(row["macs"]) == {"cut", "swap then cut", "cut then swap"}
    assert all(0.8 * row["budget"] < macs <= row["budget"] for macs in row["macs"].values())
    # Put in after the cut, FleS starts as what the cut left.
    same = ("cut", "cut then swap")
    assert all(row["accuracy"][f"{name}, before fine-tuning"] > 0 for name in same)


@pytest.mark.thorough
def test_a_cifar_network(tmp_path) -> None:
    told = python(RECIPES / "train_cifar.py", "--smoke", "--out", tmp_path)
    assert "right after the cut" in told
    assert {path.name for path in tmp_path.iterdir()} == {"small.swan", "report.html"}
    assert "before and after" in (tmp_path / "report.html").read_text()


@pytest.mark.thorough
def test_the_recipe_in_two_processes_leaves_what_it_leaves_in_one(tmp_path) -> None:
    own = (RECIPES / "train_in_processes.py", "--epochs", "3", "--out")
    one, two = python(*own, tmp_path / "one"), python(*TWO, *own, tmp_path / "two")
    assert one.splitlines()[0] == two.splitlines()[0]  # dense
    assert two.count("small: ") == 1  # one of them tells
    for name in ("one", "two"):
        right = float((one if name == "one" else two).splitlines()[1].split()[1])
        assert right > 90
        assert (tmp_path / name / "small.swan").exists()


@pytest.mark.thorough
def test_train_in_two_processes_is_train_in_one(tmp_path) -> None:
    """In float64 and without batch norm, whose statistics are of a process's own share."""
    python(*TWO, ROOT / "tests" / "two_processes.py", tmp_path)
    alone = run(tmp_path / "alone")
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys()
    for name, tensor in first.items():  # gates and weights, bit for bit
        assert torch.equal(tensor, second[name]), name
    wanted = alone.gated.state_dict() | {
        f"small.{k}": v for k, v in alone.small.state_dict().items()
    }
    for name, tensor in wanted.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-8, atol=1e-10, msg=name)
    loaded = swan.load(tmp_path / "both" / "pruned.swan", net())
    assert swan.count_macs(loaded, alone.example) <= SETTINGS.macs * alone.macs[0]
    logs = [(tmp_path / name / "log.csv").read_text() for name in ("alone", "both")]
    assert len({len(log.splitlines()) for log in logs}) == 1


def stop_inside(process: subprocess.Popen, stage: str, file: Path) -> list[int]:
    """Kill a run whose last checkpoint lies inside an epoch of this stage; the checkpoint's place."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if file.exists():
            # Standing still, so that what is read is what the kill leaves behind.
            process.send_signal(signal.SIGSTOP)
            now = read_checkpoint(file)["now"]
            if now.get("stage") == stage and now["place"][1]:
                process.kill()
                process.wait()
                return now["place"]
            process.send_signal(signal.SIGCONT)
        time.sleep(0.005)
    process.kill()
    raise AssertionError(f"no checkpoint inside an epoch of {stage}")


@pytest.mark.thorough
def test_a_process_that_is_killed_inside_an_epoch_goes_on_bitwise_the_same(tmp_path) -> None:
    config = tmp_path / "digits.toml"
    config.write_text(
        'model = "swan_surgery.experiments.digits.network:DigitsNet"\nheld_out = 0.9\nbatch = 16\n'
        "shift = 1\ndense_epochs = 1\ngate_epochs = 2\nfinetune_epochs = 1\nthreads = 1\nsave_every = 2\n"
    )
    words = ("-W", "ignore", "-m", "swan_surgery_cli", "train", config, "--out")
    python(*words, tmp_path / "whole")
    with subprocess.Popen(
        [sys.executable, *map(str, words), str(tmp_path / "killed")],
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    ) as process:
        place = stop_inside(process, "gated", tmp_path / "killed" / "checkpoint.safetensors")
    assert process.returncode == -signal.SIGKILL
    assert place[1] % 2 == 0
    python(*words, tmp_path / "killed")
    results = [
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "killed")
    ]
    for name in ("accuracy", "loss", "macs", "params"):
        assert results[0][name] == results[1][name]
    for name in ("dense", "gated", "pruned"):
        first, second = (
            load_file(tmp_path / folder / f"{name}.swan") for folder in ("whole", "killed")
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_can_be_read_and_names_its_command(config) -> None:
    assert f"recipes/configs/{config.name}" in "".join(config.read_text().splitlines()[:2])
    settings = read_settings(config)
    if not settings.model.startswith("torchvision:"):
        named_function(settings.model)
