"""What `--data` names, as batches: tensors in safetensors files, images with labels, or images alone."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from swan_surgery.errors import InputError
from swan_surgery.experiments.classifier import (
    TrainSettings,
    input_channels,
    load_data,
    read_settings,
)
from swan_surgery.experiments.classifier.unlabelled import images_below
from swan_surgery.models import Inputs
from swan_surgery.models.batches import first_samples
from swan_surgery_cli.work.models import build_model
from swan_surgery_cli.work.subjects import inputs_in, tensors_in, with_weights


@dataclass(frozen=True, slots=True)
class Samples:
    """What a model is worked on with.

    Attributes:
        batches: again and again, each time in a new order: (inputs, labels), or inputs alone, or several inputs by
            name.
        test: (inputs, labels) that `batches` never has; None where there are no labels.
        example: one sample.
    """

    batches: Iterable[Any]
    test: Iterable[Any] | None
    example: Any


def model_with_samples(
    name: str, weights: Path | None, data: str, assignments: list[str] | None
) -> tuple[nn.Module, Samples]:
    """The model of a name, with weights from a file if one is given, and what `--data` names.

    Raises:
        InputError: no such model, file or data.
    """
    model = build_model(name, with_data=True).model
    model = model if weights is None else with_weights(model, weights)
    return model, samples_of(data, assignments, model)


def samples_of(data: str, assignments: list[str] | None, model: nn.Module) -> Samples:
    """Read what `--data` names.

    Args:
        data: a safetensors file or a folder of such files, with 'inputs' (and 'labels') or several inputs by name,
            samples first; a folder of images; or what `swan-surgery train` reads, with labels.
        assignments: of `--set`: how images are read, and the batch.
        model: that takes them.

    Raises:
        InputError: no such data.
    """
    settings = read_settings(None, [f"data={json.dumps(data)}", *(assignments or [])])
    root = Path(data)
    files = sorted(root.glob("*.safetensors")) if root.is_dir() else [root]
    if files and files[0].suffix == ".safetensors":
        return _tensors(files, root, settings)
    _tell_normalisation(settings, assignments or [])
    alone = None
    if root.is_dir() and not (root / "train").is_dir():
        alone = images_below(root, settings, input_channels(model))
    if alone is not None:
        example = torch.as_tensor(alone[0][0]).unsqueeze(0)
        return Samples(_InputsAlone(_loaded(alone, settings)), None, example)
    found = load_data(settings, input_channels(model))
    test = DataLoader(found.test, settings.batch, num_workers=settings.workers)
    return Samples(_loaded(found.train, settings), test, found.example())


def checked_labels(samples: Samples, data: str) -> Iterable[Any]:
    """Samples with labels that the model is not made with.

    Raises:
        InputError: there are none.
    """
    if samples.test is None:
        raise InputError(
            f"--labels: --data {data} has none, or several inputs beside them; a safetensors file has 'labels' beside "
            f"'inputs', a folder of images train/<class>/*"
        )
    return samples.test


def _tell_normalisation(settings: TrainSettings, assignments: list[str]) -> None:
    """A model that was trained on other numbers still runs on these, and is worked on wrongly."""
    if any(own.partition("=")[0].strip() in ("mean", "std") for own in assignments):
        return
    mean, std = list(settings.mean), list(settings.std)
    typer.echo(
        f"images in [0, 1] are normalised with mean {mean} and std {std}: if the model was trained otherwise, say "
        f"--set 'mean=[...]' --set 'std=[...]'",
        err=True,
    )


def _loaded(images: Any, settings: TrainSettings) -> Iterable[tuple[Tensor, Tensor]]:
    return DataLoader(
        images,
        settings.batch,
        shuffle=True,
        drop_last=len(images) >= settings.batch,
        num_workers=settings.workers,
        generator=torch.Generator().manual_seed(settings.seed),
    )


@dataclass(frozen=True, slots=True)
class _InputsAlone:
    """Batches without their labels, which mean nothing."""

    batches: Iterable[tuple[Tensor, Tensor]]

    def __iter__(self) -> Iterator[Tensor]:
        return (x for x, _ in self.batches)


def _tensors(files: list[Path], root: Path, settings: TrainSettings) -> Samples:
    parts = [tensors_in(file) for file in files]
    if any(part.keys() != parts[0].keys() for part in parts):
        raise InputError(f"--data {root}: its files hold tensors of different names")
    try:
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    except RuntimeError as err:
        raise InputError(f"--data {root}: its files do not fit each other: {err}") from err
    labels = tensors.pop("labels", None)
    given: Any = tensors
    if "inputs" in tensors or len(tensors) < 2:
        given = inputs_in(tensors, root)
        tensors = {"inputs": given}
    columns = [*tensors.values(), *([] if labels is None else [labels])]
    if len({len(own) if own.ndim else 0 for own in columns}) > 1 or not len(columns[0]):
        raise InputError(f"--data {root}: its tensors need as many samples each, one or more")
    batches = TensorBatches(given, labels, settings.batch, settings.seed)
    example = Inputs((), first_samples(given, 1)) if given is tensors else given[:1]
    if labels is None or given is tensors:
        return Samples(batches, None, example)
    order = torch.randperm(len(given), generator=torch.Generator().manual_seed(0))
    count = max(round(settings.held_out * len(given)), 1)
    held, rest = order[:count], order[count:]
    return Samples(
        TensorBatches(given[rest], labels[rest], settings.batch, settings.seed),
        list(
            zip(given[held].split(settings.batch), labels[held].split(settings.batch), strict=True)
        ),
        example,
    )


class TensorBatches:
    """Samples that are in memory, in a new order every time; the last short batch is left out."""

    def __init__(self, given: Any, labels: Tensor | None, batch: int, seed: int) -> None:
        self._given, self._labels, self._batch = given, labels, batch
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Any]:
        first = self._given if isinstance(self._given, Tensor) else next(iter(self._given.values()))
        order = torch.randperm(len(first), generator=self._generator)
        for index in order.split(self._batch)[: max(1, len(first) // self._batch)]:
            if not isinstance(self._given, Tensor):
                yield {name: own[index] for name, own in self._given.items()}
            elif self._labels is None:
                yield self._given[index]
            else:
                yield self._given[index], self._labels[index]


__all__ = ["Samples", "checked_labels", "model_with_samples", "samples_of"]
