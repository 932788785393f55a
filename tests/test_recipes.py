"""Every recipe runs with --smoke, and does what it says."""

import dataclasses
import functools
import importlib.util
import json
import signal
import subprocess
import sys
import tarfile
import time
import tomllib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file


RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.mark.thorough
@pytest.mark.timeout(120)
def test_a_pruned_vit_is_a_vit_within_its_budget_that_finetuning_improves(tmp_path):
    output = tmp_path / "vit.json"
    command = [sys.executable, "-W", "ignore", RECIPES / "finetune_pruned_vit.py", "--smoke"]
    done = subprocess.run(
        [*command, "--output", output], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr

    (row,) = json.loads(output.read_text())["rows"]
    (result,) = row["results"]
    scores = result["scores"]
    assert scores["finetuned"]["train_loss"] < scores["pruned"]["train_loss"]
    assert scores["finetuned"]["test_loss"] < scores["pruned"]["test_loss"]
    assert scores["pruned"]["test_loss"] == pytest.approx(scores["gated"]["test_loss"], rel=1e-4)
    assert result["macs"]["pruned"] <= row["settings"]["macs"] * result["macs"]["dense"]
    assert result["pruned_is_vision_transformer"]
    assert result["tensors_moved_by_finetuning"] == result["tensors"] > 0
    dense, pruned = result["widths"]["dense"], result["widths"]["pruned"]
    assert pruned["trunk"] < dense["trunk"]
    assert sum(pruned["heads"]) < sum(dense["heads"])
    assert sum(pruned["mlp"]) < sum(dense["mlp"])


@pytest.mark.thorough
@pytest.mark.timeout(120)
def test_an_audio_encoder_gets_a_switch_without_labels(tmp_path):
    output = tmp_path / "audio.json"
    command = [sys.executable, "-W", "ignore", RECIPES / "route_audio.py", "--smoke"]
    done = subprocess.run(
        [*command, "--output", output], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert found["light_fewer_macs"] > 20
    shares = [found[kind]["light_share"] for kind in ("speech", "silence")]
    assert 0 < sum(shares) < 2
    for kind in ("speech", "silence"):
        row = found[kind]
        full, light = row["full_spectral_distance"], row["light_spectral_distance"]
        assert full != light
        assert row["latency_saving"] == 1 - row["latency_ms"] / row["full_latency_ms"]


TRAIN = [sys.executable, "-W", "ignore", RECIPES / "train_classifier.py"]
CONFIGS = sorted((RECIPES / "configs").glob("*.toml"))


def smoke(*arguments, out) -> subprocess.CompletedProcess[str]:
    command = [*TRAIN, *arguments, "--smoke", "--save-every", "3", "--out", out]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def stop_inside(process: subprocess.Popen, stage: str, file: Path) -> dict:
    """Kill a run whose last checkpoint lies inside an epoch of this stage; the checkpoint's position."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if file.exists():
            # Standing still, so that what is read is what the kill leaves behind.
            process.send_signal(signal.SIGSTOP)
            # The recipe's own file of plain tensors.
            now = torch.load(file, weights_only=True)["now"]  # noqa: TID251
            if now.get("stage") == stage and now["step"]:
                process.kill()
                process.wait()
                return now
            process.send_signal(signal.SIGCONT)
        time.sleep(0.005)
    process.kill()
    raise AssertionError(f"no checkpoint inside an epoch of {stage}")


@pytest.mark.thorough
@pytest.mark.timeout(200)
def test_a_run_killed_inside_an_epoch_ends_as_one_that_was_not(tmp_path):
    settings = RECIPES / "configs" / "mnist_lenet.toml"
    whole = smoke(settings, "--output", tmp_path / "whole.json", out=tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr

    folder = tmp_path / "killed" / "seed-0"
    command = [*TRAIN, settings, "--smoke", "--save-every", "3", "--out", folder.parent]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        now = stop_inside(process, "gated", folder / "checkpoint.pt")
    assert process.returncode == -signal.SIGKILL
    assert 0 < now["step"] < 8
    again = smoke(settings, "--output", tmp_path / "again.json", out=folder.parent)
    assert again.returncode == 0, again.stderr

    for stage in ("dense", "gated", "pruned", "finetuned"):
        first = load_file(tmp_path / "whole" / "seed-0" / f"{stage}.safetensors")
        second = load_file(folder / f"{stage}.safetensors")
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    (row,), (resumed,) = (
        json.loads((tmp_path / f"{name}.json").read_text())["rows"] for name in ("whole", "again")
    )
    (result,), (second_result,) = row["results"], resumed["results"]
    assert result["scores"] == second_result["scores"]
    scores, settings = result["scores"], row["settings"]
    assert scores["pruned"]["test_accuracy"] == scores["gated"]["test_accuracy"]
    assert scores["finetuned"]["test_accuracy"] > 50  # of four classes
    assert result["params"]["pruned"] <= settings["params"] * result["params"]["dense"]
    assert result["units"]["open"] == sum(result["widths"]["pruned"][:-1])
    lines = (folder / "log.csv").read_text().splitlines()
    assert len(lines) == 1 + sum(settings[f"{s}_epochs"] for s in ("dense", "gate", "finetune"))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_two_processes_agree_on_gates_and_cut_the_same_network(tmp_path):
    pytest.importorskip("accelerate")
    arguments = [RECIPES / "configs" / "cifar10_resnet.toml", "--smoke", "--out", tmp_path]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, TRAIN[-1], *arguments, "--output", tmp_path / "two.json"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads((tmp_path / "two.json").read_text())
    assert outcome["environment"]["processes"] == 2
    (result,) = outcome["rows"][0]["results"]
    assert result["macs"]["pruned"] <= 0.5 * result["macs"]["dense"]
    scores = result["scores"]
    assert scores["pruned"]["test_loss"] == pytest.approx(scores["gated"]["test_loss"], rel=1e-4)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_and_starts_with_its_command(config):
    assert config.read_text().splitlines()[0].startswith("# ")
    assert f"recipes/train_classifier.py recipes/configs/{config.name}" in config.read_text()
    known = {field.name for field in dataclasses.fields(recipe().Settings)}
    assert set(tomllib.loads(config.read_text())) <= known
    recipe().settings_from(config, [])


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("mcas=0.5", "unknown settings mcas"),
        ("macs='half'", "macs is like 0.0; got 'half'"),
        ("macs=2.0", r"macs is a share in \[0, 1\]; got 2.0"),
        ("flip=1", "flip is like False; got 1"),
        ("network='lenett'", "network must be one of 'mlp', 'lenet'"),
        ("macs=", "not TOML"),
        ("batch=64", "say how small"),
    ],
)
def test_a_wrong_setting_is_one_clear_error(assignment, message):
    with pytest.raises(recipe().RecipeError, match=message):
        recipe().settings_from(None, [assignment])


def test_small_images_in_an_archive_are_read_without_unpacking(tmp_path):
    for index, name in enumerate(("train/cat", "train/dog", "test/cat", "test/dog")):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (4, 4), (60 * index, 0, 0)).save(tmp_path / name / "0.png")
    with tarfile.open(tmp_path / "images.tar.gz", "w:gz") as tar:
        for part in ("train", "test"):
            tar.add(tmp_path / part, part)
    settings = recipe().settings_from(None, ["macs=0.5"])
    for path in (tmp_path, tmp_path / "images.tar.gz"):
        train, test, classes = recipe().read(path, settings)
        assert classes == 2
        assert train.x.dtype == torch.uint8
        assert (train.y.tolist(), test.y.tolist()) == ([0, 1], [0, 1])
        assert train.x[:, 0, 0, 0].tolist() == [0, 60]
        assert test.x[:, 0, 0, 0].tolist() == [120, 180]


@functools.cache
def recipe():
    """The script as a module; nothing but its functions."""
    spec = importlib.util.spec_from_file_location("train_classifier", TRAIN[-1])
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
