"""Models built from a configuration of numbers, as transformers' are: which number says which width.

Nothing is known of any class: it is built on the meta device with one number doubled, and what grew is
what the number says. A head keeps its width, so that `head_dim` is written down where the class reads it.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from swan_surgery.models.architecture import shapes_of
from swan_surgery.models.subclasses import own_class


Axis = tuple[str, int]  # parameter or buffer, and its axis
HEAD_DIM = "head_dim"


def configuration_of(model: nn.Module) -> Any | None:
    """The configuration a model can be built from again, as `type(model)(configuration)`; else None."""
    config = getattr(model, "config", None)
    if not (hasattr(config, "to_dict") and hasattr(type(config), "from_dict")):
        return None
    return config if shapes_by(model, config) is not None else None


def shapes_by(model: nn.Module, config: Any) -> dict[str, tuple[int, ...]] | None:
    """Shapes of a new model of the same class with a configuration; None where it cannot be built."""
    try:
        with torch.device("meta"):
            return shapes_of(own_class(model)(copy.deepcopy(config)))
    except Exception:  # noqa: BLE001 - classes refuse configurations in all sorts of ways
        return None


def head_widths(model: nn.Module, config: Any) -> dict[str, int]:
    """The width of a head, by dotted name, wherever the class reads it and the configuration is silent."""
    found = {}
    for prefix, own in _named_parts(config):
        hidden, heads = getattr(own, "hidden_size", None), getattr(own, "num_attention_heads", None)
        is_said = getattr(own, HEAD_DIM, None) is not None
        if is_said or type(hidden) is not int or type(heads) is not int or not heads:
            continue
        name = f"{prefix}{HEAD_DIM}"
        twice = shapes_by(model, changed(config, {name: 2 * (hidden // heads)}))
        if twice not in (None, shapes_by(model, config)):
            found[name] = hidden // heads
    return found


def widths_said(model: nn.Module, config: Any) -> dict[str, frozenset[Axis]]:
    """The numbers of a configuration that say widths: dotted name -> the axes that grow with it.

    A number of heads that moves no axis (BERT's) has none: it goes with the hidden size.
    """
    whole = shapes_by(model, config) or {}
    found = {}
    for name, value in numbers_of(config):
        doubled = shapes_by(model, changed(config, {name: 2 * value}))
        if doubled is None or doubled.keys() != whole.keys():
            continue
        axes = frozenset(
            (tensor, axis)
            for tensor, shape in whole.items()
            for axis, (old, new) in enumerate(zip(shape, doubled[tensor], strict=False))
            if old != new
        )
        if axes or "head" in name:
            found[name] = axes
    return found


def numbers_of(config: Any) -> Iterator[tuple[str, int]]:
    """Dotted names and values of the whole numbers that may be widths; a head's own width is none."""
    for prefix, own in _named_parts(config):
        for name, value in own.to_dict().items():
            if type(value) is int and value > 1 and name != HEAD_DIM:
                yield f"{prefix}{name}", value


def changed(config: Any, values: Mapping[str, int]) -> Any:
    """A copy of a configuration with other numbers; nothing checks whether they go together."""
    found = copy.deepcopy(config)
    change_(found, values)
    return found


def change_(config: Any, values: Mapping[str, int]) -> None:
    """Set numbers of a configuration."""
    for name, value in values.items():
        *path, last = name.split(".")
        own = config
        for step in path:
            own = getattr(own, step)
        setattr(own, last, value)


def is_valid(model: nn.Module, config: Any) -> bool:
    """Whether a configuration and its model can be made: some ask for widths that heads divide."""
    try:
        type(config).from_dict(config.to_dict())
    except Exception:  # noqa: BLE001 - each has its own way to refuse
        return False
    return shapes_by(model, config) is not None


def misfit(model: nn.Module) -> str | None:
    """What a model's own configuration cannot say of its widths, in words; None where it says them all."""
    config = configuration_of(model)
    if config is None:
        return "its class makes no model of the configuration it has"
    whole, found = shapes_by(model, config), shapes_of(model)
    if whole == found:
        return None
    single = "it says other widths than the model has"
    for name, axes in widths_said(model, config).items():
        value = dict(numbers_of(config))[name]
        wanted: dict[float, str] = {}
        for tensor, axis in sorted(axes):
            if whole is not None and axis < len(found.get(tensor, ())):
                share = found[tensor][axis] / whole[tensor][axis]
                wanted.setdefault(share * value, tensor)
        if len(wanted) > 1:
            cases = [f"{size:g} in {tensor!r}" for size, tensor in wanted.items()]
            return f"{name}={value} would have to be {' and '.join(cases[:2])}"
        if wanted and value not in wanted:
            single = f"it says {name}={value}, the model has {next(iter(wanted)):g}"
    return single


def _named_parts(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    yield prefix, config
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(type(value), "from_dict"):
            yield from _named_parts(value, f"{prefix}{name}.")


__all__ = [
    "HEAD_DIM",
    "Axis",
    "change_",
    "changed",
    "configuration_of",
    "head_widths",
    "is_valid",
    "misfit",
    "numbers_of",
    "shapes_by",
    "widths_said",
]
