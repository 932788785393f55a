"""`prune`: from open gates to a smaller dense model of the given class, verified."""

from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from swan_surgery.attention import put_back_, write_out_
from swan_surgery.channels import copy_of
from swan_surgery.channels.attributes import Attribute
from swan_surgery.channels.resizes import Place
from swan_surgery.errors import InputError
from swan_surgery.gates import GatedModel
from swan_surgery.plan import PruningPlan, make_plan, mask_for_budget, round_widths
from swan_surgery.preconditions import check_data, check_gated
from swan_surgery.slicing import cut_
from swan_surgery.verification import verify_pruned


def prune(
    gated: GatedModel, *, macs: float | None = None, round_to: int = 1, verify: bool = True
) -> nn.Module:
    """Remove the closed channels: a plain model of the given class, `forward` and state-dict keys.

    The gated model is not changed. dtype, device, memory format, `requires_grad`, tied weights and
    the training mode stay as they were.

    Args:
        gated: the result of `swanify`, trained.
        macs: share of the base model's MACs to keep at most, in (0, 1]. Moves the threshold: units
            stay in order of p, as many as the budget allows, so closed units may open again. By
            default `gates.open_mask()` stays.
        round_to: widths become multiples of this many channels (8 suits most hardware), by keeping
            the best of the closed units.
        verify: run both models on the example inputs and compare.

    Raises:
        ModelError: `gated` is not a gated model, or on the meta device.
        GateError: NaN or infinite logits.
        InputError: `macs` or `round_to` out of range.
        BudgetError: the budget cannot be reached.
        EmptyLayerError: a layer would keep no channel (`gates.min_width = 0`).
        VerificationError: the pruned model computes something else.
    """
    check_gated(gated)
    check_data(gated, to="prune")
    gated.gates.check()
    if macs is not None and not 0 < macs <= 1:
        raise InputError(f"macs is a share of the base model's MACs, in (0, 1]; got {macs}")
    if round_to < 1 or int(round_to) != round_to:
        raise InputError(f"round_to must be a whole number of channels >= 1; got {round_to!r}")
    if macs is None:
        mask = round_widths(gated, gated.gates.open_mask(), round_to)
    else:
        mask = mask_for_budget(gated, macs, round_to)
    plan = make_plan(gated.channels, mask)
    pruned = apply_plan(gated.model, plan)
    _follow_widths_(pruned, gated)
    if verify:
        verify_pruned(gated, pruned, plan)
    return pruned


def _follow_widths_(pruned: nn.Module, gated: GatedModel) -> None:
    """Norms without any tensor repeat their width as a number that warns when it is not met."""
    bare = [m for m in pruned.modules() if isinstance(m, _InstanceNorm) and not m.affine]
    if not bare:
        return

    def follow(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, _InstanceNorm)  # noqa: S101 - selected above
        module.num_features = args[0].shape[1 if args[0].ndim > 2 else 0]

    handles = [module.register_forward_pre_hook(follow) for module in bare]
    modes = [(module, module.training) for module in pruned.modules()]
    inputs = gated.own_inputs()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            pruned.eval()(*inputs.args, **inputs.kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training


def apply_plan(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Cut a copy of a base model as planned; the same plan works on any copy of the same model."""
    copy = write_out_(copy_of(model))
    cuts: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for entry in plan.positions:
        cuts[entry.tensor][entry.axis] = torch.tensor(entry.kept)
    cut_(copy, cuts)
    for a in plan.attributes:
        Attribute(a.module, a.name, a.index).write_(copy, a.value)
    for n in plan.numbers:
        Place(n.module, n.function, n.number, n.leaf, n.training, n.site).write_(copy, n.value)
    return put_back_(copy)
