"""From rates and minutes to what is run, with how many epochs. Numbers in, numbers out."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from gpu_runs import (
    DECIDING,
    DENSE,
    EXTREME,
    FEWEST,
    FIGURE5_NETWORKS,
    JOINT,
    LEARN,
    MOST,
    RIGHT_SECONDS,
    Job,
    Run,
    figure5_runs,
    longer_runs,
    speed_jobs,
)


PARTS = ("right", "figure5", "speed", "longer")
# Of the time that is left for them when their turn comes; what one leaves goes to the next.
SHARES = {"right": 0.25, "figure5": 0.6, "speed": 0.2, "longer": 0.2}
MEASURE_SECONDS = 15.0


@dataclass(frozen=True)
class Rates:
    """How fast a machine is.

    Attributes:
        source: which machine, and whether measured or assumed.
        images: training images per second, by network.
        gated: the same while gates learn.
        setup: seconds of a run beside its epochs (gates, scores, cut, accuracies), by network.
        start: seconds from the start of the process until images lie on the device.
        jobs: what the seconds of `Job`s, which are an H100's, are multiplied by.
    """

    source: str
    images: Mapping[str, float]
    gated: Mapping[str, float]
    setup: Mapping[str, float]
    start: float
    jobs: float = 1.0


@dataclass(frozen=True)
class Planned:
    """A run or a job, how long it should take, and whether that fits."""

    item: Run | Job
    seconds: float
    fits: bool


@dataclass(frozen=True)
class State:
    """What an earlier session left.

    Attributes:
        rows: keys of rows that are there.
        epochs: those chosen for each network of figure 5.
        dense: (part, network, seed) of dense networks that are at hand.
    """

    rows: Collection[str] = ()
    epochs: Mapping[str, int] = field(default_factory=dict)
    dense: Collection[tuple[str, str, int]] = ()


def seconds_of(run: Run, rates: Rates, num_train: int, *, has_dense: bool) -> float:
    """What a run takes, training of its dense network included where there is none yet."""
    plain, gated = rates.images[run.network], rates.gated[run.network]
    total = rates.setup[run.network]
    if not has_dense:
        total += run.dense_epochs * num_train / plain
    if run.method == DENSE:
        return total
    share = JOINT if run.method in LEARN else 0.0
    return total + run.epochs * num_train * (share / gated + (1 - share) / plain)


def deciding_seconds(network: str, epochs: int, rates: Rates, num_train: int) -> float:
    """What a network's dense run and its six most telling runs take at a number of epochs."""
    runs = [run for run in figure5_runs(network, epochs, seed=0) if run.budget in (1.0, *EXTREME)]
    runs = [run for run in runs if run.method in (DENSE, *DECIDING)]
    return sum(
        seconds_of(run, rates, num_train, has_dense=run.method != DENSE)
        for run in runs
        if run.method != "dense-longer"
    )


def epochs_for(network: str, seconds: float, rates: Rates, num_train: int) -> int:
    """As many as let the deciding runs fit, within `FEWEST` and `MOST`."""
    fitting = [
        epochs
        for epochs in range(FEWEST, MOST + 1)
        if deciding_seconds(network, epochs, rates, num_train) <= seconds
    ]
    return max(fitting, default=FEWEST)


def plan_part(
    part: str, seconds: float, rates: Rates, num_train: int, state: State, *, seeds: int = 3
) -> tuple[list[Planned], dict[str, int]]:
    """What a part runs in some seconds, in order, and the epochs of the networks that it starts.

    What does not fit is left out and marked so; shorter ones behind it may still fit.

    Args:
        part: one of `PARTS`.
        seconds: that it has.
        rates: of the machine.
        num_train: images in an epoch.
        state: what is there already.
        seeds: how many there may be.
    """
    if part == "right":
        limit = min(RIGHT_SECONDS, seconds)
        missing = "right" not in state.rows
        own = Planned(Job("right", "all", limit), limit, fits=True)
        return ([own] if missing else []), {}
    if part == "speed":
        return _fitted(speed_jobs(), seconds, rates, num_train, state), {}
    if part == "longer":
        runs = [run for seed in range(seeds) for run in longer_runs(seed)]
        return _fitted(runs, seconds, rates, num_train, state), {}
    planned: list[Planned] = []
    epochs = dict(state.epochs)
    for seed in range(seeds):
        for network in FIGURE5_NETWORKS:
            left = seconds - sum(own.seconds for own in planned if own.fits)
            if network not in epochs:
                epochs[network] = epochs_for(network, left, rates, num_train)
            runs = list(figure5_runs(network, epochs[network], seed=seed))
            planned += _fitted(runs, left, rates, num_train, state)
    started = {own.item.network for own in planned if own.fits and isinstance(own.item, Run)}
    return planned, {name: epochs[name] for name in epochs if name in started | set(state.epochs)}


def _fitted(
    items: list[Run] | list[Job], seconds: float, rates: Rates, num_train: int, state: State
) -> list[Planned]:
    dense = set(state.dense)
    planned = []
    missing = [item for item in items if item.key not in state.rows]
    for item, following in zip(missing, [*missing[1:], None], strict=True):
        beyond = 0.0
        if isinstance(item, Job):
            cost = item.seconds * rates.jobs
        else:
            start = (item.part, item.network, item.seed)
            cost = seconds_of(item, rates, num_train, has_dense=start in dense)
            if item.method == DENSE and isinstance(following, Run):
                # A dense network alone answers nothing.
                beyond = seconds_of(following, rates, num_train, has_dense=True)
        fits = cost + beyond <= seconds
        if fits:
            seconds -= cost
            if isinstance(item, Run):
                dense.add(start)
        planned.append(Planned(item, cost, fits))
    return planned


def seconds_for(part: str, following: Collection[str], left: float) -> float:
    """What a part gets of what is left, when it and `following` are still to come."""
    if part == "right":
        return min(RIGHT_SECONDS, SHARES[part] * left)
    rest = SHARES[part] + sum(SHARES[other] for other in following)
    return left * SHARES[part] / rest


def plan(
    minutes: float, rates: Rates, parts: Collection[str], num_train: int, state: State
) -> list[tuple[str, float, list[Planned]]]:
    """The whole session: per part its seconds and what it would run.

    What a part leaves over goes to those behind it, and at the end once more round.
    """
    left = 60 * minutes - reserve(minutes) - rates.start
    ordered = [part for part in PARTS if part in parts]
    found = []
    for index, part in enumerate(ordered):
        given = seconds_for(part, ordered[index + 1 :], left)
        measuring = measure_seconds(given) if part in ("figure5", "longer") else 0.0
        planned, _ = plan_part(part, given - measuring, rates, num_train, state)
        found.append((part, given, planned))
        left -= measuring + sum(own.seconds for own in planned if own.fits)
    return found


def measure_seconds(left: float) -> float:
    """How long a network's rates are measured."""
    return min(MEASURE_SECONDS, 0.1 * left)


def reserve(minutes: float) -> float:
    """Seconds kept for writing and leaving."""
    return min(10.0, 6.0 * minutes)


def rates_from(data: Mapping[str, Any]) -> Rates:
    """From a result file's `rates` of one machine, with an H100's where something was not measured."""
    assumed = ASSUMED["h100"]
    return Rates(
        source=str(data["source"]),
        images={**assumed.images, **data.get("images", {})},
        gated={**assumed.gated, **data.get("gated", {})},
        setup={**assumed.setup, **data.get("setup", {})},
        start=float(data.get("start", assumed.start)),
        jobs=float(data.get("jobs", assumed.jobs)),
    )


ASSUMED = {
    # VGG16 1.4 s and ResNet-50 8 s an epoch; the CIFAR ResNets wait for kernel launches, and so does
    # the choice of open gates, a hundred small operations a step.
    "h100": Rates(
        source="an H100, assumed",
        images={"vgg16_bn": 36_000, "resnet50": 6_250, "resnet20": 90_000, "resnet56": 38_000},
        gated={"vgg16_bn": 18_000, "resnet50": 4_800, "resnet20": 28_000, "resnet56": 18_000},
        setup={"vgg16_bn": 6.0, "resnet50": 20.0, "resnet20": 5.0, "resnet56": 12.0},
        start=30.0,
    ),
    # By the CPU seconds of the dense and gated rows of 2026-11_cpu2_*quality.json, one core; ResNet-50's
    # after VGG16-BN's, by their MACs.
    "cpu": Rates(
        source="one core of an AMD EPYC, measured by quality.py",
        images={"vgg16_bn": 119, "resnet50": 28, "resnet20": 560, "resnet56": 218},
        gated={"vgg16_bn": 110, "resnet50": 26, "resnet20": 500, "resnet56": 200},
        setup={"vgg16_bn": 20.0, "resnet50": 60.0, "resnet20": 10.0, "resnet56": 30.0},
        start=30.0,
        jobs=60.0,
    ),
}
