"""What only a GPU can show, planned into the minutes there are.

    python benchmarks/gpu.py --data DIR --minutes 8 --output gpu.json
    python benchmarks/gpu.py --minutes 8 --plan                # what that would run; --rates cpu
    python benchmarks/gpu.py --data DIR --minutes 8 --output gpu.json --parts figure5

DIR holds `cifar10-jpeg.tar.gz` and the pretrained `resnet20-*.th`, `resnet56-*.th`. The parts, in this order:

- right: the tests marked `gpu`; the laws on 30 random networks and 10 of the zoo (`gpu_right.py`)
- figure5: the paper's figure 5, VGG16-BN and ResNet-50 on CIFAR-10 (`gpu_methods.py`)
- speed: training steps with gates, latency of cuts, multiples of channels (`gpu_speed.py`)
- longer: ResNet-56 for 100 epochs, ResNet-20 for 50, from pretrained weights (`gpu_methods.py`)

`gpu_plan.py` says what is run in which order and why, and with how many epochs. The minutes are a hard
limit, start-up included. Rows are written one by one; what the output file holds is not run again, so
a later session goes on, with the rates and the epochs of the file. Needs no installed package, only PYTHONPATH.
"""

import argparse
import json
import traceback
from dataclasses import asdict
from pathlib import Path

import torch
from _measure import arguments, console, output_path, report, write
from gpu_clock import Clock, OutOfTimeError, end_process_at, seconds_since_start
from gpu_methods import measured
from gpu_plan import (
    ASSUMED,
    PARTS,
    Planned,
    Rates,
    State,
    measure_seconds,
    plan,
    plan_part,
    rates_from,
    reserve,
    seconds_for,
    seconds_of,
)
from gpu_right import run_right
from gpu_runs import Job, Run, smoke_items
from gpu_session import ARCHIVE, Session, opened, scale_of
from gpu_speed import run_job
from gpu_training import dense_network, dense_path, measured_rates
from rich.console import Console
from rich.table import Table


SMOKE_MINUTES = 6.0


def run_part(part: str, session: Session, seconds: float) -> bool:
    """A part, as far as its seconds go; whether it did anything."""
    clock, before = session.clock.within(seconds), len(session.result["rows"])
    if part == "right":
        if "right" not in session.result["rows"]:
            run_right(session.device, clock, session.save, smoke=session.options.smoke)
        return False  # once is enough
    tried = session.broken.copy()
    while (item := next_item(part, session, clock, tried)) is not None:
        tried.add(item.key)
        try:
            run_item(item, session, clock)
        except OutOfTimeError:
            session.note(item.key, "cut off: out of time")
        except Exception:  # noqa: BLE001 - one fault must not cost the minutes that are left
            session.broken.add(item.key)
            session.note(item.key, traceback.format_exc(limit=-4))
    return len(session.result["rows"]) > before


def next_item(part: str, session: Session, clock: Clock, tried: set[str]) -> Run | Job | None:
    """What to run now, planned anew with the rates and the time of now; None at the end."""
    state = session.state()
    if session.options.smoke:
        return next(
            (i for i in smoke_items(part) if i.key not in state.rows and i.key not in tried), None
        )
    while True:
        planned, epochs = plan_part(
            part, clock.left(), session.rates(), session.options.images, state
        )
        item = next((own.item for own in planned if own.fits and own.item.key not in tried), None)
        if not isinstance(item, Run):
            return item
        if item.network in session.measured()["images"]:
            session.result["epochs"] |= {k: v for k, v in epochs.items() if k == item.network}
            return item
        if not measure(item.network, session, clock):
            return None


def measure(network: str, session: Session, clock: Clock) -> bool:
    """Measure a network's rates; False if the time did not suffice."""
    seconds = measure_seconds(clock.left())
    try:
        plain, gated = measured_rates(network, session.task(clock), seconds)
    except OutOfTimeError:
        session.note(f"rates/{network}", "cut off: out of time")
        return False
    own = session.measured()
    own["images"][network], own["gated"][network] = round(plain, 1), round(gated, 1)
    write(session.path, session.result)
    session.terminal.print(f"{network}: {plain:,.0f} images/s, {gated:,.0f} while gates learn")
    return True


def run_item(item: Run | Job, session: Session, clock: Clock) -> None:
    """Run it and save its row.

    Raises:
        OutOfTimeError: the clock ended; there is no row.
    """
    if isinstance(item, Job):
        session.save(item.key, run_job(item.what, scale_of(session), clock))
        return
    task = session.task(clock)
    left = clock.left()
    pretrained = session.options.data if item.part == "longer" else None
    is_new = not dense_path(session.options.work, item, session.device).exists()
    dense = dense_network(item, task, session.options.work, pretrained)
    name = [getattr(item, field) for field in asdict(item)]
    session.result["dense"] += [name] if is_new else []
    session.save(item.key, measured(item, task, dense))
    own = session.measured()
    if item.network in own["images"]:
        # What it took beside its epochs; of several runs the newer ones count more.
        rates, taken = session.rates(), left - clock.left()
        training = seconds_of(item, rates, len(task.splits.train), has_dense=not is_new)
        beside = max(0.5, taken - training + rates.setup[item.network])
        own["setup"][item.network] = round(0.5 * (rates.setup[item.network] + beside), 2)


def print_plan(options: argparse.Namespace, terminal: Console) -> None:
    """What would run, with assumed or measured rates."""
    rates = chosen_rates(options)
    terminal.print(
        f"{options.minutes:g} minutes on {rates.source}; {rates.start:.0f} s until images lie there, "
        f"{reserve(options.minutes):.0f} s kept; what a part leaves over goes on to the next"
    )
    state = State()
    if options.output is not None and options.output.exists():
        old = json.loads(options.output.read_text())
        state = State(frozenset(old["rows"]), dict(old["epochs"]))
    for part, seconds, planned in plan(
        options.minutes, rates, options.parts, options.images, state
    ):
        terminal.print(plan_table(part, seconds, planned))


def plan_table(part: str, seconds: float, planned: list[Planned]) -> Table:
    """One part."""
    fitting = [own for own in planned if own.fits]
    taken = sum(own.seconds for own in fitting)
    title = f"{part}: {seconds:.0f} s given, {taken:.0f} s planned, {len(planned) - len(fitting)} items left"
    table = Table(
        "run or job", "epochs", "s", "s until then", title=title, title_justify="left", min_width=72
    )
    until = 0.0
    for own in fitting:
        until += own.seconds
        epochs = ""
        if isinstance(own.item, Run):
            first = own.item.method == "dense"
            epochs = str(own.item.dense_epochs if first else own.item.epochs)
        table.add_row(own.item.key, epochs, f"{own.seconds:.0f}", f"{until:.0f}")
    return table


def chosen_rates(options: argparse.Namespace) -> Rates:
    """Assumed ones by name, or those of the device that a result file measured last."""
    if options.rates in ASSUMED:
        return ASSUMED[options.rates]
    by_device = json.loads(Path(options.rates).read_text())["rates"]
    return rates_from(list(by_device.values())[-1])


def parse() -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument("--data", type=Path, help=f"folder with {ARCHIVE} and resnet*.th")
    parser.add_argument("--minutes", type=float, default=8.0, help="hard limit, start-up included")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--work", type=Path, default=Path("out/gpu"), help="keeps decoded images and dense networks"
    )
    parser.add_argument("--images", type=int, default=50_000, help="training images (default: all)")
    parser.add_argument("--plan", action="store_true", help="print what would run, and do nothing")
    parser.add_argument(
        "--rates", default="h100", help=f"of --plan: {', '.join(ASSUMED)} or a result file"
    )
    options = parser.parse_args()
    if options.smoke:
        # oneDNN writes past its memory in the backward pass of strided 1x1 convolutions of fewer than
        # 8 channels-last channels (uxlfoundation/oneDNN#6035), which cuts of tiny networks have.
        torch.backends.mkldnn.set_flags(_enabled=False)
        options.minutes, options.work = SMOKE_MINUTES, options.work / "smoke"
        options.images = 128
    elif options.data is None and not options.plan:
        parser.error("--data is needed: no images come with this project")
    return options


def main() -> None:
    options = parse()
    terminal = console()
    if options.plan:
        print_plan(options, terminal)
        return
    whole = Clock.of(60 * options.minutes - seconds_since_start())
    end_process_at(whole.within(whole.left() - 2))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.smoke:
        torch.set_num_threads(1)
    path = output_path("gpu", options)
    clock = whole.within(whole.left() - reserve(options.minutes))
    session = Session(options, path, opened(path), clock, device, terminal, [], set())
    parts = [part for part in PARTS if part in options.parts]
    for index, part in enumerate(parts):
        run_part(part, session, seconds_for(part, parts[index + 1 :], clock.left()))
    # What was left over: once more round, until nothing fits any more.
    while not options.smoke and sum(run_part(part, session, clock.left()) for part in parts):
        pass
    write(path, session.result)
    report(path, terminal)


if __name__ == "__main__":
    main()
