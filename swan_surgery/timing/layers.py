"""Times every convolution and linear layer of a gated model alone, and the whole, at several widths."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from swan_surgery.channels import PINNED, ChannelMap, Layer
from swan_surgery.costs.freshness import channels_now
from swan_surgery.costs.latency_table import (
    LatencyTable,
    LayerLatency,
    MultipleLatency,
    fit_layer,
    fit_rest,
)
from swan_surgery.cutting.pruning import cut_to
from swan_surgery.environment.machine import device_name
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import BudgetError, InputError
from swan_surgery.gates import GatedModel
from swan_surgery.gates.checks import check_gated
from swan_surgery.models import Inputs, copy_of
from swan_surgery.models.checks import check_data, described
from swan_surgery.selection.limits import limits_of
from swan_surgery.selection.widest_mask import widest_mask
from swan_surgery.timing.clock import SHARES, Clock, LayerRuntime, times
from swan_surgery.timing.loop import Latency


_MULTIPLES = (1, 2, 4, 8, 16, 32)
_MACS_OF_MULTIPLES = 0.5
_ATTEMPTS = 3
# torch's own classes: what a subclass does besides is no part of the layer.
_CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


@dataclass(frozen=True, slots=True)
class _Call:
    """What a layer was called with."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_channels_last: bool


@dataclass(slots=True)
class _Watched:
    """A layer of the model, what it was called with, and how much it puts out per channel."""

    module: nn.Module
    calls: list[_Call]
    size: int


def measure_latency_table(
    gated: GatedModel, *, repeats: int = 15, runtime: LayerRuntime = "eager"
) -> LatencyTable:
    """Measure what `latency_ms` budgets need: each layer of the base model, at several widths.

    Every convolution and linear layer is timed alone on inputs of the shapes it meets when the model
    runs on its example inputs, at 25, 50, 75 and 100 % of those of its widths that have units: the
    median over `repeats` runs in turns, after warm-up, in eval mode, on the device and with the number
    of threads in use now. Measure where the pruned model shall run, with nothing else running there.

    The whole model is timed as well, with all its units and with 75, 50 and 25 % of every group: what
    is no layer, or is called as a function on bare parameters (torch's multi-head attention), is put
    down to a constant and to the size of the layers' outputs. Last, the model is cut to half its MACs
    at random, with widths that are multiples of 1, 2, 4, 8, 16 and 32: what `round_to="auto"` needs.

    Args:
        gated: the gated model; it is not changed.
        repeats: runs per median.
        runtime: "eager", or "onnxruntime" on the CPU: the one that ships decides. There every layer and model
            is exported for it, layers at half and full width: seconds per layer.

    Raises:
        ModelError: `gated` is not a gated model, or on the meta device.
        InputError: `repeats` below 1, or an unknown runtime.
        MissingExtraError, ExportError: of `runtime="onnxruntime"`.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> gated = swan.swanify(net, torch.zeros(1, 3))
        >>> table = swan.measure_latency_table(gated, repeats=2)
        >>> [layer.module for layer in table.layers]
        ['0', '2']
    """
    check_gated(gated)
    check_data(gated, to="measure latencies")
    if repeats < 1 or int(repeats) != repeats:
        raise InputError(f"repeats must be a whole number >= 1; got {repeats!r}")
    if runtime not in get_args(LayerRuntime):
        raise InputError(f"runtime must be one of {get_args(LayerRuntime)}; got {runtime!r}")
    clock = Clock(runtime, gated.device, repeats)
    model, inputs = copy_of(gated.model).eval(), gated.own_inputs()
    device = clock.device
    channels = channels_now(gated)
    masks = [_share_of(channels, share) for share in SHARES]
    wholes = [cut_to(gated, mask.to(device), verify=False).eval() for mask in masks]
    with torch.no_grad(), streams_kept():
        watched = _watch(model, inputs)
        layers = [layer for layer in _once(channels.layers) if layer.name in watched]
        seen = [watched[layer.name] for layer in layers]
        fits = [_measure_layer(layer, own, clock) for layer, own in zip(layers, seen, strict=True)]
        taken = [own.median_ms for own in times([(whole, [inputs]) for whole in wholes], clock)]
        multiples = _measure_multiples(gated, inputs, clock)
    widths = [[_open_widths(layer, mask.tolist()) for layer in layers] for mask in masks]
    shared, rest_ms = fit_rest(fits, [own.size for own in seen], widths, taken)
    return LatencyTable(
        layers=shared,
        rest_ms=rest_ms,
        device=device_name(device),
        threads=torch.get_num_threads(),
        torch=str(torch.__version__),
        inputs=described(inputs),
        repeats=repeats,
        multiples=multiples,
        runtime=runtime,
    )


def _measure_multiples(
    gated: GatedModel, inputs: Inputs, clock: Clock
) -> tuple[MultipleLatency, ...]:
    """The whole model at the same share of its MACs, with widths that are multiples of a number.

    The order in which units stay is drawn once, so that widths differ from group to group and
    without rounding are as odd as those that training leaves. On a noisy machine it is done again, and the
    quietest of three counts.
    """
    gates = gated.gates
    scores = torch.rand(gates.num_units, generator=torch.Generator().manual_seed(0))
    scores = scores.to(gates.logits.device)
    least, order = gates.least_mask(scores), scores.argsort(descending=True)
    (limit,) = limits_of(gated, macs=_MACS_OF_MULTIPLES)
    masks: dict[int, Tensor] = {}
    for multiple in _MULTIPLES:
        try:
            mask = widest_mask(gated, order, [limit], least=least, round_to=multiple)
        except BudgetError:  # so coarse, or so many pinned, that half the MACs are too few
            continue
        if not any(bool((mask == other).all()) for other in masks.values()):
            masks[multiple] = mask
    cut = [cut_to(gated, mask, verify=False).eval() for mask in masks.values()]
    attempts: list[list[Latency]] = []
    while len(attempts) < _ATTEMPTS and (not attempts or any(x.is_noisy for x in attempts[-1])):
        attempts.append(times([(whole, [inputs]) for whole in cut], clock))
    taken = min(attempts, key=lambda own: max(x.spread_ms / x.median_ms for x in own))
    return tuple(
        MultipleLatency(
            multiple, limit.used(mask) / limit.table.total, own.median_ms, own.spread_ms
        )
        for (multiple, mask), own in zip(masks.items(), taken, strict=True)
    )


def _once(layers: Sequence[Layer]) -> list[Layer]:
    return list({layer.name: layer for layer in layers}.values())


def _share_of(channels: ChannelMap, share: float) -> Tensor:
    """An open mask with a share of the units of every group, and at least one."""
    mask = torch.zeros(channels.num_units, dtype=torch.bool)
    for group in channels.unit_groups:
        mask[list(group[: max(1, round(share * len(group)))])] = True
    return mask


def _open_widths(layer: Layer, is_open: list[bool]) -> tuple[int, int]:
    stays = [*is_open, True]  # the last entry answers for PINNED = -1
    into, out = (sum(stays[unit] for unit in units) for units in (layer.in_units, layer.out_units))
    return into, out


def _watch(model: nn.Module, inputs: Inputs) -> dict[str, _Watched]:
    """Every convolution and linear layer that is called as a module in one run."""
    found: dict[str, _Watched] = {}

    def watch(name: str) -> Callable[[nn.Module, Any, Any, Tensor], None]:
        def hook(module: nn.Module, own: Any, named: Any, out: Tensor) -> None:
            x: Tensor = own[0] if own else named["input"]
            last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
            entry = found.setdefault(name, _Watched(module, [], 0))
            entry.calls.append(_Call(tuple(x.shape), x.dtype, last and not x.is_contiguous()))
            entry.size += out.numel() // out.shape[_channel_axis(module)]

        return hook

    handles = [
        module.register_forward_hook(watch(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, (*_CONVOLUTIONS, nn.Linear))
    ]
    try:
        inputs.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _measure_layer(layer: Layer, watched: _Watched, clock: Clock) -> LayerLatency:
    module = watched.module
    widths = _widths(layer, module, clock.shares)
    runs = []
    for into, out in widths:
        narrow = _narrow(module, into, out).eval()
        xs = [Inputs((_input(module, call, into, clock.device),), {}) for call in watched.calls]
        runs.append((narrow, xs))
    return fit_layer(layer.name, widths, [own.median_ms for own in times(runs, clock)])


def _widths(layer: Layer, module: nn.Module, shares: Sequence[float]) -> list[tuple[int, int]]:
    """Pairs of widths to measure, the full one last."""
    full_in, full_out = len(layer.in_units), len(layer.out_units)
    groups = module.groups if isinstance(module, _ConvNd) else 1
    if groups > 1 and groups == full_in:  # depthwise: the groups go with the channels
        return [(into, into * full_out // full_in) for into in _steps(layer.in_units, 1, shares)]
    steps_in, steps_out = (
        _steps(units, groups, shares) for units in (layer.in_units, layer.out_units)
    )
    return list(product(steps_in, steps_out))


def _steps(units: Sequence[int], multiple: int, shares: Sequence[float]) -> list[int]:
    if all(unit == PINNED for unit in units):
        return [len(units)]
    size = len(units) // multiple
    return sorted({max(1, round(share * size)) * multiple for share in shares})


def _narrow(module: nn.Module, into: int, out: int) -> nn.Module:
    """A layer like `module` of other widths, with made-up weights; it draws no random numbers."""
    like = cast(Tensor, module.weight)  # an attribute, where it is computed from others
    options: dict[str, Any] = {
        "bias": module.bias is not None,
        "device": like.device,
        "dtype": like.dtype,
    }
    layer: nn.Module
    if isinstance(module, _ConvNd):
        kind = next(kind for kind in _CONVOLUTIONS if isinstance(module, kind))
        depthwise = module.groups > 1 and module.groups == module.in_channels
        options |= {
            "stride": module.stride,
            "padding": module.padding,
            "dilation": module.dilation,
            "groups": into if depthwise else module.groups,
            "padding_mode": module.padding_mode,
        }
        if module.transposed:
            options["output_padding"] = module.output_padding
        layer = nn.utils.skip_init(kind, into, out, module.kernel_size, **options)
    else:
        layer = nn.utils.skip_init(nn.Linear, into, out, **options)
    for parameter in layer.parameters():
        parameter.fill_(0.01)
    is_last = like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last)
    if is_last and not like.is_contiguous():
        return layer.to(memory_format=torch.channels_last)
    return layer


def _channel_axis(module: nn.Module) -> int:
    return -1 - len(module.kernel_size) if isinstance(module, _ConvNd) else -1


def _input(module: nn.Module, call: _Call, into: int, device: torch.device) -> Tensor:
    shape = list(call.shape)
    shape[_channel_axis(module)] = into
    x = torch.full(shape, 0.5, dtype=call.dtype, device=device)
    return x.contiguous(memory_format=torch.channels_last) if call.is_channels_last else x


__all__ = ["measure_latency_table"]
