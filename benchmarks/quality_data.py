"""CIFAR-10 images for `quality.py`: decoded once, split, shuffled and augmented reproducibly."""

import io
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


# Of ImageNet: what the pretrained CIFAR ResNets were trained with.
MEAN = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1) * 255
STD = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1) * 255
_PAD = 4


@dataclass(frozen=True, eq=False)
class Images:
    """uint8 images [B, 3, H, W] and labels [B]."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device) -> "Images":
        """The same on another device."""
        return Images(self.x.to(device), self.y.to(device))


@dataclass(frozen=True, eq=False)
class Splits:
    """Training images, and the two halves of the test folder: to choose settings by, and to report.

    The pretrained networks have seen every training image, so images held out of training would not
    tell settings apart.
    """

    train: Images
    validation: Images
    test: Images

    def to(self, device: torch.device) -> "Splits":
        """The same on another device."""
        return Splits(self.train.to(device), self.validation.to(device), self.test.to(device))


def load(data: Path, num_train: int, *, threads: int = 1) -> Splits:
    """Read `train/<class>/*` and `test/<class>/*` from a folder or a tar archive of one."""
    if not data.exists():
        raise SystemExit(f"--data {data}: no such file or folder")
    files = _from_tar(data) if data.is_file() else _from_folder(data)
    found: dict[str, tuple[list[np.ndarray], list[str]]] = {"train": ([], []), "test": ([], [])}
    kept = [(name, content) for name, content in files if Path(name).parts[-3] in found]
    with ThreadPoolExecutor(threads) as pool:
        images = pool.map(_decoded, (content for _, content in kept))
        for (name, _), image in zip(kept, images, strict=True):
            split, label = Path(name).parts[-3:-1]
            found[split][0].append(image)
            found[split][1].append(label)
    if not found["train"][1] or not found["test"][1]:
        raise SystemExit(f"--data {data}: found no train/<class>/<image> and test/<class>/<image>")
    classes = sorted(set(found["train"][1]))
    sets = {}
    for split, (pixels, labels) in found.items():
        x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
        y = torch.tensor([classes.index(label) for label in labels])
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(len(y)))
        sets[split] = Images(x[order], y[order])
    train, held = sets["train"], sets["test"]
    half = len(held) // 2
    return Splits(
        Images(train.x[:num_train], train.y[:num_train]),
        Images(held.x[:half], held.y[:half]),
        Images(held.x[half:], held.y[half:]),
    )


def synthetic(num_train: int) -> Splits:
    """Ten noisy patterns, to see that everything runs."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(10, 3, 32, 32, generator=generator)

    def draw(count: int) -> Images:
        y = torch.randint(10, (count,), generator=generator)
        x = 0.6 * patterns[y] + 0.4 * torch.rand(count, 3, 32, 32, generator=generator)
        return Images((255 * x).to(torch.uint8), y)

    return Splits(draw(num_train), draw(100), draw(100))


def _decoded(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def _from_tar(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content is not None and Path(member.name).suffix in (".jpg", ".jpeg", ".png"):
                yield member.name, content.read()


def _from_folder(path: Path) -> Iterator[tuple[str, bytes]]:
    for file in sorted(path.glob("*/*/*")):
        if file.suffix in (".jpg", ".jpeg", ".png"):
            yield str(file), file.read_bytes()


def normalised(x: Tensor) -> Tensor:
    """Float images from uint8 ones."""
    return (x.float() - MEAN.to(x.device)) / STD.to(x.device)


def batches(
    images: Images, size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch: shuffled, shifted by up to four pixels, mirrored; the last short batch is left out.

    Random numbers are drawn where the generator is: one on the GPU leaves nothing to copy there.
    """
    place: dict[str, Any] = {"generator": generator, "device": generator.device}
    order = torch.randperm(len(images), **place)
    width = images.x.shape[-1]
    steps = torch.arange(width, device=generator.device)
    for start in range(0, len(images) - size + 1, size):
        own = order[start : start + size]
        shift = torch.randint(0, 2 * _PAD + 1, (size, 2), **place)
        mirrored = torch.rand(size, **place) < 0.5
        rows = shift[:, :1] + steps
        columns = shift[:, 1:] + torch.where(mirrored[:, None], steps.flip(0), steps)
        own, rows, columns = (t.to(images.x.device) for t in (own, rows, columns))
        x = F.pad(normalised(images.x[own]), (_PAD,) * 4)
        index = torch.arange(size, device=x.device)[:, None, None]
        x = x[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        yield x.contiguous(memory_format=torch.channels_last), images.y[own]
