"""Where a model comes from: the model it was made of, as data, and the steps since.

A file of weights alone does not say how to build the network they fit. So what `swanify` is given is
described once, every step is noted (`steps`), and the note travels with the model, as one string among its
attributes: plain text survives `copy.deepcopy` and binds nothing to this package. `artifacts` reads
it to save the model, and to rebuild it from a new instance of the class.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from swan_surgery.errors import InputError
from swan_surgery.models.architecture import NOTE, Architecture
from swan_surgery.models.input_records import inputs_of_json, inputs_to_json, plain_inputs
from swan_surgery.models.inputs import Inputs
from swan_surgery.models.steps import Step, StepMacs


# 1 knew of cuts alone; it is still read.
_VERSION = 2
_INPUTS = "inputs"  # of a step's data, where it is there
# What reading JSON of another shape ends in; ArithmeticError: an infinite number is no whole one.
_MALFORMED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)


@dataclass(frozen=True, slots=True)
class Provenance:
    """The base model's architecture, and what was done to it since, oldest first."""

    base: Architecture
    steps: tuple[Step, ...] = field(default=())

    @property
    def macs(self) -> StepMacs | None:
        """All steps as one; None without any, or where some could not be counted."""
        counted = [step.macs for step in self.steps if step.macs is not None]
        if not counted or len(counted) < len(self.steps):
            return None
        return StepMacs(counted[0].before, counted[-1].after, counted[-1].input_shapes)

    @property
    def inputs(self) -> Inputs | None:
        """Example inputs of the shapes and types of the last step's that noted some; without what they said."""
        noted = [step.data[_INPUTS] for step in self.steps if _INPUTS in step.data]
        try:
            return inputs_of_json(noted[-1]) if noted else None
        except (*_MALFORMED, RuntimeError) as err:
            raise InputError(f"not example inputs: {type(err).__name__}: {err}") from err

    def followed_by(self, step: Step) -> "Provenance":
        """With one more step."""
        return Provenance(self.base, (*self.steps, step))

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
            "steps": [asdict(step) for step in self.steps],
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
            version = data["version"]
            if version not in range(1, _VERSION + 1):
                raise InputError(
                    f"provenance of version {version}; this version reads 1 to {_VERSION}"
                )
            kinds = [(str(kind), dict(own)) for kind, own in data["kinds"]]
            modules = {str(name): kinds[index] for name, index in data["modules"].items()}
            shapes = {str(k): tuple(map(int, shape)) for k, shape in data["shapes"].items()}
            steps = tuple(
                map(_first_version_step, data["cuts"])
                if version == 1
                else map(_step, data["steps"])
            )
            return cls(Architecture(str(data["class"]), modules, shapes), steps)
        except (*_MALFORMED, RecursionError) as err:
            if isinstance(err, InputError):
                raise
            raise InputError(f"not a provenance: {type(err).__name__}: {err}") from err


def inputs_noted(inputs: Inputs) -> dict[str, Any]:
    """The entry of a step's data that says what the model was run on; none for inputs that are no plain data."""
    return {_INPUTS: inputs_to_json(inputs, values=False)} if plain_inputs(inputs) else {}


def _step(entry: Mapping[str, Any]) -> Step:
    macs = entry["macs"]
    data = {str(name): value for name, value in entry["data"].items()}
    return Step(
        str(entry["kind"]), int(entry["version"]), data, None if macs is None else _macs(macs)
    )


def _macs(entry: Mapping[str, Any]) -> StepMacs:
    shapes = tuple(tuple(map(int, shape)) for shape in entry["input_shapes"])
    return StepMacs(int(entry["before"]), int(entry["after"]), shapes)


def _first_version_step(cut: Mapping[str, Any]) -> Step:
    macs = {"before": cut["macs_before"], "after": cut["macs_after"], **cut}
    return Step("cut", 1, {"plan": str(cut["plan"])}, _macs(macs))


def provenance_of(model: nn.Module) -> Provenance | None:
    """The note a model carries, if it carries one."""
    text = vars(model).get(NOTE)
    return Provenance.from_json(text) if isinstance(text, str) else None


def note_(model: nn.Module, provenance: Provenance) -> None:
    """Attach a note to a private model."""
    setattr(model, NOTE, provenance.to_json())
