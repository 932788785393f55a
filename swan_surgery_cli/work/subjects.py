"""What the commands work on: a model by its name, with random weights or those of a file."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from swan_surgery.artifacts import load
from swan_surgery.errors import InputError
from swan_surgery.models import Inputs
from swan_surgery.models.checks import infer_inputs
from swan_surgery_cli.work.checkpoints import TORCH_SUFFIXES, read_weights
from swan_surgery_cli.work.models import Subject, build_model, parse_inputs


def subject_of(name: str, weights: Path | None, shapes: list[str]) -> tuple[nn.Module, Inputs]:
    """The model of a name with data, weights from a file if one is given, and its example inputs.

    `weights` is a file of `swan.save` (the model is then what was saved: pruned, or gated), or
    safetensors or a `torch.save` checkpoint of a plain `state_dict`.

    Raises:
        InputError: no such model or file, weights that do not fit, inputs that cannot be guessed.
        ArtifactError: a damaged file, or one of another model.
    """
    subject = build_model(name, with_data=True)
    inputs = inputs_of(subject, shapes)
    model = subject.model if weights is None else with_weights(subject.model, weights)
    return model, inputs


def inputs_of(subject: Subject, shapes: list[str]) -> Inputs:
    """Those given, those that come with the model, or those that its first layer suggests."""
    given = parse_inputs(shapes, subject)
    return infer_inputs(subject.model)[0] if given is None else given


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


def tensors_in(path: Path) -> dict[str, Tensor]:
    """What the file of `--data` holds.

    Raises:
        InputError: it is no safetensors file.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as err:
        raise InputError(f"--data {path} is not a safetensors file: {err}") from err


def _is_ours(path: Path) -> bool:
    if path.suffix in TORCH_SUFFIXES:
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return "swan_surgery" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return path.suffix == ".swan"  # a damaged one is `load`'s to refuse
