"""Weighted statistics: at 0/1 gates they are torch's own function on the channels that are left."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.calls.functions import WEIGHABLE
from swan_surgery.calls.mode import CallMode, Change
from swan_surgery.gates.weighted_statistics import WEIGHTED, weighing
from tests.closing import assert_closed_equals_cut, image, prepared
from tests.small_nets import Net, conv


KEPT = torch.tensor([0, 2, 3, 6, 7])
GATES = torch.zeros(8, dtype=torch.float64).index_fill(0, KEPT, 1.0)
TIGHT = {"rtol": 1e-12, "atol": 1e-13}

REDUCTIONS = {
    "mean": torch.mean,
    "sum": torch.sum,
    "var": torch.var,
    "std": torch.std,
    "var_mean": torch.var_mean,
    "norm": torch.norm,
    "vector_norm": torch.linalg.vector_norm,
    "linalg_vector_norm": torch.linalg.vector_norm,
    "amax": torch.amax,
    "amin": torch.amin,
}
NORMS = ("layer_norm", "rms_norm", "group_norm")
OF_VECTORS = {"normalize": F.normalize, "linalg_norm": torch.linalg.norm}

DIMS = [
    {"dim": 1},
    {"dim": -3, "keepdim": True},
    {"dim": (1, 2)},
    {"dim": (-1, 1), "keepdim": True},
]
SPREADS: list[dict[str, Any]] = [
    {},
    {"unbiased": False},
    {"correction": 0},
    {"correction": 1},
    {"correction": 2},
]
POWERS: list[dict[str, Any]] = [
    {},
    *({"p": p} for p in (1, 2, 3.5, -1, 0, math.inf, -math.inf, "fro")),
]
ORDERS: list[dict[str, Any]] = [{}, *({"ord": p} for p in (1, 2, 3.5, -1, 0, math.inf, -math.inf))]
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "var": SPREADS,
    "std": SPREADS,
    "var_mean": SPREADS,
    "norm": POWERS,
    "vector_norm": ORDERS,
    "linalg_vector_norm": ORDERS,
}
CASES = [
    (name, dims | options)
    for name in REDUCTIONS
    for dims in DIMS
    for options in OPTIONS.get(name, [{}])
]


def along(axis: int, ndim: int, gates: Tensor = GATES) -> Tensor:
    return gates.view([-1 if a == axis % ndim else 1 for a in range(ndim)])


def activations() -> Tensor:
    """[B, C, H, W], every channel of its own mean and spread; closed ones far away."""
    x = image(2, 8, 3, 4) * torch.arange(1, 9, dtype=torch.float64).view(-1, 1, 1)
    return x + 10 * (1 - along(1, 4)) + along(1, 4, torch.linspace(-1, 1, 8, dtype=torch.float64))


def test_every_statistic_has_a_case_and_is_one_that_the_map_may_weigh() -> None:
    assert {*REDUCTIONS, *NORMS, *OF_VECTORS} == WEIGHTED.keys() == WEIGHABLE


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_reductions_over_the_channels_that_are_left(name: str, options: dict) -> None:
    x = activations()
    got = WEIGHTED[name](along(1, 4), x, **options)
    wanted = REDUCTIONS[name](x[:, KEPT], **options)
    torch.testing.assert_close(got, wanted, **TIGHT)
    every = WEIGHTED[name](torch.ones_like(along(1, 4)), x, **options)
    torch.testing.assert_close(every, REDUCTIONS[name](x, **options), **TIGHT)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_over_everything(name: str) -> None:
    x = activations()
    own = {"dim": None} if name in ("var", "std", "var_mean") else {}
    got = WEIGHTED[name](along(1, 4), x, **own)
    torch.testing.assert_close(got, REDUCTIONS[name](x[:, KEPT], **own), **TIGHT)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_closed_channel_of_zeros_does_no_harm(name: str) -> None:
    """0 ** -1 is infinite, and infinite * 0 is no number."""
    x = activations()
    x[:, 1] = 0
    options = {
        "norm": {"p": -1},
        "vector_norm": {"ord": -1},
        "linalg_vector_norm": {"ord": -1},
    }.get(name, {})
    got = WEIGHTED[name](along(1, 4), x, dim=1, **options)
    torch.testing.assert_close(got, REDUCTIONS[name](x[:, KEPT], dim=1, **options), **TIGHT)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("mean", (1, True)), ("sum", (1, True)), ("var", (1, False, True)), ("var", (False,)),
        ("std", (1, True, True)), ("var_mean", (1, False)), ("norm", (1, 1, True)),
        ("vector_norm", (3, 1, True)), ("amax", (1, True)), ("amin", ((1, 2), False)),
    ],
    ids=str,
)  # fmt: skip
def test_positional_arguments(name: str, args: tuple) -> None:
    x = activations()
    got = WEIGHTED[name](along(1, 4), x, *args)
    torch.testing.assert_close(got, REDUCTIONS[name](x[:, KEPT], *args), **TIGHT)


@pytest.mark.parametrize("options", [{}, {"p": 1.0}, {"p": 3.5}, {"p": math.inf}, {"eps": 200.0}])
def test_normalize(options: dict) -> None:
    x = activations()
    got = WEIGHTED["normalize"](along(1, 4), x, dim=1, **options)[:, KEPT]
    torch.testing.assert_close(got, F.normalize(x[:, KEPT], dim=1, **options), **TIGHT)
    x[:, KEPT] = 0
    assert not WEIGHTED["normalize"](along(1, 4), x)[:, KEPT].any()


@pytest.mark.parametrize(
    "options", [{}, {"ord": 1}, {"dim": 1, "keepdim": True}, {"ord": 2, "dim": 1}]
)
def test_linalg_norm_of_vectors(options: dict) -> None:
    x = activations()[:, :, 0, 0]
    if "ord" in options and "dim" not in options:
        x, gates = x[0], GATES
    else:
        gates = along(1, 2)
    got = WEIGHTED["linalg_norm"](gates, x, **options)
    torch.testing.assert_close(got, torch.linalg.norm(x[..., KEPT], **options), **TIGHT)


@pytest.mark.parametrize("affine", ["weight and bias", "weight", "none"])
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_layer_norm(affine: str, eps: float) -> None:
    x = activations().movedim(1, -1)
    scale, shift = (torch.linspace(s, 2, 8, dtype=torch.float64) for s in (0.5, -1))
    weight = None if affine == "none" else scale
    bias = shift if affine == "weight and bias" else None
    got = WEIGHTED["layer_norm"](along(-1, 4), x, (8,), weight, bias, eps)
    own = [None if t is None else t[KEPT] for t in (weight, bias)]
    wanted = F.layer_norm(x[..., KEPT], (len(KEPT),), *own, eps)  # type: ignore[call-arg]
    torch.testing.assert_close(got[..., KEPT], wanted, **TIGHT)


def test_layer_norm_over_channels_and_pixels() -> None:
    x = activations()
    weight, bias = image(8, 3, 4), image(8, 3, 4).flip(0)
    got = WEIGHTED["layer_norm"](along(1, 4), x, (8, 3, 4), weight, bias)
    wanted = F.layer_norm(x[:, KEPT], (len(KEPT), 3, 4), weight[KEPT], bias[KEPT])
    torch.testing.assert_close(got[:, KEPT], wanted, **TIGHT)


@pytest.mark.parametrize("eps", [None, 1e-6, 0.3])
@pytest.mark.parametrize("affine", [True, False])
def test_rms_norm(affine: bool, eps: float | None) -> None:
    x = activations().movedim(1, -1)
    weight = torch.linspace(0.5, 2, 8, dtype=torch.float64) if affine else None
    got = WEIGHTED["rms_norm"](along(-1, 4), x, (8,), weight, eps)
    wanted = F.rms_norm(x[..., KEPT], (len(KEPT),), None if weight is None else weight[KEPT], eps)
    torch.testing.assert_close(got[..., KEPT], wanted, **TIGHT)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_group_norm(groups: int, affine: bool) -> None:
    x = activations()
    width = 8 // groups
    own = [position for position in (0, 1, 3, 5, 6) if position < width][: max(width // 2, 1)]
    kept = torch.tensor([g * width + position for g in range(groups) for position in own])
    gates = torch.zeros(8, dtype=torch.float64).index_fill(0, kept, 1.0)
    tensors = [torch.linspace(s, 2, 8, dtype=torch.float64) if affine else None for s in (0.5, -1)]
    got = WEIGHTED["group_norm"](along(1, 4, gates), x, groups, *tensors, 0.1)
    left = [None if t is None else t[kept] for t in tensors]
    wanted = F.group_norm(x[:, kept], groups, *left, 0.1)  # type: ignore[call-arg]
    torch.testing.assert_close(got[:, kept], wanted, **TIGHT)


class TestBetween:
    """Soft gates interpolate: sum of w x over sum of w."""

    gates = torch.linspace(0.1, 0.9, 8, dtype=torch.float64)

    def test_the_mean_is_the_weighted_mean(self) -> None:
        x = activations()
        got = WEIGHTED["mean"](along(1, 4, self.gates), x, 1)
        wanted = torch.einsum("bchw,c->bhw", x, self.gates) / self.gates.sum()
        torch.testing.assert_close(got, wanted, **TIGHT)

    @pytest.mark.parametrize("name", ["mean", "var", "layer_norm", "rms_norm", "group_norm"])
    def test_what_is_averaged_knows_no_common_factor(self, name) -> None:
        x = activations()
        options = {
            "mean": ((1,), {}), "var": ((1,), {"correction": 0}), "layer_norm": (((8, 3, 4),), {}),
            "rms_norm": (((8, 3, 4),), {}), "group_norm": ((2,), {}),
        }[name]  # fmt: skip
        one, half = (
            WEIGHTED[name](along(1, 4, scale * self.gates), x, *options[0], **options[1])
            for scale in (1.0, 0.5)
        )
        torch.testing.assert_close(one, half, **TIGHT)

    @pytest.mark.parametrize("name", ["mean", "sum", "var", "std", "norm", "layer_norm"])
    def test_the_gates_learn(self, name) -> None:
        x = activations()[:1, :, :1, :2]
        args = ((8, 1, 2),) if name == "layer_norm" else (2, 1) if name == "norm" else (1,)

        def statistic(gates: Tensor) -> Tensor:
            return WEIGHTED[name](along(1, 4, gates), x, *args)

        assert torch.autograd.gradcheck(statistic, self.gates.clone().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", sorted(WEIGHTED))
def test_wider_gates_do_not_widen_the_model(name: str, dtype: torch.dtype) -> None:
    """The gates of half models stay in float32; its next layer takes half precision only."""
    x = (activations() / 10).to(dtype)
    gates = torch.ones(1, 8, 1, 1)
    if name in NORMS:
        args = (2,) if name == "group_norm" else ((8, 3, 4),)
        wanted = getattr(F, name)(x, *args)
        got = WEIGHTED[name](gates, x, *args)
    else:
        wanted = (REDUCTIONS | OF_VECTORS)[name](x, dim=1)
        got = WEIGHTED[name](gates, x, dim=1)
    bound = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(got, wanted, **bound)  # compares dtypes, too


def test_counts_stay_whole_numbers() -> None:
    positive = activations() > 0
    got = WEIGHTED["sum"](along(1, 4), positive, dim=1)
    assert torch.equal(got, positive[:, KEPT].sum(1))
    assert got.dtype == torch.int64
    wide = WEIGHTED["mean"](along(1, 4), activations().float(), 1, dtype=torch.float64)
    assert wide.dtype == torch.float64


def weighing_mode(function: str, number: int, *outer: CallMode) -> CallMode:
    change = Change(instead=weighing(function, along(1, 4)))
    return CallMode({(function, number): change}, outer=outer)


class TestMode:
    def test_only_the_numbered_call_is_weighted(self) -> None:
        x = activations()
        with weighing_mode("mean", 2):
            first, second, third = x.mean(1), torch.mean(x, 1), x.mean(dim=1)
        plain, weighted = x.mean(1), x[:, KEPT].mean(1)
        assert torch.equal(first, plain)
        assert torch.equal(third, plain)
        torch.testing.assert_close(second, weighted, **TIGHT)
        assert not torch.allclose(plain, weighted)

    def test_functions_are_numbered_apart(self) -> None:
        x = activations()
        with weighing_mode("sum", 1):
            x.mean(1)
            x.amax(1)
            total = x.sum(1)
        torch.testing.assert_close(total, x[:, KEPT].sum(1), **TIGHT)

    @pytest.mark.parametrize(
        "call",
        [
            lambda x: x.mean(axis=1),
            lambda x: torch.mean(x, axis=1, keepdims=True),
            lambda x: x.mean(dim=1, keepdims=True),
        ],
        ids=["axis", "both", "keepdims"],
    )
    def test_numpys_names_of_arguments(self, call) -> None:
        x = activations()
        with weighing_mode("mean", 1):
            got = call(x)
        torch.testing.assert_close(got, call(x[:, KEPT]), **TIGHT)

    def test_a_call_weighted_inside_counts_for_the_modules_around(self) -> None:
        x = activations()
        outer = weighing_mode("mean", 3)
        with outer:
            before = x.mean(1)
            with weighing_mode("mean", 1, outer):
                inside = x.mean(1)
            after = x.mean(1)
        torch.testing.assert_close(inside, x[:, KEPT].mean(1), **TIGHT)
        torch.testing.assert_close(after, x[:, KEPT].mean(1), **TIGHT)
        assert torch.equal(before, x.mean(1))
        assert outer.counts["mean"] == 3


def centred(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return centred(x)


@pytest.mark.parametrize("order", ["before", "behind", "both"])
def test_calls_are_numbered_the_same_when_planning_and_when_running(order: str) -> None:
    """Plain statistics, and those of a module inside, stand between the weighted ones."""

    def run(m, x):
        x = F.relu(m.a(x))
        x = centred(x) if order != "behind" else x
        x = x * x.mean((2, 3), keepdim=True)
        x = m.inner(m.b(x))
        x = centred(x) if order != "before" else x
        return m.last(F.relu(x))

    net = Net(run, a=conv(3, 4), b=conv(4, 5), inner=Centred(), last=conv(5, 2))
    gated = assert_closed_equals_cut(prepared(net), image(2, 3, 4, 4))
    assert gated.channels.num_units == 9
    assert len(gated.channels.statistics) == 2 * (3 if order == "both" else 2)


@pytest.mark.parametrize("name", ["mean", "var", "sum", "norm"])
def test_a_model_in_bfloat16_stays_in_bfloat16(name: str) -> None:
    def run(m, x):
        x = m.a(x)
        return m.last(x / (1 + getattr(x, name)(dim=1, keepdim=True).abs()))

    model = prepared(Net(run, a=conv(3, 4), last=conv(4, 2))).bfloat16()
    x = image(2, 3, 4, 4).bfloat16()
    gated = swan.swanify(model, x).eval()
    assert gated.channels.num_units == 4
    assert gated.channels.statistics
    torch.testing.assert_close(gated(x), model(x), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_without_an_epsilon_takes_the_one_that_torch_takes(dtype) -> None:
    x = (activations().movedim(1, -1) / 1000).to(dtype)  # small enough for the epsilon to matter
    got = WEIGHTED["rms_norm"](torch.ones(1, 1, 1, 8), x, (8,))
    torch.testing.assert_close(got, F.rms_norm(x, (8,)), rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("norm", lambda x: x.norm(dim=1, keepdim=True)),
        ("norm", lambda x: x.norm(3, 1, keepdim=True)),
        ("norm", lambda x: torch.norm(x, dim=1, keepdim=True)),
        ("std", lambda x: x.std(1, keepdim=True)),
    ],
    ids=["norm", "norm_of_order_3", "torch_norm", "std"],
)
def test_the_slope_at_zero_is_that_of_torch(name, call) -> None:
    found = []
    for weighted in (False, True):
        x = torch.zeros(2, 4, 3, dtype=torch.float64)
        x[1] = activations()[1, :, :3].reshape(4, -1)[:, :3]
        x.requires_grad_()
        gates = torch.ones(1, 4, 1, dtype=torch.float64)
        mode = CallMode({(name, 1): Change(instead=weighing(name, gates))} if weighted else {})
        with mode:
            out = call(x)
        out.sum().backward()
        found.append((out.detach(), x.grad))
    assert bool(found[0][1].isfinite().all())
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)
