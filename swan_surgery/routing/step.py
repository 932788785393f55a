"""A switch as a step of a model's provenance: where it stands, and how its light branch was cut."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from swan_surgery.errors import ArtifactError
from swan_surgery.models import Inputs, copy_of
from swan_surgery.models.architecture import architecture_of, shapes_of
from swan_surgery.models.input_records import inputs_of_json, inputs_to_json
from swan_surgery.models.provenance import Provenance, note_, provenance_of
from swan_surgery.models.steps import Shapes, Step, StepKind, apply_step, check_steps, register_step
from swan_surgery.routing.parts import Ending, Parts, Switch
from swan_surgery.routing.routed_model import RoutedModel
from swan_surgery.routing.splitting import inner_name, split_at


ROUTE = "route"
_VERSION = 1


def route_step(routed: RoutedModel) -> Step:
    """The step that made a routed model's parts of the model they came from."""
    switches = []
    for own in routed.parts.chain:
        provenance = provenance_of(own.light)
        sizes = own.light.default.shape if isinstance(own.light, Ending) else ()
        switches.append(
            {
                "light": "default" if isinstance(own.light, Ending) else "cut",
                "steps": [] if provenance is None else [asdict(step) for step in provenance.steps],
                "default": list(sizes),
                "channels": own.switch.channels,
                "axis": own.switch.axis,
                "hidden": own.switch.hidden.out_features,
            }
        )
    shapes = {name: list(shape) for name, shape in shapes_of(routed.parts).items()}
    return Step(
        ROUTE,
        _VERSION,
        {
            "after": list(routed.after),
            "switches": switches,
            "inputs": inputs_to_json(routed.example_inputs),
            "shapes": shapes,
        },
    )


def _apply(model: nn.Module, step: Step) -> nn.Module:
    data = step.data
    inputs = inputs_of_json(data["inputs"])
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is not None:
        device = torch.device("cpu") if like.is_meta else like.device
        kind = like.dtype
        model = with_values_(model) if like.is_meta else model
        inputs = inputs.on(device, kind)
    model.eval()
    parts = _parts(model, inputs, data["after"], data["switches"])
    wanted = {str(name): tuple(shape) for name, shape in data["shapes"].items()}
    if shapes_of(parts) != wanted:
        raise ArtifactError(
            "the parts of the routed model have other shapes than those in the file"
        )
    return parts


def with_values_(model: nn.Module) -> nn.Module:
    """A model from the meta device, with weights on which it can be run; those of the file come later."""
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.rand(parameter.shape, generator=generator))
        for buffer in model.buffers():
            buffer.fill_(1 if buffer.is_floating_point() else 0)
    return model


def _parts(
    model: nn.Module, inputs: Inputs, names: Sequence[str], switches: Sequence[Mapping[str, Any]]
) -> Parts:
    own = switches[0]
    split = split_at(model, inner_name(model, str(names[0])), inputs)
    with torch.no_grad():
        crossing = inputs.run(split.trunk)
    is_ending = own["light"] == "default"
    if is_ending:
        light: nn.Module = Ending(crossing.new_zeros([int(size) for size in own["default"]]))
    else:
        light = copy_of(split.rest)
        base = architecture_of(light)
        steps = tuple(
            Step(str(e["kind"]), int(e["version"]), dict(e["data"])) for e in own["steps"]
        )
        check_steps(steps, written_by="another version")
        for step in steps:
            light = apply_step(light, step)
        note_(light, Provenance(base, steps))
    switch = Switch(
        int(own["channels"]), axis=int(own["axis"]), hidden=int(own["hidden"]), is_logit=is_ending
    ).to(crossing.device, crossing.dtype)
    full = split.rest
    if len(names) > 1:
        full = _parts(split.rest, Inputs((crossing,), {}), names[1:], switches[1:])
    return Parts(split.trunk, switch, light, full)


def _reshape(_shapes: Shapes, step: Step) -> Shapes:
    return {str(k): tuple(int(n) for n in shape) for k, shape in step.data["shapes"].items()}


register_step(ROUTE, StepKind(_VERSION, _apply, _reshape))

__all__ = ["route_step"]
