"""Images to train and to test on, from folders, torchvision's data sets, scikit-learn or a function."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from swan_surgery.environment.extras import named_function, needed_from
from swan_surgery.errors import InputError
from swan_surgery.experiments.classifier.settings import TrainSettings


with needed_from("cli"):
    import torchvision
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
        validation: what epochs are scored on instead, so that settings are not chosen by test images.
        is_fixed: whether training images are the same every time.
    """

    train: Dataset[tuple[Tensor, int]]
    test: Dataset[tuple[Tensor, int]]
    classes: int
    about: str
    validation: Dataset[tuple[Tensor, int]] | None = None
    is_fixed: bool = False

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
        test, train = _split(
            train, settings.held_out, f"{settings.data} has no test images, and held_out"
        )
        about += f", {len(test)} of its images held out"
    validation = None
    if settings.validation:
        validation, train = _split(train, settings.validation, "validation")
    classes = len({int(label) for label in _labels(train)})
    plain = _transform(settings, channels, is_training=False)
    about += f": {len(train)} images to train, {len(test)} to test, {classes} classes"
    if validation is not None:
        about += f", {len(validation)} to score epochs on"
    return Data(
        _Transformed(train, _transform(settings, channels, is_training=True)),
        _Transformed(test, plain),
        classes,
        about,
        None if validation is None else _Transformed(validation, plain),
        is_fixed=not (
            settings.shift or settings.flip or settings.crop or _is_function(settings.data)
        ),
    )


def _split(data: Any, share: float, what: str) -> tuple[Any, Any]:
    """A part drawn at random, the same for every seed of a run, and the rest."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(_SPLIT_SEED)).tolist()
    count = round(share * len(data))
    if not 0 < count < len(data):
        raise InputError(
            f"{what}={share:g} of its {len(data)} images leaves none to hold out or none to train"
        )
    return Subset(data, order[:count]), Subset(data, order[count:])


def input_channels(model: nn.Module) -> int | None:
    """Of the first convolution; None where the first layer is none."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
        if isinstance(module, nn.Linear):
            return None
    return None


class _Transformed(Dataset[tuple[Tensor, int]]):
    def __init__(self, data: Any, transform: Callable[[Any], Tensor]) -> None:
        self._data, self._transform = data, transform

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self._data[index]
        return self._transform(image), int(label)


class _Decoded(Dataset[tuple[Tensor, int]]):
    """A torchvision data set of small images, as tensors without the way through PIL."""

    def __init__(self, found: Any) -> None:
        pixels = torch.as_tensor(found.data)
        self._pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        self.targets = torch.as_tensor(found.targets).tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._pixels[index], self.targets[index]


def _transform(
    settings: TrainSettings, channels: int | None, *, is_training: bool
) -> Callable[[Any], Tensor]:
    """From an image, or a tensor of whole numbers, to a normalised one; floating-point tensors stay.

    By functions on plain tensors: small images would spend most of their time between torchvision's transforms.
    """
    mean, std = (torch.tensor(own).view(-1, 1, 1) for own in (settings.mean, settings.std))
    return partial(
        _apply,
        sized=_resizing(settings, is_training=is_training),
        shift=settings.shift if is_training else 0,
        flip=settings.flip and is_training,
        channels=channels,
        mean=mean,
        std=std,
    )


def _resizing(settings: TrainSettings, *, is_training: bool) -> Any:
    """A function of images, None where they stay as they are."""
    side = [settings.size, settings.size]
    if settings.crop and is_training:
        return v2.RandomResizedCrop(side, antialias=True)
    if settings.crop:
        return v2.Compose([v2.Resize(round(side[0] / 0.875), antialias=True), v2.CenterCrop(side)])
    return v2.Resize(side, antialias=True) if settings.size else None


def _apply(
    image: Any,
    *,
    sized: Callable[[Tensor], Tensor] | None,
    shift: int,
    flip: bool,
    channels: int | None,
    mean: Tensor,
    std: Tensor,
) -> Tensor:
    if isinstance(image, Tensor) and image.is_floating_point():
        return image.as_subclass(Tensor)
    x: Tensor = v2.functional.to_image(image).as_subclass(Tensor)
    if sized is not None:
        x = sized(x)
    if shift:
        (top, left), (height, width) = torch.randint(0, 2 * shift + 1, (2,)).tolist(), x.shape[-2:]
        x = F.pad(x, (shift,) * 4)[:, top : top + height, left : left + width]
    if flip and torch.rand(()) < 0.5:
        x = x.flip(-1)
    x = v2.functional.to_dtype(x, torch.float32, scale=True)
    if channels == 3 and len(x) == 1:
        x = x.expand(3, -1, -1)
    elif channels == 1 and len(x) == 3:
        x = v2.functional.rgb_to_grayscale(x)
    if not {len(mean), len(std)} <= {1, len(x)}:
        raise InputError(
            f"images have {len(x)} channels, but mean and std {len(mean)} and {len(std)} numbers"
        )
    return (x - mean) / std


def _is_function(name: str) -> bool:
    return ":" in name and name != _DIGITS and not Path(name).exists()


def _found(settings: TrainSettings) -> tuple[Any, Any, str]:
    """Training images, test images or None, and a name."""
    name = settings.data
    if name == _DIGITS:
        return _digits(), None, "scikit-learn's digits"
    if _is_function(name):
        return _from_function(name)
    root = Path(name)
    if not root.is_dir():
        raise InputError(f"no folder {name}; data is {_WHAT}")
    if (root / "train").is_dir():
        return _from_folders(root)
    for kind in _TORCHVISION:
        make = getattr(torchvision.datasets, kind)
        try:
            parts = [_Decoded(make(root, train=is_training)) for is_training in (True, False)]
        except RuntimeError:  # not here: nothing is downloaded
            continue
        return parts[0], parts[1], f"{kind} in {root}"
    raise InputError(f"{name} holds neither train/<class>/* nor {', '.join(_TORCHVISION)}")


_WHAT = (
    "a folder with train/<class>/* and test/ or val/, the root of a torchvision data set "
    f"({', '.join(_TORCHVISION)}), {_DIGITS}, or package.module:function"
)


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
    return [(image, label) for image, label in zip(pixels, bunch.target.tolist(), strict=True)]


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
