"""The demo over several seeds: accuracy on digits at a quarter of the MACs, beside its baselines.

    python benchmarks/demo_seeds.py
    python benchmarks/demo_seeds.py --seeds 10 --macs 0.1

Dense, one-shot magnitude and SWAN spend the same epochs from the same dense start, with the same
batches and learning rates. The split is the same for every seed; settings were chosen by validation
accuracy. The target: SWAN's mean test accuracy at least that of the dense network trained as long,
less 0.5 points, at no more than a quarter of the MACs.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from _measure import arguments, console, environment, output_path, report, write

from swan_surgery.experiments.digits import DemoSettings, run_study
from swan_surgery_cli.work.demo_output import Teller, result_table, verdict


TARGET_POINTS = -0.5


def parse() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--macs", type=float, default=0.25, help="share of the MACs to keep")
    options = parser.parse_args()
    if options.smoke:
        options.seeds = 1
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    terminal = console()
    settings = DemoSettings(macs=options.macs)
    if options.smoke:
        settings = DemoSettings.of_length(3, macs=options.macs)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        study, _ = run_study(range(options.seeds), settings, Path(folder), Teller(terminal))
    difference = study.mean_test("swan") - study.mean_test("dense")
    path = output_path("demo", options)
    result = {
        "theme": "demo",
        "environment": environment(),
        "seconds": time.perf_counter() - started,
        "target_points": TARGET_POINTS,
        "swan_minus_dense_points": difference,
        "met": difference >= TARGET_POINTS
        and study.mean_macs("swan") <= 0.25 * study.mean_macs("dense"),
        "study": json.loads(study.to_json()),
    }
    write(path, result)
    terminal.print(result_table(study))
    terminal.print(verdict(study), highlight=False)
    report(path, terminal)


if __name__ == "__main__":
    main()
