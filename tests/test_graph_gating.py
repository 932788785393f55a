"""Plans for traced graphs: where gates go, what is pinned when none can, and how sites are named."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import swan_surgery as swan
from swan_surgery.channels import PINNED, channel_map
from swan_surgery.gates import FoldedGate, GateSite
from swan_surgery.gates.graph.gating import GraphPlan, gate_graph, plan_graph
from swan_surgery.gates.sites import fold_scale, fold_vectors
from swan_surgery.models import as_inputs, copy_of
from tests.closing import assert_closed_equals_cut, close_, image, outputs, prepared
from tests.fingerprints import assert_same_fingerprint, fingerprint
from tests.small_nets import Net, conv


X = (2, 3, 4, 4)


def planned(model: nn.Module) -> tuple[nn.Module, GraphPlan]:
    copy = copy_of(model)
    return copy, plan_graph(copy, channel_map(model, image(*X)), as_inputs(image(*X)))


def plain() -> nn.Module:
    """A folded gate, and one behind a function."""

    def run(m, x):
        return m.last(torch.sigmoid(m.b(F.relu(m.a(x))) + m.c(x)))

    return prepared(Net(run, a=conv(3, 4), b=conv(4, 5), c=conv(3, 5), last=conv(5, 2)))


def test_a_plan_holds_one_graph_and_all_units() -> None:
    model = plain()
    _, plan = planned(model)
    assert isinstance(plan.graph, fx.Graph)
    assert plan.channels == channel_map(model, image(*X))
    assert plan.placed.uncovered == frozenset()
    units = {u for site in plan.placed.sites for u in site.units.reshape(-1).tolist()}
    assert units - {PINNED} == set(range(9))


def test_planning_changes_no_weight_and_no_hook() -> None:
    model = plain()
    copy = copy_of(model)
    before = fingerprint(copy)
    plan_graph(copy, channel_map(model, image(*X)), as_inputs(image(*X)))
    after = fingerprint(copy)
    before.pop("training")
    after.pop("training")  # the mode is set anew by the caller
    assert_same_fingerprint(before, after)


@pytest.mark.parametrize("training", [True, False])
def test_one_graph_serves_both_modes(training: bool) -> None:
    copy, plan = planned(plain())
    gated = gate_graph(copy.train(training), plan, as_inputs(image(*X)))
    assert not gated.runs_in_place
    assert {type(site) for site in gated.sites.values()} == {FoldedGate, GateSite}
    close_(gated, 1, 6)
    (got,) = outputs(gated, image(*X))
    with torch.no_grad():
        x = F.relu(gated.model.a(image(*X)))
        x[:, 1] = 0
        x = torch.sigmoid(gated.model.b(x) + gated.model.c(image(*X)))
        x[:, 2] = 0  # unit 6 is channel 2 of `b` and `c`
        wanted = gated.model.last(x)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)


def test_units_that_no_graph_can_close_are_pinned_and_the_others_stay() -> None:
    """A leaf module returns a gated width and reads it itself: no node in between takes a gate."""

    class Block(nn.Conv2d):
        """A leaf for fx, as every subclass of a layer is."""

        def __init__(self) -> None:
            super().__init__(4, 5, 1)
            self.inner = nn.Conv2d(5, 4, 1)

        def forward(self, x):
            return self.inner(torch.sigmoid(super().forward(x)))

    model = prepared(
        Net(lambda m, x: m.last(F.relu(m.block(F.relu(m.a(x))))), a=conv(3, 4), block=Block(), last=conv(4, 2))
    )  # fmt: skip
    channels = channel_map(model, image(*X))
    assert channels.num_units == 13
    _, plan = planned(model)
    assert plan.channels.layer("block.inner").out_units == (0, 1, 2, 3)
    pins = {pin.layer: pin for pin in plan.channels.pins if pin.op == "fx"}
    assert pins["block"].channels == (0, 1, 2, 3, 4)
    assert "no gate can close these channels" in str(pins["block"])
    in_graph = swan.swanify(model, image(*X), in_place=False)
    assert in_graph.channels == plan.channels
    # In place they are gated, so that is what happens by default.
    gated = assert_closed_equals_cut(model, image(*X))
    assert gated.runs_in_place
    assert gated.channels.num_units == 13


def test_a_trace_that_does_not_run_is_an_error_that_says_why() -> None:
    class Cropping(nn.Module):
        """Branches on the value of an argument: fx bakes in the path of the default."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.last = conv(3, 4), conv(4, 2)

        def forward(self, x, scale=None):
            x = F.relu(self.a(x))
            if scale is not None:
                x = F.interpolate(x, scale_factor=scale)
            return self.last(x)

    model = prepared(Cropping())
    inputs = {"x": image(*X), "scale": 2.0}
    gated = swan.swanify(model, inputs)
    assert gated.channels.num_units == 4
    (got,), (wanted,) = outputs(gated, inputs), outputs(model, inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)


def test_tracing_that_fails_is_a_trace_error() -> None:
    model = Net(lambda m, x: m.b(m.a(x) if x.sum() < 0 else -m.a(x)), a=conv(3, 4), b=conv(4, 2))
    with pytest.raises(swan.TraceError, match=r"torch\.fx cannot trace Net"):
        planned(prepared(model))


def test_threads_may_gate_and_run_models_side_by_side() -> None:
    """torch.fx changes what every call of every module does while it traces."""
    wanted = swan.swanify(plain(), image(*X)).channels
    running = plain()
    outs = outputs(running, image(*X))
    done = threading.Event()

    def gate(_: int) -> bool:
        return all(swan.swanify(plain(), image(*X)).channels == wanted for _ in range(3))

    def run() -> bool:
        right = True
        while not done.is_set():
            right = right and torch.equal(outputs(running, image(*X))[0], outs[0])
        return right

    with ThreadPoolExecutor(4) as pool:
        other = pool.submit(run)
        try:
            assert all(pool.map(gate, range(3)))
        finally:
            done.set()
        assert other.result()


class Demodulated(nn.Module):
    """StyleGAN2: weights of its own for every sample, whose samples become groups."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.style = nn.Parameter(torch.randn(6, 5, 3, 3)), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        weight = self.weight[None] * (self.style(x.mean((2, 3))) + 1)[:, None, :, None, None]
        y = F.conv2d(x.reshape(1, b * c, h, w), weight.flatten(0, 1), padding=1, groups=b)
        return F.relu(y.view(b, 6, h, w))


@pytest.mark.parametrize("batch", [1, 2])
def test_gates_behind_functions_fit_every_batch(batch: int) -> None:
    model = nn.Sequential(conv(3, 5), nn.ReLU(), Demodulated(), conv(6, 2))
    gated = assert_closed_equals_cut(prepared(model), image(batch, 3, 4, 4))
    assert gated is not None
    small = swan.prune(gated)
    for other in (1, 2, 3):
        (wanted,), (got,) = (
            outputs(gated, image(other, 3, 4, 4)),
            outputs(small, image(other, 3, 4, 4)),
        )
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


class _Products(TorchDispatchMode):
    """Counts products."""

    def __init__(self):
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found += func is torch.ops.aten.mul.Tensor
        return func(*args, **(kwargs or {}))


def normed_chain(depth):
    layers = [
        (conv(3 if i == 0 else 4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        for i in range(depth)
    ]
    return nn.Sequential(*(own for layer in layers for own in layer), conv(4, 2))


def test_batch_norms_absorb_their_gates_in_one_product():
    found = []
    for depth in (2, 7):
        gated = swan.swanify(normed_chain(depth), image(2, 3, 6, 6).float()).train()
        assert not gated.runs_in_place
        with _Products() as products:
            gated(image(2, 3, 6, 6).float()).sum().backward()
        found.append(products.found)
    assert found[0] == found[1]


def test_vectors_scaled_together_are_those_scaled_alone():
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(width).requires_grad_(width != 3) for width in (4, 3, 5, 2)]
    norms[2].double()
    norms[1].bias = None
    for norm in norms:
        nn.init.uniform_(norm.weight)
    values = [torch.rand(norm.num_features, requires_grad=True) for norm in norms]
    wanted = [
        fold_scale(norm.weight, norm.bias, own, 0) for norm, own in zip(norms, values, strict=True)
    ]
    sources = [*values, *(p for norm in norms for p in norm.parameters() if p.requires_grad)]
    gradients = []
    for found in (wanted, fold_vectors(norms, values)):
        for one, two in zip(wanted, found, strict=True):
            assert one.keys() == two.keys()
            assert all(torch.equal(one[name], two[name]) for name in one)
            assert all(one[name].dtype is two[name].dtype for name in one)
        total = sum(tensor.square().sum().float() for own in found for tensor in own.values())
        gradients.append(torch.autograd.grad(total, sources))
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=0)
