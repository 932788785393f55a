"""Images without labels: all that lie in a folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from swan_surgery.environment.extras import needed_from
from swan_surgery.errors import InputError
from swan_surgery.experiments.classifier.data import Transformed, transform_of
from swan_surgery.experiments.classifier.settings import TrainSettings


with needed_from("cli"):
    import torchvision


def images_below(
    root: Path, settings: TrainSettings, channels: int | None
) -> Dataset[tuple[Tensor, int]] | None:
    """All images in a folder and those below it, in order of their paths, without labels (0); None if there is none."""
    kinds = torchvision.datasets.folder.IMG_EXTENSIONS
    found = sorted(file for file in root.rglob("*") if file.suffix.lower() in kinds)
    transform = transform_of(settings, channels, is_training=False)
    return Transformed(_Files(found), transform) if found else None


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


__all__ = ["images_below"]
