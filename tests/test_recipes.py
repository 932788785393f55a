"""Every recipe runs with --smoke, and does what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.mark.slow
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
