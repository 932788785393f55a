"""The laws of DESIGN section 2, over random networks in float64 and eval mode."""

import re

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import swan_surgery as swan
from swan_surgery.cutting.plan import make_plan
from swan_surgery.cutting.verification import relative_error, tensor_error
from swan_surgery.gates import GatedModel
from tests.closing import gated_by
from tests.fingerprints import assert_same_fingerprint, fingerprint
from tests.strategies import Case, NetworkSpec, PartSpec, build, easy_networks, networks


TOLERANCE = 1e-9


def outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, Tensor)]


def assert_close(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second)
    for one, two in zip(first, second, strict=True):
        assert tensor_error(one, two) <= TOLERANCE


def gate(case: Case) -> GatedModel | None:
    """Law 7 on the way: strict raises exactly where an operation is unknown.

    Planning takes nearly all the time, so the map is made once.
    """
    channels = swan.channel_map(case.model, case.inputs)
    try:
        gated = gated_by(channels, case.model, case.inputs, strict=True)
    except swan.UnsupportedOpError as err:
        assert channels.unknown_ops
        assert all(op in str(err) for op, _ in channels.unknown_ops)  # noqa: PT017 - lawful
    except swan.NoGateableChannelsError:
        assert not channels.unknown_ops
    else:
        assert not channels.unknown_ops
        return gated
    try:
        return gated_by(channels, case.model, case.inputs)
    except swan.NoGateableChannelsError as err:
        assert re.search(r"pinned|no conv", str(err))  # noqa: PT017 - both outcomes are lawful
        assert channels.ungated_reads >= set(range(channels.num_units))
        return None


def close_units(gated: GatedModel, share: float, seed: int) -> None:
    drawn = torch.rand(gated.channels.num_units, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        gated.gates.logits.copy_(torch.where(drawn < share, -3.0, 3.0) + 0.1 * drawn)


def check_laws(case: Case, share: float, seed: int) -> GatedModel | None:
    """Laws 1 to 5, 7 and 8 on one network; what was gated is handed on."""
    model, inputs = case.model, case.inputs
    before = fingerprint(model)
    wanted = outputs(model, inputs)
    gated = gate(case)
    assert_same_fingerprint(before, fingerprint(model))  # law 5
    if gated is None:
        return None
    gated.eval()
    assert_close(wanted, outputs(gated, inputs))  # law 1
    back = swan.unswanify(gated)
    assert type(back) is type(model)  # law 4
    assert back.state_dict().keys() == model.state_dict().keys()
    assert_close(wanted, outputs(back, inputs))

    assert_close(wanted, outputs(swan.prune(gated, verify=False), inputs))  # keep all is identity
    assert swan.hard_macs(gated) == swan.count_macs(model, inputs)
    assert swan.hard_params(gated) == swan.count_params(model)
    close_units(gated, share, seed)
    predicted = swan.hard_macs(gated), swan.hard_params(gated)
    pruned = swan.prune(gated, verify=False)
    mask = gated.gates.open_mask()
    assert relative_error(gated, pruned, mask, gated.example_inputs) <= TOLERANCE  # law 2
    assert type(pruned) is type(model)
    assert pruned.state_dict().keys() == model.state_dict().keys()
    counted = swan.count_macs(pruned, inputs), sum(p.numel() for p in pruned.parameters())
    assert predicted == counted  # law 3: integers, said before the cut
    assert_same_fingerprint(before, fingerprint(model))
    with torch.no_grad():
        gated.gates.logits[seed % gated.channels.num_units] = 5.0
    assert swan.hard_macs(gated) >= predicted[0]  # law 8: opening more never costs less
    assert swan.hard_params(gated) >= predicted[1]
    return gated


class LossOfLogits:
    """The loss of a gated model in train mode at any logits: same random numbers, same buffers."""

    def __init__(self, gated: GatedModel, case: Case) -> None:
        self.gated, self.case = gated.train(), case
        self.start = gated.gates.logits.detach().clone()
        self.buffers = {name: tensor.clone() for name, tensor in gated.named_buffers()}

    def at(self, logits: Tensor) -> Tensor:
        with torch.no_grad():
            for name, tensor in self.gated.named_buffers():
                tensor.copy_(self.buffers[name])
            self.gated.gates.logits.copy_(logits)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            result = tree_leaves(self.gated(*self.case.inputs))
        squares = [leaf.square().sum() for leaf in result if isinstance(leaf, Tensor)]
        return torch.stack(squares).sum()

    def gradient(self, logits: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(self.at(logits), self.gated.gates.logits)
        return found

    def change(self, direction: Tensor) -> float:
        """The derivative along a direction, by central differences."""
        with torch.no_grad():
            one, two = (self.at(self.start + step * direction) for step in (1e-6, -1e-6))
        return float(one - two) / 2e-6


def check_learning(gated: GatedModel, case: Case) -> None:
    """Both modes: the gradient is the derivative, and is there wherever a gate makes a difference."""
    with torch.no_grad():
        gated.gates.logits.copy_(torch.linspace(2.5, 3.5, gated.channels.num_units))
    loss = LossOfLogits(gated, case)
    hard = loss.gradient(loss.start)
    gated.gates.mode = "soft"
    soft = loss.gradient(loss.start)
    generator = torch.Generator().manual_seed(case.description.seed)
    towards = torch.randn(len(soft), generator=generator, dtype=soft.dtype)
    scale = float((soft * towards).abs().sum())
    assert abs(loss.change(towards) - float(soft @ towards)) <= 1e-5 * scale + 1e-6
    # Without a gradient a gate never learns: then it must make no difference either.
    for unit in (soft == 0).nonzero().reshape(-1).tolist():
        assert abs(loss.change(torch.eye(len(soft), dtype=soft.dtype)[unit])) <= 1e-6
    # At p = 1 - 2e-9 soft gates are the hard ones; dL/dz = dL/dg p(1-p) at either (Eq. 6).
    far = torch.full_like(loss.start, 20.0)
    slope = [torch.sigmoid(z) * torch.sigmoid(-z) for z in (loss.start, far)]
    wanted = loss.gradient(far) / slope[1]
    largest = float(wanted.abs().max())
    torch.testing.assert_close(hard / slope[0], wanted, rtol=1e-5, atol=1e-7 * largest + 1e-12)


SHARES = st.sampled_from([0.3, 0.7, 0.95])
SEEDS = st.integers(0, 1000)
FEW = settings(max_examples=max(3, settings.default.max_examples // 10))


@pytest.mark.law
@given(easy_networks(), SHARES, SEEDS)
def test_laws_hold_on_the_mechanisms_of_convolutional_networks(
    case: Case, share: float, seed: int
) -> None:
    gated = check_laws(case, share, seed)
    if gated is not None:
        check_learning(gated, case)


@pytest.mark.law
@given(networks(), SHARES, SEEDS)
def test_laws_hold_where_channels_must_be_pinned(case: Case, share: float, seed: int) -> None:
    check_laws(case, share, seed)


@pytest.mark.law
@FEW
@given(networks(), SHARES, SEEDS)
def test_the_same_model_is_planned_the_same_again(case: Case, share: float, seed: int) -> None:
    plans = []
    for gated in (gate(case), gate(case)):
        if gated is None:
            return
        close_units(gated, share, seed)
        plans.append((gated.channels, make_plan(gated.channels, gated.gates.open_mask())))
    assert plans[0] == plans[1]  # law 8


def test_two_widths_of_two_are_told_apart() -> None:
    """`constant.expand_as(x)` looked right as long as both kept one of two channels."""
    entry = (("form", "concat"), ("own", True), ("width", 2))
    heads = (("form", "conv"), ("head_dim", 2), ("heads", 2), ("norm", "none"), ("own", False))
    stem = (("activation", "sigmoid"), ("bn", False), ("kernel", 3), ("width", 2))
    spec = NetworkSpec(
        seed=1,
        image=8,
        in_channels=3,
        second=None,
        stem=PartSpec("stem", stem),
        blocks=(PartSpec("constant", entry), PartSpec("map_attention", heads)),
        head=PartSpec("conv_classifier", (("activation", "none"),)),
    )
    check_laws(build(spec), 0.3, 3)
