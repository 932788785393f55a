"""Closed equals cut: compares a gated model with its pruned model on real forward passes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from swan_surgery.channels import ChannelMap
from swan_surgery.cutting.plan import PruningPlan
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import VerificationError
from swan_surgery.gates import GatedModel
from swan_surgery.models import Inputs, copy_of, doubled
from swan_surgery.models.modes import evaluating
from swan_surgery.models.outputs import iter_named_tensors


# Relative to the largest output. In float64 a wrong channel cannot hide; float32 rounds.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def verify_pruned(gated: GatedModel, pruned: nn.Module, plan: PruningPlan) -> float:
    """Check that hard gates at the plan's units and the pruned model agree; returns the error.

    On the example inputs, and on a batch twice as large where the gated model takes one. The models
    run in their own precision first; if that is not close enough to tell (or is half precision),
    float64 copies decide.

    Raises:
        VerificationError: they differ; names the first module that does.
    """
    mask = torch.zeros(plan.num_units, dtype=torch.bool)
    mask[list(plan.open_units)] = True
    worst = _verify_on(gated, pruned, mask, gated.own_inputs())
    twice = gated.own_inputs().map(doubled)
    try:
        _run(gated, mask, gated, twice)
    except Exception:  # noqa: BLE001 - models refuse a batch in all sorts of ways
        return worst
    return max(worst, _verify_on(gated, pruned, mask, twice))


def _verify_on(gated: GatedModel, pruned: nn.Module, mask: Tensor, inputs: Inputs) -> float:
    dtype = gated.dtype
    if dtype in TOLERANCE:
        error = relative_error(gated, pruned, mask, inputs)
        if error <= TOLERANCE[dtype]:
            return error
    gated64, pruned64 = copy_of(gated).double(), copy_of(pruned).double()
    assert isinstance(gated64, GatedModel)  # noqa: S101 - a copy of one
    inputs = inputs.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    error = relative_error(gated64, pruned64, mask, inputs)
    if error > TOLERANCE[torch.float64]:
        # Llama's norms and the like round to float32 on the way, whatever they are given.
        error = relative_error(gated64, pruned64, mask, inputs, widen=True)
    if error <= TOLERANCE[torch.float64]:
        return error
    module = first_difference(gated64, pruned64, mask, inputs)
    raise VerificationError(
        f"the pruned model does not compute what the gated model computes: relative error "
        f"{error:.2e} in float64, first seen in module {module!r}. Nothing was returned; please "
        f"report this model, and keep the module out with ignore=({module!r},) meanwhile",
        module=module,
    )


def relative_error(
    gated: GatedModel, pruned: nn.Module, mask: Tensor, inputs: Inputs, *, widen: bool = False
) -> float:
    """Largest difference of any output over the largest output; infinite if shapes differ.

    `widen` computes everything in float64, also what the models' own code would round.
    """
    with _Widening() if widen else nullcontext():
        return _relative_error(gated, pruned, mask, inputs)


class _Widening(TorchDispatchMode):
    """Every operation on floating-point numbers runs in float64."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map(_widened, (args, kwargs or {}))
        return op(*args, **kwargs)


def _widened(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return value


def _relative_error(gated: GatedModel, pruned: nn.Module, mask: Tensor, inputs: Inputs) -> float:
    first = list(_what_stays(gated, mask, _run(gated, mask, gated, inputs)))
    skipped = _spread(gated)
    try:
        second = [
            tensor
            for name, tensor in iter_named_tensors(_run(pruned, None, gated, inputs))
            if name not in skipped
        ]
    except (RuntimeError, ValueError, IndexError):
        return float("inf")  # its shapes do not even fit
    if [t.shape for t in first] != [t.shape for t in second]:
        return float("inf")
    worst = 0.0
    for one, two in zip(first, second, strict=True):
        worst = max(worst, tensor_error(one, two))
    return worst


def _what_stays(gated: GatedModel, mask: Tensor, output: Any) -> Iterator[Tensor]:
    """What a gated model returned; of outputs that were given up the positions that stay."""
    is_open = torch.cat([mask.cpu(), torch.ones(1, dtype=torch.bool)])  # the last is `PINNED`
    skipped = _spread(gated)
    for name, tensor in iter_named_tensors(output):
        if name in skipped:
            continue
        for entry in gated.channels.free_outputs:
            if entry.name == name and entry.axis is not None and not entry.training:
                kept = is_open[list(entry.units)].nonzero().flatten()
                tensor = tensor.index_select(entry.axis, kept.to(tensor.device))  # noqa: PLW2901
        yield tensor


def _spread(gated: GatedModel) -> set[str]:
    """Outputs that were given up and whose channels lie on no axis of their own: nothing to compare."""
    return {entry.name for entry in gated.channels.free_outputs if entry.axis is None}


def tensor_error(one: Tensor, two: Tensor) -> float:
    """Largest absolute difference over the largest absolute value; NaN in the same place is equal."""
    if one.shape != two.shape:
        return float("inf")
    if not one.numel():
        return 0.0
    one, two = one.double(), two.double()
    same = (one == two) | (one.isnan() & two.isnan())
    if bool(same.all()):
        return 0.0
    finite = one[one.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 1.0
    difference = (one - two).abs().masked_fill(same, 0.0)
    if not bool(difference.isfinite().all()):
        return float("inf")
    return float(difference.max()) / max(scale, torch.finfo(torch.float64).tiny)


def _run(model: nn.Module, mask: Tensor | None, gated: GatedModel, inputs: Inputs) -> Any:
    device = gated.gates.logits.device
    moved = inputs.map(lambda tensor: tensor.to(device))
    with evaluating(model), torch.no_grad(), streams_kept(0):
        if mask is None:
            return moved.run(model)
        with gated.gates.holding(mask.to(device)):
            return moved.run(model)


def first_difference(gated: GatedModel, pruned: nn.Module, mask: Tensor, inputs: Inputs) -> str:
    """The first layer, in order of execution, whose kept channels differ."""
    stays = torch.cat([mask, torch.ones(1, dtype=torch.bool)])
    kept = _kept_channels(gated.channels, stays)
    before = _layer_outputs(gated.model, lambda: _run(gated, mask, gated, inputs), kept)
    after = _layer_outputs(pruned, lambda: _run(pruned, None, gated, inputs), kept)
    modules = dict(pruned.named_modules())
    for name, out in after.items():
        if name not in before:
            continue
        axis = out.ndim - 1 if isinstance(modules[name], nn.Linear) else min(1, out.ndim - 1)
        if before[name].shape[axis] <= int(kept[name][-1]):
            continue  # its output is no longer what the layer made
        wanted = before[name].index_select(axis, kept[name].to(out.device))
        if tensor_error(wanted, out) > TOLERANCE[torch.float64]:
            return name
    return "the output"


def _layer_outputs(
    model: nn.Module, run: Callable[[], Any], names: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The first output of each named layer, as far as the run gets."""
    seen: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            if isinstance(out, Tensor):
                # A clone: what follows may change it in place, in one model and not the other.
                seen.setdefault(name, out.clone())

        return hook

    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_hook(remember(name)) for name in names if name in modules
    ]
    try:
        run()
    except (RuntimeError, ValueError, IndexError):
        return seen  # shapes no longer fit: what ran until then tells where
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _kept_channels(channels: ChannelMap, stays: Tensor) -> dict[str, Tensor]:
    return {
        layer.name: stays[torch.tensor(layer.out_units)].nonzero().reshape(-1)
        for layer in channels.layers
        if layer.out_units
    }
