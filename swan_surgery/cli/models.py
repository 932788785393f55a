"""From a name on the command line to a model with random weights and its example inputs."""

import difflib
import inspect
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from swan_surgery.errors import InputError


_TORCHVISION = "torchvision:"
# They draw every weight with scipy; the values do not matter here.
_SLOW_TO_INITIALISE = ("googlenet", "inception_v3")


def build_model(name: str) -> nn.Module:
    """A torchvision model by name (`torchvision:` in front or not), or what a factory returns.

    Weights are never loaded. Torchvision models are built on the meta device where they can be, so
    that size does not matter.

    Raises:
        InputError: no such model or factory, or the factory fails.
    """
    wanted = name.removeprefix(_TORCHVISION)
    if wanted in torchvision.models.list_models():
        return _torchvision_model(wanted)
    if ":" in name and not name.startswith(_TORCHVISION):
        return _from_factory(name)
    known = torchvision.models.list_models()
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    hint = f"nearest torchvision names: {', '.join(near)}" if near else "see torchvision's models"
    raise InputError(f"no model {name!r}; {hint}; your own: package.module:factory")


def _torchvision_model(name: str) -> nn.Module:
    builder = torchvision.models.get_model_builder(name)
    known = inspect.signature(builder).parameters
    options: dict[str, Any] = {"weights": None}
    # A segmentation or detection model would download its backbone by default.
    if "weights_backbone" in known:
        options["weights_backbone"] = None
    if name in _SLOW_TO_INITIALISE:
        options["init_weights"] = False
    try:
        with torch.device("meta"):
            model: nn.Module = builder(**options)
    except (RuntimeError, NotImplementedError):  # it reads a value while it is built
        model = builder(**options)
    return model.eval()


def _from_factory(name: str) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    # A console script does not have the working folder on its path; `python -m` has.
    folder = str(os.getcwd())  # noqa: PTH109 - sys.path wants a string
    added = folder not in sys.path
    if added:
        sys.path.insert(0, folder)
    try:
        module = import_module(module_name)
    except ImportError as err:
        raise InputError(f"cannot import {module_name!r}: {err}") from err
    finally:
        if added:
            sys.path.remove(folder)
    factory: Callable[[], object] | None = getattr(module, attribute, None)
    if not callable(factory):
        raise InputError(f"module {module_name!r} has no function {attribute!r}")
    try:
        model = factory()
    except Exception as err:
        raise InputError(f"{name} failed: {type(err).__name__}: {err}") from err
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} returned {type(model).__name__}, not a torch.nn.Module")
    return model


def parse_inputs(texts: list[str], model: nn.Module) -> tuple[Tensor, ...]:
    """Meta tensors of the shapes given as `1,3,224,224`, in the model's dtype.

    Raises:
        InputError: not a shape.
    """
    reference = next((p for p in model.parameters() if p.is_floating_point()), None)
    dtype = torch.float32 if reference is None else reference.dtype
    found = []
    for text in texts:
        try:
            shape = [int(part) for part in text.split(",")]
        except ValueError:
            shape = [0]
        if min(shape) < 1:
            raise InputError(f"--input {text!r} is not a shape; write it like 1,3,224,224")
        found.append(torch.empty(shape, dtype=dtype, device="meta"))
    return tuple(found)
