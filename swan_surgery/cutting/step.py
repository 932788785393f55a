"""A cut as a step of a model's provenance: its plan, and how it is done to a fresh model."""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from swan_surgery.calls.arguments import Factor
from swan_surgery.calls.functions import RESIZABLE
from swan_surgery.channels.rehearsal.numbers import Place
from swan_surgery.costs.macs import cost_table
from swan_surgery.cutting.own_saving import warn_on_save_pretrained_
from swan_surgery.cutting.plan import PruningPlan
from swan_surgery.errors import ArtifactError, CostError, InputError
from swan_surgery.gates import GatedModel
from swan_surgery.models import copy_of
from swan_surgery.models.architecture import shapes_of
from swan_surgery.models.attributes import Attribute, whole_numbers_of
from swan_surgery.models.configurations import HEAD_DIM, change_, numbers_of
from swan_surgery.models.provenance import inputs_noted
from swan_surgery.models.slicing import cut_
from swan_surgery.models.slim_attention import put_back_, write_out_
from swan_surgery.models.steps import Shapes, Step, StepKind, StepMacs, register_step


CUT = "cut"
CONFIGURATION = "configuration"  # of the step's data, where it is there: what its numbers became
_VERSION = 1


def cut_step(gated: GatedModel, plan: PruningPlan, mask: Tensor) -> Step:
    """The step that cuts a gated model to an open mask, bool of shape (num_units,)."""
    data = {"plan": plan.to_json(), **inputs_noted(gated.example_inputs)}
    return Step(CUT, _VERSION, data, _macs(gated, mask))


def _macs(gated: GatedModel, mask: Tensor) -> StepMacs | None:
    try:
        table = cost_table(gated)
    except (CostError, InputError):
        return None  # a cut is right whether or not somebody can count it
    inputs: Any = (gated.example_inputs.args, dict(gated.example_inputs.kwargs))
    shapes = tuple(tuple(leaf.shape) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
    after = table.at(mask.double().to(table.factors.device))
    return StepMacs(int(table.total), int(after), shapes)


def apply_plan(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Cut a copy of a base model as planned; the same plan works on any copy of the same model."""
    return apply_plan_(copy_of(model), plan)


def apply_plan_(copy: nn.Module, plan: PruningPlan) -> nn.Module:
    """The same on a private copy, which is used up."""
    copy = write_out_(copy)
    cuts: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for entry in plan.positions:
        cuts[entry.tensor][entry.axis] = torch.tensor(entry.kept)
    cut_(copy, cuts)
    for a in plan.attributes:
        Attribute(a.module, a.name, a.index).write_(copy, a.value)
    for n in plan.numbers:
        place = Place(n.module, n.function, n.number, n.leaf, n.training, n.site)
        place.write_(copy, Factor(n.value) if n.is_factor else n.value)
    return warn_on_save_pretrained_(put_back_(copy))


def _apply(model: nn.Module, step: Step) -> nn.Module:
    plan = _plan(step, shapes_of(model))
    _check(model, plan)
    result = apply_plan(model, plan)
    config: Any = getattr(result, "config", None)
    numbers = step.data.get(CONFIGURATION, {})
    if numbers and config is not None:
        known = dict(numbers_of(config))
        for name, value in numbers.items():
            most = max(known.values()) if name.endswith(HEAD_DIM) else known.get(name, 0)
            if type(value) is not int or not 1 <= value <= most:
                raise ArtifactError(
                    f"the file sets {name!r} of the configuration to {value!r}, which was {known.get(name)}"
                )
        change_(config, numbers)
    return result


def _reshape(shapes: Shapes, step: Step) -> Shapes:
    found = {name: list(shape) for name, shape in shapes.items()}
    for entry in _plan(step, shapes).positions:
        if entry.tensor in found:  # a plain attribute is no part of the state
            found[entry.tensor][entry.axis] = len(entry.kept)
    return {name: tuple(shape) for name, shape in found.items()}


def _plan(step: Step, shapes: Shapes) -> PruningPlan:
    return PruningPlan.from_json(step.data["plan"], shapes=shapes)


def _check(model: nn.Module, plan: PruningPlan) -> None:
    """Nothing may be written into a model but what a map of it could ask for: widths that shrink."""
    for entry in plan.attributes:
        owner = model.get_submodule(entry.module)
        found = {(name, index): number for name, index, number in whole_numbers_of(owner)}
        before = found.get((entry.name, entry.index))
        if before is None:
            raise ArtifactError(
                f"the file sets {entry.name!r} of module {entry.module!r}, which is no width"
            )
        if type(entry.value) is not int or not 0 <= entry.value < before:
            raise ArtifactError(
                f"the file sets {entry.name!r} of module {entry.module!r} to {entry.value!r}; a width "
                f"of {before} can become 0 to {before - 1}"
            )
    for number in plan.numbers:
        is_number = type(number.value) in (int, float) and math.isfinite(number.value)
        if number.function not in RESIZABLE or not is_number:
            raise ArtifactError(
                f"the file replaces a number in {number.function!r} by {number.value!r}"
            )


register_step(CUT, StepKind(_VERSION, _apply, _reshape))


__all__ = ["apply_plan", "apply_plan_", "cut_step"]
