"""`swanify` puts gates into a copy of a model; `unswanify` takes them out again."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from swan_surgery.channels import (
    ChannelMap,
    Inputs,
    as_inputs,
    channel_map,
    copy_of,
    doubled,
    match_modules,
    shell_of,
    without_collection,
)
from swan_surgery.channels.fields import Fields
from swan_surgery.errors import (
    InputError,
    NoGateableChannelsError,
    TraceError,
    UnsupportedOpError,
)
from swan_surgery.gates import (
    FoldedGate,
    GateBank,
    GatedModel,
    GateSite,
    importance_ranks,
    widths,
)
from swan_surgery.graph import (
    NodeFacts,
    Placement,
    Site,
    foldable,
    insert,
    node_facts,
    place,
    trace,
    unit_fields,
)
from swan_surgery.preconditions import check_gated, check_model, infer_inputs


# Folding into a weight pays while the weight is not much larger than what the layer puts out.
_TYPICAL_BATCH = 8
# Logits start apart by importance, so that a budget has an order to close units in.
_SPREAD = 0.5


def swanify(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    ignore: Iterable[str] = (),
    strict: bool = False,
) -> GatedModel:
    """Retrofit a learnable gate onto every channel of a copy of `model`.

    Args:
        model: an `nn.Module` that torch.fx can trace; it is not changed.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments. May be left
            out where it can be inferred: `(1, in_channels, 224, 224)` for a model that starts with
            a 2-d convolution, `(1, in_features)` for one that starts with a linear layer.
        ignore: module names or glob patterns whose output channels get no gate.
        strict: raise where an operation without a channel rule would pin channels.

    Returns:
        The gated model, in the mode of the given model. All gates are open.

    Raises:
        ModelError: not an `nn.Module`, already gated, scripted or quantized.
        InputError: example inputs cannot be inferred, or do not fit; or `ignore` matches nothing.
        TraceError: the model cannot be run or traced.
        UnsupportedOpError: `strict=True` and some channels are pinned by unknown operations.
        NoGateableChannelsError: every channel is pinned.
    """
    check_model(model)
    match_modules(model, ignore)
    channels, inputs = _map(model, example_inputs, ignore)
    if strict and channels.unknown_ops:
        lines = [f"  {op} in module {module!r}" for op, module in channels.unknown_ops]
        raise UnsupportedOpError(
            f"{len(lines)} operations have no channel rule:\n" + "\n".join(lines),
            pins=channels.pins,
        )
    if channels.notes:
        raise InputError(f"{channels.notes[0]}; pass example_inputs on which both modes run")
    _require_units(channels)
    with without_collection(), torch.inference_mode(mode=False):
        copy = copy_of(model)
        graphs = {training: trace(copy, training=training) for training in (False, True)}
        channels, placed = _place(copy, graphs, channels, inputs)
        _restore_modes(model, copy)
        _require_units(channels)
        return _assemble(copy, graphs, placed, channels, inputs)


def unswanify(gated: GatedModel) -> nn.Module:
    """Take the gates out: a copy of the base model with the weights as trained.

    The result has the given class, `state_dict` keys and mode. Closed gates leave no trace: use
    `prune` to remove what they closed.

    Raises:
        ModelError: `gated` is not a gated model.
    """
    check_gated(gated)
    return copy_of(gated.model)


def _map(
    model: nn.Module,
    example_inputs: Any,
    ignore: Iterable[str],
) -> tuple[ChannelMap, Inputs]:
    if example_inputs is not None:
        inputs = as_inputs(example_inputs)
        try:
            return channel_map(model, inputs, ignore=ignore), inputs
        except TraceError as err:
            raise InputError(f"{err}; pass example_inputs that the model accepts") from err
    candidates = infer_inputs(model)
    last: TraceError | None = None
    for inputs in candidates:
        try:
            channels = channel_map(model, inputs, ignore=ignore)
        except TraceError as err:
            last = err
            continue
        if not channels.notes or inputs is candidates[-1]:
            return channels, inputs
    raise InputError(
        f"the example inputs guessed from the first layer do not fit: {last}; "
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


def _place(
    copy: nn.Module, graphs: dict[bool, fx.Graph], channels: ChannelMap, inputs: Inputs
) -> tuple[ChannelMap, dict[bool, Placement]]:
    """Placement in both modes; units that no gate can close are pinned."""
    while True:
        placed = {}
        units = unit_fields(copy, channels)
        for training, graph in graphs.items():
            copy.train(training)
            placed[training] = place(copy, graph, _facts(copy, graph, units, inputs))
        lost = placed[False].uncovered | placed[True].uncovered
        if not lost:
            return channels, placed
        channels = channels.without(lost, "no gate can close these channels", "fx")


def _facts(
    copy: nn.Module, graph: fx.Graph, units: Mapping[str, Fields], inputs: Inputs
) -> dict[fx.Node, NodeFacts]:
    """Facts of a graph in the copy's mode: on a shell if it runs there, else on real data.

    Batch-norm refuses one sample in training, so every input is tried doubled as well.
    """
    on_meta = inputs.map(lambda tensor: torch.empty_like(tensor, device="meta"))
    attempts = [
        (stand_in, candidate)
        for stand_in, own in ((shell_of, on_meta), (copy_of, inputs))
        for candidate in (own, own.map(doubled))
    ]
    for stand_in, candidate in attempts[:-1]:
        try:
            return node_facts(stand_in(copy), graph, units, candidate)
        except (RuntimeError, ValueError, NotImplementedError, TypeError, IndexError):
            continue
    stand_in, candidate = attempts[-1]
    try:
        return node_facts(stand_in(copy), graph, units, candidate)
    except (RuntimeError, ValueError, NotImplementedError, TypeError, IndexError) as err:
        first = str(err).splitlines()[0] if str(err) else ""
        raise TraceError(
            f"the torch.fx trace of {type(copy).__name__} does not run on the example inputs "
            f"({type(err).__name__}: {first}); if forward has optional arguments, or branches on "
            f"its inputs, move that decision out of forward"
        ) from err


def _assemble(
    copy: nn.Module,
    graphs: dict[bool, fx.Graph],
    placed: dict[bool, Placement],
    channels: ChannelMap,
    inputs: Inputs,
) -> GatedModel:
    folded = {mode: foldable(copy, graphs[mode], placed[mode].sites) for mode in graphs}
    units: dict[str, Tensor] = {}
    chosen: dict[str, Site] = {}
    names: dict[bool, dict[Site, str]] = {}
    layers: dict[str, nn.Module | None] = {}
    for mode, placement in placed.items():
        names[mode] = {}
        for site in placement.sites:
            layer = None
            if site in folded[mode]:
                layer = copy.get_submodule(str(site.node.target))
            name = _name(site, folded=layer is not None, taken=units)
            names[mode][site] = name
            units[name], layers[name] = site.units, layer
            chosen.setdefault(name, site)  # eval mode comes first: one sample, not two
    bank = GateBank(channels.num_units, widths(channels), list(units.values()))
    sites = {name: _make_site(chosen[name], bank, layer) for name, layer in layers.items()}
    bank.logits.data += _SPREAD * (2 * importance_ranks(copy, channels) - 1)
    reference = next((p for p in copy.parameters() if p.is_floating_point()), None)
    if reference is not None:
        # Half precision would merge the starting order of the gates: logits stay in float32 then.
        wide = torch.promote_types(reference.dtype, torch.float32)
        bank.to(device=reference.device, dtype=wide)
    gated = GatedModel(copy, bank, sites, channels=channels, example_inputs=inputs)
    for mode, graph in graphs.items():
        insert(graph, names[mode], list(units), folded[mode])
        gated.set_forward(type(fx.GraphModule(gated, graph)).forward, training=mode)
    gated.training = copy.training
    gates_mode = copy.training
    for part in (gated.gates, gated.sites):
        part.train(gates_mode)
    return gated


def _name(site: Site, *, folded: bool, taken: dict[str, Tensor]) -> str:
    stem = str(site.node.target) if folded else site.node.name
    stem = stem.replace(".", "_") + ("_input" if site.users else "")
    name, number = stem, 1
    while name in taken and not (
        taken[name].shape == site.units.shape and taken[name].equal(site.units) and folded
    ):
        number += 1
        name = f"{stem}_{number}"
    return name


def _make_site(site: Site, bank: GateBank, layer: nn.Module | None) -> nn.Module:
    if layer is None:
        return GateSite(site.units, bank)
    weight = layer.get_parameter("weight")
    transposed = bool(getattr(layer, "transposed", False))
    return FoldedGate(
        site.units,
        bank,
        weight_axis=1 if transposed else 0,
        is_folded=weight.numel() <= _TYPICAL_BATCH * site.num_elements,
    )
