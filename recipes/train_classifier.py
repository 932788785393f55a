"""Train a classifier with gates to a budget, cut it, fine-tune it: MNIST, CIFAR-10 and ImageNet.

    python recipes/train_classifier.py --smoke                                 # all of it, in seconds
    python recipes/train_classifier.py recipes/configs/mnist_lenet.toml --data FOLDER
    python recipes/train_classifier.py CONFIG --data FOLDER --baseline --seeds 0 1 2 --output r.json
    accelerate launch recipes/train_classifier.py CONFIG --data FOLDER         # many processes

Dense training (or `--init FILE`), then weights and gates together while the budget falls, then gates
frozen, batch-norm calibrated, the cut (verified), and fine-tuning of what is left. `--baseline` also
trains the dense network for the same number of further epochs. Everything lands in `out/NAME/seed-N`:
checkpoint, curves as CSV and PNG, weights, result.

Every random number is a function of (seed, stage, epoch, step, process), so the position in training
is the state of the random generators: a run that was killed, started again with the same command,
ends with bitwise the same gates and weights (on a CPU). Only accuracies under hard gates are results;
soft ones are a curve in the log.
"""

import argparse
import csv
import gzip
import hashlib
import json
import math
import os
import platform
import shlex
import statistics
import sys
import tarfile
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms import v2

import swan_surgery as swan


class RecipeError(Exception):
    """Something the user can put right; shown as one line."""


# --- Settings ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """One experiment; a TOML file and `--set key=value` override fields by name.

    Attributes:
        network: a key of `NETWORKS`.
        widths: hidden widths of "mlp" and "lenet".
        depth: of "cifar_resnet": 20, 32, 44, 56 or 110.
        mean, std: of the images in [0, 1], per channel.
        crop: 0: images stay as they are and are decoded once into memory; otherwise the side that big
            images are cropped to, by `workers` processes.
        workers: processes that decode big images.
        shift, flip: random moves in pixels and mirror images (of images in memory).
        validation: training images held out for the curves and to choose settings by. 0: the curves
            show the test images.
        dense_epochs: before the gates; ignored with `--init`.
        adapt_epochs: dense training after `--init`.
        gate_epochs: weights and gates together.
        finetune_epochs: of the cut network. The baseline gets `gate_epochs` plus these.
        macs, params: share of the dense network's MACs or parameters to keep; 0: no such budget.
        target_active: share of the units that the mean probability is drawn to (the paper's way, in
            place of a budget); 0: none.
        l0, flops, target_weight: weights of the paper's penalties.
        learning: "" for the library's choice, "curvature" or "gradient".
        min_width: units that every layer keeps: a number, a share, or a table by layer.
        delay, ramp: shares of `gate_epochs` before the pressure sets in, and over which it grows.
        freeze: share of `gate_epochs`, the last ones, in which gates stay as they are.
        optimizer: "adamw" or "sgd" (with Nesterov momentum 0.9).
        batch: images per step, over all processes.
        lr: peak of the weights' learning rate; it falls along a cosine.
        gate_lr: of the logits, where gates learn by gradient.
        finetune_lr: peak of a cosine of its own after the cut; 0: joint training's cosine goes on.
        warmup: epochs of rising learning rate at the start of each cosine.
        weight_decay: of the weights; gates have none.
        distillation: share of the loss that follows the dense network's outputs after it is trained.
        temperature: of distillation.
        calibration: batches for batch-norm statistics before the cut.
        soft_curve: whether each epoch of joint training is also scored with soft gates, for the log.
        mixed_precision: "no", "bf16" or "fp16"; other than "no" needs accelerate.
    """

    network: str = "lenet"
    widths: tuple[int, ...] = (32, 64, 512)
    depth: int = 20
    mean: tuple[float, ...] = (0.1307,)
    std: tuple[float, ...] = (0.3081,)
    crop: int = 0
    workers: int = 8
    shift: int = 0
    flip: bool = False
    validation: int = 0
    dense_epochs: int = 10
    adapt_epochs: int = 0
    gate_epochs: int = 10
    finetune_epochs: int = 10
    macs: float = 0.0
    params: float = 0.0
    target_active: float = 0.0
    l0: float = 0.0
    flops: float = 0.0
    target_weight: float = 1.0
    learning: str = ""
    min_width: int | float | dict[str, Any] = 1
    delay: float = 0.0
    ramp: float = 0.6
    freeze: float = 0.1
    optimizer: str = "adamw"
    batch: int = 128
    lr: float = 1e-3
    gate_lr: float = 1e-2
    finetune_lr: float = 0.0
    warmup: float = 0.0
    weight_decay: float = 0.01
    distillation: float = 0.0
    temperature: float = 4.0
    calibration: int = 50
    soft_curve: bool = True
    mixed_precision: str = "no"

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        shares = {n: getattr(self, n) for n in ("macs", "params", "target_active", "distillation")}
        shares |= {n: getattr(self, n) for n in ("delay", "ramp", "freeze")}
        faults = [
            f"{n} is a share in [0, 1]; got {v}" for n, v in shares.items() if not 0 <= v <= 1
        ]
        choices = {
            "network": tuple(NETWORKS),
            "optimizer": ("adamw", "sgd"),
            "learning": ("", "curvature", "gradient"),
            "mixed_precision": ("no", "bf16", "fp16"),
        }
        faults += [
            f"{name} must be one of {', '.join(map(repr, known))}; got {getattr(self, name)!r}"
            for name, known in choices.items()
            if getattr(self, name) not in known
        ]
        if not (self.macs or self.params or self.target_active or self.l0 or self.flops):
            faults.append("say how small the network shall get: macs, params or target_active")
        if self.gate_epochs < 1 or self.batch < 1:
            faults.append("gate_epochs and batch must be at least 1")
        if faults:
            raise RecipeError("; ".join(faults))


# What `--smoke` overrides in any configuration.
SMOKE: dict[str, Any] = {
    "widths": (8, 16, 64),
    "validation": 32,
    "dense_epochs": 6,
    "gate_epochs": 3,
    "finetune_epochs": 2,
    "batch": 16,
    "crop": 0,
    "calibration": 4,
    "distillation": 0.5,
    "mixed_precision": "no",
}
SMOKE_TRAIN, SMOKE_TEST = 160, 64


def settings_from(path: Path | None, assignments: list[str]) -> Settings:
    """The defaults, overridden by a TOML file, overridden by `key=value` assignments."""
    given: dict[str, Any] = {}
    try:
        given |= tomllib.loads(path.read_text()) if path else {}
        for assignment in assignments:
            given |= tomllib.loads(assignment)
    except OSError as err:
        raise RecipeError(f"cannot read {path}: {err.strerror}") from err
    except tomllib.TOMLDecodeError as err:
        raise RecipeError(f"not TOML: {err} (in {path} or --set {assignments})") from err
    known = {f.name: f for f in fields(Settings)}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise RecipeError(f"unknown settings {', '.join(unknown)}; there are {', '.join(known)}")
    return Settings(**{name: _checked(name, value) for name, value in given.items()})


def _checked(name: str, value: Any) -> Any:
    default = getattr(Settings, name)
    if name == "min_width":
        fits = isinstance(value, (int, float, dict)) and not isinstance(value, bool)
    elif isinstance(default, tuple):
        kinds = (int,) if isinstance(default[0], int) else (int, float)
        fits = isinstance(value, list) and all(type(v) in kinds for v in value)
        value = tuple(value) if fits else value
    elif isinstance(default, float):
        fits = type(value) in (int, float)
    else:
        fits = type(value) is type(default)
    if not fits:
        raise RecipeError(f"{name} is like {default!r}; got {value!r}")
    return value


# --- Networks ----------------------------------------------------------------------------------------

Shape = tuple[int, int, int]


def mlp(shape: Shape, classes: int, settings: Settings) -> nn.Module:
    sizes = (math.prod(shape), *settings.widths)
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))


class LeNet(nn.Module):
    """Two 5x5 convolutions with pooling, one hidden linear layer."""

    def __init__(self, shape: Shape, classes: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        first, second, hidden = widths
        self.conv1 = nn.Conv2d(shape[0], first, 5)
        self.conv2 = nn.Conv2d(first, second, 5)
        side = ((shape[1] - 4) // 2 - 4) // 2
        self.fc1 = nn.Linear(second * side * side, hidden)
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, classes]."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        logits: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and He's option-A shortcut: every second pixel, channels padded by zeros."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.stride, self.pad = stride, (after - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, H, W], smaller and wider where the stride is 2."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """He's ResNet for 32x32 images, 6n + 2 layers; the names are those of the usual checkpoints."""

    def __init__(self, channels: int, classes: int, depth: int) -> None:
        super().__init__()
        if (depth - 2) % 6:
            raise RecipeError(f"depth is 6 n + 2 (20, 32, 44, 56, 110); got {depth}")
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks = (depth - 2) // 6
        self.layer1 = self._layer(16, 16, blocks)
        self.layer2 = self._layer(16, 32, blocks)
        self.layer3 = self._layer(32, 64, blocks)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _layer(before: int, after: int, blocks: int) -> nn.Sequential:
        first = BasicBlock(before, after, after // before)
        return nn.Sequential(first, *(BasicBlock(after, after, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, 32, 32] to [B, classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def small_resnet50(shape: Shape, classes: int) -> nn.Module:
    """Torchvision's ResNet-50 with a 3x3 stem that keeps the size of small images."""
    model: nn.Module = torchvision.models.resnet50(num_classes=classes)
    model.conv1 = nn.Conv2d(shape[0], 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def small_vgg16(classes: int) -> nn.Module:
    """Torchvision's VGG16-BN; 32x32 images leave 1x1 maps, so one hidden layer is the head."""
    model: nn.Module = torchvision.models.vgg16_bn(num_classes=classes)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Sequential(
        nn.Linear(512, 512), nn.ReLU(), nn.Dropout(), nn.Linear(512, classes)
    )
    return model


NETWORKS: dict[str, Callable[[Shape, int, Settings], nn.Module]] = {
    "mlp": mlp,
    "lenet": lambda shape, classes, s: LeNet(shape, classes, s.widths),
    "cifar_resnet": lambda shape, classes, s: CifarResNet(shape[0], classes, s.depth),
    "small_resnet50": lambda shape, classes, _: small_resnet50(shape, classes),
    "small_vgg16": lambda _, classes, __: small_vgg16(classes),
    "resnet50": lambda _, classes, __: torchvision.models.resnet50(num_classes=classes),
}


def load_init_(model: nn.Module, path: Path) -> None:
    """Weights from `.safetensors`, or from a torch file of plain tensors."""
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            # Published weights come as torch files; weights_only runs no code from them.
            state = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    except OSError as err:
        raise RecipeError(f"cannot read {path}: {err}") from err
    state = state.get("state_dict", state.get("model", state))
    try:
        model.load_state_dict({name.removeprefix("module."): t for name, t in state.items()})
    except RuntimeError as err:
        text = " ".join(str(err).split())[:300]
        raise RecipeError(f"{path} does not fit {type(model).__name__}: {text}") from err


# --- Data --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Images:
    """Small images, decoded: uint8 [N, C, H, W], labels [N], perhaps the dense network's outputs."""

    x: Tensor
    y: Tensor
    outputs: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)

    def part(self, which: Tensor) -> "Images":
        """Some of them."""
        return Images(self.x[which], self.y[which])


class Files(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Big images, decoded when they are needed; an index is (seed of its augmentation, number)."""

    def __init__(self, samples: list[tuple[str, int]], crop: int) -> None:
        self.samples, self.crop = samples, crop

    def __len__(self) -> int:
        return len(self.samples)

    def part(self, which: Tensor) -> "Files":
        """Some of them."""
        return Files([self.samples[int(index)] for index in which], self.crop)

    def __getitem__(self, key: tuple[int | None, int]) -> tuple[Tensor, int]:
        seed, index = key
        path, label = self.samples[index]
        with Image.open(path) as file:
            image = v2.functional.pil_to_tensor(file.convert("RGB"))
        if seed is None:
            image = v2.functional.resize(image, [round(self.crop / 0.875)], antialias=True)
            return v2.functional.center_crop(image, [self.crop]), label
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            image = v2.RandomResizedCrop(self.crop, antialias=True)(image)
            return v2.RandomHorizontalFlip()(image), label


@dataclass(frozen=True, eq=False)
class Data:
    """Images to train on, to choose settings by, and to report."""

    train: Images | Files
    validation: Images | Files
    test: Images | Files
    shape: Shape
    classes: int


def load_data(path: Path | None, settings: Settings) -> Data:
    """Read `path`, or make up images; hold out `settings.validation` of the training images."""
    train, test, classes = synthetic(settings) if path is None else read(path, settings)
    shape = (3, settings.crop, settings.crop) if settings.crop else tuple(train.x.shape[1:])
    if shape[0] != len(settings.mean) or shape[0] != len(settings.std):
        raise RecipeError(
            f"images have {shape[0]} channels, but mean and std have {len(settings.mean)} and "
            f"{len(settings.std)} numbers"
        )
    if not 0 <= settings.validation < len(train):
        raise RecipeError(f"validation={settings.validation} of {len(train)} training images")
    # The same images are held out for every seed.
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    held, rest = order[: settings.validation], order[settings.validation :]
    validation = train.part(held) if settings.validation else test
    return Data(train.part(rest), validation, test, shape, classes)


def synthetic(settings: Settings) -> tuple[Images, Images, int]:
    """Four classes: a random pattern each, under noise."""
    side = {"mlp": 28, "lenet": 28, "small_resnet50": 16}.get(settings.network, 32)
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 156, (4, len(settings.mean), side, side), generator=generator)

    def draw(count: int) -> Images:
        y = torch.arange(count) % 4
        noise = torch.randint(0, 100, (count, *patterns.shape[1:]), generator=generator)
        return Images((patterns[y] + noise).to(torch.uint8), y)

    return draw(SMOKE_TRAIN), draw(SMOKE_TEST), 4


def read(path: Path, settings: Settings) -> tuple[Any, Any, int]:
    """MNIST's four files, torchvision's CIFAR folders, or train/<class>/* in a folder or archive."""
    if not path.exists():
        raise RecipeError(f"--data {path} does not exist")
    if path.is_file():
        return archive(path)
    for raw in (path / "MNIST" / "raw", path / "raw", path):
        if any(raw.glob("train-images-idx3-ubyte*")):
            return idx(raw, "train"), idx(raw, "t10k"), 10
    for folder, name in (("cifar-10-batches-py", "CIFAR10"), ("cifar-100-python", "CIFAR100")):
        if (path / folder).is_dir():
            own = [getattr(torchvision.datasets, name)(path, train=t) for t in (True, False)]
            parts = [
                Images(torch.from_numpy(o.data).permute(0, 3, 1, 2), torch.tensor(o.targets))
                for o in own
            ]
            return parts[0], parts[1], len(own[0].classes)
    tests = [path / name for name in ("test", "val") if (path / name).is_dir()]
    if not (path / "train").is_dir() or not tests:
        raise RecipeError(
            f"{path} holds neither MNIST/raw/, nor cifar-10-batches-py/, nor train/<class>/* with "
            f"test/<class>/* or val/<class>/*"
        )
    found = [torchvision.datasets.ImageFolder(folder) for folder in (path / "train", tests[0])]
    if found[0].classes != found[1].classes:
        raise RecipeError(f"{path / 'train'} and {tests[0]} hold different classes")
    if settings.crop:
        files = [Files(f.samples, settings.crop) for f in found]
        return files[0], files[1], len(found[0].classes)
    decoded = [stack(((Image.open(p), label) for p, label in f.samples), path) for f in found]
    return decoded[0], decoded[1], len(found[0].classes)


def idx(folder: Path, part: str) -> Images:
    """MNIST's own format, packed or not."""
    arrays = []
    for name, header in ((f"{part}-images-idx3-ubyte", 16), (f"{part}-labels-idx1-ubyte", 8)):
        plain, packed = folder / name, folder / f"{name}.gz"
        if not plain.exists() and not packed.exists():
            raise RecipeError(f"{plain} is missing")
        content = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
        arrays.append(torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).copy()))
    return Images(arrays[0].view(-1, 1, 28, 28), arrays[1].long())


def archive(path: Path) -> tuple[Images, Images, int]:
    """An ImageFolder of small images inside a tar file, decoded without unpacking it."""
    samples: dict[str, list[tuple[str, Image.Image]]] = {"train": [], "test": []}
    with tarfile.open(path) as tar:
        for member in tar:
            part, _, rest = member.name.removeprefix("./").partition("/")
            part = "test" if part == "val" else part
            file = tar.extractfile(member) if part in samples and member.isfile() else None
            if file is not None:
                image = Image.open(file)
                image.load()
                samples[part].append((rest.split("/")[0], image))
    names = sorted({name for name, _ in samples["train"]})
    if not names or {name for name, _ in samples["test"]} != set(names):
        raise RecipeError(f"{path} does not hold train/<class>/* and test/<class>/* of one kind")
    number = {name: index for index, name in enumerate(names)}
    parts = [
        stack([(image, number[name]) for name, image in samples[part]], path)
        for part in ("train", "test")
    ]
    return parts[0], parts[1], len(names)


def stack(samples: Iterable[tuple[Image.Image, int]], path: Path) -> Images:
    pixels, labels = [], []
    for image, label in samples:  # one at a time: each holds its file open until it is decoded
        with image:
            pixels.append(v2.functional.pil_to_tensor(image.convert("RGB")))
        labels.append(label)
    if len({tuple(p.shape) for p in pixels}) > 1:
        raise RecipeError(f"images of {path} differ in size; set crop, as for ImageNet")
    return Images(torch.stack(pixels), torch.tensor(labels))


def seed_of(*parts: Any) -> int:
    """A seed for whatever `parts` name, the same in every process and every run."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest())


Batch = tuple[Tensor, Tensor, Tensor | None]


def batches(
    data: Images | Files,
    settings: Settings,
    machine: "Machine",
    key: tuple[Any, ...],
    first: int = 0,
) -> Iterator[Batch]:
    """This process's share of an epoch of training batches, in random order, from step `first` on.

    Images, labels, and the dense network's outputs where the data hold them.
    """
    device = machine.device
    generator = torch.Generator().manual_seed(seed_of(*key))
    chosen = torch.randperm(len(data), generator=generator).split(settings.batch)
    chosen = chosen[: num_steps(data, settings)]
    own = [c.tensor_split(machine.world)[machine.rank] for c in chosen]
    if isinstance(data, Files):
        seeds = [[(seed_of(*key, int(i)), int(i)) for i in which] for which in own[first:]]
        for x, y in _loader(data, seeds, settings):
            yield normalise(x, settings, machine), y.to(device), None
        return
    for step in range(first, len(own)):
        draw = torch.Generator().manual_seed(seed_of(*key, step, machine.rank))
        x = moved(data.x[own[step]], settings, draw)
        outputs = None if data.outputs is None else data.outputs[own[step]].to(device)
        yield normalise(x, settings, machine), data.y[own[step]].to(device), outputs


@torch.no_grad()
def with_outputs(
    data: Images | Files, teacher: nn.Module | None, settings: Settings, machine: "Machine"
) -> Images | Files:
    """The dense network's outputs, once and for all, where images stay as they are."""
    if teacher is None or isinstance(data, Files) or settings.shift or settings.flip:
        return data
    parts = data.x.split(settings.batch)
    outputs = torch.cat([teacher(normalise(x, settings, machine)).cpu() for x in parts])
    return replace(data, outputs=outputs)


def num_steps(data: Images | Files, settings: Settings) -> int:
    """Whole batches only, so that all processes always have equal shares."""
    if len(data) < settings.batch:
        raise RecipeError(f"{len(data)} training images do not fill a batch of {settings.batch}")
    return len(data) // settings.batch


def _loader(data: Files, keys: Any, settings: Settings) -> Any:
    return torch.utils.data.DataLoader(
        data, batch_sampler=keys, num_workers=settings.workers, pin_memory=torch.cuda.is_available()
    )


def in_order(
    data: Images | Files, settings: Settings, machine: "Machine"
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of all images, once, as they are."""
    own = torch.arange(len(data))[machine.rank :: machine.world].split(settings.batch)
    if isinstance(data, Files):
        keys = [[(None, int(i)) for i in which] for which in own]
        for x, y in _loader(data, keys, settings):
            yield normalise(x, settings, machine), y.to(machine.device)
        return
    for which in own:
        yield normalise(data.x[which], settings, machine), data.y[which].to(machine.device)


def moved(x: Tensor, settings: Settings, generator: torch.Generator) -> Tensor:
    """Every image [B, C, H, W] shifted by a few pixels, zeros coming in, and perhaps mirrored."""
    reach, (height, width) = settings.shift, x.shape[-2:]
    if not reach and not settings.flip:
        return x
    rows, columns = torch.randint(0, 2 * reach + 1, (2, len(x), 1), generator=generator)
    rows, columns = rows + torch.arange(height), columns + torch.arange(width)
    if settings.flip:
        mirrored = torch.rand(len(x), 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    which = torch.arange(len(x))[:, None, None]
    padded = F.pad(x, (reach,) * 4)
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def normalise(x: Tensor, settings: Settings, machine: "Machine") -> Tensor:
    x = x.to(machine.device).float() / 255
    mean, std = (x.new_tensor(v).view(-1, 1, 1) for v in (settings.mean, settings.std))
    return ((x - mean) / std).contiguous()


# --- One process or many -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Where this process runs; `accelerator` only with several processes or mixed precision."""

    device: torch.device
    rank: int = 0
    world: int = 1
    accelerator: Any = None

    @property
    def scaler(self) -> Any:
        """Of fp16's losses; None without."""
        return getattr(self.accelerator, "scaler", None)

    def prepare(self, net: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        """For several processes, and for casts."""
        return self.accelerator.prepare(net, optimizer) if self.accelerator else (net, optimizer)

    def release_(self, wrapped: nn.Module) -> None:
        """Give the network back its own forward, without casts."""
        if self.accelerator:
            self.accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
            self.accelerator.free_memory()

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision, where asked for."""
        return self.accelerator.autocast() if self.accelerator else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Gradients; scaled for fp16."""
        self.accelerator.backward(loss) if self.accelerator else loss.backward()

    def wait(self) -> None:
        """Until every process is here."""
        if self.accelerator:
            self.accelerator.wait_for_everyone()

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over all processes."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def agree_(self, net: nn.Module) -> None:
        """Buffers (batch-norm statistics) as the first process has them; gates must be equal."""
        if self.world == 1:
            return
        for buffer in net.buffers():
            torch.distributed.broadcast(buffer, 0)
        if isinstance(net, swan.GatedModel):
            own = torch.cat([net.gates.logits.detach(), net.gates.open_mask().float()])
            first = own.clone()
            torch.distributed.broadcast(first, 0)
            if not torch.equal(own, first):
                raise RuntimeError(f"gates of process {self.rank} differ from those of process 0")


def find_machine(settings: Settings) -> Machine:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    mixed = settings.mixed_precision if settings.mixed_precision != "no" else asked
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if world == 1 and mixed == "no":
        return Machine(device)
    if find_spec("accelerate") is None:
        raise RecipeError(
            f"{world} processes, mixed precision {mixed!r}: this needs accelerate; run: "
            f"pip install 'swan-surgery[recipes]'"
        )
    cpu = device.type == "cpu"
    accelerator = import_module("accelerate").Accelerator(cpu=cpu, mixed_precision=mixed)
    if settings.batch % accelerator.num_processes:
        raise RecipeError(
            f"batch={settings.batch} does not divide into {accelerator.num_processes} processes"
        )
    return Machine(
        accelerator.device, accelerator.process_index, accelerator.num_processes, accelerator
    )


# --- Runs: what a seed has done so far -----------------------------------------------------------------


@dataclass
class Run:
    """One seed of an experiment: its folder, and what is in its checkpoint.

    Attributes:
        scores: per finished stage, hard accuracies and losses.
        history: a row per epoch.
        facts: MACs, parameters, units, once known.
        now: the unfinished stage: position, weights, optimizer, objective; empty between stages.
    """

    settings: Settings
    machine: Machine
    data: Data
    seed: int
    folder: Path
    bar: Progress
    save_every: int
    board: Any = None
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    now: dict[str, Any] = field(default_factory=dict)

    _KEPT = ("scores", "history", "facts", "now")

    def load_(self) -> None:
        """Go on where the checkpoint in the folder was written, if there is one."""
        file = self.folder / "checkpoint.pt"
        if not file.exists():
            return
        # Plain tensors, numbers and texts; weights_only refuses anything else.
        state = torch.load(file, map_location="cpu", weights_only=True)  # noqa: TID251
        if state["settings"] != repr(self.settings) or state["seed"] != self.seed:
            raise RecipeError(
                f"{self.folder} was made with other settings; remove it, or choose --out"
            )
        for name in self._KEPT:
            setattr(self, name, state[name])

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        if self.machine.rank == 0:
            kept = {name: getattr(self, name) for name in self._KEPT}
            state = {"settings": repr(self.settings), "seed": self.seed, **kept}
            with replacing(self.folder / "checkpoint.pt") as temporary:
                torch.save(state, temporary)  # noqa: TID251 - plain tensors and numbers, see load_
        self.machine.wait()

    def keep(
        self, stage: str, position: tuple[int, int], sums: Tensor, parts: Mapping[str, Any]
    ) -> None:
        """Save an unfinished stage: epoch and step, sums so far, and the state of its parts."""
        states = {name: {} if part is None else part.state_dict() for name, part in parts.items()}
        epoch, step = position
        self.now = {"stage": stage, "epoch": epoch, "step": step, "sums": sums.tolist(), **states}
        self.save()

    def resume_(self, stage: str, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Where a stage begins; if the checkpoint lies inside it, its parts are loaded."""
        if self.now.get("stage") != stage:
            return {"epoch": 0, "step": 0, "sums": [0.0, 0.0]}
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(self.now[name])
        return self.now

    def finish(self, stage: str, net: nn.Module) -> None:
        """Score a stage, keep its weights, and leave it."""
        self.machine.agree_(net)
        self.scores[stage] = self.score(net)
        if self.machine.rank == 0:
            tensors = {k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()}
            with replacing(self.folder / f"{stage}.safetensors") as temporary:
                save_file(tensors, temporary)
        self.now = {}
        self.save()

    def restore_(self, stage: str, net: nn.Module) -> bool:
        """Whether a stage is finished; if so its weights are loaded."""
        if stage not in self.scores:
            return False
        net.load_state_dict(load_file(self.folder / f"{stage}.safetensors"))
        return True

    def score(self, net: nn.Module) -> dict[str, float]:
        """Hard accuracies in percent and losses; validation only where images are held out."""
        parts = {"test": self.data.test}
        if self.settings.validation:
            parts["validation"] = self.data.validation
        found: dict[str, float] = {}
        for name, part in parts.items():
            loss, accuracy = evaluate(net, part, self.settings, self.machine)
            found |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
        return found


class replacing:  # noqa: N801 - used like a function
    """A temporary path that takes a file's place when the block is left without an error."""

    def __init__(self, path: Path) -> None:
        self.path, self.temporary = path, path.with_name(path.name + ".tmp")

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(self, error: object, *_: object) -> None:
        if error is None:
            os.replace(self.temporary, self.path)  # noqa: PTH105 - the atomic rename, by its name


@torch.no_grad()
def evaluate(
    net: nn.Module, data: Images | Files, settings: Settings, machine: Machine
) -> tuple[float, float]:
    """Mean loss and accuracy in percent, in eval mode: hard gates."""
    net.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    for x, y in in_order(data, settings, machine):
        logits = net(x)
        loss = F.cross_entropy(logits, y, reduction="sum")
        sums += torch.tensor([float(loss), float((logits.argmax(1) == y).sum()), len(y)])
    loss, right, count = machine.total(sums.to(machine.device)).tolist()
    return loss / count, 100 * right / count


# --- Training ------------------------------------------------------------------------------------------


def make_optimizer(net: nn.Module, settings: Settings, lr: float) -> torch.optim.Optimizer:
    decay = settings.weight_decay
    if isinstance(net, swan.GatedModel):
        groups = swan.parameter_groups(net, lr=lr, gate_lr=settings.gate_lr, weight_decay=decay)
    else:
        groups = [{"params": list(net.parameters()), "lr": lr, "weight_decay": decay}]
    for group in groups:
        group["peak"] = group["lr"]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups)


def set_rates_(optimizer: Any, share: float, *, is_frozen: bool) -> None:
    for group in optimizer.param_groups:
        group["lr"] = share * group["peak"]
    if is_frozen:
        optimizer.param_groups[-1]["lr"] = 0.0  # the gates'


@torch.no_grad()
def outputs_of(teacher: nn.Module | None, x: Tensor) -> Tensor | None:
    return None if teacher is None else teacher(x).float()


def rate(epoch: float, length: float, warmup: float) -> float:
    """Share of the peak learning rate: a rise, then a cosine to zero."""
    rise = min(1.0, (epoch + 1e-2) / warmup) if warmup else 1.0
    return rise * 0.5 * (1 + math.cos(math.pi * epoch / length))


def train(
    run: Run,
    stage: str,
    net: nn.Module,
    *,
    epochs: int,
    lr: float,
    start: int = 0,
    length: int = 0,
    objective: swan.Objective | None = None,
    teacher: nn.Module | None = None,
) -> None:
    """Train in place through epochs `start` to `start + epochs` of a cosine of `length` epochs.

    Goes on in the middle where the checkpoint says so.
    """
    settings, machine = run.settings, run.machine
    data = with_outputs(run.data.train, teacher, settings, machine)
    frozen_from = (1 - settings.freeze) * settings.gate_epochs if objective else math.inf
    optimizer = make_optimizer(net, settings, lr)
    parts = {"net": net, "optimizer": optimizer, "objective": objective, "scaler": machine.scaler}
    now = run.resume_(stage, parts)
    wrapped, optimizer = machine.prepare(net, optimizer)
    steps = num_steps(data, settings)
    first, sums = now["step"], torch.tensor(now["sums"], dtype=torch.float64)
    task = run.bar.add_task(f"seed {run.seed} {stage}", total=epochs * steps, note="")
    run.bar.update(task, completed=now["epoch"] * steps + first)

    for epoch in range(now["epoch"], epochs):
        started = time.perf_counter()
        key = (run.seed, stage, epoch)
        wrapped.train()
        for step, batch in enumerate(batches(data, settings, machine, key, first), first):
            x, y, wanted = batch
            torch.manual_seed(seed_of(*key, step, machine.rank, "dropout"))
            t = epoch + step / steps
            share = rate(start + t, length or epochs, settings.warmup)
            set_rates_(optimizer, share, is_frozen=t >= frozen_from)
            with machine.autocast():
                logits = wrapped(x)
                wanted = outputs_of(teacher, x) if wanted is None else wanted
            logits = logits.float()
            task_loss = loss = F.cross_entropy(logits, y)
            if wanted is not None:
                soft = swan.distillation_loss(logits, wanted, temperature=settings.temperature)
                loss = torch.lerp(loss, soft, settings.distillation)
            if objective is not None:
                loss = loss + objective(t)
            optimizer.zero_grad()
            machine.backward(loss)
            optimizer.step()
            sums += torch.tensor(
                [float(task_loss.detach()), float((logits.argmax(1) == y).double().mean())]
            )
            run.bar.update(task, advance=1, note=f"loss {sums[0] / (step + 1):.3f}")
            if run.save_every and (step + 1) % run.save_every == 0 and step + 1 < steps:
                run.keep(stage, (epoch, step + 1), sums, parts)
        machine.agree_(net)
        means = machine.total((sums / steps / machine.world).to(machine.device)).tolist()
        add_row(run, stage, net, means, time.perf_counter() - started, objective)
        first, sums = 0, torch.zeros(2, dtype=torch.float64)
        run.keep(stage, (epoch + 1, 0), sums, parts)
    machine.release_(wrapped)
    run.bar.remove_task(task)


def add_row(
    run: Run,
    stage: str,
    net: nn.Module,
    means: list[float],
    seconds: float,
    objective: swan.Objective | None,
) -> None:
    """One epoch in the history, the CSV and TensorBoard."""
    settings, machine = run.settings, run.machine
    loss, accuracy = evaluate(net, run.data.validation, settings, machine)
    row: dict[str, Any] = {
        "epoch": len(run.history) + 1,
        "stage": stage,
        "train_loss": means[0],
        "train_accuracy": 100 * means[1],
        "validation_loss": loss,
        "hard_accuracy": accuracy,
        "soft_accuracy": "",
        "active_fraction": "",
        "open_fraction": "",
        "hard_macs_ratio": "",
        "seconds": seconds,
    }
    if objective is not None and isinstance(net, swan.GatedModel):
        row |= {k: v for k, v in objective.log().items() if k in row}
        if settings.soft_curve:
            with swan.soft_gates(net):
                row["soft_accuracy"] = evaluate(net, run.data.validation, settings, machine)[1]
    run.history.append(row)
    if machine.rank == 0:
        with (
            replacing(run.folder / "log.csv") as temporary,
            temporary.open("w", newline="") as file,
        ):
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerows(run.history)
    if run.board is not None:
        for name, value in row.items():
            if isinstance(value, float):
                run.board.add_scalar(name, value, row["epoch"])
        run.board.flush()


def run_seed(run: Run, init: Path | None, *, baseline: bool) -> dict[str, Any]:
    """All stages of one seed, each from where the checkpoint left it."""
    settings, machine, data = run.settings, run.machine, run.data
    later = settings.gate_epochs + settings.finetune_epochs
    example = torch.zeros(2, *data.shape, device=machine.device)
    run.load_()

    # 1. A dense network.
    torch.manual_seed(run.seed)
    dense = NETWORKS[settings.network](data.shape, data.classes, settings)
    if init:
        load_init_(dense, init)
    dense.to(machine.device)
    if not run.restore_("dense", dense):
        epochs = settings.adapt_epochs if init else settings.dense_epochs
        train(run, "dense", dense, epochs=epochs, lr=settings.lr)
        run.finish("dense", dense)

    # 2. Gates in; weights and gates together while the budget falls; then gates frozen.
    gated = swan.swanify(dense, example)
    gated.gates.min_width = settings.min_width
    objective = make_objective(gated, settings)
    teacher = dense.eval() if settings.distillation else None
    own_cosine = settings.finetune_lr > 0
    joint = settings.gate_epochs if own_cosine else later
    if not run.restore_("gated", gated):
        epochs = settings.gate_epochs
        train(
            run,
            "gated",
            gated,
            epochs=epochs,
            lr=settings.lr,
            length=joint,
            objective=objective,
            teacher=teacher,
        )
        if not settings.freeze:
            objective(epochs)  # the last step moved the logits: meet the budget once more
        # The same batches in every process, so that the statistics are equal.
        alone = replace(machine, rank=0, world=1)
        own = batches(data.train, settings, alone, (run.seed, "calibration"))
        swan.calibrate(gated, own, settings.calibration)
        run.finish("gated", gated)

    # 3. Cut. `prune` compares the result with the gated network and raises if they differ. Every
    # process cuts, for each needs the smaller network; the first one verifies.
    pruned = swan.prune(gated, verify=machine.rank == 0)
    if "pruned" not in run.scores:
        is_open = gated.gates.open_mask()
        one = example[:1]
        run.facts = {
            "units": {"all": is_open.numel(), "open": int(is_open.sum())},
            "macs": {"dense": swan.count_macs(dense, one), "pruned": swan.count_macs(pruned, one)},
            "params": {"dense": swan.count_params(dense), "pruned": swan.count_params(pruned)},
            "widths": {"dense": layer_widths(dense), "pruned": layer_widths(pruned)},
        }
        run.finish("pruned", pruned)

    # 4. Fine-tune what is left: an ordinary network, an ordinary loop.
    if not run.restore_("finetuned", pruned):
        train(
            run,
            "finetuned",
            pruned,
            epochs=settings.finetune_epochs,
            lr=settings.finetune_lr or settings.lr,
            start=0 if own_cosine else settings.gate_epochs,
            length=settings.finetune_epochs if own_cosine else later,
            teacher=teacher,
        )
        run.finish("finetuned", pruned)

    # 5. The dense network, trained as long.
    if baseline and not run.restore_("baseline", dense):
        dense.load_state_dict(load_file(run.folder / "dense.safetensors"))
        train(run, "baseline", dense, epochs=later, lr=settings.lr)
        run.finish("baseline", dense)
    seconds = sum(row["seconds"] for row in run.history)
    return {"seed": run.seed, "scores": run.scores, **run.facts, "training_seconds": seconds}


def make_objective(gated: swan.GatedModel, settings: Settings) -> swan.Objective:
    length = settings.gate_epochs
    return swan.Objective(
        gated,
        macs=settings.macs or None,
        params=settings.params or None,
        learning=settings.learning or None,  # type: ignore[arg-type]  # checked by Settings
        freeze_after=(1 - settings.freeze) * length if settings.freeze else None,
        l0=settings.l0,
        flops=settings.flops,
        target_active=settings.target_active or None,
        target_weight=settings.target_weight,
        ramp=swan.CosineRamp(settings.delay * length, settings.ramp * length),
    )


def layer_widths(model: nn.Module) -> list[int]:
    kinds = (nn.Conv2d, nn.Linear)
    return [module.weight.shape[0] for module in model.modules() if isinstance(module, kinds)]


# --- Results -------------------------------------------------------------------------------------------

STAGES = {
    "dense": "dense, where both start",
    "baseline": "dense, trained as long",
    "gated": "gated, hard gates, before the cut",
    "pruned": "pruned, right after the cut",
    "finetuned": "pruned, fine-tuned",
}


def mean_and_spread(values: list[float]) -> dict[str, float | None]:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "stdev": spread}


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation over the seeds."""
    found: dict[str, Any] = {
        stage: {
            key: mean_and_spread([result["scores"][stage][key] for result in results])
            for key in results[0]["scores"][stage]
        }
        for stage in STAGES
        if stage in results[0]["scores"]
    }
    units, macs, params = (
        [result[name][small] / result[name][big] for result in results]
        for name, small, big in (
            ("units", "open", "all"),
            ("macs", "pruned", "dense"),
            ("params", "pruned", "dense"),
        )
    )
    left = {"units_left": units, "macs_left": macs, "params_left": params}
    return found | {name: mean_and_spread(values) for name, values in left.items()}


def show(found: Mapping[str, Any], results: list[dict[str, Any]]) -> Table:
    headers = ("network", "test acc. %", "validation acc. %", "MACs", "active units")
    table = Table(*headers, title=f"hard accuracy, {len(results)} seed(s)")

    def cell(stats: Mapping[str, float | None] | None, scale: float = 1.0) -> str:
        if stats is None or stats["mean"] is None:
            return "-"
        spread = "" if stats["stdev"] is None else f" +- {scale * stats['stdev']:.2f}"
        return f"{scale * stats['mean']:.2f}{spread}"

    for stage, text in STAGES.items():
        if stage in found:
            own, full = found[stage], stage in ("dense", "baseline")
            table.add_row(
                text,
                cell(own["test_accuracy"]),
                cell(own.get("validation_accuracy")),
                f"{results[0]['macs']['dense']:,}"
                if full
                else f"{cell(found['macs_left'], 100)} %",
                f"{results[0]['units']['all']:,}"
                if full
                else f"{cell(found['units_left'], 100)} %",
            )
    return table


def plot(run: Run) -> str:
    """Loss, accuracy and active fraction over epochs (the paper's Figures 2 to 4); says what it did."""
    if find_spec("matplotlib") is None:
        return "plot skipped: matplotlib is not installed (pip install 'swan-surgery[recipes]')"
    import_module("matplotlib").use("Agg")
    pyplot = import_module("matplotlib.pyplot")
    rows = [row for row in run.history if row["stage"] != "baseline"]
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4), sharex=True, constrained_layout=True)
    panels = (
        ("loss", ("train_loss", "validation_loss")),
        ("accuracy, %", ("train_accuracy", "hard_accuracy", "soft_accuracy")),
        ("share", ("active_fraction", "open_fraction", "hard_macs_ratio")),
    )
    changes = [b["epoch"] - 0.5 for a, b in pairwise(rows) if a["stage"] != b["stage"]]
    for axis, (title, names) in zip(axes, panels, strict=True):
        for name in names:
            points = [(row["epoch"], row[name]) for row in rows if row[name] != ""]
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", label=name.replace("_", " "))
        for change in changes:
            axis.axvline(change, color="0.7", linestyle=":")
        axis.set(title=title, xlabel="epoch")
        axis.legend()
    file = run.folder / "curves.png"
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
    return f"curves: {file}"


def environment(machine: Machine) -> dict[str, Any]:
    return {
        "command": shlex.join(["python", *sys.argv]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "device": str(machine.device),
        "processes": machine.world,
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
    """Add to the file; a row of the same configuration is replaced."""
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [row for row in old if row["config"] != outcome["config"]]
    content = {
        "theme": "classifier",
        "environment": outcome["environment"],
        "rows": [*kept, outcome],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def make_board(folder: Path, first_epoch: int) -> Any:
    if find_spec("tensorboard") is None:
        raise RecipeError(
            "--tensorboard needs tensorboard, which is not installed; run: "
            "pip install 'swan-surgery[recipes]'"
        )
    writer = import_module("torch.utils.tensorboard").SummaryWriter
    return writer(folder / "tensorboard", purge_step=first_epoch)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path, nargs="?", help="TOML file; see recipes/configs")
    parser.add_argument("--data", type=Path, help="MNIST, CIFAR, or train/<class>/* (see read)")
    parser.add_argument("--init", type=Path, help="dense weights to start from")
    parser.add_argument("--baseline", action="store_true", help="train the dense network as long")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument("--out", type=Path, help="folder (default: out/<config>)")
    parser.add_argument("--output", type=Path, help="JSON file to add the result to")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's choice)")
    parser.add_argument("--tensorboard", action="store_true", help="log to OUT/tensorboard as well")
    parser.add_argument("--smoke", action="store_true", help="made-up images, seconds")
    options = parser.parse_args()
    if not options.smoke and not (options.config and options.data):
        parser.error("give a config and --data FOLDER, or --smoke")
    return options


def experiment(options: argparse.Namespace, console: Console) -> None:
    default = ["macs=0.5"] if options.config is None else []
    settings = settings_from(options.config, [*default, *options.set])
    if options.smoke:
        budgets: dict[str, Any] = {
            name: 0.5 for name in ("macs", "params") if getattr(settings, name)
        }
        settings = replace(settings, **SMOKE, **budgets)
    if options.threads or options.smoke:
        torch.set_num_threads(options.threads or 1)
    machine = find_machine(settings)
    console.quiet = machine.rank > 0
    name = options.config.stem if options.config else "smoke"
    out = options.out or Path("out") / name
    data = load_data(None if options.smoke else options.data, settings)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    results = []
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as bar:
        for seed in options.seeds:
            folder = out / f"seed-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            run = Run(settings, machine, data, seed, folder, bar, options.save_every)
            run.load_()
            if options.tensorboard and machine.rank == 0:
                run.board = make_board(folder, len(run.history) + 1)
            results.append(run_seed(run, options.init, baseline=options.baseline))
            if machine.rank == 0:
                console.print(plot(run), markup=False)
    found = summary(results)
    console.print(show(found, results))
    if options.output and machine.rank == 0:
        outcome = {
            "config": name,
            "environment": environment(machine),
            "settings": asdict(settings),
            "images": {part: len(getattr(data, part)) for part in ("train", "validation", "test")},
            "summary": found,
            "results": results,
        }
        write(options.output, outcome)
        console.print(f"written: {options.output}")


def main() -> None:
    options = parse()
    console = Console(width=None if Console().is_terminal else 120)
    try:
        experiment(options, console)
    except (RecipeError, swan.SwanError) as err:
        sys.exit(f"{type(err).__name__}: {err}")
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
