"""The runs and jobs of the GPU script, and their order: what decides most comes first.

Figure 5's claim is about the extreme: gates above 90 % at 5 % of the FLOPs where channel pruning
collapses. So VGG16-BN comes first, at 5 and then 10 %, with the five methods that can answer it (one-shot
Fisher compensated, in one cut and in stages, gates, uniform L2, one-shot Fisher); then L2
compensated, the paper's own preset and dropout there; then 25 and 50 %, which no method finds hard; then the
same for ResNet-50, which takes six times as long; then further seeds. Epochs of a network are chosen
(`gpu_plan.py`) so that its deciding methods at both budgets fit, and are the same for all its runs, also in a
later session that goes on.
"""

from collections.abc import Iterator
from dataclasses import dataclass


RIGHT_SECONDS = 90.0
DENSE = "dense"
METHODS = (
    "fisher-compensated",
    "staged-compensated",
    "ours",
    "tp-l2",
    "score-fisher",
    "tp-l2-compensated",
    "paper",
    "dropout",
)
DECIDING = METHODS[:5]
EXTREME, EASY = (0.05, 0.1), (0.25, 0.5)
FIGURE5_NETWORKS = ("vgg16_bn", "resnet50")
# The paper fine-tunes for five epochs; beyond thirty little changes.
FEWEST, MOST = 5, 30
DENSE_FACTOR = 2
LONGER = {"resnet20": (50, (0.25, 0.5, 0.1)), "resnet56": (100, (1 / 2.11, 1 / 2.57))}
ADAPT_EPOCHS = 5
SPEED_MODELS = ("resnet50", "vgg16_bn", "vit_b_16")
# Share of a run's epochs in which gates learn, where they do.
JOINT = 0.35
LEARN = {"ours", "paper", "dropout"}


@dataclass(frozen=True)
class Run:
    """One training run of figure 5 or of the longer schedules."""

    part: str
    network: str
    method: str
    budget: float
    seed: int
    epochs: int
    dense_epochs: int

    @property
    def key(self) -> str:
        """Names the run in the result file."""
        return (
            f"{self.part}/{self.network}/{self.method}/{self.budget:.4g}/{self.seed}/{self.epochs}"
        )


@dataclass(frozen=True)
class Job:
    """One measurement that is no training run; `seconds` on an H100."""

    part: str
    what: str
    seconds: float

    @property
    def key(self) -> str:
        """Names the measurement in the result file."""
        return f"{self.part}/{self.what}"


def figure5_runs(network: str, epochs: int, *, seed: int) -> Iterator[Run]:
    """All runs of a network and a seed, those first that decide most."""

    def run(method: str, budget: float) -> Run:
        return Run("figure5", network, method, budget, seed, epochs, DENSE_FACTOR * epochs)

    yield run(DENSE, 1.0)
    for methods, budgets in (
        (DECIDING, EXTREME),
        (METHODS[5:], EXTREME),
        (METHODS, EASY),
    ):
        for budget in budgets:
            for method in methods:
                yield run(method, budget)
    yield run("dense-longer", 1.0)


def longer_runs(seed: int) -> Iterator[Run]:
    """The longer schedules, from pretrained weights."""
    for network, (epochs, budgets) in LONGER.items():
        yield Run("longer", network, DENSE, 1.0, seed, epochs, ADAPT_EPOCHS)
        for budget in budgets:
            for method in DECIDING:
                yield Run("longer", network, method, budget, seed, epochs, ADAPT_EPOCHS)


def speed_jobs() -> list[Job]:
    """Eager and CUDA graphs first: compiling takes minutes."""
    cheap = (("latency", 15.0), ("train", 12.0), ("multiples", 12.0))
    compiled = [("train-compile", "", 120.0)]
    compiled += [
        ("latency-compile", f"/{batch}/{dtype}", 75.0)
        for batch in (1, 32)
        for dtype in ("bf16", "fp32")
    ]
    return [
        *(Job("speed", f"{what}/{name}", s) for what, s in cheap for name in SPEED_MODELS),
        *(
            Job("speed", f"{what}/{name}{rest}", s)
            for name in SPEED_MODELS
            for what, rest, s in compiled
        ),
    ]


def smoke_items(part: str) -> list[Run | Job]:
    """A little of everything that a part does."""
    if part == "figure5":
        own = ((DENSE, 1.0), ("dense-longer", 1.0), *((method, 0.25) for method in METHODS))
        runs: list[Run | Job] = [Run(part, "vgg16_bn", *which, 0, 2, 2) for which in own]
        return [*runs, Run(part, "resnet50", "ours", 0.25, 0, 2, 2)]
    if part == "longer":
        return [Run(part, "resnet20", "ours", 0.5, 0, 2, 1)]
    if part == "speed":
        kinds = ("latency", "train", "multiples")
        jobs = [Job(part, f"{kind}/squeezenet1_1", 5.0) for kind in kinds]
        return [*jobs, Job(part, "latency-compile/squeezenet1_1/2/fp32", 5.0)]
    return [Job("right", "all", RIGHT_SECONDS)]
