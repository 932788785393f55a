"""Where a pruned model comes from: the model it was cut out of, as data, and the cuts.

A file of weights alone does not say how to build the network they fit. So what `swanify` is given is
described once, every cut is noted, and the note travels with the model, as one string among its
attributes: plain text survives `copy.deepcopy` and binds nothing to this package. `artifacts` reads
it to save the model, and to rebuild it from a new instance of the class.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from swan_surgery.errors import InputError


NOTE = "swan_provenance"  # the attribute
_VERSION = 1
# What may change from run to run without changing what the model computes in eval mode.
_PASSING = {"training", "p", "inplace", "momentum", NOTE}


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


@dataclass(frozen=True, slots=True)
class Cut:
    """One `prune`: its plan (`PruningPlan.to_json`) and what it saved, at the example inputs' shapes."""

    plan: str
    macs_before: int
    macs_after: int
    input_shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Provenance:
    """The base model's architecture, and the cuts since, oldest first."""

    base: Architecture
    cuts: tuple[Cut, ...] = field(default=())

    def to_json(self) -> str:
        """Versioned JSON; every class with its settings stands there once."""
        kinds: dict[str, int] = {}
        modules = {
            name: kinds.setdefault(json.dumps(entry), len(kinds))
            for name, entry in self.base.modules.items()
        }
        data = {
            "version": _VERSION,
            "class": self.base.name,
            "kinds": [json.loads(kind) for kind in kinds],
            "modules": modules,
            "shapes": self.base.shapes,
            "cuts": [asdict(cut) for cut in self.cuts],
        }
        return json.dumps(data, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Provenance":
        """Read what `to_json` wrote.

        Raises:
            InputError: not a provenance, or of another version.
        """
        try:
            data = json.loads(text)
            if data["version"] != _VERSION:
                raise InputError(f"provenance of version {data['version']}, not {_VERSION}")
            kinds = [(str(kind), dict(own)) for kind, own in data["kinds"]]
            modules = {str(name): kinds[index] for name, index in data["modules"].items()}
            shapes = {str(k): tuple(map(int, shape)) for k, shape in data["shapes"].items()}
            cuts = tuple(
                Cut(
                    str(cut["plan"]),
                    int(cut["macs_before"]),
                    int(cut["macs_after"]),
                    tuple(tuple(map(int, shape)) for shape in cut["input_shapes"]),
                )
                for cut in data["cuts"]
            )
            return cls(Architecture(str(data["class"]), modules, shapes), cuts)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as err:
            if isinstance(err, InputError):
                raise
            raise InputError(f"not a provenance: {type(err).__name__}: {err}") from err


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


def provenance_of(model: nn.Module) -> Provenance | None:
    """The note a model carries, if it carries one."""
    text = vars(model).get(NOTE)
    return Provenance.from_json(text) if isinstance(text, str) else None


def note_(model: nn.Module, provenance: Provenance) -> None:
    """Attach a note to a private model."""
    setattr(model, NOTE, provenance.to_json())
