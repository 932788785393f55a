"""Batches whose order and augmentation follow from a seed, shared out among processes, from any step on."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from swan_surgery.errors import InputError
from swan_surgery.experiments.classifier.settings import TrainSettings
from swan_surgery.experiments.processes import Processes


Images = Dataset[tuple[Tensor, int]]
_ALONE = Processes(torch.device("cpu"))


def seed_of(*parts: Any) -> int:
    """A seed for whatever the parts name, the same in every process and every run."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest())


class ShuffledBatches:
    """This process's share of every batch of an epoch, in random order; the last short batch is left out.

    Each image is augmented by a seed of its own, and torch's global generator is seeded before each
    batch: what an epoch does from a step on is the same whether it was left there or not, and, but for
    what the model draws, for any number of processes.
    """

    def __init__(
        self,
        images: Images,
        settings: TrainSettings,
        seed: int,
        *,
        first: int = 0,
        processes: Processes = _ALONE,
    ) -> None:
        """`first` is the step to begin with.

        Raises:
            InputError: batches that cannot be shared out evenly.
        """
        count = len(images)  # type: ignore[arg-type]  # every data set here has a length
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        steps = order.split(settings.batch)[: max(1, count // settings.batch)]
        if len(steps[0]) % processes.count:
            raise InputError(
                f"batches of {len(steps[0])} images cannot be shared out evenly among {processes.count} processes; "
                f"set batch to a multiple of {processes.count}"
            )
        self._shares = [
            own.tensor_split(processes.count)[processes.rank].tolist() for own in steps[first:]
        ]
        self._images, self._settings = _Seeded(images, seed), settings
        self._seeds = [seed_of(seed, step, processes.rank) for step in range(first, len(steps))]

    def __len__(self) -> int:
        """Steps that are left."""
        return len(self._shares)

    def __iter__(self) -> Iterator[Any]:
        """Images and labels, and what comes with them."""
        batches = _loader(self._images, self._shares, self._settings)
        for seed, batch in zip(self._seeds, batches, strict=True):
            seed_all(seed)
            yield batch


def in_order(
    images: Images, settings: TrainSettings, processes: Processes = _ALONE
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of all images, once."""
    own = range(processes.rank, len(images), processes.count)  # type: ignore[arg-type]
    shares = [list(own[i : i + settings.batch]) for i in range(0, len(own), settings.batch)]
    return iter(_loader(images, shares, settings))


class Taught(Images):
    """Images, labels, and a teacher's outputs, computed once: for images that stay as they are."""

    def __init__(
        self, images: Images, teacher: nn.Module, settings: TrainSettings, device: torch.device
    ) -> None:
        self._images = images
        with torch.no_grad():
            outputs = [teacher(x.to(device)).cpu() for x, _ in in_order(images, settings)]
        self._outputs = torch.cat(outputs)

    def __len__(self) -> int:
        """As many as there are images."""
        return len(self._images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        """Image, label, outputs."""
        return *self._images[index], self._outputs[index]


def seed_all(seed: int) -> None:
    """Seed torch's generators."""
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # which formats the stack once for every kind of device that is not there
        torch.default_generator.manual_seed(seed)


def _loader(images: Images, shares: list[list[int]], settings: TrainSettings) -> Any:
    return DataLoader(
        images,
        batch_sampler=shares,
        num_workers=settings.workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(0),  # of the workers' seeds, which draw nothing
    )


class _Seeded(Dataset[tuple[Tensor, int]]):
    """Seeds whatever is drawn for an image; the global generator stays as it was."""

    def __init__(self, images: Images, seed: int) -> None:
        self._images, self._seed = images, seed

    def __len__(self) -> int:
        return len(self._images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.default_generator
        before = generator.get_state()
        generator.manual_seed(seed_of(self._seed, index))
        try:
            return self._images[index]
        finally:
            generator.set_state(before)


__all__ = ["Images", "ShuffledBatches", "Taught", "in_order", "seed_all", "seed_of"]
