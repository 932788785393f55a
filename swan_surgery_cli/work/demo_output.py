"""The demo in plain language: what happens now, what came out, where the files are."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from swan_surgery.experiments.digits import METHODS, Study
from swan_surgery.reporting import Report


class Teller:
    """Prints sentences and progress bars."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        """One sentence."""
        self._console.print(text, highlight=False)

    @contextmanager
    def epochs(self, text: str, total: int) -> Iterator[Callable[[], None]]:
        """A progress bar over epochs; it stays when done."""
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(text, total=total)
            yield lambda: progress.advance(task)


def result_table(study: Study) -> Table:
    """Accuracy and MACs per method: mean, and the spread where there is more than one seed."""
    many = len(study.results) > 1
    spread = f", mean +- standard deviation of {len(study.results)} seeds" if many else ""
    table = Table(title=f"on the test images{spread}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("network", no_wrap=True)
    for name in ("accuracy", "MACs per image", "MACs left"):
        table.add_column(name, justify="right", no_wrap=True)
    dense = study.mean_macs("dense")
    for method, text in METHODS.items():
        spread = f" +- {study.spread_test(method):.2f}" if many else ""
        macs = study.mean_macs(method)
        table.add_row(
            text,
            f"{study.mean_test(method):.2f} %{spread}",
            f"{macs / 1e6:.3f} MMACs",
            f"{100 * macs / dense:.1f} %",
        )
    return table


def verdict(study: Study) -> str:
    """What the numbers show, and what they do not."""
    share = study.mean_macs("swan") / study.mean_macs("dense")
    many = len(study.results)
    of = f"{many} x {study.num_test}" if many > 1 else f"{study.num_test}"
    wrong = {method: study.wrong(method) for method in METHODS}
    swan = wrong["swan"]
    return (
        f"The smaller network does {share:.1%} of the multiply-adds. Of {of} test images it gets {swan} wrong; the "
        f"dense one, trained as long, {wrong['dense']}: {_than(swan, wrong['dense'])}. The baseline, which is cut by "
        f"weight magnitude at once and fine-tuned for the same epochs, gets {wrong['one_shot']} wrong: "
        f"{_than(swan, wrong['one_shot'])}. Right after the cut, ours gets {wrong['swan_cut']} wrong, as many as with "
        f"its gates closed ({wrong['swan_hard']}), and the baseline {wrong['one_shot_cut']}: ours had spent most of "
        f"its epochs by then, the baseline none. Digits are easy, and small differences show nothing here; "
        f"benchmarks/TABLES.md has CIFAR-10."
    )


def _than(ours: int, other: int) -> str:
    """In words; images that only one network gets right are at most all wrong ones, each as likely here as there."""
    if abs(ours - other) <= 2 * math.sqrt(ours + other):
        return "no more than chance may do"
    return "ours is worse" if ours > other else "ours is better"


def file_list(folder: Path, study: Study) -> str:
    """Where everything lies."""
    own = folder / f"seed-{study.results[0].seed}"
    lines = {
        own
        / "report.html": "before and after, to look at (report.md: as text, report.json: as data)",
        own / "pruned.swan": "the smaller network (dense.safetensors: weights of the large one)",
        own / "plan.json": "which channels stayed",
        folder / "results.json": "settings, versions and the numbers above",
    }
    width = max(len(str(path)) for path in lines)
    return "\n".join(["Files:", *(f"  {path!s:{width}}  {text}" for path, text in lines.items())])


def closing(report: Report) -> str:
    """The before/after table of the first seed."""
    return report.summary()
