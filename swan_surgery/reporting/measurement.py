"""Measures models: memory, latency, layers, and what the MAC counter leaves out.

Every function works on a model it may run; `report` hands in copies in eval mode.
"""

import platform
import re
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from swan_surgery.channels import Inputs
from swan_surgery.counting import count_operators
from swan_surgery.machine import device_name, wait_for
from swan_surgery.reporting.figures import Environment, Latency, LayerFigures


_WARM_UP = 3
_MIN_REPEATS = 3
_MAX_REPEATS = 200
_SECONDS_PER_MODEL = 2.0

# Operations without products of two activations or of weights: arithmetic per element, activation,
# normalisation, pooling, reduction, resampling, bookkeeping. The convention of `count_macs` leaves
# them out, so that naming them would only hide the others.
_FREE = re.compile(
    r"""aten::(
      (add|sub|rsub|mul|div|neg|pow|sqrt|rsqrt|exp|log|abs|square|reciprocal|round|sign)
    | (sigmoid|tanh|softmax|log_softmax|\w*relu\w*|\w*elu|silu|mish|hard\w+|softplus|leaky_relu)
    | (\w*_norm|\w*pool\d?d?|\w*pool[123]d_with_indices|upsample_\w+|pixel_(un)?shuffle|\w*dropout\w*)
    | (mean|sum|prod|var|std|amax|amin|max|min|argmax|argmin|norm|all|any|topk|sort)
    | (where|clone|lift_fresh|repeat|repeat_interleave|tile|flip|unfold|pad|reflection_pad\w+
       |replication_pad\w+|embedding|one_hot|bernoulli|bernoulli_|rand\w*|fill|zero|normal|uniform
       |unflatten|movedim|broadcast_\w+|meshgrid|tensor_split|hsplit|vsplit|expand_as|view_as
       |reshape_as|swapaxes|triu|tril|linspace|scalar_tensor|numel|len|dim|item|lt|le|ne|logical_\w+
       |bitwise_\w+|is_\w+|__\w+__|floordiv|ceil|trunc|fmod|minimum|maximum|type|index_select)
    )_?$""",
    re.VERBOSE,
)


def uncounted_ops(model: nn.Module, inputs: Inputs) -> tuple[tuple[str, int], ...]:
    """Operations fvcore has no formula for and that are not free, with their number of calls."""
    found = count_operators(model, inputs).uncounted
    open_ops = [(name, int(calls)) for name, calls in found.items() if not _FREE.match(name)]
    return tuple(sorted(open_ops, key=lambda entry: (-entry[1], entry[0])))


def layer_figures(model: nn.Module, inputs: Inputs) -> dict[str, LayerFigures]:
    """Every module with MACs of its own, and every convolution and linear layer, in model order."""
    totals = count_operators(model, inputs).macs
    found = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        children = sum(totals.get(prefix + child, 0) for child, _ in module.named_children())
        own = totals.get(name, 0) - children
        widths: tuple[int | None, int | None] = (None, None)
        if isinstance(module, _ConvNd):
            widths = (module.in_channels, module.out_channels)
        elif isinstance(module, nn.Linear):
            widths = (module.in_features, module.out_features)
        elif not own:
            continue
        params = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        found[name] = LayerFigures(*widths, macs=own, params=params)
    return found


def size_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and persistent buffers, a tied one once."""
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class _Watch(TorchDispatchMode):
    """Adds up the storages that operations make, and takes each off when it is freed."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch does not annotate it
        # By identity: torch hands out the same Python object for a storage as long as it lives.
        self._seen = WeakIdKeyDictionary(ref_type=weakref.ref)
        for tensor in known:
            self._seen[tensor.untyped_storage()] = True
        self._alive = 0
        self.peak: int = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._take_in(leaf.untyped_storage())
        self.peak = max(self.peak, self._alive)
        return result

    def _take_in(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen[storage] = True
        size = storage.nbytes()
        self._alive += size
        weakref.finalize(storage, self._release, size).atexit = False

    def _release(self, size: int) -> None:
        self._alive -= size


def peak_activation_bytes(model: nn.Module, inputs: Inputs) -> int:
    """Most bytes alive at once in tensors that one forward pass makes; see `Figures`."""
    leaves = tree_leaves((inputs.args, dict(inputs.kwargs)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    watch = _Watch([*model.parameters(), *model.buffers(), *tensors])
    with torch.no_grad(), watch:
        model(*inputs.args, **inputs.kwargs)
    return watch.peak


def paired_latencies(
    runs: Sequence[tuple[nn.Module, Inputs]],
    batch: int,
    *,
    seconds_per_model: float = _SECONDS_PER_MODEL,
) -> list[Latency]:
    """Time models in turns; see `latencies_in_turns`."""
    return latencies_in_turns(
        [timed_pass(model, inputs, device_of(model)) for model, inputs in runs],
        batch,
        seconds_each=seconds_per_model,
    )


def latencies_in_turns(
    passes: Sequence[Callable[[], object]],
    batch: int,
    *,
    seconds_each: float = _SECONDS_PER_MODEL,
) -> list[Latency]:
    """Time functions in turns, so that what else the machine does hits them alike.

    Up to 200 rounds while the time lasts, and never fewer than 3; 30 take 2 s where a pass takes
    70 ms. Each latency says how many.
    """
    samples: list[list[float]] = [[] for _ in passes]
    with torch.no_grad():
        for run in passes:
            for _ in range(_WARM_UP):
                run()
        deadline = time.perf_counter() + seconds_each * len(passes)
        for done in range(_MAX_REPEATS):
            if done >= _MIN_REPEATS and time.perf_counter() > deadline:
                break
            for own, run in zip(samples, passes, strict=True):
                start = time.perf_counter()
                run()
                own.append(time.perf_counter() - start)
    found = []
    for own in samples:
        lower, median, upper = (float(q) * 1e3 for q in np.percentile(own, (25, 50, 75)))
        found.append(Latency(batch, median, lower, upper, len(own)))
    return found


def timed_pass(
    forward: Callable[..., Any], inputs: Inputs, device: torch.device
) -> Callable[[], None]:
    """One forward pass, done when the device is: what `latencies_in_turns` takes."""

    def run() -> None:
        wait_for(device)
        forward(*inputs.args, **inputs.kwargs)
        wait_for(device)

    return run


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter or buffer lies; the CPU for a model without any."""
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def environment(device: torch.device) -> Environment:
    """Device, threads and versions in use."""
    return Environment(
        device=device_name(device),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        swan_surgery=own_version(),
    )


def own_version() -> str:
    """The installed version of this library."""
    try:
        return version("swan-surgery")
    except PackageNotFoundError:
        return "not installed"
