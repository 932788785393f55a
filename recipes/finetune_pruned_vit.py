"""Gate, prune and fine-tune a vision transformer, beside a dense one that trains as long.

    python recipes/finetune_pruned_vit.py                             # digits, one seed
    python recipes/finetune_pruned_vit.py --seeds 3 --output vit.json
    python recipes/finetune_pruned_vit.py --data FOLDER --num-train 4000   # FOLDER/train/<class>/*.jpg

Dense training, then two branches from the same weights: the dense model goes on, or gates go in, are
trained with the weights to a MAC budget, the model is cut (verified against the gated one) and what
is left is fine-tuned. Both branches see the same number of epochs, batches and the same schedule of
learning rates; on digits, test scores of
weaker settings were seen before learning rate and batch size were chosen on a validation split of the
training images; the numbers of epochs were not compared.
"""

import argparse
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import swan_surgery as swan


# --- Settings ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What to train, for how long, and how small it gets.

    Attributes:
        macs: share of the dense model's MACs to keep; lower is smaller and loses more.
        dense_epochs: training of the dense model that both branches start from.
        gate_epochs: weights and gates together.
        finetune_epochs: the pruned model alone; the dense branch gets `gate_epochs` plus these.
        ramp: share of `gate_epochs` over which the budget falls from everything to `macs`.
        lr: peak learning rate of the weights in each branch; falls along a cosine.
        gate_lr: of the gate logits, along the same cosine.
        weight_decay: of the weights; gates have none.
        batch: images per step.
        patch, hidden, mlp, layers, heads: the transformer's sizes.
        shift: pixels by which training images move; zeros come in.
        flip: whether half of the training images are mirrored.
    """

    macs: float = 0.5
    dense_epochs: int = 40
    gate_epochs: int = 25
    finetune_epochs: int = 15
    ramp: float = 0.6
    lr: float = 2e-3
    gate_lr: float = 1e-2
    weight_decay: float = 0.05
    batch: int = 25
    patch: int = 2
    hidden: int = 64
    mlp: int = 128
    layers: int = 2
    heads: int = 4
    shift: int = 1
    flip: bool = False


DIGITS = Settings()
PHOTOS = Settings(
    dense_epochs=12,
    gate_epochs=8,
    finetune_epochs=6,
    lr=1e-3,
    batch=64,
    patch=4,
    layers=4,
    shift=3,
    flip=True,
)
SMOKE = Settings(dense_epochs=12, gate_epochs=4, finetune_epochs=6, hidden=32, mlp=64, shift=0)


# --- Data ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Normalised images [N, 3, H, W] and labels [N]."""

    x: Tensor
    y: Tensor


def digits(num_train: int) -> tuple[Images, Images]:
    """Scikit-learn's 1,797 real handwritten digits, 8x8 pixels, in three equal channels."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - only needed without --data

    bunch = load_digits()
    x = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    x, y = ((x - 0.3) / 0.4).expand(-1, 3, -1, -1).contiguous(), torch.tensor(bunch.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, test = order[:1300][:num_train], order[1300:]
    return Images(x[train], y[train]), Images(x[test], y[test])


def folder(path: Path, num_train: int, num_test: int) -> tuple[Images, Images]:
    """`path/train` and `path/test`, a random part of each decoded once into memory."""
    return _decoded(path / "train", num_train), _decoded(path / "test", num_test)


def _decoded(path: Path, number: int) -> Images:
    found = torchvision.datasets.ImageFolder(path)
    # Files are sorted by class.
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:number]
    images, labels = zip(*(found[int(index)] for index in order), strict=True)
    pixels = torch.stack([torchvision.transforms.functional.to_tensor(i) for i in images])
    return Images((pixels - 0.47) / 0.25, torch.tensor(labels))


def batches(
    images: Images, settings: Settings, generator: torch.Generator
) -> Iterable[tuple[Tensor, Tensor]]:
    """One epoch in random order, every image moved and perhaps mirrored."""
    order = torch.randperm(len(images.y), generator=generator)
    for chosen in order.split(settings.batch):
        x, side, reach = images.x[chosen], images.x.shape[-1], settings.shift
        corners = torch.randint(0, 2 * reach + 1, (2, len(x), 1), generator=generator)
        rows, columns = corners + torch.arange(side)
        if settings.flip:
            mirrored = torch.rand(len(x), 1, generator=generator) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        which = torch.arange(len(x))[:, None, None]
        padded = F.pad(x, (reach,) * 4)
        moved = padded[which, :, rows[:, :, None], columns[:, None, :]]
        yield moved.permute(0, 3, 1, 2), images.y[chosen]


# --- Training and scores -------------------------------------------------------------------------


def train(
    model: nn.Module,
    images: Images,
    settings: Settings,
    *,
    epochs: range,
    of: int,
    seed: int,
    penalty: Callable[[float], Tensor] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> list[float]:
    """Train in place through these epochs of a schedule that is `of` long; mean losses per epoch."""
    groups = [{"params": list(model.parameters()), "lr": settings.lr}]
    if isinstance(model, swan.GatedModel):
        groups = swan.parameter_groups(model, lr=settings.lr, gate_lr=settings.gate_lr)
    for group in groups:
        group.setdefault("weight_decay", settings.weight_decay)
    optimizer = torch.optim.AdamW(groups)
    peaks = [group["lr"] for group in optimizer.param_groups]
    steps = math.ceil(len(images.y) / settings.batch)
    means = []
    for epoch in epochs:
        model.train()
        generator = torch.Generator().manual_seed(
            1000 * seed + epoch
        )  # same batches in both branches
        losses = []
        for step, (x, y) in enumerate(batches(images, settings, generator)):
            done = (epoch + step / steps) / of
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * done))
            loss = F.cross_entropy(model(x), y)
            losses.append(loss.item())
            if penalty is not None:
                loss = loss + penalty(epoch + step / steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        means.append(statistics.mean(losses))
        advance()
    return means


@torch.no_grad()
def score(model: nn.Module, train_images: Images, test_images: Images) -> dict[str, float]:
    """Loss and accuracy in eval mode, on training images as they are and on test images."""
    model.eval()
    result = {}
    for name, images in (("train", train_images), ("test", test_images)):
        logits = torch.cat([model(x) for x in images.x.split(250)])
        result[f"{name}_loss"] = F.cross_entropy(logits, images.y).item()
        result[f"{name}_accuracy"] = 100 * (logits.argmax(1) == images.y).double().mean().item()
    return result


def widths(model: VisionTransformer) -> dict[str, Any]:
    """Trunk, heads of every layer, MLP units of every layer."""
    blocks = list(model.encoder.layers)
    return {
        "trunk": model.conv_proj.out_channels,
        "heads": [block.self_attention.num_heads for block in blocks],
        "mlp": [block.mlp[0].out_features for block in blocks],
    }


# --- One seed ------------------------------------------------------------------------------------


def run(
    seed: int, data: tuple[Images, Images], settings: Settings, bar: Progress
) -> dict[str, Any]:
    """Both branches of one seed."""
    started = time.perf_counter()
    torch.manual_seed(seed)
    images = data[0]
    example = images.x[:2]
    later = settings.gate_epochs + settings.finetune_epochs
    task = bar.add_task(f"seed {seed}", total=settings.dense_epochs + 2 * later)

    def epochs(model: nn.Module, which: range, of: int, penalty: Any = None) -> list[float]:
        tick = lambda: bar.advance(task)  # noqa: E731
        return train(
            model, images, settings, epochs=which, of=of, seed=seed, penalty=penalty, advance=tick
        )

    # 1. A dense model.
    dense = VisionTransformer(
        image_size=images.x.shape[-1],
        patch_size=settings.patch,
        num_layers=settings.layers,
        num_heads=settings.heads,
        hidden_dim=settings.hidden,
        mlp_dim=settings.mlp,
        num_classes=int(images.y.max()) + 1,
    )
    # torchvision starts the head at zero, as for transfer; a head that is trained needs a start.
    nn.init.trunc_normal_(dense.heads.head.weight, std=0.02)
    scores, losses = {}, {}
    losses["dense_start"] = epochs(dense, range(settings.dense_epochs), settings.dense_epochs)
    scores["dense_start"] = score(dense, *data)

    # 2. Gates in, trained with the weights to the budget. `dense` stays as it is.
    gated = swan.swanify(dense, example)
    ramp = swan.CosineRamp(length=settings.ramp * settings.gate_epochs)
    objective = swan.Objective(gated, macs=settings.macs, learning="gradient", ramp=ramp)
    losses["gated"] = epochs(gated, range(settings.gate_epochs), later, objective)
    objective(settings.gate_epochs)  # the last step moved the logits: meet the budget once more
    scores["gated"] = score(gated, *data)

    # 3. Cut. `prune` compares the result with the gated model and raises if they differ.
    pruned = swan.prune(gated, macs=settings.macs)
    scores["pruned"] = score(pruned, *data)
    cut = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}

    # 4. Fine-tune what is left: an ordinary model, an ordinary loop.
    losses["finetuned"] = epochs(pruned, range(settings.gate_epochs, later), later)
    scores["finetuned"] = score(pruned, *data)
    moved = [
        bool((tensor != cut[name]).any())
        for name, tensor in pruned.state_dict().items()
        if tensor.is_floating_point()
    ]

    # 5. The dense model, trained as long.
    macs = {"dense": swan.count_macs(dense, example[:1])}
    macs["pruned"] = swan.count_macs(pruned, example[:1])
    params = {"dense": swan.count_params(dense), "pruned": swan.count_params(pruned)}
    before = widths(dense)
    losses["dense"] = epochs(dense, range(later), later)
    scores["dense"] = score(dense, *data)
    bar.remove_task(task)
    return {
        "seed": seed,
        "scores": scores,
        "epoch_losses": losses,
        "macs": macs,
        "macs_left": macs["pruned"] / macs["dense"],
        "params": params,
        "widths": {"dense": before, "pruned": widths(pruned)},
        "gated_channels": gated.channels.num_gated_channels,
        "channels": gated.channels.num_channels,
        "pruned_is_vision_transformer": isinstance(pruned, VisionTransformer),
        "tensors": len(moved),
        "tensors_moved_by_finetuning": sum(moved),
        "seconds": time.perf_counter() - started,
    }


# --- Results -------------------------------------------------------------------------------------

STAGES = {
    "dense_start": "dense, where both start",
    "dense": "dense, trained as long",
    "gated": "gated, hard gates",
    "pruned": "pruned, right after the cut",
    "finetuned": "pruned, fine-tuned",
}


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation over the seeds, of every score at every stage."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        found[stage] = {}
        for key in results[0]["scores"][stage]:
            values = [result["scores"][stage][key] for result in results]
            spread = statistics.stdev(values) if len(values) > 1 else None
            found[stage][key] = {"mean": statistics.mean(values), "stdev": spread}
    return found


def show(outcome: dict[str, Any]) -> Table:
    table = Table(
        "network", "train loss", "train acc. %", "test loss", "test acc. %", "MACs left %"
    )
    left = 100 * statistics.mean(result["macs_left"] for result in outcome["results"])
    for stage, text in STAGES.items():
        cells = []
        for key in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
            stats = outcome["summary"][stage][key]
            digits = 3 if key.endswith("loss") else 2
            spread = "" if stats["stdev"] is None else f" +- {stats['stdev']:.{digits}f}"
            cells.append(f"{stats['mean']:.{digits}f}{spread}")
        table.add_row(text, *cells, "100.0" if stage.startswith("dense") else f"{left:.1f}")
    return table


def environment() -> dict[str, Any]:
    return {
        "command": shlex.join(["python", *sys.argv]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {"torch": torch.__version__, "torchvision": torchvision.__version__},
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write(path: Path, outcome: dict[str, Any]) -> None:
    """Add to the file; the same data and images replace what was there."""
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    key = ("data", "num_train")
    kept = [row for row in old if any(row[k] != outcome[k] for k in key)]
    text = json.dumps(
        {"theme": "vit", "environment": outcome["environment"], "rows": [*kept, outcome]}, indent=1
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with train/<class>/* and test/<class>/*")
    parser.add_argument("--num-train", type=int, default=4000, help="images to train on, at most")
    parser.add_argument("--num-test", type=int, default=2000, help="images to test on, at most")
    parser.add_argument("--seeds", type=int, default=1, help="how many (default: 1)")
    parser.add_argument("--output", type=Path, help="JSON file to add the result to")
    parser.add_argument("--smoke", action="store_true", help="everything, in seconds")
    for field in fields(Settings):
        if field.type in (int, float):
            option = f"--{field.name.replace('_', '-')}"
            parser.add_argument(option, type=field.type, help=f"digits: {field.default}")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(1)  # a small model gains nothing from more
    settings = SMOKE if options.smoke else PHOTOS if options.data else DIGITS
    chosen = {f.name: getattr(options, f.name, None) for f in fields(Settings)}
    settings = replace(settings, **{k: v for k, v in chosen.items() if v is not None})
    num_train = 400 if options.smoke else options.num_train
    data = folder(options.data, num_train, options.num_test) if options.data else digits(num_train)
    where = environment()
    console = Console(width=None if Console().is_terminal else 120)
    with Progress(console=console) as bar:
        results = [run(seed, data, settings, bar) for seed in range(options.seeds)]
    outcome = {
        "data": options.data.name if options.data else "digits",
        "num_train": len(data[0].y),
        "num_test": len(data[1].y),
        "environment": where,
        "settings": asdict(settings),
        "summary": summary(results),
        "results": results,
    }
    console.print(show(outcome))
    first = results[0]
    for name, own in first["widths"].items():
        console.print(
            f"{name}: {own}, {first['macs'][name]:,} MACs, {first['params'][name]:,} params"
        )
    if options.output:
        write(options.output, outcome)
        console.print(f"written: {options.output}")


if __name__ == "__main__":
    main()
