"""Closed equals cut: compares a gated model with its pruned model on real forward passes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from swan_surgery.channels import ChannelMap, Inputs, copy_of
from swan_surgery.channels.recording import iter_tensors
from swan_surgery.errors import VerificationError
from swan_surgery.gates import GatedModel
from swan_surgery.plan import PruningPlan


# Relative to the largest output. In float64 a wrong channel cannot hide; float32 rounds.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def verify_pruned(gated: GatedModel, pruned: nn.Module, plan: PruningPlan) -> float:
    """Check that hard gates at the plan's units and the pruned model agree; returns the error.

    The models run in their own precision first; if that is not close enough to tell (or is half
    precision), float64 copies decide.

    Raises:
        VerificationError: they differ; names the first module that does.
    """
    mask = torch.zeros(plan.num_units, dtype=torch.bool)
    mask[list(plan.open_units)] = True
    dtype = gated.gates.logits.dtype
    if dtype in TOLERANCE:
        error = relative_error(gated, pruned, mask, gated.example_inputs)
        if error <= TOLERANCE[dtype]:
            return error
    gated64, pruned64 = copy_of(gated).double(), copy_of(pruned).double()
    assert isinstance(gated64, GatedModel)  # noqa: S101 - a copy of one
    inputs = gated.example_inputs.map(lambda t: t.double() if t.is_floating_point() else t)
    error = relative_error(gated64, pruned64, mask, inputs)
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
    gated: GatedModel, pruned: nn.Module, mask: Tensor, inputs: Inputs
) -> float:
    """Largest difference of any output over the largest output; infinite if shapes differ."""
    first = list(iter_tensors(_run(gated, mask, gated, inputs)))
    second = list(iter_tensors(_run(pruned, None, gated, inputs)))
    if [t.shape for t in first] != [t.shape for t in second]:
        return float("inf")
    worst = 0.0
    for one, two in zip(first, second, strict=True):
        worst = max(worst, tensor_error(one, two))
    return worst


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


def _run(model: nn.Module, mask: Tensor | None, gated: GatedModel, inputs: Inputs) -> Any:  # noqa: ANN401
    device = gated.gates.logits.device
    moved = inputs.map(lambda tensor: tensor.to(device).clone())
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            if mask is None:
                return model(*moved.args, **moved.kwargs)
            with gated.gates.holding(mask.to(device)):
                return model(*moved.args, **moved.kwargs)
    finally:
        for module, training in modes:
            module.training = training


def first_difference(
    gated: GatedModel, pruned: nn.Module, mask: Tensor, inputs: Inputs
) -> str:
    """The first layer, in order of execution, whose kept channels differ."""
    stays = torch.cat([mask, torch.ones(1, dtype=torch.bool)])
    seen: dict[str, Tensor] = {}
    different: list[str] = []
    kept = _kept_channels(gated.channels, stays)

    def remember(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:  # noqa: ANN401
            if isinstance(out, Tensor) and name not in seen:
                seen[name] = out

        return hook

    def compare(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:  # noqa: ANN401
            before = seen.get(name)
            if before is None or not isinstance(out, Tensor):
                return
            axis = out.ndim - 1 if isinstance(_module, nn.Linear) else min(1, out.ndim - 1)
            wanted = before.index_select(axis, kept[name].to(before.device))
            if tensor_error(wanted, out) > TOLERANCE[torch.float64]:
                different.append(name)

        return hook

    for model, make, part in ((gated.model, remember, gated), (pruned, compare, pruned)):
        modules = dict(model.named_modules())
        handles = [modules[n].register_forward_hook(make(n)) for n in kept if n in modules]
        try:
            _run(part, mask if part is gated else None, gated, inputs)
        except (RuntimeError, ValueError, IndexError):
            pass
        finally:
            for handle in handles:
                handle.remove()
    return different[0] if different else "the output"


def _kept_channels(channels: ChannelMap, stays: Tensor) -> dict[str, Tensor]:
    return {
        layer.name: stays[torch.tensor(layer.out_units)].nonzero().reshape(-1)
        for layer in channels.layers
        if layer.out_units
    }
