"""A width as a static model: the library's own cut, and the means of what went in the biases."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from swan_surgery.adaptive.structure import Structure
from swan_surgery.cutting.plan import PruningPlan, make_plan
from swan_surgery.cutting.step import CUT, apply_plan_
from swan_surgery.errors import ArtifactError
from swan_surgery.models import shell_of
from swan_surgery.models.bare_norms import bare_norms, follow_width, follow_widths_
from swan_surgery.models.provenance import inputs_noted, note_, provenance_of
from swan_surgery.models.steps import Shapes, Step, StepKind, StepMacs, register_step


BIAS = "bias"
_VERSION = 1


def give_bias_(layer: nn.Module) -> bool:
    """A bias of zeros for a layer that has none; whether it had none."""
    own: Any = layer
    if own.bias is not None:
        return False
    weight = own.weight
    bias = torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)
    own.bias = nn.Parameter(bias, requires_grad=weight.requires_grad)
    return True


def shell_at(model: nn.Module, plan: PruningPlan, readers: Iterable[str]) -> nn.Module:
    """A cut without data; the readers have biases, for the means of what went."""
    shell = apply_plan_(shell_of(model), plan)
    for reader in readers:
        give_bias_(shell.get_submodule(reader))
    for norm in bare_norms(shell):
        norm.register_forward_pre_hook(follow_width)
    return shell


def fixed(
    dense: nn.Module,
    structure: Structure,
    mask: Tensor,
    parts: Mapping[str, Mapping[str, Tensor]],
    *,
    macs: tuple[int, int],
    own_readers: Iterable[str] = (),
) -> nn.Module:
    """The static model of an open mask.

    Args:
        dense: a private model at full width; used up.
        structure: what adapts.
        mask: open units, bool of shape (num_units,).
        parts: parameters and buffers of every block as it runs under the mask.
        macs: per sample, before and after.
        own_readers: with weights of their own there, and biases, though they may read all units.
    """
    provenance = provenance_of(dense)
    plan = make_plan(structure.channels, mask)
    small = apply_plan_(dense, plan)
    narrow = [g for g in structure.groups if not bool(mask[list(g.units)].all())]
    readers = [*(reader for group in narrow for reader in group.readers), *own_readers]
    biased = [reader for reader in readers if give_bias_(small.get_submodule(reader))]
    for name, own in parts.items():
        block = small.get_submodule(name)
        with torch.no_grad():
            for key, tensor in _tensors(block).items():
                if key in own:
                    tensor.copy_(own[key])
    device = next(iter(small.parameters())).device
    follow_widths_(small, structure.example_inputs.map(lambda tensor: tensor.to(device)))
    if provenance is not None:
        shapes = tuple(tuple(leaf.shape) for leaf in structure.samples())
        batch = shapes[0][0] if shapes else 1
        steps = StepMacs(macs[0] * batch, macs[1] * batch, shapes)
        data: dict[str, Any] = {
            "plan": plan.to_json(),
            **inputs_noted(structure.example_inputs),
        }
        provenance = provenance.followed_by(Step(CUT, 1, data, steps))
        if biased:
            data = {"layers": biased}
            provenance = provenance.followed_by(
                Step(BIAS, _VERSION, data, StepMacs(steps.after, steps.after, shapes))
            )
        note_(small, provenance)
    return small


def _tensors(block: nn.Module) -> dict[str, Tensor]:
    named = [*block.named_parameters(remove_duplicate=False)]
    return dict([*named, *block.named_buffers(remove_duplicate=False)])


def _layers(step: Step) -> list[str]:
    layers = step.data.get("layers")
    if not isinstance(layers, list) or not all(isinstance(name, str) for name in layers):
        raise ArtifactError("the file gives a bias to what is no list of layers")
    return layers


def _apply(model: nn.Module, step: Step) -> nn.Module:
    for name in _layers(step):
        layer = model.get_submodule(name)
        if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
            raise ArtifactError(f"the file gives a bias to {name!r}, a {type(layer).__name__}")
        give_bias_(layer)
    return model


def _reshape(shapes: Shapes, step: Step) -> Shapes:
    found = dict(shapes)
    for name in _layers(step):
        weight = found.get(f"{name}.weight" if name else "weight")
        if weight is None:
            raise ArtifactError(f"the file gives a bias to {name!r}, which has no weight")
        found[f"{name}.bias" if name else "bias"] = weight[:1]
    return found


register_step(BIAS, StepKind(_VERSION, _apply, _reshape))


__all__ = ["fixed", "give_bias_", "shell_at"]
