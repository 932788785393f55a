"""Times every convolution and linear layer of a gated model alone, at a handful of widths."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from swan_surgery.channels import PINNED, Layer, copy_of
from swan_surgery.errors import InputError
from swan_surgery.gates import GatedModel
from swan_surgery.latency import LatencyTable, LayerLatency, fit_layer
from swan_surgery.machine import device_name, wait_for
from swan_surgery.preconditions import check_data, check_gated, described


_WARM_UP = 3
_SHARES = (0.25, 0.5, 0.75, 1.0)
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


def measure_latencies(gated: GatedModel, *, repeats: int = 15) -> LatencyTable:
    """Measure what `latency_ms` budgets need: each layer of the base model, at several widths.

    Every convolution and linear layer is timed alone on inputs of the shapes it meets when the model
    runs on its example inputs, at 25, 50, 75 and 100 % of those of its widths that have units: the
    median over `repeats` runs in turns, after warm-up, in eval mode, on the device and with the number
    of threads in use now. Measure where the pruned model shall run, with nothing else running there.

    Layers that are called as functions on bare parameters (torch's multi-head attention), and all
    that is no layer, count as a constant rest.

    Args:
        gated: the gated model; it is not changed.
        repeats: runs per median.

    Raises:
        ModelError: `gated` is not a gated model, or on the meta device.
        InputError: `repeats` below 1.
    """
    check_gated(gated)
    check_data(gated, to="measure latencies")
    if repeats < 1 or int(repeats) != repeats:
        raise InputError(f"repeats must be a whole number >= 1; got {repeats!r}")
    model, inputs = copy_of(gated.model).eval(), gated.own_inputs()
    device = gated.gates.logits.device
    layers = []
    with torch.no_grad(), torch.random.fork_rng():
        calls = _watch_calls(model, inputs.args, inputs.kwargs)
        for layer in _once(gated.channels.layers):
            module = calls.get(layer.name)
            if module is not None:
                layers.append(_measure_layer(layer, *module, device=device, repeats=repeats))
        (whole,) = _median_ms([lambda: model(*inputs.args, **inputs.kwargs)], device, repeats)
    full = sum(own.milliseconds(own.in_width, own.out_width) for own in layers)
    return LatencyTable(
        layers=tuple(layers),
        rest_ms=max(0.0, whole - full),
        device=device_name(device),
        threads=torch.get_num_threads(),
        torch=str(torch.__version__),
        inputs=described(inputs),
        repeats=repeats,
    )


def _once(layers: Sequence[Layer]) -> list[Layer]:
    return list({layer.name: layer for layer in layers}.values())


def _watch_calls(
    model: nn.Module, args: Any, kwargs: Any
) -> dict[str, tuple[nn.Module, list[_Call]]]:
    """Every convolution and linear layer that is called as a module, and its calls, in one run."""
    found: dict[str, tuple[nn.Module, list[_Call]]] = {}

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, own: Any, named: Any) -> None:
            x: Tensor = own[0] if own else named["input"]
            last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
            call = _Call(tuple(x.shape), x.dtype, last and not x.is_contiguous())
            found.setdefault(name, (module, []))[1].append(call)

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, (*_CONVOLUTIONS, nn.Linear))
    ]
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _measure_layer(
    layer: Layer,
    module: nn.Module,
    calls: Sequence[_Call],
    *,
    device: torch.device,
    repeats: int,
) -> LayerLatency:
    widths = _widths(layer, module)
    runs: list[Callable[[], object]] = []
    for into, out in widths:
        narrow = _narrow(module, into, out).eval()
        xs = [_input(module, call, into, device) for call in calls]
        runs.append(partial(_run, narrow, xs))
    return fit_layer(layer.name, widths, _median_ms(runs, device, repeats))


def _run(layer: nn.Module, xs: Sequence[Tensor]) -> None:
    for x in xs:
        layer(x)


def _widths(layer: Layer, module: nn.Module) -> list[tuple[int, int]]:
    """Pairs of widths to measure, the full one last."""
    full_in, full_out = len(layer.in_units), len(layer.out_units)
    groups = module.groups if isinstance(module, _ConvNd) else 1
    if groups > 1 and groups == full_in:  # depthwise: the groups go with the channels
        return [(into, into * full_out // full_in) for into in _steps(layer.in_units, 1)]
    return list(product(_steps(layer.in_units, groups), _steps(layer.out_units, groups)))


def _steps(units: Sequence[int], multiple: int) -> list[int]:
    if all(unit == PINNED for unit in units):
        return [len(units)]
    size = len(units) // multiple
    return sorted({max(1, round(share * size)) * multiple for share in _SHARES})


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


def _input(module: nn.Module, call: _Call, into: int, device: torch.device) -> Tensor:
    axis = -1 - len(module.kernel_size) if isinstance(module, _ConvNd) else -1
    shape = list(call.shape)
    shape[axis] = into
    x = torch.full(shape, 0.5, dtype=call.dtype, device=device)
    return x.contiguous(memory_format=torch.channels_last) if call.is_channels_last else x


def _median_ms(
    runs: Sequence[Callable[[], object]], device: torch.device, repeats: int
) -> list[float]:
    """Time runs in turns, so that what else the machine does hits them alike."""
    samples: list[list[float]] = [[] for _ in runs]
    for run in runs:
        for _ in range(_WARM_UP):
            run()
    for _ in range(repeats):
        for own, run in zip(samples, runs, strict=True):
            wait_for(device)
            start = time.perf_counter()
            run()
            wait_for(device)
            own.append((time.perf_counter() - start) * 1e3)
    return [median(own) for own in samples]


__all__ = ["measure_latencies"]
