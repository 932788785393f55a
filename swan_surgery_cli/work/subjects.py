"""What the commands work on: a model by its name, with random weights or those of a file."""

from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from swan_surgery.adaptive import AdaptiveModel
from swan_surgery.artifacts import load
from swan_surgery.errors import InputError
from swan_surgery.gates import GatedModel
from swan_surgery.models import Inputs
from swan_surgery.models.modes import evaluating
from swan_surgery.models.provenance import provenance_of
from swan_surgery.routing.routed_model import RoutedModel
from swan_surgery_cli.work.checkpoints import TORCH_SUFFIXES, read_weights
from swan_surgery_cli.work.models import Subject, build_model, guesses, misfit, parse_inputs


def subject_of(
    name: str, weights: Path | None, shapes: list[str], *, sample: Tensor | None = None
) -> tuple[nn.Module, Inputs]:
    """The model of a name with data, weights from a file if one is given, and its example inputs.

    Those are of the `shapes` given, else `sample` (of the data, where there are some), else those that come with
    the model, that the file remembers, or that are guessed.

    `weights` is a file of `swan.save` (the model is then what was saved: pruned, or gated), or
    safetensors or a `torch.save` checkpoint of a plain `state_dict`.

    Raises:
        InputError: no such model or file, weights that do not fit, inputs that cannot be guessed.
        ArtifactError: a damaged file, or one of another model.
    """
    subject = build_model(name, with_data=True)
    model = subject.model if weights is None else with_weights(subject.model, weights)
    told = shapes or sample is None
    return model, inputs_of(subject, shapes, model) if told else Inputs((sample,), {})


def remembered(model: nn.Module) -> Inputs | None:
    """Example inputs that a model of a `swan.save` file has: its own, or of the shapes of those it was cut with."""
    if isinstance(model, (GatedModel, RoutedModel)):
        return model.example_inputs
    if isinstance(model, AdaptiveModel):
        return model.structure.example_inputs
    provenance = provenance_of(model)
    return None if provenance is None else provenance.inputs


def inputs_of(subject: Subject, shapes: list[str], loaded: nn.Module) -> Inputs:
    """Those given, those that come with the model, those of the file, or those that the first layer suggests.

    Raises:
        InputError: not a shape, or the model does not run on what was guessed.
    """
    given = parse_inputs(shapes, subject) or remembered(loaded)
    if given is not None:
        return given
    guess, *_ = guesses(subject.model, type(subject.model).__name__)
    try:
        with evaluating(subject.model), torch.no_grad():
            subject.model(*guess.args)
    except Exception as err:
        raise misfit(subject.model, guess, err) from err
    return guess


def with_weights(model: nn.Module, path: Path) -> nn.Module:
    """The model as saved in a file, or with the weights in it.

    Raises:
        InputError: no such file, or weights that do not fit.
        ArtifactError: a damaged file of ours, or one of another model.
    """
    if not path.is_dir() and not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.is_dir() or _is_ours(path):
        return load(path, model)
    try:
        model.load_state_dict(read_weights(path, model.state_dict()))
    except RuntimeError as err:
        raise InputError(f"{path} does not fit {type(model).__name__}: {err}") from err
    return model


def read_rounding(text: str) -> int | Literal["auto"]:
    """What `--round-to` says.

    Raises:
        InputError: neither a number nor auto.
    """
    if text == "auto":
        return "auto"
    if not text.isdecimal():
        raise InputError(f"--round-to {text}: a number of channels, or auto")
    return int(text)


def tensors_in(path: Path) -> dict[str, Tensor]:
    """What the file of `--data` holds.

    Raises:
        InputError: it is no safetensors file.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as err:
        raise InputError(f"--data {path} is not a safetensors file: {err}") from err


def inputs_in(tensors: dict[str, Tensor], path: Path) -> Tensor:
    """The samples of a file of `--data`: what is called `inputs`, or its only tensor beside `labels`.

    Raises:
        InputError: neither is there.
    """
    named = [name for name in tensors if name != "labels"]
    name = "inputs" if "inputs" in tensors or len(named) != 1 else named[0]
    if name not in tensors or not tensors[name].ndim:
        raise InputError(
            f"--data {path} holds {', '.join(map(repr, tensors)) or 'nothing'}; call the samples 'inputs'"
        )
    return tensors[name]


def _is_ours(path: Path) -> bool:
    if path.suffix in TORCH_SUFFIXES:
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return "swan_surgery" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return path.suffix == ".swan"  # a damaged one is `load`'s to refuse
