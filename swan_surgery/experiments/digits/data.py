"""Scikit-learn's handwritten digits: 1,797 real 8x8 images, split once and for all."""

from dataclasses import dataclass
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from swan_surgery.errors import InputError


# The split is the same in every run and for every seed: tuning never saw the test images.
_SPLIT_SEED = 0
_TRAIN, _VALIDATION = 1000, 300
_SIDE = 8


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """Images [N, 1, 8, 8] in [0, 1] and labels [N]."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, slots=True, eq=False)
class Digits:
    """The three parts: 1,000 to train, 300 to choose settings, 497 to report."""

    train: Images
    validation: Images
    test: Images


def load_digits(num_train: int = _TRAIN) -> Digits:
    """Load and split the data; nothing is downloaded.

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        datasets = import_module("sklearn.datasets")
    except ImportError as err:
        raise InputError(
            "the demo's data comes with scikit-learn, which is not installed; "
            "run: pip install 'swan-surgery[demo]'"
        ) from err
    bunch = datasets.load_digits()
    x = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(bunch.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    parts = order.tensor_split([_TRAIN, _TRAIN + _VALIDATION])
    train, validation, test = (Images(x[part], y[part]) for part in parts)
    return Digits(Images(train.x[:num_train], train.y[:num_train]), validation, test)


def shuffled_batches(
    images: Images, size: int, generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """One epoch in random order, every image moved by up to one pixel."""
    order = torch.randperm(len(images), generator=generator)
    return [(shift(images.x[chosen], generator), images.y[chosen]) for chosen in order.split(size)]


def shift(x: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image [B, 1, 8, 8] by -1, 0 or 1 pixels along each axis; zeros come in."""
    corners = torch.randint(0, 3, (2, len(x), 1), generator=generator)
    rows, columns = corners + torch.arange(_SIDE)
    which = torch.arange(len(x))[:, None, None]
    return F.pad(x, (1, 1, 1, 1))[which, 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)
