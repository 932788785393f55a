"""Images to train and to test on, from folders, torchvision's data sets, scikit-learn or a function."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from swan_surgery.environment.extras import named_function, needed_from
from swan_surgery.errors import InputError
from swan_surgery.experiments.classifier.settings import TrainSettings


with needed_from("cli"):
    import torchvision
    from torchvision import tv_tensors
    from torchvision.transforms import v2

_DIGITS = "sklearn:digits"
_TORCHVISION = ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST")
_SPLIT_SEED = 0


@dataclass(frozen=True, slots=True)
class Data:
    """Two data sets of (image, label), the second of which training never sees.

    Attributes:
        train: as tensors, moved and mirrored at random where the settings say so.
        test: what accuracies are measured on.
        classes: how many labels there are.
        about: where the images come from, in words.
    """

    train: Dataset[tuple[Tensor, int]]
    test: Dataset[tuple[Tensor, int]]
    classes: int
    about: str

    def example(self) -> Tensor:
        """The first test image as a batch [1, C, H, W]."""
        return self.test[0][0].unsqueeze(0)


def load_data(settings: TrainSettings, channels: int | None = None) -> Data:
    """What `settings.data` names. Nothing is downloaded.

    Args:
        settings: of the experiment.
        channels: that the model takes, if known: grey images are repeated, colours averaged to fit.

    Raises:
        InputError: no such data, no images in it, or a missing package.
    """
    train, test, about = _found(settings)
    if test is None:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(_SPLIT_SEED))
        count = round(settings.held_out * len(train))
        if not 0 < count < len(train):
            raise InputError(
                f"{settings.data} has no test images, and held_out={settings.held_out:g} of its "
                f"{len(train)} images leaves none to test or none to train"
            )
        test, train = Subset(train, order[:count].tolist()), Subset(train, order[count:].tolist())
        about += f", {count} of its images held out"
    classes = len({int(label) for label in _labels(train)})
    return Data(
        _Transformed(train, _transform(settings, channels, is_training=True)),
        _Transformed(test, _transform(settings, channels, is_training=False)),
        classes,
        f"{about}: {len(train)} images to train, {len(test)} to test, {classes} classes",
    )


def input_channels(model: nn.Module) -> int | None:
    """Of the first convolution; None where the first layer is none."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
        if isinstance(module, nn.Linear):
            return None
    return None


def loader(
    data: Dataset[tuple[Tensor, int]], settings: TrainSettings, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in an order drawn from a generator, the last short one left out; without, all in order."""
    training = generator is not None
    count = len(data)  # type: ignore[arg-type]  # every data set here has a length
    made: Any = DataLoader(
        data,
        settings.batch,
        shuffle=training,
        drop_last=training and count >= settings.batch,
        num_workers=settings.workers,
        generator=generator,
    )
    return iter(made)


class _Transformed(Dataset[tuple[Tensor, int]]):
    def __init__(self, data: Any, transform: Callable[[Any], Tensor]) -> None:
        self._data, self._transform = data, transform

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self._data[index]
        return self._transform(image), int(label)


def _transform(
    settings: TrainSettings, channels: int | None, *, is_training: bool
) -> Callable[[Any], Tensor]:
    """From a PIL image or a uint8 tensor to a normalised one; floating-point tensors stay."""
    steps: list[Any] = [v2.ToImage()]
    if settings.size:
        side = [settings.size, settings.size]
        steps.append(v2.Resize(side, antialias=True))
    if is_training and settings.shift:
        steps.append(_Shift(settings.shift))
    if is_training and settings.flip:
        steps.append(v2.RandomHorizontalFlip())
    steps.append(v2.ToDtype(torch.float32, scale=True))
    if channels in (1, 3):
        steps.append(v2.RGB() if channels == 3 else v2.Grayscale())
    steps += [v2.Normalize(list(settings.mean), list(settings.std)), v2.ToPureTensor()]
    return partial(_apply, v2.Compose(steps))


def _apply(transform: Callable[[Any], Tensor], image: Any) -> Tensor:
    if isinstance(image, Tensor) and image.is_floating_point():
        return image.as_subclass(Tensor)
    return transform(image)


class _Shift(nn.Module):
    """Pads with zeros and crops at random."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.pixels = pixels

    def forward(self, image: Tensor) -> Tensor:
        """[C, H, W] to [C, H, W]."""
        height, width = image.shape[-2:]
        moved: Tensor = v2.RandomCrop((height, width), padding=self.pixels)(image)
        return moved


def _found(settings: TrainSettings) -> tuple[Any, Any, str]:
    """Training images, test images or None, and a name."""
    name = settings.data
    if name == _DIGITS:
        return _digits(), None, "scikit-learn's digits"
    if ":" in name and not Path(name).exists():
        return _from_function(name)
    root = Path(name)
    if not root.is_dir():
        raise InputError(f"no folder {name}; data is {_WHAT}")
    if (root / "train").is_dir():
        return _from_folders(root)
    for kind in _TORCHVISION:
        make = getattr(torchvision.datasets, kind)
        try:
            return make(root, train=True), make(root, train=False), f"{kind} in {root}"
        except RuntimeError:  # not here: nothing is downloaded
            continue
    raise InputError(f"{name} holds neither train/<class>/* nor {', '.join(_TORCHVISION)}")


_WHAT = (
    "a folder with train/<class>/* and test/ or val/, the root of a torchvision data set "
    f"({', '.join(_TORCHVISION)}), {_DIGITS}, or package.module:function"
)


def images_below(
    root: Path, settings: TrainSettings, channels: int | None
) -> Dataset[tuple[Tensor, int]] | None:
    """All images in a folder and those below it, in order of their paths, without labels (0); None if there is none."""
    kinds = torchvision.datasets.folder.IMG_EXTENSIONS
    found = sorted(file for file in root.rglob("*") if file.suffix.lower() in kinds)
    transform = _transform(settings, channels, is_training=False)
    return _Transformed(_Files(found), transform) if found else None


@dataclass(frozen=True, slots=True)
class _Files:
    """Images as torchvision opens them, each with the label 0."""

    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path = self.paths[index]
        try:
            return torchvision.datasets.folder.default_loader(str(path)), 0
        except OSError as err:
            raise InputError(f"{path} is no image that can be read: {err}") from err


def _from_folders(root: Path) -> tuple[Any, Any, str]:
    def folder(part: str) -> Any:
        try:
            return torchvision.datasets.ImageFolder(str(root / part))
        except (FileNotFoundError, OSError) as err:
            raise InputError(f"{root / part}: {err}") from err

    train = folder("train")
    part = next((own for own in ("test", "val") if (root / own).is_dir()), None)
    if part is None:
        return train, None, str(root)
    test = folder(part)
    if test.classes != train.classes:
        raise InputError(
            f"{root}: train/ has the classes {train.classes[:5]}..., {part}/ has {test.classes[:5]}..."
        )
    return train, test, str(root)


def _digits() -> Sequence[tuple[Tensor, int]]:
    with needed_from("demo"):
        bunch = import_module("sklearn.datasets").load_digits()
    pixels = (torch.tensor(bunch.images) * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    return [
        (tv_tensors.Image(image), label)
        for image, label in zip(pixels, bunch.target.tolist(), strict=True)
    ]


def _from_function(name: str) -> tuple[Any, Any, str]:
    made = named_function(name)()
    if not (
        isinstance(made, tuple) and len(made) == 2 and all(hasattr(d, "__len__") for d in made)
    ):
        raise InputError(
            f"{name} must return two data sets with a length; got {type(made).__name__}"
        )
    return *made, name


def _labels(data: Any) -> Iterator[Any]:
    """Without decoding the images, where the data set allows it."""
    if isinstance(data, Subset):
        known = list(_labels(data.dataset))
        return (known[index] for index in data.indices)
    if hasattr(data, "targets"):
        return iter(data.targets)
    return (data[index][1] for index in range(len(data)))
