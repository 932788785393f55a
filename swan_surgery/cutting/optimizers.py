"""An optimizer through the cut: its state sliced as the weights were."""

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from swan_surgery.errors import InputError
from swan_surgery.gates import GatedModel
from swan_surgery.gates.checks import check_gated
from swan_surgery.gates.in_place import ungate_modules_
from swan_surgery.models.copies import copy_holding
from swan_surgery.models.provenance import provenance_of
from swan_surgery.models.steps import Step, apply_step


# What an optimizer holds of itself, and schedulers hang on it: bound to the old one.
_OWN = ("state", "param_groups", "defaults", "step", "_patched")


def optimizer_after(optimizer: Optimizer, gated: GatedModel, small: nn.Module) -> Optimizer:
    """The optimizer of a gated model as one of the model cut from it, with its state carried over.

    Momentum and moments are sliced exactly as the weights were, counters stay. Groups keep their order and
    settings; the gates' logits go, and a group that held nothing else with them. Parameters that are no
    part of the gated model (of a loss, of a head beside it) stay as they are. Schedulers are made anew:
    the groups carry `initial_lr`, so `LambdaLR(new, ..., last_epoch=epoch)` goes on.

    Args:
        optimizer: any of `torch.optim` that keeps numbers or tensors of its parameters' shapes; it is
            not changed.
        gated: the gated model that it trains.
        small: what `prune` made of `gated`, cut again or compensated or not.

    Returns:
        A new optimizer of the same class over the parameters of `small`.

    Raises:
        ModelError: `gated` is not a gated model.
        InputError: not an optimizer, or one of another model's parameters, `small` is no cut of `gated`, or the optimizer keeps state of other
            shapes (Adafactor's rows, LBFGS's history), which has no slices.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> gated = swan.swanify(net, torch.zeros(1, 3))
        >>> optimizer = torch.optim.AdamW(swan.parameter_groups(gated, lr=1e-3))
        >>> gated(torch.randn(4, 3)).sum().backward()
        >>> optimizer.step()
        >>> small = swan.prune(gated, macs=0.5)
        >>> new = swan.optimizer_after(optimizer, gated, small)
        >>> new.state[small[0].weight]["exp_avg"].shape
        torch.Size([4, 3])
    """
    check_gated(gated)
    if not isinstance(optimizer, Optimizer):
        raise InputError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps them
    steps = _steps_between(gated, small)
    before: dict[Tensor, str] = {
        parameter: name for name, parameter in gated.model.named_parameters()
    }
    logits = gated.gates.logits
    trained = [own for group in optimizer.param_groups for own in group["params"]]
    # Otherwise it would go on with the weights of a model that nobody uses any more.
    if not any(own is logits or own in before for own in trained):
        raise InputError(
            f"this {type(optimizer).__name__} trains no parameter of the gated model. swanify copies, so make the "
            f"optimizer from the copy, swan.parameter_groups(gated, lr=...) or gated.parameters(), before training it"
        )
    after = dict(small.named_parameters())
    state = _sliced(optimizer, gated, before, after, steps)

    def new(parameter: Tensor) -> Tensor:
        return after[before[parameter]] if parameter in before else parameter

    groups = []
    for group in optimizer.param_groups:
        stay = [index for index, own in enumerate(group["params"]) if own is not logits]
        if stay or not group["params"]:
            fresh = copy.deepcopy({k: value for k, value in group.items() if k != "params"})
            fresh["params"] = [new(group["params"][index]) for index in stay]
            if "param_names" in group:
                fresh["param_names"] = [group["param_names"][index] for index in stay]
            groups.append(fresh)
    return _like(optimizer, groups, state)


def _steps_between(gated: GatedModel, small: nn.Module) -> tuple[Step, ...]:
    old, new = provenance_of(gated.model), provenance_of(small)
    steps = () if old is None or new is None else new.steps[len(old.steps) :]
    if (
        old is None
        or new is None
        or not steps
        or old.base != new.base
        or new.steps[: -len(steps)] != old.steps
    ):
        raise InputError(
            f"{type(small).__name__} was not cut from this gated model; pass what swan.prune(gated) returned"
        )
    return steps


def _sliced(
    optimizer: Optimizer,
    gated: GatedModel,
    names: Mapping[Tensor, str],
    after: Mapping[str, nn.Parameter],
    steps: tuple[Step, ...],
) -> dict[Tensor, dict[str, Any]]:
    """The state of every parameter: a model that holds it in place of its weights is cut as they were."""
    state: dict[Tensor, dict[str, Any]] = {}
    shaped: dict[str, dict[Tensor, Tensor]] = {}
    for parameter, own in optimizer.state.items():
        if parameter is gated.gates.logits:
            continue
        if parameter not in names:
            state[parameter] = copy.deepcopy(own)
            continue
        kept = state[after[names[parameter]]] = {}
        for key, value in own.items():
            if isinstance(value, (list, dict)) or (isinstance(value, Tensor) and value.numel() > 1):
                shaped.setdefault(key, {})[parameter] = _shaped(
                    optimizer, names[parameter], key, value, parameter
                )
            else:
                kept[key] = copy.deepcopy(value)
    for key, values in shaped.items():
        holder = ungate_modules_(copy_holding(gated.model, values))
        for step in steps:
            holder = apply_step(holder, step)
        held = dict(holder.named_parameters())
        for parameter in values:
            name = names[parameter]
            state[after[name]][key] = held[name].detach().to(after[name].device)
    return state


def _shaped(optimizer: Optimizer, name: str, key: str, value: Any, parameter: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        seen = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "of many tensors"
        raise InputError(
            f"{type(optimizer).__name__} keeps {key!r} {seen} for {name!r} of shape "
            f"{tuple(parameter.shape)}, which has no slices; make a new optimizer for the smaller model"
        )
    return value


def _like(
    optimizer: Optimizer, groups: list[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]]
) -> Optimizer:
    """The same class and settings, without a call of its constructor, whose arguments nobody knows."""
    kind = type(optimizer)
    made = kind.__new__(kind)
    others = {k: v for k, v in vars(optimizer).items() if k not in _OWN and "hook" not in k}
    vars(made).update(others)
    made.__setstate__(
        {
            "defaults": dict(optimizer.defaults),
            "state": defaultdict(dict, state),
            "param_groups": groups,
        }
    )
    return made


__all__ = ["optimizer_after"]
