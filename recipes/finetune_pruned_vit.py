"""Gate, prune and fine-tune a vision transformer, beside a dense one that trains as long.

    python recipes/finetune_pruned_vit.py --smoke                     # seconds
    python recipes/finetune_pruned_vit.py                             # digits, minutes on one core
    python recipes/finetune_pruned_vit.py --data FOLDER --num-train 4000   # FOLDER/train/<class>/*.jpg

One flat script to copy and change (`pip install 'swan-surgery[demo]'`). Dense training, then two branches from the
same weights: the dense model goes on, or gates go in, are trained with the weights to a MAC budget, the model is
cut (verified against the gated one) and what is left is fine-tuned. Both branches see the same number of epochs,
batches and learning rates. On digits, test scores of weaker settings were seen before learning rate and batch size
were chosen on a validation split of the training images; the numbers of epochs were not compared.
`benchmarks/trainings.py vit` runs this for several seeds.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import swan_surgery as swan


@dataclass(frozen=True)
class Knobs:
    """What to change first."""

    macs: float = 0.5  # share of the dense model's MACs to keep; lower is smaller and loses more
    dense_epochs: int = 40  # of the dense model that both branches start from
    gate_epochs: int = 25  # weights and gates together
    finetune_epochs: int = 15  # the pruned model alone; the dense branch gets both
    ramp: float = 0.6  # share of gate_epochs over which the budget falls
    lr: float = 2e-3  # peak of a cosine in each branch
    gate_lr: float = 1e-2  # of the gate logits, along the same cosine
    weight_decay: float = 0.05  # of the weights; gates have none
    batch: int = 25
    patch: int = 2
    hidden: int = 64
    mlp: int = 128
    layers: int = 2
    heads: int = 4
    shift: int = 1  # pixels by which training images move; zeros come in
    flip: bool = False  # half of the training images are mirrored


DIGITS = Knobs()
PHOTOS = Knobs(0.5, 12, 8, 6, lr=1e-3, batch=64, patch=4, layers=4, shift=3, flip=True)
SMOKE = Knobs(dense_epochs=12, gate_epochs=4, finetune_epochs=6, hidden=32, mlp=64, shift=0)
Images = tuple[Tensor, Tensor]  # normalised [N, 3, H, W], labels [N]


def digits(num_train: int) -> tuple[Images, Images]:
    """Scikit-learn's 1,797 real handwritten digits, 8x8 pixels, in three equal channels."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - only needed without --data

    bunch = load_digits()
    x = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    x, y = ((x - 0.3) / 0.4).expand(-1, 3, -1, -1).contiguous(), torch.tensor(bunch.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, test = order[:1300][:num_train], order[1300:]
    return (x[train], y[train]), (x[test], y[test])


def folder(path: Path, number: int) -> Images:
    """A random part of the small images in `path/<class>/*`, decoded once into memory."""
    found = torchvision.datasets.ImageFolder(path)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:number]
    images, labels = zip(*(found[int(index)] for index in order), strict=True)
    pixels = torch.stack([torchvision.transforms.functional.to_tensor(i) for i in images])
    return (pixels - 0.47) / 0.25, torch.tensor(labels)


def batches(images: Images, knobs: Knobs, generator: torch.Generator) -> Iterable[Images]:
    """One epoch in random order, every image moved and perhaps mirrored."""
    for chosen in torch.randperm(len(images[1]), generator=generator).split(knobs.batch):
        x, side, reach = images[0][chosen], images[0].shape[-1], knobs.shift
        corners = torch.randint(0, 2 * reach + 1, (2, len(x), 1), generator=generator)
        rows, columns = corners + torch.arange(side)
        if knobs.flip:
            mirrored = torch.rand(len(x), 1, generator=generator) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        which = torch.arange(len(x))[:, None, None]
        moved = F.pad(x, (reach,) * 4)[which, :, rows[:, :, None], columns[:, None, :]]
        yield moved.permute(0, 3, 1, 2), images[1][chosen]


def train(
    model: nn.Module,
    images: Images,
    knobs: Knobs,
    *,
    epochs: range,
    of: int,
    seed: int,
    penalty: Callable[[float], Tensor] | None = None,
) -> None:
    """Train in place through these epochs of a schedule that is `of` long."""
    groups: list[dict[str, Any]] = [{"params": list(model.parameters()), "lr": knobs.lr}]
    if isinstance(model, swan.GatedModel):
        groups = swan.parameter_groups(model, lr=knobs.lr, gate_lr=knobs.gate_lr)
    optimizer = torch.optim.AdamW(groups, weight_decay=knobs.weight_decay)
    peaks = [group["lr"] for group in optimizer.param_groups]
    steps = math.ceil(len(images[1]) / knobs.batch)
    for epoch in epochs:
        model.train()
        # The same batches in both branches.
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        for step, (x, y) in enumerate(batches(images, knobs, generator)):
            place = epoch + step / steps
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * place / of))
            loss = F.cross_entropy(model(x), y)
            if penalty is not None:
                loss = loss + penalty(place)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def score(model: nn.Module, data: dict[str, Images]) -> dict[str, float]:
    """Loss and accuracy in eval mode, on training images as they are and on test images."""
    model.eval()
    found = {}
    for name, (x, y) in data.items():
        logits = torch.cat([model(part) for part in x.split(250)])
        found[f"{name}_loss"] = F.cross_entropy(logits, y).item()
        found[f"{name}_accuracy"] = 100 * (logits.argmax(1) == y).double().mean().item()
    return found


def widths(model: VisionTransformer) -> dict[str, Any]:
    """Trunk, heads of every layer, MLP units of every layer."""
    blocks = list(model.encoder.layers)
    heads = [block.self_attention.num_heads for block in blocks]
    mlp = [block.mlp[0].out_features for block in blocks]
    return {"trunk": model.conv_proj.out_channels, "heads": heads, "mlp": mlp}


def run(seed: int, data: dict[str, Images], knobs: Knobs) -> dict[str, Any]:
    """Both branches of one seed."""
    started, scores = time.perf_counter(), {}
    torch.manual_seed(seed)
    x, y = data["train"]
    later = knobs.gate_epochs + knobs.finetune_epochs

    def note(stage: str, model: nn.Module) -> None:
        scores[stage] = score(model, data)
        print(f"{stage}: {scores[stage]['test_accuracy']:.2f} % of the test images", flush=True)

    # 1. A dense model. Torchvision starts the head at zero, as for transfer.
    dense = VisionTransformer(
        image_size=x.shape[-1],
        patch_size=knobs.patch,
        num_layers=knobs.layers,
        num_heads=knobs.heads,
        hidden_dim=knobs.hidden,
        mlp_dim=knobs.mlp,
        num_classes=int(y.max()) + 1,
    )
    nn.init.trunc_normal_(dense.heads.head.weight, std=0.02)
    own: dict[str, Any] = {"images": (x, y), "knobs": knobs, "seed": seed}
    train(dense, epochs=range(knobs.dense_epochs), of=knobs.dense_epochs, **own)
    note("dense_start", dense)

    # 2. Gates in, trained with the weights to the budget. `dense` stays as it is.
    gated = swan.swanify(dense, x[:2])
    ramp = swan.CosineRamp(length=knobs.ramp * knobs.gate_epochs)
    objective = swan.Objective(gated, macs=knobs.macs, learning="gradient", ramp=ramp)
    train(gated, epochs=range(knobs.gate_epochs), of=later, penalty=objective, **own)
    objective(knobs.gate_epochs)  # the last step moved the logits: meet the budget once more
    note("gated", gated)

    # 3. Cut; `prune` raises if the result differs from the gated model. 4. An ordinary loop on an ordinary model.
    pruned = swan.prune(gated, macs=knobs.macs)
    note("pruned", pruned)
    train(pruned, epochs=range(knobs.gate_epochs, later), of=later, **own)
    note("finetuned", pruned)

    # 5. The dense model, trained as long.
    train(dense, epochs=range(later), of=later, **own)
    note("dense", dense)
    both = {"dense": dense, "pruned": pruned}
    macs = {name: swan.count_macs(model, x[:1]) for name, model in both.items()}
    return {
        "seed": seed,
        "scores": scores,
        "macs": macs,
        "macs_left": macs["pruned"] / macs["dense"],
        "params": {name: swan.count_params(model) for name, model in both.items()},
        "widths": {name: widths(model) for name, model in both.items()},
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with train/<class>/* and test/<class>/*")
    parser.add_argument("--num-train", type=int, default=4000, help="images to train on, at most")
    parser.add_argument("--num-test", type=int, default=2000, help="images to test on, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--macs", type=float, help="share to keep")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("--smoke", action="store_true", help="everything, in seconds")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a small model gains nothing from more
    knobs = SMOKE if options.smoke else PHOTOS if options.data else DIGITS
    knobs = replace(knobs, macs=options.macs or knobs.macs)
    if options.data:
        train_images = folder(options.data / "train", options.num_train)
        test_images = folder(options.data / "test", options.num_test)
    else:
        train_images, test_images = digits(400 if options.smoke else options.num_train)
    data = {"train": train_images, "test": test_images}
    result = run(options.seed, data, knobs)
    print(f"{result['macs_left']:.1%} of the MACs are left; widths {result['widths']}")
    if options.output:
        about = {"data": options.data.name if options.data else "digits", "settings": asdict(knobs)}
        about |= {f"num_{name}": len(y) for name, (_, y) in data.items()}
        options.output.write_text(json.dumps(about | {"result": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
