"""Activations on CIFAR-10: from scratch, put into a trained network, and put in after a cut.

    python benchmarks/activations_training.py --data cifar10-jpeg.tar.gz
    python benchmarks/activations_training.py --data ... --networks vit --parts scratch --methods given fles

Two small networks: He's CIFAR ResNet (SGD, ReLU given) and a Vision Transformer (AdamW, GELU given), images
made smaller. Every activation takes the place of every activation of the same network and gets the same
images, epochs, batches, augmentation and cosine; the peak learning rate is the best of `rates` by the
validation accuracy of seed 0. Parts:

    scratch         each activation at its own start
    retrofit        the given network as trained from scratch; the activation put in, from the same function on
                    where it has such a start; trained on for a few epochs
    cut-25, cut-10  that network cut to so many % of its MACs by Fisher scores, compensated; the activation put
                    in (what it costs is cut away first); trained on

Rows that are in the result file already are not measured again; trained networks are kept in `--work`.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _measure import arguments, console, environment, output_path, report, write
from quality_data import Images, Splits, batches, load, normalised, synthetic
from quality_networks import CifarResNet
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import swan_surgery as swan


GIVEN = "given"
SCRATCH = ("silu", "starrelu", "acon-c", "fles", "fles-dg", "fles-pn")
# In order of how much they decide.
METHODS: dict[str, tuple[str, ...]] = {
    "scratch": (GIVEN, *SCRATCH),
    "retrofit": (GIVEN, "fles", "fles-dg", "acon-c", "silu"),
    "cut-25": (GIVEN, "fles", "ap"),
    "cut-10": (GIVEN, "fles", "ap"),
}
# Where it does not start as what was there: mixed in from nothing on.
_BLENDED = ("silu",)


@dataclass(frozen=True)
class Schedule:
    """How a network is trained.

    Attributes:
        rates: peak learning rates to choose among.
        later: share of the chosen rate that training on starts at.
        epochs: from scratch.
        later_epochs: after something was put in or cut.
    """

    optimizer: str
    rates: tuple[float, ...]
    weight_decay: float
    later: float = 0.3
    epochs: int = 8
    later_epochs: int = 3
    images: int = 8000
    batch: int = 100
    size: int = 16


SCHEDULES = {
    "resnet8": Schedule("sgd", rates=(0.1, 0.03), weight_decay=5e-4),
    "vit": Schedule("adamw", rates=(2e-3, 1e-3), weight_decay=0.05),
}
SMOKE = {"rates": (0.01,), "epochs": 1, "later_epochs": 1, "images": 64, "batch": 32}


@dataclass(frozen=True)
class Job:
    """One training."""

    network: str
    part: str
    method: str
    lr: float
    seed: int

    @property
    def key(self) -> str:
        """Names it in the result file."""
        return f"{self.network}/{self.part}/{self.method}/{self.lr:g}/{self.seed}"


def build(network: str, size: int) -> nn.Module:
    if network == "vit":
        model = VisionTransformer(
            image_size=size,
            patch_size=4,
            num_layers=4,
            num_heads=4,
            hidden_dim=96,
            mlp_dim=384,
            num_classes=10,
        )
        nn.init.trunc_normal_(model.heads.head.weight, std=0.02)  # torchvision starts it at 0
        return model
    return CifarResNet(8)


def swapped(model: nn.Module, method: str, example: Tensor, start: str) -> nn.Module:
    if method == GIVEN:
        return model
    if start == "identity" and method in _BLENDED:
        start = "blend"
    return swan.swap_activations(model, method, example, start=start)  # type: ignore[arg-type]  # one of them


def train(
    model: nn.Module,
    splits: Splits,
    schedule: Schedule,
    *,
    lr: float,
    epochs: int,
    seed: int,
    loss_of: Callable[[Tensor, Tensor, int], Tensor] | None = None,
) -> None:
    """One cosine, a tenth of the steps to warm up; `loss_of`: (images, labels, step), cross-entropy by default."""
    generator = torch.Generator().manual_seed(1000 + seed)
    steps = epochs * (len(splits.train) // schedule.batch)
    decay = schedule.weight_decay
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=decay)
    if schedule.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=decay
        )
    model.train()
    step = 0
    for _ in range(epochs):
        for x, y in batches(splits.train, schedule.batch, generator):
            share = min(1.0, (step + 1) / (0.1 * steps))
            for group in optimizer.param_groups:
                group["lr"] = lr * share * 0.5 * (1 + math.cos(math.pi * step / steps))
            loss = F.cross_entropy(model(x), y) if loss_of is None else loss_of(x, y, step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """In %."""
    model.eval()
    hits = 0
    for start in range(0, len(images), 500):
        x, y = images.x[start : start + 500], images.y[start : start + 500]
        hits += int((model(normalised(x)).argmax(1) == y).sum())
    return 100 * hits / len(images)


def of_size(images: Images, size: int) -> Images:
    """Smaller images, each pixel the mean of those it covers."""
    x = F.adaptive_avg_pool2d(images.x.float(), size)
    return Images(x.round().to(torch.uint8), images.y)


def cut(model: nn.Module, splits: Splits, macs: int, example: Tensor) -> nn.Module:
    """By Fisher scores of 1,024 images, compensated."""

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(net(batch[0]), batch[1])

    x, y = normalised(splits.train.x[:1024]), splits.train.y[:1024]
    data = list(zip(x.split(128), y.split(128), strict=True))
    gated = swan.swanify(model, example)
    scores = swan.importance(gated, "fisher", batches=data, loss=loss)
    return swan.prune_by_score(gated, scores, macs=macs, compensate=list(x.split(128)))


class Bench:
    """Trainings of one network, those that others start from kept."""

    def __init__(self, network: str, schedule: Schedule, splits: Splits, work: Path) -> None:
        self.network, self.schedule, self.work = network, schedule, work
        self.splits = Splits(
            *(of_size(own, schedule.size) for own in (splits.train, splits.validation, splits.test))
        )
        self.example = torch.zeros(2, 3, schedule.size, schedule.size)

    def start_of(self, job: Job) -> nn.Module:
        """The network before `job` trains it."""
        torch.manual_seed(job.seed)
        model = build(self.network, self.schedule.size)
        if job.part == "scratch":
            return swapped(model, job.method, self.example, "fresh")
        load_model(model, self.file_of(job))
        model.eval()
        if job.part == "retrofit":
            return swapped(model, job.method, self.example, "identity")
        share = float(job.part.removeprefix("cut-")) / 100
        small = self._cut_and_swapped(model, job.method, int(share * self._macs(model)))
        if job.method == "ap":
            swan.activate_dead(small, [normalised(self.splits.train.x[:512])])
        return small

    def _cut_and_swapped(self, model: nn.Module, method: str, macs: int) -> nn.Module:
        """At most so many MACs, those of the activations among them."""
        one = self.example[:1]
        small = cut(model, self.splits, macs, one)
        found = swapped(small, method, self.example, "identity")
        more = self._macs(found) - self._macs(small)
        if more > 0:
            small = cut(model, self.splits, macs - more, one)
            found = swapped(small, method, self.example, "identity")
        return found

    def _macs(self, model: nn.Module) -> int:
        return swan.count_macs(model, self.example[:1])

    def file_of(self, job: Job) -> Path:
        """Where the network that a job started from scratch is kept."""
        return self.work / f"{self.network}_{job.lr:g}_{job.seed}.safetensors"

    def run(self, job: Job) -> dict[str, Any]:
        """The row of one training."""
        started, cpu = time.perf_counter(), time.process_time()
        model = self.start_of(job)
        before = None if job.part == "scratch" else accuracy(model, self.splits.test)
        schedule, scratch = self.schedule, job.part == "scratch"
        lr = job.lr if scratch else job.lr * schedule.later
        epochs = schedule.epochs if scratch else schedule.later_epochs
        train(model, self.splits, schedule, lr=lr, epochs=epochs, seed=job.seed)
        if scratch and job.method == GIVEN:
            self.work.mkdir(parents=True, exist_ok=True)
            save_model(model, self.file_of(job))
        seen = Images(self.splits.train.x[:2000], self.splits.train.y[:2000])
        return {
            **asdict(job),
            "before": before,
            "test": accuracy(model, self.splits.test),
            "validation": accuracy(model, self.splits.validation),
            "train": accuracy(model, seen),
            "params": swan.count_params(model),
            "macs": self._macs(model),
            "seconds": round(time.perf_counter() - started, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
        }


def wanted(options: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> Iterator[Job]:
    """What is to be measured: rates of seed 0, then the other seeds at the best of them."""
    for network in options.networks:
        rates = options.schedules[network].rates
        for part in options.parts:
            for method in METHODS[part]:
                if options.methods and method not in options.methods:
                    continue
                for lr in rates if part == "scratch" else ():
                    yield Job(network, part, method, lr, 0)
        for seed in options.seeds:
            for part in options.parts:
                for method in METHODS[part]:
                    if options.methods and method not in options.methods:
                        continue
                    # What is put in later is put into the given network.
                    own = method if part == "scratch" else GIVEN
                    yield Job(network, part, method, best_rate(rows, network, own, rates), seed)


def best_rate(
    rows: dict[str, dict[str, Any]], network: str, method: str, rates: tuple[float, ...]
) -> float:
    def validation(lr: float) -> float:
        found = rows.get(Job(network, "scratch", method, lr, 0).key)
        return -1.0 if found is None else float(found["validation"])

    return max(rates, key=validation)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, help="CIFAR-10 as a folder or tar archive of images")
    parser.add_argument("--networks", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--parts", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--methods", nargs="+", choices=(GIVEN, *SCRATCH, "ap"), help="default all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("out/activations"))
    options = parser.parse_args()
    options.schedules = dict(SCHEDULES)
    if options.smoke:
        options.seeds, options.work = [0], options.work / "smoke"
        options.methods = options.methods or [GIVEN, "fles", "ap"]
        options.schedules = {
            name: Schedule(**{**asdict(own), **SMOKE}) for name, own in SCHEDULES.items()
        }
    if options.data is None and not options.smoke:
        raise SystemExit("--data FILE: where the images are (see quality.py)")
    torch.set_num_threads(1)
    out, screen = output_path("activations_training", options), console()
    rows: dict[str, dict[str, Any]] = {}
    if out is not None and out.exists():
        rows = json.loads(out.read_text())["rows"]
    images = options.schedules["vit"].images
    splits = load(options.data, images) if options.data else synthetic(images)
    benches = {
        name: Bench(name, options.schedules[name], splits, options.work)
        for name in options.networks
    }
    for job in wanted(options, rows):
        if job.key in rows:
            continue
        rows[job.key] = row = benches[job.network].run(job)
        screen.print(f"{job.key}: {row['test']:.2f} % ({row['cpu_seconds']} s)")
        write(
            out,
            {
                "theme": "activations_training",
                "environment": environment(),
                "schedules": {name: asdict(own) for name, own in options.schedules.items()},
                "rows": rows,
            },
        )
    report(out, screen)


if __name__ == "__main__":
    main()
