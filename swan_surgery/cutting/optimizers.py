"""An optimizer through the cut: its state sliced as the weights were."""

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from swan_surgery.errors import InputError
from swan_surgery.gates import GatedModel
from swan_surgery.gates.in_place import ungate_modules_
from swan_surgery.models.architecture import architecture_of
from swan_surgery.models.checks import check_is_module
from swan_surgery.models.copies import copy_holding
from swan_surgery.models.provenance import Provenance, provenance_of
from swan_surgery.models.steps import Step, apply_step


# What an optimizer holds of itself, and schedulers hang on it: bound to the old one.
_OWN = ("state", "param_groups", "defaults", "step", "_patched")


def optimizer_after(optimizer: Optimizer, model: nn.Module, small: nn.Module) -> Optimizer:
    """The optimizer of a model as one of the model cut from it, with its state carried over.

    Momentum and moments are sliced exactly as the weights were, counters stay. Groups keep their order and
    settings; the gates' logits go, and a group that held nothing else with them. Parameters that are no
    part of the model (of a loss, of a head beside it) stay as they are. Schedulers are made anew:
    the groups carry `initial_lr`, so `LambdaLR(new, ..., last_epoch=epoch)` goes on. Again and again: from a small
    model to the gated copy that `swanify` makes of it (whose gates are added with `add_param_group`), and
    from that to the next cut; or from one plain model to the next.

    Args:
        optimizer: any of `torch.optim` that keeps numbers or tensors of its parameters' shapes; it is
            not changed.
        model: that it trains: gated, or the plain one that was gated and cut.
        small: what `prune` made of it, cut again or compensated or not; or the gated copy of `model`.

    Returns:
        A new optimizer of the same class over the parameters of `small`.

    Raises:
        ModelError: `model` or `small` is no module.
        InputError: not an optimizer, or one of another model's parameters, `small` is no cut of `model`, or the
            optimizer keeps state of other shapes (Adafactor's rows, LBFGS's history), which has no slices.

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
    check_is_module(model)
    check_is_module(small)
    if not isinstance(optimizer, Optimizer):
        raise InputError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps them
    steps = _steps_between(model, small)
    logits = model.gates.logits if isinstance(model, GatedModel) else None
    model, small = _plain(model), _plain(small)
    before: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    trained = [own for group in optimizer.param_groups for own in group["params"]]
    # Otherwise it would go on with the weights of a model that nobody uses any more.
    if not any(own is logits or own in before for own in trained):
        is_gated = "the gated model" if logits is not None else "this model"
        raise InputError(
            f"this {type(optimizer).__name__} trains no parameter of {is_gated}. swanify copies, so make the "
            f"optimizer from the copy, swan.parameter_groups(gated, lr=...) or gated.parameters(), before training "
            f"it; or name the model that it trains"
        )
    after = dict(small.named_parameters())
    state = _sliced(optimizer, model, logits, after, steps)

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


def _plain(model: nn.Module) -> nn.Module:
    return model.model if isinstance(model, GatedModel) else model


def _steps_between(model: nn.Module, small: nn.Module) -> tuple[Step, ...]:
    """What was done to a model until it was `small`; nothing where that is its gated copy."""
    old = provenance_of(_plain(model)) or Provenance(architecture_of(_plain(model)))
    new = provenance_of(_plain(small))
    if new is not None and old.base == new.base and new.steps[: len(old.steps)] == old.steps:
        steps = new.steps[len(old.steps) :]
        if steps or isinstance(small, GatedModel):
            return steps
    which = "this gated model" if isinstance(model, GatedModel) else f"this {type(model).__name__}"
    raise InputError(
        f"{type(_plain(small)).__name__} was not cut from {which}; pass what swan.prune(gated) returned"
    )


def _sliced(
    optimizer: Optimizer,
    model: nn.Module,
    logits: Tensor | None,
    after: Mapping[str, nn.Parameter],
    steps: tuple[Step, ...],
) -> dict[Tensor, dict[str, Any]]:
    """The state of every parameter: a model that holds it in place of its weights is cut as they were."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    state: dict[Tensor, dict[str, Any]] = {}
    shaped: dict[str, dict[Tensor, Tensor]] = {}
    for parameter, own in optimizer.state.items():
        if parameter is logits:
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
        holder = ungate_modules_(copy_holding(model, values))
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
