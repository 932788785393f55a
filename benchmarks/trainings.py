"""Trainings of `recipes/` over several seeds: mean and spread of what each leaves.

    python benchmarks/trainings.py vit --seeds 3                       # finetune_pruned_vit.py on digits
    python benchmarks/trainings.py vit --data FOLDER --num-train 3000
    python benchmarks/trainings.py mnist_lenet --data FOLDER --seeds 3 # swan-surgery train, configs/mnist_lenet.toml

A row of the same training is replaced; the others stay.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _measure import ROOT, arguments, console, environment, output_path, report, write


RECIPES = ROOT / "recipes"
CONFIGS = sorted(path.stem for path in (RECIPES / "configs").glob("*.toml"))


def run(*command: str | Path) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", *map(str, command)], check=False)  # noqa: S603
    if done.returncode:
        raise SystemExit(done.returncode)


def vit(seed: int, folder: Path, options: Any) -> dict[str, Any]:
    own = ["--smoke"] if options.smoke else ["--num-train", str(options.num_train)]
    own += ["--data", str(options.data)] if options.data else []
    file = folder / "vit.json"
    run(RECIPES / "finetune_pruned_vit.py", "--seed", str(seed), "--output", file, *own)
    return json.loads(file.read_text())


def config(seed: int, folder: Path, options: Any) -> dict[str, Any]:
    """`swan-surgery train`, one thread; the scores by stage."""
    out, own = folder / f"seed-{seed}", [f"seed={seed}", f"threads={options.threads}"]
    assignments = [word for text in (*own, *options.set) for word in ("--set", text)]
    file = RECIPES / "configs" / f"{options.training}.toml"
    run("-m", "swan_surgery_cli", "train", file, "--data", options.data, "-o", out, *assignments)
    result = json.loads((out / "result.json").read_text())
    scores: dict[str, dict[str, float]] = {stage: {} for stage in result["accuracy"]}
    for name in ("accuracy", "loss", "validation_accuracy"):
        key = name if name.startswith("validation") else f"test_{name}"
        for stage, value in result.get(name, {}).items():
            scores[stage][key] = value
    kept = {name: result[name] for name in ("units", "macs", "params", "seconds") if name in result}
    return {
        "config": options.training,
        "data": result["data"],
        "settings": result["settings"],
        "result": {"seed": seed, "scores": scores, **kept},
    }


def summary(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation over the seeds, of every score at every stage."""
    return {
        stage: {
            key: mean_and_spread([result["scores"][stage][key] for result in results])
            for key in first
        }
        for stage, first in results[0]["scores"].items()
    }


def mean_and_spread(values: list[float]) -> dict[str, float | None]:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "stdev": spread}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("training", choices=["vit", *CONFIGS], nargs="?", default="vit")
    parser.add_argument("--data", type=Path, help="folder; of vit: digits without")
    parser.add_argument("--num-train", type=int, default=4000, help="of vit, at most")
    parser.add_argument("--seeds", type=int, default=1, help="how many (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    if options.training != "vit" and not options.data:
        parser.error("--data is missing")
    terminal, where = console(), environment()
    train = vit if options.training == "vit" else config
    with tempfile.TemporaryDirectory() as folder:
        made = [train(seed, Path(folder), options) for seed in range(options.seeds)]
    results = [own.pop("result") for own in made]
    row = {**made[0], "environment": where, "summary": summary(results), "results": results}
    theme, key = "classifier", ("config",)
    if options.training == "vit":
        theme, key = "vit", ("data", "num_train")
    path = output_path(theme, options)
    old = json.loads(path.read_text())["rows"] if path is not None and path.exists() else []
    rows = [own for own in old if any(own[name] != row[name] for name in key)]
    write(path, {"theme": theme, "environment": where, "rows": [*rows, row]})
    report(path, terminal)


if __name__ == "__main__":
    main()
