"""Where a pruned model comes from: the model it was cut out of, as data, and the cuts.

A file of weights alone does not say how to build the network they fit. So what `swanify` is given is
described once, every cut is noted, and the note travels with the model, as one string among its
attributes: plain text survives `copy.deepcopy` and binds nothing to this package. `artifacts` reads
it to save the model, and to rebuild it from a new instance of the class.
"""

import json
from dataclasses import asdict, dataclass, field

from torch import nn

from swan_surgery.errors import InputError
from swan_surgery.models.architecture import NOTE, Architecture


_VERSION = 1


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


def provenance_of(model: nn.Module) -> Provenance | None:
    """The note a model carries, if it carries one."""
    text = vars(model).get(NOTE)
    return Provenance.from_json(text) if isinstance(text, str) else None


def note_(model: nn.Module, provenance: Provenance) -> None:
    """Attach a note to a private model."""
    setattr(model, NOTE, provenance.to_json())
