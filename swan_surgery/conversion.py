"""`swanify` puts gates into a copy of a model; `unswanify` takes them out again."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from swan_surgery.channels import (
    PINNED,
    ChannelMap,
    Inputs,
    as_inputs,
    channel_map,
    copy_of,
    match_modules,
    shell_of,
)
from swan_surgery.errors import (
    InputError,
    ModelError,
    NoGateableChannelsError,
    TraceError,
    UnsupportedOpError,
)
from swan_surgery.gates import FoldedGate, GateBank, GatedModel, GateSite
from swan_surgery.graph import Placement, Site, foldable, insert, node_facts, place, trace


# Folding into a weight pays while the weight is not much larger than what the layer puts out.
_TYPICAL_BATCH = 8
_IMAGE_SIZES = (224, 299)
# Logits start apart by importance, so that a budget has an order to close units in.
_SPREAD = 0.5


def swanify(
    model: nn.Module,
    example_inputs: Any = None,  # noqa: ANN401 - tensor, tuple or dict
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
    _require_units(channels)
    copy = copy_of(model)
    try:
        graphs = {training: trace(copy, training=training) for training in (False, True)}
        channels, placed = _place(copy, graphs, channels, inputs)
    finally:
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


def check_gated(gated: object) -> None:
    """Refuse anything but a gated model.

    Raises:
        ModelError: says what was seen and what to do.
    """
    if not isinstance(gated, GatedModel):
        raise ModelError(
            f"expected a gated model, got {type(gated).__name__}; call swan.swanify(model) first"
        )


def check_model(model: object) -> None:
    """Refuse what cannot be gated.

    Raises:
        ModelError: says what was seen and what to do.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, GatedModel):
        raise ModelError("the model is gated already; train it, or swan.unswanify(model) first")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("the model is a TorchScript module; pass the nn.Module it was made from")
    for name, module in model.named_modules():
        origin = type(module).__module__
        if isinstance(module, GatedModel):
            raise ModelError(f"module {name!r} is gated already; swan.unswanify it first")
        if ".quantized" in origin or ".qat" in origin:
            raise ModelError(
                f"module {name!r} is quantized ({type(module).__name__}); prune first, then quantize"
            )
    quantized = [name for name, t in model.state_dict().items() if _is_quantized(t)]
    if quantized:
        raise ModelError(f"{quantized[0]!r} is a quantized tensor; prune first, then quantize")


def _is_quantized(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_quantized


def _map(
    model: nn.Module,
    example_inputs: Any,  # noqa: ANN401
    ignore: Iterable[str],
) -> tuple[ChannelMap, Inputs]:
    if example_inputs is not None:
        inputs = as_inputs(example_inputs)
        try:
            return channel_map(model, inputs, ignore=ignore), inputs
        except TraceError as err:
            raise InputError(f"{err}; pass example_inputs that the model accepts") from err
    candidates = infer_inputs(model)
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


def infer_inputs(model: nn.Module) -> list[Inputs]:
    """Example inputs guessed from the first layer, best guess first.

    Raises:
        InputError: the first layer is neither a 2-d convolution nor linear; says what to pass.
    """
    reference = next(iter(model.parameters()), None)
    dtype = reference.dtype if reference is not None else torch.float32
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            shapes = [(1, module.in_channels, size, size) for size in _IMAGE_SIZES]
        elif isinstance(module, nn.Linear):
            shapes = [(1, module.in_features)]
        elif isinstance(module, (nn.Embedding, nn.Conv1d, nn.Conv3d, nn.RNNBase)):
            break
        else:
            continue
        return [Inputs((torch.randn(s, generator=generator).to(dtype),), {}) for s in shapes]
    raise InputError(
        f"example inputs cannot be inferred for {type(model).__name__}: its first layer is not a "
        f"2-d convolution or linear; pass example_inputs=(tensor, ...)"
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
        for training, graph in graphs.items():
            placed[training] = place(copy, graph, _facts(copy, graph, channels, inputs, training))
        lost = placed[False].uncovered | placed[True].uncovered
        if not lost:
            return channels, placed
        channels = channels.without(lost, "no gate can close these channels", "fx")


def _facts(
    copy: nn.Module, graph: fx.Graph, channels: ChannelMap, inputs: Inputs, training: bool
) -> Any:  # noqa: ANN401, FBT001
    copy.train(training)
    try:
        shell = shell_of(copy)
        on_meta = inputs.map(lambda tensor: torch.empty_like(tensor, device="meta"))
        if training:
            on_meta = on_meta.map(lambda t: torch.cat([t, t]) if t.ndim else t)
        return node_facts(shell, graph, channels, on_meta)
    except (RuntimeError, ValueError, NotImplementedError):
        return node_facts(copy_of(copy), graph, channels, inputs)


def _assemble(
    copy: nn.Module,
    graphs: dict[bool, fx.Graph],
    placed: dict[bool, Placement],
    channels: ChannelMap,
    inputs: Inputs,
) -> GatedModel:
    folded = {mode: foldable(copy, graphs[mode], placed[mode].sites) for mode in graphs}
    units: dict[str, Tensor] = {}
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
    bank = GateBank(channels.num_units, widths(channels), list(units.values()))
    sites = {
        name: _make_site(units[name], bank, layer, graphs) for name, layer in layers.items()
    }
    bank.logits.data += _SPREAD * (2 * importance_ranks(copy, channels) - 1)
    reference = next((p for p in copy.parameters() if p.is_floating_point()), None)
    if reference is not None:
        bank.to(device=reference.device, dtype=reference.dtype)
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


def _make_site(
    units: Tensor, bank: GateBank, layer: nn.Module | None, graphs: object
) -> nn.Module:
    del graphs
    if layer is None:
        return GateSite(units, bank)
    transposed = bool(getattr(layer, "transposed", False))
    return FoldedGate(units, bank, weight_axis=1 if transposed else 0, is_folded=True)


def importance_ranks(model: nn.Module, channels: ChannelMap) -> Tensor:
    """Rank of every unit within its group by the squared weights of its slots, in [0, 1].

    Each tensor axis is divided by its mean first, so that every layer of a group has one vote.
    A unit alone in its group ranks 0.5.
    """
    parameters = dict(model.named_parameters())
    score = torch.zeros(channels.num_units, dtype=torch.float64)
    for entry in channels.tensors:
        parameter = parameters.get(entry.tensor)
        if parameter is None or parameter.is_meta or not parameter.is_floating_point():
            continue
        others = [axis for axis in range(parameter.ndim) if axis != entry.axis]
        squares = parameter.detach().square()
        own = (squares.sum(others) if others else squares).double().cpu()
        own = torch.nan_to_num(own / own.mean().clamp(min=torch.finfo(torch.float64).tiny))
        units = torch.tensor(entry.units)
        score.index_add_(0, units[units >= 0], own[units >= 0])
    ranks = torch.full((channels.num_units,), 0.5)
    for group in channels.unit_groups:
        if len(group) > 1:
            members = torch.tensor(group)
            order = score[members].argsort(stable=True)
            ranks[members[order]] = torch.arange(len(group)) / (len(group) - 1)
    return ranks


def widths(channels: ChannelMap) -> list[Sequence[int]]:
    """The distinct sets of units whose width must not reach zero: layers without a pinned channel.

    An input axis that holds a whole output axis needs no entry of its own.
    """
    found: dict[tuple[int, ...], None] = {}
    for layer in channels.layers:
        units = tuple(dict.fromkeys(layer.out_units))
        if units and PINNED not in units:
            found[units] = None
    outputs = [set(units) for units in found]
    for layer in channels.layers:
        units = tuple(dict.fromkeys(layer.in_units))
        if not units or PINNED in units or units in found:
            continue
        own = set(units)
        if not any(own >= output for output in outputs if units[0] in output):
            found[units] = None
    return list(found)


__all__ = ["check_gated", "check_model", "infer_inputs", "swanify", "unswanify", "widths"]
