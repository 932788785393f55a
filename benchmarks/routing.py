"""Easy images by a short way: accuracy over mean MACs and measured milliseconds, against a static cut.

    python benchmarks/routing.py --data cifar10-jpeg.tar.gz --pretrained cifar_resnets
    python benchmarks/routing.py --data ... --network resnet56 --light exit --train all --epochs 3

The networks are those of `quality.py`, adapted to the images (schedule "cut"). The light branch is the library's own cut of
the rest, compensated, and trained for `--epochs` on the training images with trunk and full branch frozen; the switch is
trained on what crosses of some training images. The static cut of the whole network, compensated, gets as many epochs,
distilled from the same network. With no epochs, the default, both are as cut and compensated. All thresholds are set on the
validation images, and all is reported on the test images. `--train all` trains trunk and full branch as well, as the
static cut is trained whole ("full" is then the full branch). `--light exit` is a branch that is short, not narrow: where
a run's time is its layers' number and not their MACs (single images), that is what saves it. Rows that are in the result file already are not measured
again.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _measure import arguments, console, cpu, environment, output_path, paired, report, wall, write
from quality import Row, accuracy, dense_network
from quality_data import Images, Splits, batches, load, normalised, synthetic
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.routing.costs import routed_costs
from swan_surgery.routing.finding import largest_threshold
from swan_surgery.routing.observing import Observed, observe


TARGETS = (0.6, 0.75, 0.9)
CONFIDENCE, SPLITS = 0.9, 100
BATCHES = (1, 8, 32)
TIMED_IMAGES = 32
EXIT = "exit"
EXAMPLE = torch.zeros(2, 3, 32, 32)


def loader(images: Images) -> list[tuple[Tensor, Tensor]]:
    """Batches of 250, neither shuffled nor augmented."""
    return [
        (normalised(images.x[i : i + 250]), images.y[i : i + 250])
        for i in range(0, len(images), 250)
    ]


def train(
    loss: Callable[[Any], Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    splits: Splits,
    *,
    epochs: int,
    seed: int,
) -> None:
    """A cosine over all steps, the same for routed and static networks."""
    generator = torch.Generator().manual_seed(1000 + seed)
    size = 128 if len(splits.train) >= 1000 else 32
    steps = epochs * (len(splits.train) // size)
    decays = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda s: 0.5 * (1 + math.cos(math.pi * s / steps)))
        for o in optimizers
    ]
    for _ in range(epochs):
        for batch in batches(splits.train, size, generator):
            value = loss(batch)
            for optimizer in optimizers:
                optimizer.zero_grad()
            value.backward()
            for optimizer, decay in zip(optimizers, decays, strict=True):
                optimizer.step()
                decay.step()


def few(splits: Splits, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Augmented batches for scores and compensation."""
    own = batches(
        splits.train, min(64, len(splits.train)), torch.Generator().manual_seed(77 + seed)
    )
    return [batch for _, batch in zip(range(count), own, strict=False)]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """As in quality.py, at the rate that its compensated and distilled rows like."""
    return torch.optim.SGD(parameters, 0.02, 0.9, weight_decay=1e-4, nesterov=True)


def exit_branch(dense: nn.Module, after: str) -> nn.Module:
    """An early exit: of each stage behind the switch the first block alone, then class scores; its weights are copies."""
    stages = [name for name, _ in dense.named_children() if name.startswith("layer")]
    blocks = [dense.get_submodule(f"{name}.0") for name in stages[stages.index(after) + 1 :]]
    found = nn.Sequential(
        *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), dense.get_submodule("linear")
    )
    return copy.deepcopy(found)


def label_loss(logits: Tensor, batch: Any) -> Tensor:
    """A tenth of the cross entropy; the rest of a loss comes from another network."""
    return 0.1 * F.cross_entropy(logits, batch[1])


def distilled_loss(dense: nn.Module, logits: Tensor, batch: Any) -> Tensor:
    """As quality.py distils: mostly from the dense network."""
    with torch.no_grad():
        soft = dense(batch[0])
    return label_loss(logits, batch) + 0.9 * swan.distillation_loss(logits, soft)


def routed_network(dense: nn.Module, splits: Splits, options: Any, seed: int) -> swan.RoutedModel:
    """The dense network with a short way, trained."""
    torch.manual_seed(seed)
    routed = swan.add_switch(
        dense,
        options.after,
        example_inputs=EXAMPLE,
        light=exit_branch(dense, options.after) if options.light == EXIT else options.light,
        batches=few(splits, 12, seed),
    )
    own = routed.parts
    routed.train()
    trained, task = [own.light], label_loss
    if options.train == "all":
        routed.unfreeze()
        trained, task = [own.light, own.trunk, own.full], partial(distilled_loss, dense)
    if options.epochs:
        train(
            lambda batch: routed.loss(batch, task=task),
            [
                sgd([p for part in trained for p in part.parameters()]),
                torch.optim.AdamW(own.switch.parameters(), 2e-3),
            ],
            splits,
            epochs=options.epochs,
            seed=seed,
        )
    train_switch(routed.eval(), splits.train, options.switch_images)
    return routed.eval()


def train_switch(routed: swan.RoutedModel, images: Images, count: int) -> None:
    """The switch alone, on what crosses: all else is at rest, so it is run once."""
    own, cached = routed.parts, []
    with torch.no_grad():
        for start in range(0, min(count, len(images)), 250):
            crossing = own.trunk(normalised(images.x[start : start + 250]))
            cached.append((crossing, own.full(crossing), own.light(crossing)))
    optimizer = torch.optim.AdamW(own.switch.parameters(), 3e-3)
    own.switch.train()
    for _ in range(8):
        for crossing, full, light in cached:
            for rows in torch.arange(len(crossing)).split(125):
                h, f, s = crossing[rows], full[rows], light[rows]
                loss = routed.loss(h, run=lambda h, f=f, s=s: (f, (s,), (own.switch(h),)))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


def static_network(
    dense: nn.Module, splits: Splits, options: Any, seed: int, budget: float
) -> nn.Module:
    """The dense network cut to the same mean cost for every input."""
    gated = swan.swanify(dense, EXAMPLE)
    scores = swan.importance(
        gated,
        "fisher",
        batches=few(splits, 12, seed),
        loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
    )
    small = swan.prune_by_score(gated, scores, macs=budget, compensate=few(splits, 12, seed))

    def loss(batch: Any) -> Tensor:
        return distilled_loss(dense, small(batch[0]), batch)

    if not options.epochs:
        return small.eval()
    small.train()
    train(loss, [sgd(small.parameters())], splits, epochs=options.epochs, seed=seed)
    return small.eval()


def accuracy_of(found: Observed, leaves: Tensor) -> float:
    """Percent right when these leave."""
    return 100 * float(torch.where(leaves, found.right[0], found.right[1]).mean())


def curves(routed: swan.RoutedModel, held: Observed, test: Observed, seed: int) -> dict[str, Any]:
    """Accuracy at mean MACs of the targets, for every way of deciding."""
    found: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(seed)
    for target in TARGETS:
        for way in ("predicted", "margin"):
            costs = routed_costs(routed, [way])
            shares = torch.linspace(0, 1, 2001).tolist()
            share = next((s for s in shares if costs.expected([s]) <= target * costs.given), None)
            if share is None:
                continue
            threshold = float(torch.quantile(held.scores[way][0], share))
            leaves = test.scores[way][0] <= threshold
            found[f"{way}/{target:g}"] = {
                "threshold": threshold,
                "share": float(leaves.double().mean()),
                "macs": costs.expected([float(leaves.double().mean())]) / costs.given,
                "test": accuracy_of(test, leaves),
                "harm": float(test.harm[0][leaves].sum()) / test.num_samples,
            }
            if way == "predicted":
                count = round(share * test.num_samples)
                drawn = torch.zeros(test.num_samples, dtype=torch.bool)
                drawn[torch.randperm(test.num_samples, generator=generator)[:count]] = True
                best = torch.zeros(test.num_samples, dtype=torch.bool)
                best[test.harm[0].argsort(stable=True)[:count]] = True
                macs = costs.expected([share]) / costs.given
                for name, own in (("random", drawn), ("oracle", best)):
                    found[f"{name}/{target:g}"] = {
                        "share": share, "macs": macs, "test": accuracy_of(test, own),
                        "harm": float(test.harm[0][own].sum()) / test.num_samples,
                    }  # fmt: skip
    return found


def violations(held: Observed, test: Observed, seed: int, level: float) -> dict[str, Any]:
    """How often the certified harm is exceeded, over resampled calibration sets, with the harm known.

    "drawn": samples drawn from all held-out images with replacement; their harm in all of them is then the true
    one. "halves": one random half to calibrate, harm measured on the other, which has a spread of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Any] = {}
    for way in ("predicted", "margin"):
        scores = torch.cat([held.scores[way][0], test.scores[way][0]])
        harm = torch.cat([held.harm[0], test.harm[0]])
        total, size = len(scores), len(scores) // 2
        over, over_half, shares, harms = 0, 0, [], []
        for _ in range(SPLITS):
            own = torch.randint(total, (size,), generator=generator)
            threshold = largest_threshold(
                scores[own], harm[own], level, 1 - CONFIDENCE, counts=True
            )
            true = float((harm * (scores <= threshold)).mean())
            over += true > level
            harms.append(true)
            shares.append(float((scores <= threshold).double().mean()))
            order = torch.randperm(total, generator=generator)
            one, two = order[:size], order[size:]
            threshold = largest_threshold(
                scores[one], harm[one], level, 1 - CONFIDENCE, counts=True
            )
            over_half += float((harm[two] * (scores[two] <= threshold)).mean()) > level
        found[way] = {
            "drawn": over, "halves": over_half, "of": SPLITS, "samples": size,
            "share": float(np.mean(shares)), "harm": float(np.mean(harms)), "worst": max(harms),
        }  # fmt: skip
    return found


def times(
    variants: dict[str, nn.Module], images: Images, repeats: int
) -> dict[str, dict[str, Any]]:
    """Milliseconds per image and of single batches; all variants on the same images, in turns."""
    x = normalised(images.x[:TIMED_IMAGES])
    found: dict[str, dict[str, Any]] = {name: {} for name in variants}
    for size in BATCHES:
        parts = x.split(size)
        single: dict[str, list[float]] = {name: [] for name in variants}

        def runner(
            name: str, model: nn.Module, parts: Any = parts, single: Any = single
        ) -> Callable[[], None]:
            def run() -> None:
                with torch.no_grad():
                    for part in parts:
                        started = time.perf_counter()
                        model(part)
                        single[name].append(1000 * (time.perf_counter() - started))

            return run

        samples = paired({n: runner(n, m) for n, m in variants.items()}, repeats=repeats)
        for name, own in samples.items():
            found[name][str(size)] = {
                "ms_per_image": 1000 * cpu(own)["median"] / len(x),
                "wall_ms_per_image": 1000 * wall(own)["median"] / len(x),
                "p95_batch_ms": float(np.quantile(single[name], 0.95)),
            }
    return found


def timed_variants(
    dense: nn.Module, static: dict[float, nn.Module], routed: swan.RoutedModel, rows: dict[str, Any]
) -> dict[str, nn.Module]:
    """The networks whose milliseconds are measured."""
    variants: dict[str, nn.Module] = {"dense": dense}
    for budget, small in static.items():
        variants[f"static/{budget:g}"] = small
    for name, row in rows.items():
        way = name.partition("/")[0]
        if way in ("predicted", "margin"):
            own = swan.RoutedModel(
                routed.parts, after=routed.after, decide=[way], example_inputs=routed.example_inputs,
                way=routed.way, discrepancy=routed.discrepancy,
            ).eval()  # fmt: skip
            own.thresholds = [row["threshold"]]
            variants[name] = own
    return variants


def one_seed(
    splits: Splits, options: Any, seed: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """All rows of a seed."""
    row = Row(options.network, options.schedule, "dense", 1.0, distil=False, seed=seed, lr=0.01)
    dense = dense_network(row, splits, options).eval()
    started = time.process_time()
    routed = routed_network(dense, splits, options, seed)
    seconds = time.process_time() - started
    held, test = observe(routed, loader(splits.validation)), observe(routed, loader(splits.test))
    costs = routed_costs(routed)
    found: dict[str, Any] = {
        "dense": {"test": accuracy(dense, splits.test), "macs": 1.0},
        "full": {"test": 100 * float(test.right[1].mean()), "macs": 1.0},
        "light": {
            "test": 100 * float(test.right[0].mean()),
            "macs": (costs.trunks[0] + costs.lights[0]) / costs.given,
            "trunk_macs": costs.trunks[0] / costs.given,
            "light_of_rest": costs.lights[0] / costs.full,
            "switch_macs": costs.switches[0] / costs.given,
            "train_seconds": seconds,
        },
        **curves(routed, held, test, seed),
        "certificate": violations(held, test, seed, options.harm),
    }
    routed.decide = ["auto"]
    certificate = swan.calibrate_switch(routed, loader(splits.validation), harm=options.harm)
    found["auto/harm"] = {
        "decide": certificate.decide[0], "share": certificate.shares[0], "macs": certificate.macs,
        "bound": certificate.bound,
        "test": accuracy_of(test, test.scores[certificate.decide[0]][0] <= certificate.thresholds[0]),
        "harm": float((test.harm[0] * (test.scores[certificate.decide[0]][0] <= certificate.thresholds[0])).mean()),  # type: ignore[index]
    }  # fmt: skip
    tell(f"seed {seed}: routed in {seconds:.0f} s")
    static = {}
    for budget in options.static:
        started = time.process_time()
        small = static_network(dense, splits, options, seed, budget)
        static[budget] = small
        found[f"static/{budget:g}"] = {
            "test": accuracy(small, splits.test),
            "macs": swan.count_macs(small, EXAMPLE) / swan.count_macs(dense, EXAMPLE),
            "train_seconds": time.process_time() - started,
        }
        tell(f"seed {seed}: static {budget:g}: {found[f'static/{budget:g}']}")
    rows = {k: v for k, v in found.items() if "threshold" in v}
    for name, own in times(
        timed_variants(dense, static, routed, rows), splits.test, options.repeats
    ).items():
        found[name]["ms"] = own
    return found


def parse() -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument(
        "--data", type=Path, help="folder or tar with train/<class>/* and test/<class>/*"
    )
    parser.add_argument(
        "--pretrained", type=Path, help="folder with <network>-*.th; else from scratch"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("out/quality"), help="keeps dense networks"
    )
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--after", default="layer1")
    parser.add_argument(
        "--light", type=lambda given: given if given == EXIT else float(given), default=0.25,
        help=f"share of the rest's MACs; or {EXIT}: the first block of each stage behind the switch, and class scores",
    )  # fmt: skip
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument(
        "--train", choices=["light", "all"], default="light",
        help="the light branch alone, or trunk and full branch with it, distilled from the dense network",
    )  # fmt: skip
    parser.add_argument(
        "--switch-images", type=int, default=4000, help="that the switch is trained on"
    )
    parser.add_argument("--static", nargs="+", type=float, default=[0.9, 0.75, 0.6])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    options.schedule, options.harm = "cut", 0.01
    if options.smoke:
        options.schedule, options.epochs, options.static, options.harm = "smoke", 1, [0.75], 0.05
        options.seeds, options.repeats, options.work = [0], 1, Path("out/quality/smoke")
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    out = console()
    if options.smoke:
        splits = synthetic(256)
    elif options.data is None:
        raise SystemExit("--data: a folder or tar of images (or --smoke)")
    else:
        splits = load(options.data, 10_000)
    path = output_path("routing", options)
    result: dict[str, Any] = {"environment": environment(), "rows": {}}
    if path is not None and path.exists():
        result["rows"] = json.loads(path.read_text())["rows"]
    for seed in options.seeds:
        epochs = f"{options.epochs}{' (all parts)' if options.train == 'all' else ''}"
        key = f"{options.network}/{options.after}/{options.light}/{epochs}/{seed}"
        if key in result["rows"]:
            continue
        result["rows"][key] = one_seed(splits, options, seed, out.print)
        write(path, result)
    for key, rows in result["rows"].items():
        for name, row in rows.items():
            if "test" in row:
                out.print(f"{key} {name}: {row['test']:.2f} % at {row['macs']:.3f} of the MACs")
    report(path, out)


if __name__ == "__main__":
    main()
