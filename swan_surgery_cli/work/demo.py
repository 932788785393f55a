"""`demo`: a digits network through all of it."""

from pathlib import Path

from rich.console import Console

from swan_surgery.experiments.digits import DemoSettings, run_study
from swan_surgery_cli.work.demo_output import Teller, closing, file_list, result_table, verdict
from swan_surgery_cli.work.waiting import on_threads


def demo(*, seeds: int, out: Path, epochs: int | None, macs: float) -> None:
    """Train, gate, cut and compare; one seed or several."""
    settings = (
        DemoSettings(macs=macs) if epochs is None else DemoSettings.of_length(epochs, macs=macs)
    )
    console = Console()
    console.print(
        "This demo takes a network that reads handwritten digits, puts a switch on every channel, "
        "trains switches and weights together, removes what was switched off, and compares.",
        highlight=False,
    )
    with on_threads(1):
        study, report = run_study(range(seeds), settings, out, Teller(console))
    for part in (
        closing(report),
        "",
        result_table(study),
        verdict(study),
        "",
        file_list(out, study),
    ):
        console.print(part, highlight=False, markup=False, soft_wrap=isinstance(part, str))
