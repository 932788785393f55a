"""Every benchmark script runs with --smoke, and README tables follow the result files."""

import argparse
import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from gpu_plan import PARTS
from gpu_runs import METHODS, smoke_items
from quality import RATES, Row, chosen_rate, rates_to_try, wanted


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# The whole zoo's script, and one of each other kind; the rest take minutes.
SCRIPTS = (
    *("overhead", "zoo"),
    *(
        pytest.param(script, marks=pytest.mark.thorough)
        for script in (
            *(
                "activations",
                "activations_training",
                "adaptive",
                "adaptive_accuracy",
                "adaptive_tokens_accuracy",
                "gated_compression",
                "gpu",
                "latency",
                "planning",
            ),
            *("quality", "shipping", "speed", "trainings", "vit_cut"),
        )
    ),
)
# These change settings of their process, or end it.
APART = ("gpu", "quality")
ENVIRONMENT = {
    "processor": "abacus",
    "cpus": 2,
    "started": "2026-11-01T00:00:00+00:00",
    "command": "python benchmarks/speed.py",
    "packages": {"torch": "2.15.0"},
}


def run_here(monkeypatch, script, *arguments):
    """The script without a process of its own, which costs seconds of imports."""
    argv = [f"benchmarks/{script}.py", *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", argv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module(script).main()


def run(script, *arguments, cwd=None):
    command = [sys.executable, "-W", "ignore", BENCHMARKS / f"{script}.py", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, cwd=cwd
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("script", SCRIPTS)
def test_smoke_run_writes_rows_with_their_environment(script, tmp_path, monkeypatch, capsys):
    output = tmp_path / f"2026-11_cpu2_{script}.json"
    if script in APART:
        done = run(script, "--smoke", "--output", output, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    else:
        monkeypatch.chdir(tmp_path)
        run_here(monkeypatch, script, "--smoke", "--output", output)
    theme = {"zoo": "zoo_torchvision", "trainings": "vit"}.get(script, script)
    result = json.loads(output.read_text())
    assert result["theme"] == theme
    assert result["rows"]
    recorded = result["environment"]
    assert recorded.keys() >= {"command", "commit", "source", "packages", "processor", "threads"}
    assert "--smoke" in recorded["command"]

    readme = tmp_path / "README.md"
    readme.write_text(marked(theme))
    named = output.with_name(f"2026-11_cpu2_{theme}.json")
    output.rename(named)
    assert run("tables", "--pages", readme, "--results", output.parent).returncode == 0
    named.rename(output)
    assert readme.read_text().count("\n|") >= 3
    if script == "gpu":
        check_gpu(output)
    elif script == "zoo":
        check_zoo(output)
        capsys.readouterr()
        run_here(monkeypatch, script, "--smoke", "--output", output)
        assert "0/0" in capsys.readouterr().out


def check_zoo(output: Path) -> None:
    """Closed equals cut."""
    (row,) = json.loads(output.read_text())["rows"].values()
    assert row["swan"]["forgotten_channels"] == 0
    for cut in row["swan"]["cuts"]:
        assert cut["error"] <= 1e-9
        assert cut["hard_macs"] == cut["counted_macs"] == cut["torch_counter_macs"]
        assert cut["predicted_params"] == cut["counted_params"]
    assert row["torch_pruning"]["verdict"] == "exact"


def check_gpu(output: Path) -> None:
    """Every part is reached, and nothing is measured twice."""
    result = json.loads(output.read_text())
    assert result["unfinished"] == []
    reached = {item.key for part in PARTS[1:] for item in smoke_items(part)}
    rows = result["rows"]
    assert reached <= rows.keys()
    assert rows["right"]["not_reached"] == []
    assert rows["right/tests"]["passed"] == 2
    assert rows["right/tests"]["failed"] == {}
    for key, row in rows.items():
        if key.startswith("right/") and "float64" in row:
            assert row["float64"]["cut_error"] <= 1e-9
            assert row["float64"]["hard_macs"] == row["float64"]["counted_macs"]
    pruned = [row for row in rows.values() if row.get("method") in METHODS]
    assert all(0 < row["macs_share"] < 0.75 for row in pruned)
    assert all(
        row["dense_test"] == rows["figure5/vgg16_bn/dense/1/0/2"]["test"]
        for row in pruned
        if row["network"] == "vgg16_bn"
    )

    again = run("gpu", "--smoke", "--output", output, cwd=output.parent)
    assert again.returncode == 0, again.stderr
    assert json.loads(output.read_text())["rows"] == rows


def marked(name, body=""):
    return f"before\n<!-- table:{name} -->\n{body}<!-- /table:{name} -->\nafter\n"


def speed_result(seconds):
    stats = {"median": seconds, "q1": seconds, "q3": seconds}
    times = {"wall": stats, "cpu": stats}
    row = {"model": "tiny", "layers": 4, "map": times, "swanify": times, "prune": times}
    row["gib"] = {"built": 1, "map": 2, "all": 3}
    return {"environment": ENVIRONMENT, "rows": [row], "slopes": {"map all": 1.0}}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "2026-11_cpu2_speed.json").write_text(json.dumps(speed_result(0.25)))
    return tmp_path


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(marked("speed"))
    return path


@pytest.mark.slow
def test_check_fails_until_tables_are_written_and_again_when_results_change(folder, readme):
    options = ("--pages", readme, "--results", folder)
    before = readme.read_text()
    assert run("tables", "--check", *options).returncode == 1
    assert readme.read_text() == before

    assert run("tables", *options).returncode == 0
    text = readme.read_text()
    assert "| tiny | 4 | 0.25 [0.25, 0.25] | 62.5 |" in text
    assert "| 1.00 | 2.00 | 3.00 |" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert run("tables", "--check", *options).returncode == 0

    (folder / "2026-12_cpu2_speed.json").write_text(json.dumps(speed_result(0.5)))
    stale = run("tables", "--check", *options)
    assert stale.returncode == 1
    assert "stale" in stale.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [("zoo_timm", "no results for table 'zoo_timm'"), ("weather", "known are")],
)
def test_a_table_that_cannot_be_made_is_an_error(name, message, folder, readme):
    readme.write_text(marked(name))
    done = run("tables", "--check", "--pages", readme, "--results", folder)
    assert done.returncode == 1
    assert message in done.stderr
    assert readme.read_text() == marked(name)


def tuned(*accuracies, network="resnet20"):
    """Rows of seed 0 at each learning rate: {rate: validation accuracy}."""
    rows = {}
    for lr, validation in accuracies:
        row = Row(network, "short", "ours", 0.25, distil=False, seed=0, lr=lr)
        rows[row.key()] = {**vars(row), "validation": validation}
    return rows


@pytest.mark.parametrize(
    ("accuracies", "next_rates"),
    [
        ((), RATES),
        (((0.01, 50.0), (0.02, 60.0)), RATES),
        (((0.01, 50.0), (0.02, 60.0), (0.04, 59.0), (0.08, 58.0)), ()),
        (((0.01, 50.0), (0.02, 60.0), (0.04, 61.0), (0.08, 62.0)), (0.16,)),
        (((0.01, 50.0), (0.02, 60.0), (0.04, 61.0), (0.08, 62.0), (0.16, 1.0)), ()),
        (((0.01, 50.0), (0.02, 40.0), (0.04, 41.0), (0.08, 42.0)), (0.005,)),
    ],
)
def test_quality_widens_the_grid_while_the_best_rate_is_on_its_edge(accuracies, next_rates):
    case = Row("resnet20", "short", "ours", 0.25, distil=False, seed=0, lr=RATES[0])
    assert rates_to_try(tuned(*accuracies), case) == next_rates


def test_quality_chooses_the_best_rate_of_a_finished_grid_by_validation():
    grid = ((0.01, 50.0), (0.02, 60.0), (0.04, 61.0), (0.08, 62.0))
    case = Row("resnet20", "short", "ours", 0.25, distil=False, seed=1, lr=RATES[0])
    assert chosen_rate(tuned(*grid), case) == 0.08
    assert chosen_rate(tuned(*grid, (0.16, 63.0)), case) == 0.16
    assert chosen_rate(tuned(*grid[:3]), case) == chosen_rate({}, case) == 0.04
    assert chosen_rate(tuned(*grid, network="vgg16_bn"), case) == 0.04


def test_rows_of_its_own_file_choose_the_learning_rate_before_those_of_older_files(
    tmp_path, monkeypatch
):
    older = tuned((0.01, 70.0), (0.02, 60.0), (0.04, 50.0), (0.08, 40.0))
    own = tuned((0.01, 40.0), (0.02, 60.0), (0.04, 50.0), (0.08, 40.0))
    (tmp_path / "2026-11_cpu2_quality.json").write_text(json.dumps({"rows": older}))
    monkeypatch.setattr("quality.RESULTS", tmp_path)
    asked = argparse.Namespace(
        network="resnet20",
        schedule="short",
        methods=["ours"],
        budgets=[0.25],
        lr=None,
        seeds=[1],
        distil=[False],
        tune=False,
    )
    assert [row.lr for row in wanted(asked, own)] == [0.02]
    assert [row.lr for row in wanted(asked, {})] == [0.01]
    asked.lr = 0.08
    assert [row.lr for row in wanted(asked, own)] == [0.08]
