"""Eq. 7: mean and biased variance over all samples, under hard gates."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import swan_surgery as swan
from tests.gated_zoo import drawn_zoo
from tests.zoo import ZOO


with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    from fvcore.nn.precise_bn import update_bn_stats


def batches(sizes: tuple[int, ...] = (5, 3, 7), seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, 3, 8, 8, generator=generator, dtype=torch.float64) * (1 + i) + i
        for i, n in enumerate(sizes)
    ]


def norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def over_all(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 7, both lines of it, over samples and positions."""
    mean = x.mean((0, 2, 3))
    return mean, (x - mean[:, None, None]).square().mean((0, 2, 3))


def close(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_eq_7_on_the_first_norm_with_batches_of_different_sizes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double().eval()
    data = batches()
    assert swan.calibrate(model, data) == 3
    mean, variance = over_all(model[0](torch.cat(data)).detach())
    close(model[1].running_mean, mean)
    close(model[1].running_var, variance)  # biased: divided by N


def test_it_is_exact_far_from_zero() -> None:
    # Sum of squares minus square of sums would lose all digits here.
    bn = nn.BatchNorm2d(3).double()
    data = [1e8 + 1e-2 * x for x in batches()]
    swan.calibrate(bn, data)
    mean, variance = over_all(torch.cat(data))
    torch.testing.assert_close(bn.running_var, variance, rtol=1e-6, atol=0)
    torch.testing.assert_close(bn.running_mean, mean, rtol=1e-12, atol=0)


def test_eq_7_on_every_norm_in_one_batch() -> None:
    model, _ = ZOO["resnet_projection"]()
    model = model.double()
    data = batches((9,))
    seen = {}
    for name, norm in norms(model).items():
        norm.register_forward_pre_hook(
            lambda module, args, name=name: seen.__setitem__(name, args[0].detach())
        )
    swan.calibrate(model, data)
    assert set(seen) == set(norms(model))
    for name, norm in norms(model).items():
        mean, variance = over_all(seen[name])
        close(norm.running_mean, mean)
        close(norm.running_var, variance)


def test_fvcore_agrees_on_equal_batches() -> None:
    # fvcore's estimator: mean of batch means, population variance by the law of total variance
    # from unbiased batch variances; the same number up to n / (n - 1) for one batch.
    model, _ = ZOO["densenet"]()
    ours = model.double().eval()
    theirs = copy.deepcopy(ours).train()
    data = batches((6, 6, 6))
    swan.calibrate(ours, data)
    update_bn_stats(theirs, data, num_iters=3)
    counts = {"norm1": 64, "norm2": 64, "norm3": 64, "norm4": 16}
    for name, norm in norms(ours).items():
        other = norms(theirs)[name]
        close(norm.running_mean, other.running_mean)
        samples = 6 * counts[name]
        assert float((norm.running_var / other.running_var - 1).abs().max()) <= 1 / samples


def test_a_shared_norm_sees_all_its_calls() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.one(x)) + self.bn(self.two(x))

    model = Shared().double()
    data = batches()
    swan.calibrate(model, data)
    x = torch.cat(data)
    mean, variance = over_all(torch.cat([model.one(x), model.two(x)]).detach())
    close(model.bn.running_mean, mean)
    close(model.bn.running_var, variance)


@pytest.mark.parametrize("num_batches", [1, 2, 3, 50, None])
def test_num_batches(num_batches) -> None:
    taken = []

    def loader():
        for batch in batches():
            taken.append(batch)
            yield batch

    bn = nn.BatchNorm2d(3).double()
    wanted = min(num_batches or 3, 3)
    assert swan.calibrate(bn, loader(), num_batches=num_batches) == wanted
    assert len(taken) == wanted  # not one more is drawn
    mean, variance = over_all(torch.cat(batches()[:wanted]))
    close(bn.running_mean, mean)
    close(bn.running_var, variance)


def test_forms_of_batches() -> None:
    data = batches()
    wanted = nn.BatchNorm2d(3).double()
    swan.calibrate(wanted, data)
    for form in (
        [(x, torch.zeros(len(x))) for x in data],
        [[x, None] for x in data],
        [{"x": x} for x in data],
    ):
        model = _Named()
        swan.calibrate(model, form)
        assert torch.equal(model.bn.running_mean, wanted.running_mean)
        assert torch.equal(model.bn.running_var, wanted.running_var)


class _Named(nn.Module):
    def __init__(self, *, by_keyword: bool = False) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3).double()
        self.by_keyword = by_keyword

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(input=x) if self.by_keyword else self.bn(x)


def test_a_norm_that_is_called_with_a_keyword() -> None:
    model = _Named(by_keyword=True)
    swan.calibrate(model, batches())
    mean, variance = over_all(torch.cat(batches()))
    close(model.bn.running_mean, mean)
    close(model.bn.running_var, variance)


@pytest.mark.parametrize("training", [True, False])
def test_modes_counters_and_weights_stay(training) -> None:
    gated = drawn_zoo()
    gated.train(training)
    some = gated.model.stem[1]
    some.train(not training)
    modes = [module.training for module in gated.modules()]
    weights = {name: p.clone() for name, p in gated.named_parameters()}
    hooks = [len(module._forward_pre_hooks) for module in gated.modules()]
    tracked = {name: norm.num_batches_tracked.clone() for name, norm in norms(gated).items()}
    swan.calibrate(gated, batches())
    assert [module.training for module in gated.modules()] == modes
    assert all(torch.equal(p, weights[name]) for name, p in gated.named_parameters())
    assert [len(module._forward_pre_hooks) for module in gated.modules()] == hooks
    for name, norm in norms(gated).items():
        assert torch.equal(norm.num_batches_tracked, tracked[name])


def test_dropout_is_off_and_the_gates_are_hard() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Dropout(0.9), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), nn.ReLU(),
        nn.Conv2d(5, 2, 1),
    ).double()  # fmt: skip
    data = batches()
    gated = swan.swanify(model, data[0]).train()
    gated.gates.mode = "soft"
    with torch.no_grad():
        gated.gates.logits.fill_(3.0)
        gated.gates.logits[1] = -3.0
    swan.calibrate(gated, data)
    hidden = model[0](torch.cat(data)) * torch.tensor([1.0, 0, 1, 1])[:, None, None]
    mean, variance = over_all(model[2](hidden).detach())
    close(gated.model[3].running_mean, mean)
    close(gated.model[3].running_var, variance)


def test_it_does_not_depend_on_the_statistics_before() -> None:
    first, second = drawn_zoo(), drawn_zoo()
    for norm in norms(second).values():
        norm.running_mean.fill_(1e6)
        norm.running_var.fill_(1e-6)
    for gated in (first, second):
        swan.calibrate(gated, batches())
    for one, two in zip(norms(first).values(), norms(second).values(), strict=True):
        assert torch.equal(one.running_mean, two.running_mean)
        assert torch.equal(one.running_var, two.running_var)


@pytest.mark.parametrize(
    "name",
    ["resnet_projection", "resnet_preactivation", "densenet", "inverted_residual", "inception"],
)
def test_calibrating_then_pruning_equals_pruning_then_calibrating(name) -> None:
    gated = drawn_zoo(name)
    small = swan.prune(gated)
    stale = {name: norm.running_mean.clone() for name, norm in norms(small).items()}
    swan.calibrate(small, batches())
    swan.calibrate(gated, batches())
    other = swan.prune(gated)
    assert norms(small).keys() == norms(other).keys()
    for key, norm in norms(small).items():
        close(norm.running_mean, norms(other)[key].running_mean)
        close(norm.running_var, norms(other)[key].running_var)
        assert not torch.equal(norm.running_mean, stale[key])
    x = batches((4,), seed=5)[0]
    torch.testing.assert_close(small.eval()(x), other.eval()(x), rtol=1e-8, atol=1e-10)


def test_norms_that_do_not_run_or_do_not_track_are_left_alone() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.BatchNorm2d(3)
            self.unused = nn.BatchNorm2d(3)
            self.untracked = nn.BatchNorm2d(3, track_running_stats=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.untracked(self.used(x))

    model = Partly().double()
    swan.calibrate(model, batches())
    assert model.unused.running_mean.tolist() == [0, 0, 0]
    assert model.unused.running_var.tolist() == [1, 1, 1]
    assert model.untracked.running_mean is None
    assert bool((model.used.running_mean != 0).all())


def test_statistics_keep_dtype_and_identity() -> None:
    bn = nn.BatchNorm2d(3)
    mean, variance = bn.running_mean, bn.running_var
    swan.calibrate(bn, [x.float() for x in batches()])
    assert bn.running_mean is mean
    assert bn.running_var is variance
    assert mean.dtype == torch.float32


def test_a_model_without_norms() -> None:
    with pytest.warns(swan.SwanWarning, match=r"Conv2d has no batch-norm .*cut without it"):
        assert swan.calibrate(nn.Conv2d(3, 4, 1).double(), batches()) == 3


def test_no_gradient_is_built() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).double()
    swan.calibrate(model, batches())
    assert not model[1].running_mean.requires_grad
    assert model[0].weight.grad is None


def test_batches_without_samples_are_refused_and_nothing_changes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    before = model[1].running_mean.clone()
    with pytest.raises(swan.InputError, match="hold no samples"):
        swan.calibrate(model, [torch.zeros(0, 3, 4, 4)])
    assert torch.equal(model[1].running_mean, before)
