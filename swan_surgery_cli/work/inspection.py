"""What `inspect` shows, as data: every layer explained, with its cost."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from swan_surgery.channels import ChannelMap, Explanation, LayerExplanation, channel_map
from swan_surgery.costs.params import count_params
from swan_surgery.errors import TraceError
from swan_surgery.gates.checks import check_model
from swan_surgery.models import Inputs
from swan_surgery.models.checks import check_arguments
from swan_surgery.reporting import to_flops
from swan_surgery_cli.work.models import guesses, misfit


_JSON_VERSION = 2


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer.

    Attributes:
        layer: what happens to its channels.
        macs: at the example inputs, batch included.
        params: of the module alone.
    """

    layer: LayerExplanation
    macs: int
    params: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """A model's channel map in words and numbers.

    Attributes:
        model: as named on the command line.
        class_name: of the model.
        input_shapes: of the tensors in the example inputs.
        layers: in order of execution.
        macs: of the whole model, including products that belong to no layer.
        flops: twice the MACs.
        params: a tied one once.
        units: number of gates.
        channels: output channels of all layers.
        gated_channels: those that have a gate.
        explanation: of the channel map.
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
    explanation: Explanation
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dicts; one entry per layer holds its explanation, MACs and parameters."""
        plain = asdict(self)
        explanation = plain.pop("explanation")
        layers = [row.pop("layer") | row for row in plain["layers"]]
        del explanation["layers"]
        return {"version": _JSON_VERSION, **plain, "layers": layers, **explanation}


def inspect_model(name: str, model: nn.Module, inputs: Inputs | None) -> Inspection:
    """Map a model; inputs are guessed from the first layer where none are given.

    Raises:
        ModelError: the model is quantized, scripted or gated already.
        InputError: the inputs cannot be guessed, or do not fit the model's forward.
        TraceError: the model cannot be run on the inputs.
    """
    check_model(model)
    candidates = guesses(model, name) if inputs is None else [inputs]
    check_arguments(model, candidates[0])
    try:
        channels, used = _map(model, candidates)
    except TraceError as err:
        if inputs is None:
            raise misfit(model, candidates[-1], err) from err
        raise
    explanation = channels.explain()
    total = sum(term.macs for term in channels.costs)
    tensors = [leaf for leaf in tree_leaves((used.args, dict(used.kwargs))) if _is_tensor(leaf)]
    return Inspection(
        model=name,
        class_name=type(model).__name__,
        input_shapes=tuple(tuple(tensor.shape) for tensor in tensors),
        layers=_rows(model, channels, explanation),
        macs=total,
        flops=to_flops(total),
        params=count_params(model),
        units=channels.num_units,
        channels=channels.num_channels,
        gated_channels=channels.num_gated_channels,
        explanation=explanation,
        notes=channels.notes,
    )


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, Tensor)


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


def _rows(model: nn.Module, channels: ChannelMap, explanation: Explanation) -> tuple[LayerRow, ...]:
    modules = dict(model.named_modules())
    weights = dict(model.named_parameters())
    macs: Counter[tuple[str, str]] = Counter()
    for term in channels.costs:
        macs[term.module, term.op.removeprefix("aten.")] += term.macs
    bare = Counter(
        layer.name.rpartition(".")[0] for layer in explanation.layers if layer.name not in modules
    )
    rows = []
    for entry, layer in zip(channels.layers, explanation.layers, strict=True):
        owner = modules.get(layer.name)
        if owner is not None:
            params = sum(p.numel() for p in owner.parameters(recurse=False))
            own = sum(count for (module, _), count in macs.items() if module == layer.name)
        else:
            # A bare weight's products are its module's, where no other bare weight makes any.
            params = weights[layer.name].numel() if layer.name in weights else 0
            parent = layer.name.rpartition(".")[0]
            own = macs[parent, entry.op] if bare[parent] == 1 else 0
        rows.append(LayerRow(layer, own, params))
    return tuple(rows)
