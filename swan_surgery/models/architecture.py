"""A model as data: classes, settings and shapes; no weights."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


# The attribute that carries a provenance.
NOTE = "swan_provenance"
# What may change from run to run without changing what the model computes in eval mode.
_PASSING = {"training", "p", "inplace", "momentum", NOTE}
# Settings of torch's own modules that are worth a comparison in every step.
_QUICK = (int, bool, str, tuple)


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model as data: what a new instance must look like for the cuts to fit it.

    Attributes:
        name: the class of the model, as in `torchvision.models.resnet.ResNet`.
        modules: module name -> its class and its settings, numbers and texts among its attributes.
        shapes: parameter or buffer -> its shape, at full width; a tied one under its first name.
    """

    name: str
    modules: Mapping[str, tuple[str, Mapping[str, Any]]]
    shapes: Mapping[str, tuple[int, ...]]


def architecture_of(model: nn.Module) -> Architecture:
    """Describe a model: classes, settings and shapes; no weights."""
    modules = {
        name: (type(module).__qualname__, dict(_settings(module)))
        for name, module in model.named_modules(remove_duplicate=False)
    }
    kind = type(model)
    return Architecture(
        f"{kind.__module__}.{kind.__qualname__}",
        modules,
        shapes_of(model),
    )


def structure_of(model: nn.Module) -> tuple[object, ...]:
    """Classes, shapes, ties and torch's settings as one value to compare; quick, for every step.

    What decides how much a model computes, as far as that can be told without running it. Weights,
    types, devices, modes and `requires_grad` play no part.
    """
    found: list[object] = []
    numbers: dict[int, int] = {}  # modules and tensors in the order met: ties show
    waiting = [model]
    while waiting:
        module = waiting.pop()
        own = vars(module)
        if id(module) in numbers:
            found.append(numbers[id(module)])
            continue
        numbers[id(module)] = len(numbers)
        kind = type(module)
        found.append(f"{kind.__module__}.{kind.__qualname__}")
        if kind.__module__.startswith("torch.nn.") or isinstance(module, _ConvNd):
            found += [
                (name, value)
                for name, value in own.items()
                if name[0] != "_" and type(value) in _QUICK and name not in _PASSING
            ]
        for name, tensor in (*own["_parameters"].items(), *own["_buffers"].items()):
            if tensor is not None:
                number = numbers.setdefault(id(tensor), len(numbers))
                found.append((name, number, tensor.shape))
        for name, child in own["_modules"].items():
            found.append(name)
            if child is not None:
                waiting.append(child)
    return tuple(found)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter and buffer, a tied one under its first name."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def all_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters, then buffers, those outside the state dict included; a tied one under every name."""
    return [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Public attributes that decide what a module computes, as far as that can be told.

    Whole numbers and tuples of them; of torch's own modules also texts, flags and other numbers.
    Elsewhere those may be switches of training, as `gradient_checkpointing` is.
    """
    is_torch = type(module).__module__.startswith("torch.")
    kinds = (int, bool, float, str) if is_torch else (int,)
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or name in _PASSING:
            continue
        if type(value) in kinds:
            yield name, value
        elif isinstance(value, (tuple, list)) and all(type(item) in kinds for item in value):
            yield name, list(value)


def difference(saved: Architecture, given: Architecture) -> str | None:
    """The first thing in which a model is not the saved one; None if it is.

    Settings that only one of the two has are left alone: another version of torch may add some.
    """
    for name in [*saved.modules, *given.modules]:
        if name not in given.modules:
            return f"it has no module {name!r}"
        if name not in saved.modules:
            return f"its module {name!r} was not in the saved one"
        (kind, old), (own, new) = saved.modules[name], given.modules[name]
        place = f"module {name!r}" if name else "the model itself"
        if kind != own:
            return f"{place} is a {own}, saved was a {kind}"
        for key in old.keys() & new.keys():
            if json.dumps(old[key]) != json.dumps(new[key]):
                return f"{place} has {key}={new[key]!r}, saved was {old[key]!r}"
    for name in [*saved.shapes, *given.shapes]:
        if saved.shapes.get(name) != given.shapes.get(name):
            return f"{name} has shape {given.shapes.get(name)}, saved was {saved.shapes.get(name)}"
    return None
