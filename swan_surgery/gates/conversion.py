"""`swanify` puts gates into a copy of a model; `unswanify` takes them out again."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from swan_surgery.channels import PINNED, ChannelMap, channel_map, match_modules, patterns_of
from swan_surgery.errors import InputError, NoGateableChannelsError, TraceError, UnsupportedOpError
from swan_surgery.gates.checks import check_changeable, check_gated, name_what_trains
from swan_surgery.gates.gated_model import GatedModel
from swan_surgery.gates.graph.gating import GraphPlan, gate_graph, plan_graph
from swan_surgery.gates.in_place_gating import gate_in_place
from swan_surgery.models import Inputs, copy_of, without_collection
from swan_surgery.models.architecture import architecture_of
from swan_surgery.models.checks import check_data, checked_inputs, described, infer_inputs
from swan_surgery.models.provenance import Provenance, note_, provenance_of
from swan_surgery.models.slim_attention import put_back_, write_out_


# Gates start in the order of the weights' magnitudes, and costs are counted on real runs.
_INSERT = "put gates in"


def swanify(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    ignore: Iterable[str] = (),
    free_outputs: Iterable[str] = (),
    strict: bool = False,
    in_place: bool | None = None,
) -> GatedModel:
    """Retrofit a learnable gate onto every channel of a copy of `model`.

    Args:
        model: an `nn.Module`; it is not changed.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments. May be left
            out where it can be inferred: `(1, in_channels, 224, 224)` for a model that starts with
            a 2-d convolution, `(1, in_features)` for one that starts with a linear layer.
        ignore: module names or glob patterns whose output channels get no gate.
        free_outputs: outputs that nobody needs whole, as the feature maps that a detector returns beside
            its boxes: indices, keys and attributes joined by dots, or glob patterns (`"1.*"`, `"feats.*"`;
            in either mode). They pin nothing. The gated model returns them at full width (what a closed
            gate stops there may be zero or not), the pruned model returns the channels that stay, and
            those are compared.
        strict: raise where an operation without a channel rule would pin channels.
        in_place: True: the model's own Python code runs, gates act on its parameters and statistics.
            False: gates go into the graph that torch.fx traces. None: the graph where that is shown to
            be the model and gates as many channels, else in place; `explain()` says which, and why.

    Returns:
        The gated model, in the mode of the given model. All gates are open.

    Raises:
        ModelError: not an `nn.Module`, already gated, scripted, quantized, or on the meta device.
        InputError: example inputs cannot be inferred, or do not fit; or `ignore` or `free_outputs`
            matches nothing.
        TraceError: the model cannot be run; or `in_place=False` and its trace is not the model.
        UnsupportedOpError: `strict=True` and some channels are pinned by unknown operations.
        NoGateableChannelsError: every channel is pinned.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> gated = swan.swanify(net, torch.zeros(1, 3))
        >>> gated.gates.num_units
        8
        >>> torch.equal(gated.eval()(torch.ones(1, 3)), net(torch.ones(1, 3)))
        True
    """
    check_changeable(model)
    name_what_trains(model)
    ignore = patterns_of(ignore, "ignore")
    match_modules(model, ignore)
    free = patterns_of(free_outputs, "free_outputs")
    channels, inputs = _map(model, example_inputs, ignore, free)
    if strict and channels.unknown:
        raise _unsupported(channels)
    if channels.notes:
        raise InputError(f"{channels.notes[0]}; pass example_inputs on which both modes run")
    _require_units(channels)
    with without_collection(), torch.inference_mode(mode=False):
        copy = write_out_(copy_of(model))
        plan = _plan_graph(copy, channels, inputs, in_place=in_place)
        _restore_modes(model, copy)
        if isinstance(plan, str):
            gated, way = gate_in_place(copy, channels, inputs), f"in place: {plan}"
        else:
            _require_units(plan.channels)
            gated = gate_graph(copy, plan, inputs)
            way = "graph: torch.fx traces the model faithfully"
        _require_units(gated.channels)
        note_(gated.model, provenance_of(model) or Provenance(architecture_of(model)))
        gated.channels = replace(gated.channels, way=way)
        gated.ignored, gated.free_outputs = ignore, free
        return gated


def _unsupported(channels: ChannelMap) -> UnsupportedOpError:
    count = len(channels.unknown)
    head = (
        "1 operation has no channel rule:"
        if count == 1
        else f"{count} operations have no channel rule:"
    )
    lines = [f"  {entry}" for entry in channels.unknown]
    hint = (
        "swan.register_rule says what an operation does to channels. "
        "Without strict=True the channels that meet them stay as they are; all others get gates."
    )
    return UnsupportedOpError("\n".join([head, *lines, hint]), pins=channels.pins)


def _plan_graph(
    copy: nn.Module, channels: ChannelMap, inputs: Inputs, *, in_place: bool | None
) -> GraphPlan | str:
    """Gates in the traced graph; or, in words, why they had better act in place."""
    if in_place:
        return "as asked for"
    if in_place is None and channels.statistics:
        return "statistics over channels count them with their gates"
    weighted = {unit for entry in channels.statistics for unit in entry.units if unit != PINNED}
    if weighted:
        channels = channels.without(weighted, "a statistic that a graph cannot weigh", "fx")
    try:
        plan = plan_graph(copy, channels, inputs)
    except TraceError as err:
        if in_place is None:
            return str(err)
        raise
    lost = channels.num_units - plan.channels.num_units
    if in_place is None and lost > len(channels.ungated_reads):
        return "a graph would leave more channels without a gate"
    return plan


def unswanify(gated: GatedModel) -> nn.Module:
    """Take the gates out: a copy of the base model with the weights as trained.

    The result has the given class, `state_dict` keys and mode. Closed gates leave no trace: use
    `prune` to remove what they closed.

    Raises:
        ModelError: `gated` is not a gated model.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> gated = swan.swanify(net, torch.zeros(1, 3))
        >>> swan.unswanify(gated)
        Sequential(
          (0): Linear(in_features=3, out_features=8, bias=True)
          (1): ReLU()
          (2): Linear(in_features=8, out_features=2, bias=True)
        )
    """
    check_gated(gated)
    return put_back_(gated.base_model())


def _map(
    model: nn.Module,
    example_inputs: Any,
    ignore: Iterable[str],
    free: Iterable[str],
) -> tuple[ChannelMap, Inputs]:
    if example_inputs is not None:
        inputs = checked_inputs(model, example_inputs, to=_INSERT)
        try:
            return channel_map(model, inputs, ignore=ignore, free_outputs=free), inputs
        except TraceError as err:
            own = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
            raise InputError(
                f"{err}; given {described(inputs)} and parameters of {' and '.join(own) or 'no type'}: "
                f"pass example_inputs that the model accepts"
            ) from err
    check_data(model, to=_INSERT)
    candidates = infer_inputs(model)
    failed: list[TraceError] = []
    for inputs in candidates:
        try:
            channels = channel_map(model, inputs, ignore=ignore, free_outputs=free)
        except TraceError as err:
            failed.append(err)
            continue
        if not channels.notes or inputs is candidates[-1]:
            return channels, inputs
    raise InputError(
        f"the example inputs guessed from the first layer do not fit: {'; '.join(map(str, failed))}; "
        f"pass example_inputs=..."
    )


def _require_units(channels: ChannelMap) -> None:
    if channels.num_units:
        return
    why = "\n".join(f"  {pin}" for pin in channels.pins[:8]) or "  it has no conv or linear layer"
    raise NoGateableChannelsError(f"no channel of the model can be gated:\n{why}")


def _restore_modes(model: nn.Module, copy: nn.Module) -> None:
    for module, twin in zip(model.modules(), copy.modules(), strict=True):
        twin.training = module.training
