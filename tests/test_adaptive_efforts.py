"""Efforts of nested widths that learn: the gradient of what lies beyond a threshold, a budget, and what stays as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.adaptive.effort import Effort
from swan_surgery.adaptive.thresholds import temperature_of
from tests.adaptive_laws import aim_, own_readers_, randomise_statistics_
from tests.closing import image, prepared
from tests.test_adaptive import SmallNet, adapted_net, loader, small_net


def aimed_net(**options) -> swan.AdaptiveModel:
    """Samples take widths of their own, each with readers of its own."""
    adapted = adapted_net(**options).eval()
    generator = torch.Generator().manual_seed(3)
    own_readers_(adapted, generator)
    aim_(adapted, generator)
    return adapted


def slopes_of(adapted: swan.AdaptiveModel, x: Tensor) -> dict[str, Tensor]:
    """Gradients of who looks."""
    adapted.zero_grad()
    weights = torch.randn(len(x), 4, generator=torch.Generator().manual_seed(5)).double()
    (adapted(x) * weights).sum().backward()
    return {
        name: block.effort.bias.grad.clone()
        for name, block in adapted.blocks().items()
        if block.effort is not None
    }


def slope_by_hand(adapted: swan.AdaptiveModel, x: Tensor, name: str) -> Tensor:
    """d loss / d output of a block, times what it gives beyond the nearest threshold less what it gives now, times p'."""
    block, seen = adapted.blocks()[name], {}

    def keep(_module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        seen["x"], seen["y"] = args[0], output.detach().requires_grad_()
        return seen["y"]

    handle = block.register_forward_hook(keep)
    weights = torch.randn(len(x), 4, generator=torch.Generator().manual_seed(5)).double()
    taken = adapted.taken(x)
    (taken.output * weights).sum().backward()
    handle.remove()
    total = torch.zeros(()).double()
    thresholds = block.effort.thresholds.tolist()
    for index, effort in enumerate(taken.efforts[name].tolist()):
        nearest = min(thresholds, key=lambda own: abs(own - effort))
        upper = thresholds.index(nearest) + 1
        gives = []
        for level in (upper, upper - 1):
            with torch.no_grad(), adapted.holding({name: level}):
                outputs = []
                own = block.register_forward_hook(lambda _m, _a, y, to=outputs: to.append(y))
                adapted(x)
                own.remove()
            gives.append(outputs[0][index])
        p = torch.tensor(
            (effort - nearest) / float(block.effort.temperature), dtype=torch.float64
        ).sigmoid()
        slope = p * (1 - p) / block.effort.temperature
        total += (seen["y"].grad[index] * (gives[0] - gives[1])).sum() * slope
    return total


@pytest.mark.parametrize("execution", ["group", "masked"])
def test_the_gradient_is_what_lies_beyond_the_nearest_threshold(execution) -> None:
    adapted, x = aimed_net(), image(6, 3, 8, 8)
    adapted.execution = execution
    found = slopes_of(adapted, x)
    last = list(found)[-1]
    wanted = slope_by_hand(adapted, x, last)
    assert float(wanted.abs()) > 1e-3
    assert torch.allclose(found[last].squeeze(), wanted, rtol=1e-9)


@pytest.mark.parametrize("per", ["block", "network"])
def test_groups_and_masks_have_the_same_slopes(per) -> None:
    adapted, x = aimed_net(per=per), image(6, 3, 8, 8)
    found = {}
    for way in ("group", "masked"):
        adapted.execution = way
        found[way] = slopes_of(adapted, x)
    assert len(found["group"]) == (2 if per == "block" else 1)
    for name, own in found["group"].items():
        assert bool(own.any())
        assert torch.allclose(own, found["masked"][name], rtol=1e-9)


def test_outputs_and_other_gradients_are_as_without() -> None:
    adapted, x = aimed_net(), image(6, 3, 8, 8)
    frozen = copy.deepcopy(adapted)
    for block in frozen.blocks().values():
        block.effort.requires_grad_(requires_grad=False)
    one, other = adapted(x), frozen(x)
    assert torch.equal(one, other)
    one.square().sum().backward()
    other.square().sum().backward()
    for (name, p), q in zip(adapted.named_parameters(), frozen.parameters(), strict=True):
        if ".effort." not in name and q.grad is not None:
            assert torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-12), name


def test_running_statistics_move_once_a_step() -> None:
    adapted, x = aimed_net(), image(6, 3, 8, 8)
    adapted.execution = "masked"
    frozen = copy.deepcopy(adapted)
    for block in frozen.blocks().values():
        block.effort.requires_grad_(requires_grad=False)
    for model in (adapted, frozen):
        model.train()(x).sum().backward()
    assert any(block.effort.bias.grad.any() for block in adapted.blocks().values())
    for (name, one), other in zip(adapted.named_buffers(), frozen.buffers(), strict=True):
        assert torch.equal(one, other), name


def test_in_groups_norms_in_train_mode_leave_efforts_alone() -> None:
    adapted = aimed_net().train()
    with torch.no_grad():
        for block in adapted.blocks().values():
            block.effort.thresholds.copy_(torch.tensor([-torch.inf, -torch.inf, -1e9]))
    adapted(image(6, 3, 8, 8)).sum().backward()
    assert all(block.effort.bias.grad is None for block in adapted.blocks().values())


def test_a_ceiling_has_no_slope() -> None:
    adapted, x = aimed_net(), image(6, 3, 8, 8)
    assert any(own.any() for own in slopes_of(adapted, x).values())
    adapted.max_macs = adapted.costs.least
    with torch.no_grad():
        for block in adapted.blocks().values():
            block.effort.bias += 100.0  # all want the widest, none may
    assert not any(own.any() for own in slopes_of(adapted, x).values())


def test_levels_that_somebody_holds_have_no_slope() -> None:
    adapted, x = aimed_net(), image(6, 3, 8, 8)
    with adapted.holding({"first": torch.tensor([0, 1, 2, 3, 0, 1])}):
        adapted(x).sum().backward()
    blocks = adapted.blocks()
    assert blocks["first"].effort.bias.grad is None
    assert blocks["second"].effort.bias.grad is not None


@pytest.mark.parametrize("per", ["block", "network"])
def test_blocks_that_run_again_in_backward_have_the_same_slopes(per) -> None:
    class Checkpointed(SmallNet):
        again = True

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in (self.first, self.second):
                run = torch.utils.checkpoint.checkpoint if self.again else _called
                x = run(block, x, use_reentrant=False)
            return self.head(x.mean((2, 3)))

    adapted = swan.adapt(prepared(Checkpointed()), image(2, 3, 8, 8), per=per).eval()
    aim_(adapted, torch.Generator().manual_seed(3))
    randomise_statistics_(adapted, torch.Generator().manual_seed(3))
    x = image(6, 3, 8, 8)
    adapted.model.again = False
    plain = slopes_of(adapted, x)
    adapted.model.again = True
    found = slopes_of(adapted, x)
    assert all(torch.allclose(found[name], plain[name], rtol=1e-9) for name in plain)
    assert all(own.any() for own in plain.values())
    copy.deepcopy(adapted)


def _called(block: nn.Module, x: Tensor, **_: bool) -> Tensor:
    return block(x)


def test_the_other_side_of_thresholds_that_fall_together() -> None:
    effort = Effort(2, 4, like=torch.zeros((), dtype=torch.float64))
    effort.thresholds.copy_(torch.tensor([0.0, 0.0, 2.0]))
    efforts = torch.tensor([-1.0, 0.5, 1.5, 3.0], dtype=torch.float64, requires_grad=True)
    beyond, p = effort.neighbours(efforts)
    assert effort.levels(efforts).tolist() == [0, 2, 2, 3]
    assert beyond.tolist() == [2, 0, 3, 2]
    assert torch.allclose(p, torch.sigmoid(torch.tensor([-1.0, 0.5, -0.5, 1.0]).double()))
    effort.thresholds.fill_(-torch.inf)
    beyond, p = effort.neighbours(efforts)
    assert beyond.tolist() == [3, 3, 3, 3]
    p.sum().backward()
    assert not efforts.grad.any()


@pytest.mark.parametrize("per", ["block", "network"])
def test_the_budget_is_a_mean_over_inputs_and_has_gradients(per) -> None:
    adapted, x = aimed_net(per=per), image(6, 3, 8, 8)
    taken = adapted.taken(x)
    mean = float(taken.macs.double().mean()) / adapted.costs.dense
    penalty = swan.gate_penalty(adapted, taken, macs=0.2, macs_weight=1.0)
    assert float(penalty.detach()) == pytest.approx((mean - 0.2) ** 2)
    penalty.backward()
    grads = [block.effort for block in adapted.blocks().values() if block.effort is not None]
    assert all(float(effort.bias.grad) > 0 for effort in grads), "a lower effort costs less"
    # Eq. 10: at the probabilities, the mean MACs of blocks, in shares of what they cost in full.
    wanted, total = 0.0, 0.0
    for name, efforts in taken.efforts.items():
        p = adapted.blocks()[name].effort.probabilities(efforts).mean(0)
        for block in [name] if per == "block" else adapted.blocks():
            macs = adapted.costs.blocks[block]
            wanted += float((torch.diff(macs, prepend=macs.new_zeros(1)) * p.detach()).sum())
            total += float(macs[-1])
    found = float(swan.gate_penalty(adapted, taken, flops=1.0).detach())
    assert found == pytest.approx(wanted / total)


@pytest.mark.filterwarnings("ignore:widths hardly vary")
def test_efforts_learn_a_budget_and_thresholds_are_set_anew() -> None:
    adapted = swan.adapt(small_net(), image(2, 3, 8, 8))
    batches = loader(4)
    swan.calibrate_widths(adapted, batches)
    high = (0.2 * adapted.costs.least + 0.8 * adapted.costs.most) / adapted.costs.dense
    low = (0.6 * adapted.costs.least + 0.4 * adapted.costs.most) / adapted.costs.dense
    swan.fit_widths(adapted, batches, macs=high, efforts="learn")
    temperatures = [float(block.effort.temperature) for block in adapted.blocks().values()]
    assert all(0.2 < own < 5 for own in temperatures), "so that rates are those of logits"
    assert all(bool(own.effort.thresholds.isfinite().all()) for own in adapted.blocks().values())
    efforts = [p for block in adapted.blocks().values() for p in block.effort.parameters()]
    optimizer = torch.optim.Adam(efforts, 0.05)
    adapted.execution = "masked"
    x, y = batches[0]
    before = float(adapted.eval().taken(x).macs.double().mean())
    for _ in range(100):
        taken = adapted.train().taken(x)
        penalty = swan.gate_penalty(adapted, taken, macs=low, macs_weight=100.0)
        optimizer.zero_grad()
        (F.cross_entropy(taken.output, y) + penalty).backward()
        optimizer.step()
    after = float(adapted.eval().taken(x).macs.double().mean())
    assert after < 0.5 * (before + low * adapted.costs.dense)
    learnt = [p.detach().clone() for p in efforts]
    stats = swan.fit_widths(adapted, batches, macs=low, efforts="keep")
    assert stats.mean_macs <= low * adapted.costs.dense
    assert all(torch.equal(own, now) for own, now in zip(learnt, efforts, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: swan.fit_widths(aimed_net(), loader(1), macs=0.9, efforts="learnt"), "efforts"),
        (
            lambda: swan.fit_widths(
                swan.adapt(small_net(), image(2, 3, 8, 8), structure="free"),
                loader(1),
                macs=0.9,
                efforts="keep",
            ),
            "learn as they are",
        ),
        (
            lambda: swan.fit_widths(
                aimed_net(), loader(1), macs=0.9, efforts="keep", distance=lambda a, b: a - b
            ),
            "move together",
        ),
    ],
)
def test_refusals_say_what_to_do(call, message: str) -> None:
    with pytest.raises(swan.InputError, match=message):
        call()


def test_efforts_that_say_nothing_have_no_steep_slope() -> None:
    """Rounding in the deviation of equal efforts made slopes of 1e7."""
    alike = torch.full((513,), 0.1)
    assert temperature_of(alike, 4.0) == 1.0
    assert temperature_of(torch.tensor([0.0, 2.0]), 4.0) == pytest.approx(2**0.5 / 4)
