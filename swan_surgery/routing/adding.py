"""`add_switch`: a trained network in, the same with a short way for easy inputs out."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from swan_surgery.environment.precision import in_own_precision
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import InputError
from swan_surgery.gates.checks import check_changeable
from swan_surgery.models import Inputs, copy_of
from swan_surgery.models.architecture import architecture_of
from swan_surgery.models.batches import batches_in, holds_nan
from swan_surgery.models.checks import checked_inputs, described, infer_inputs
from swan_surgery.models.provenance import Provenance, note_, provenance_of
from swan_surgery.routing.asked import Light, check_asked, decided, names_of
from swan_surgery.routing.axes import channel_axis_of
from swan_surgery.routing.lights import cut_light
from swan_surgery.routing.losses import Discrepancy, DiscrepancyName, discrepancy_of, kl, l1, l2
from swan_surgery.routing.masking import masked
from swan_surgery.routing.parts import Ending, OnCopy, Parts, Switch, check_branches, check_follows
from swan_surgery.routing.placing import data_of, depths_of, least_apart, placements
from swan_surgery.routing.routed_model import Decide, RoutedModel
from swan_surgery.routing.rows import arguments_of, check_apart, is_plain, writes_to_input
from swan_surgery.routing.splitting import Split, inner_name, split_at
from swan_surgery.routing.step import route_step


_NAMES: dict[Discrepancy, DiscrepancyName] = {kl: "kl", l1: "l1", l2: "l2"}


def add_switch(
    model: nn.Module,
    after: str | Sequence[str],
    *,
    example_inputs: Any = None,
    light: Light | Sequence[Light] = 0.25,
    default: Tensor | None = None,
    decide: Decide = "auto",
    batches: Iterable[Any] | None = None,
    mask: bool = False,
    discrepancy: DiscrepancyName | Discrepancy | None = None,
    positive: Callable[[Any], Tensor] | None = None,
    hidden: int = 64,
    frozen: bool = True,
) -> RoutedModel:
    """Give a network a short way for easy inputs, behind a module (Dynamic Switch Layer, arXiv:2407.05442).

    Train the result with `routed.loss(batch)`, then set its threshold with `swan.calibrate_switch`. Until then
    every input takes the full way, and the outputs are bitwise the given model's.

    Args:
        model: any network; it is not changed.
        after: the trunk ends with this module, by its name in `named_modules`; several names, in order, give nested
            switches. "auto": of a few depths the one at which outputs move least for three quarters of the MACs, by
            `batches` (`swan.scan_switches` shows them all).
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments; as for `swanify`.
        light: the light branch: a share of the rest's MACs, to which it is cut (`swan.prune_by_score`); a module of
            your own, from what crosses to what the model returns; or None: the input ends there with the output
            `default` (gated compression). One for each switch, or one for all.
        default: what an input gets that ends at a switch: the output of one sample, without the batch.
        decide: "predicted": the switch, before the light branch runs; "margin": the light branch's own confidence,
            after it ran (class scores alone); "label": the switch, trained on labels (gated compression); "auto":
            what `calibrate_switch` finds to be cheaper.
        batches: what the model is used on, as for `swan.calibrate`: then the light branch is cut by Fisher scores of
            the model's own output distribution and compensated (`swan.compensate`), else by magnitude. A few hundred
            samples; no labels.
        mask: gates on the channels that cross (`routed.gated`), for `beta` in the loss or a `swan.Objective`; cut
            by `swan.cut_mask`.
        discrepancy: how far two outputs are apart: "kl" for class scores, "l1", "l2", or a function of (light, full)
            that gives one number per sample. By default "kl" where the only output is [B, classes], else "l2", the mean over all.
        positive: Omega of gated compression: labels -> bool [B], True for what must not be stopped.
        hidden: width of the switch's hidden layer.
        frozen: trunk and full branch are not trained (`routed.unfreeze()` later).

    Raises:
        ModelError: not a plain `nn.Module`.
        InputError: no such module, its output is not one tensor, more crosses (says what), or the branches do not
            fit.
        BudgetError: the light branch cannot be made as small as that.
        NoGateableChannelsError: nothing of the rest can be cut: pass a module of your own.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.randn(4, 3)
        >>> routed = swan.add_switch(net, "1", example_inputs=x, light=0.5)
        >>> torch.equal(routed(x), net(x))
        True
        >>> routed.thresholds = [float("inf")]  # all take the short way
        >>> torch.equal(routed(x), routed.parts.light(routed.parts.trunk(x)))
        True
    """
    check_changeable(model)
    if after == "auto":
        held, given = data_of(model, batches, example_inputs)

        def make(name: str, making: Sequence[Any]) -> RoutedModel:
            return add_switch(
                model,
                name,
                example_inputs=given,
                light=light,
                default=default,
                decide=decide,
                batches=making,
                discrepancy=discrepancy,
                positive=positive,
                hidden=hidden,
            ).eval()

        found = placements(depths_of(copy_of(model).eval(), given), make, held)
        after, batches, example_inputs = least_apart(found).after, held, given
    names = names_of(after)
    listed: Any = light if isinstance(light, (tuple, list)) else (light,) * len(names)
    lights: tuple[Light, ...] = tuple(listed)
    check_asked(names, lights, default, decide)
    if type(hidden) is not int or hidden < 1:
        raise InputError(f"hidden must be a whole number from 1 on; got {hidden!r}")
    if positive is not None and not callable(positive):
        raise InputError(f"positive must be a function of labels; got {positive!r}")
    given = infer_inputs(model)[0] if example_inputs is None else example_inputs
    inputs = checked_inputs(model, given, to="add a switch").copied()
    data = None if batches is None else list(batches_in(batches, None))
    if any(map(holds_nan, data or ())):
        raise InputError("a batch holds NaN; leave it out")
    with torch.inference_mode(mode=False), streams_kept(), in_own_precision(model):
        private = copy_of(model).eval()
        making = _Making(private, inputs, default, hidden, data)
        parts = making.build(names, lights)
        apart = discrepancy_of(discrepancy, making.output)
        decide = decided(decide, making.output)
        routed = RoutedModel(
            parts,
            after=names,
            decide=["label" if own is None else decide for own in lights],
            example_inputs=inputs,
            way=making.ways,
            discrepancy=_NAMES.get(apart, apart),
            positive=positive,
            frozen=frozen,
        )
        base = provenance_of(model) or Provenance(architecture_of(model))
        own_light = any(isinstance(item, nn.Module) for item in lights)
        note_(
            parts,
            Provenance(architecture_of(parts))
            if own_light
            else base.followed_by(route_step(routed)),
        )
        if frozen:
            for own in parts.chain:
                own.trunk.requires_grad_(requires_grad=False)
            parts.last.requires_grad_(requires_grad=False)
        if mask:
            routed.body = masked(parts, inputs)
        return routed.train(model.training)


class _Making:
    """Builds parts from the front to the back."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        default: Tensor | None,
        hidden: int,
        data: list[Any] | None,
    ) -> None:
        self.model, self.inputs, self.default = model, inputs, default
        self.hidden, self.data = hidden, data
        self.ways: list[str] = []
        self.names = {name for name, _ in model.named_modules()}
        try:
            with torch.no_grad():
                self.output = inputs.run(model)
        except Exception as err:
            first = str(err).splitlines()[0] if str(err) else ""
            raise InputError(
                f"{type(model).__name__} cannot be run on the example inputs, {described(inputs)}: "
                f"{type(err).__name__}: {first}"
            ) from err

    def build(self, names: Sequence[str], lights: Sequence[Light]) -> Parts:
        """The parts for switches behind these modules."""
        data = None if self.data is None else [_arguments(self.model, b) for b in self.data]
        return self._build(self.model, self.inputs, names, lights, data)

    def _build(
        self,
        model: nn.Module,
        inputs: Inputs,
        names: Sequence[str],
        lights: Sequence[Light],
        data: list[Inputs] | None,
    ) -> Parts:
        if model is not self.model and names[0] in self.names:
            _check_behind(model, names[0])
        split = split_at(model, inner_name(model, names[0]), inputs)
        self.ways.append(split.way)
        with torch.no_grad():
            crossing = inputs.run(split.trunk)
            behind = None if data is None else [Inputs((b.run(split.trunk),), {}) for b in data]
        if model is self.model:
            check_branches(self.output, self.output, crossing.shape[0])
            check_follows(model, inputs, self.output)
            check_apart(split.rest, crossing, f"what runs behind {names[0]!r}")
        given = lights[0]
        if given is None:
            assert self.default is not None  # noqa: S101 - checked at the edge
            first = next(t for t in tree_leaves(self.output) if isinstance(t, Tensor))
            light: nn.Module = Ending(self.default.to(first.device, first.dtype))
        elif isinstance(given, nn.Module):
            light = copy_of(given)
            is_sure = is_plain(light) and not writes_to_input(light, crossing)
            light = light if is_sure else OnCopy(light)
        else:
            light = cut_light(split, crossing, float(given), behind)
        self._check_fit(light, crossing)
        switch = self._switch(split, crossing, is_logit=given is None)
        full = split.rest
        if len(names) > 1:
            full = self._build(split.rest, Inputs((crossing,), {}), names[1:], lights[1:], behind)
        return Parts(split.trunk, switch, light, full).eval()

    def _check_fit(self, light: nn.Module, crossing: Tensor) -> None:
        try:
            with torch.no_grad():
                found = light.eval()(crossing)
        except Exception as err:
            first = str(err).splitlines()[0] if str(err) else ""
            raise InputError(
                f"the light branch cannot be run on what crosses, {list(crossing.shape)}: "
                f"{type(err).__name__}: {first}"
            ) from err
        check_branches(found, self.output, crossing.shape[0])
        check_apart(light, crossing, "the light branch")

    def _switch(self, split: Split, crossing: Tensor, *, is_logit: bool) -> Switch:
        axis = channel_axis_of(split.trunk, crossing)
        switch = Switch(crossing.shape[axis], axis=axis, hidden=self.hidden, is_logit=is_logit)
        return switch.to(crossing.device, crossing.dtype)


def _check_behind(rest: nn.Module, name: str) -> None:
    known = dict(rest.named_modules())
    if inner_name(rest, name) not in known:
        raise InputError(
            f"switches stand one behind the other: {name!r} does not run behind the one before it; name each module "
            f"once, in the order in which they run"
        )


def _arguments(model: nn.Module, batch: Any) -> Inputs:
    """A batch as arguments on the model's device, labels left out."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return Inputs(*arguments_of(batch, device))


__all__ = ["Light", "add_switch"]
