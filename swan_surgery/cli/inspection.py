"""What `inspect` shows, as data: layers, their cost, who shares units with whom, and pins."""

from collections import Counter, defaultdict
from dataclasses import dataclass

from torch import Tensor, nn

from swan_surgery.channels import PINNED, ChannelMap, Inputs, channel_map
from swan_surgery.cost import count_params
from swan_surgery.errors import InputError, TraceError
from swan_surgery.preconditions import infer_inputs
from swan_surgery.reporting import to_flops


_KINDS = {"convolution": "conv", "addmm": "linear", "mm": "linear", "bmm": "matmul"}


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer.

    Attributes:
        name: dotted name of the module, or of the weight where it has none.
        kind: conv, linear, or the operation.
        in_channels: channels it reads.
        out_channels: channels it makes.
        macs: at the example inputs, batch included.
        params: of the module alone.
        units: switches that its output channels hang on.
        gated_channels: output channels that have a switch.
        shares_with: layers whose output channels hang on the same switches.
        pinned: why the other output channels must stay.
    """

    name: str
    kind: str
    in_channels: int
    out_channels: int
    macs: int
    params: int
    units: int
    gated_channels: int
    shares_with: tuple[str, ...]
    pinned: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Inspection:
    """A model's channel map in words and numbers.

    Attributes:
        model: as named on the command line.
        class_name: of the model.
        input_shapes: of the example inputs.
        layers: in order of execution.
        macs: of the whole model, including products that belong to no layer.
        flops: twice the MACs.
        params: a tied one once.
        units: number of switches.
        channels: output channels of all layers.
        gated_channels: those that have a switch.
        unknown_ops: operations without a channel rule, and where.
        notes: about the tracing itself.
    """

    model: str
    class_name: str
    input_shapes: tuple[tuple[int, ...], ...]
    layers: tuple[LayerRow, ...]
    macs: int
    flops: int
    params: int
    units: int
    channels: int
    gated_channels: int
    unknown_ops: tuple[str, ...]
    notes: tuple[str, ...]


def inspect_model(name: str, model: nn.Module, inputs: tuple[Tensor, ...]) -> Inspection:
    """Map a model; inputs are guessed from the first layer where none are given.

    Raises:
        InputError: the inputs cannot be guessed.
        TraceError: the model cannot be run on the inputs.
    """
    try:
        candidates = [Inputs(inputs, {})] if inputs else infer_inputs(model)
    except InputError as err:
        raise InputError(
            f"no input shape can be guessed for {name}: its first layer is neither a 2-d convolution "
            f"nor linear; pass one, like --input 1,3,224,224"
        ) from err
    channels, used = _map(model, candidates)
    macs = Counter[str]()
    for term in channels.costs:
        macs[term.module] += term.macs
    return Inspection(
        model=name,
        class_name=type(model).__name__,
        input_shapes=tuple(tuple(tensor.shape) for tensor in used.args),
        layers=_rows(model, channels, macs),
        macs=macs.total(),
        flops=to_flops(macs.total()),
        params=count_params(model),
        units=channels.num_units,
        channels=channels.num_channels,
        gated_channels=channels.num_gated_channels,
        unknown_ops=tuple(
            f"{op} in {module or 'the model'}" for op, module in channels.unknown_ops
        ),
        notes=channels.notes,
    )


def _map(model: nn.Module, candidates: list[Inputs]) -> tuple[ChannelMap, Inputs]:
    """The first candidate that the model accepts in train mode too; else the last."""
    for inputs in candidates[:-1]:
        try:
            channels = channel_map(model, inputs)
        except TraceError:
            continue
        if not channels.notes:
            return channels, inputs
    return channel_map(model, candidates[-1]), candidates[-1]


def _rows(model: nn.Module, channels: ChannelMap, macs: Counter[str]) -> tuple[LayerRow, ...]:
    makers: dict[int, list[str]] = defaultdict(list)
    for layer in channels.layers:
        for unit in dict.fromkeys(layer.out_units):
            makers[unit].append(layer.name)
    pinned: dict[str, list[str]] = defaultdict(list)
    for pin in channels.pins:
        where = f" in {pin.module}" if pin.module and pin.module != pin.layer else ""
        pinned[pin.layer].append(f"{len(pin.channels)} stay: {pin.reason}{where}")
    modules = dict(model.named_modules())
    weights = dict(model.named_parameters())
    rows = []
    for layer in channels.layers:
        units = [unit for unit in dict.fromkeys(layer.out_units) if unit != PINNED]
        partners = dict.fromkeys(name for unit in units for name in makers[unit])
        owner = modules.get(layer.name)
        if owner is not None:
            params = sum(p.numel() for p in owner.parameters(recurse=False))
        else:
            params = weights[layer.name].numel() if layer.name in weights else 0
        rows.append(
            LayerRow(
                name=layer.name,
                kind=_KINDS.get(layer.op.split(".")[0], layer.op),
                in_channels=len(layer.in_units),
                out_channels=len(layer.out_units),
                macs=macs[layer.name],
                params=params,
                units=len(units),
                gated_channels=sum(unit != PINNED for unit in layer.out_units),
                shares_with=tuple(name for name in partners if name != layer.name),
                pinned=tuple(pinned[layer.name]),
            )
        )
    return tuple(rows)
