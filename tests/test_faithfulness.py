"""The graph is used only where it is the model; whatever fx evaluates once or drops runs in place."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import swan_surgery as swan
from swan_surgery.cutting.verification import tensor_error
from swan_surgery.gates.graph.faithfulness import _same
from tests.closing import TOLERANCE, close_random_, image, prepared
from tests.small_nets import Net, conv


X = (2, 3, 4, 4)


class Twice(torch.autograd.Function):
    """Identity whose gradient is doubled."""

    @staticmethod
    def forward(ctx, x):  # noqa: ARG004 - torch's signature
        return x * 1

    @staticmethod
    def backward(ctx, grad):  # noqa: ARG004 - torch's signature
        return 2 * grad


def hidden(m, x):
    return F.relu(m.b(F.relu(m.a(x))))


def custom_norm(m, x):
    y = m.b(F.relu(m.a(x)))
    if m.training:
        with torch.no_grad():
            m.mean.lerp_(y.detach().mean((0, 2, 3)), 0.1)
    return m.last(F.relu(y - m.mean[:, None, None]))


def running_average(m, x):
    y = hidden(m, x)
    with torch.no_grad():
        m.mean.mul_(0.9).add_(y.detach().mean((0, 2, 3)), alpha=0.1)
    return m.last(y - m.mean[:, None, None])


def reassigned(m, x):
    y = hidden(m, x)
    m.mean = 0.9 * m.mean + 0.1 * y.detach().mean((0, 2, 3))
    return m.last(y * m.mean[:, None, None])


def counter(m, x):
    m.steps = m.steps + 1
    return m.last(hidden(m, x))


def frozen(m, x):
    with torch.no_grad():
        y = hidden(m, x)
    return m.last(y)


def half_precision(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = hidden(m, x)
    return m.last(y.to(x.dtype))


def backward_of_its_own(m, x):
    return m.last(Twice.apply(hidden(m, x)))


def checkpointed(m, x):
    return m.last(checkpoint(lambda y: F.relu(m.b(y)), F.relu(m.a(x)), use_reentrant=False))


def numpys(m, x):
    return m.last(hidden(m, x) * float(np.random.rand()))  # noqa: NPY002


def pythons(m, x):
    return m.last(hidden(m, x) * (2 if random.random() < 0.5 else 1))  # noqa: S311


def torchs(m, x):
    return m.last(hidden(m, x) * (1 + torch.rand(())))


def temperature(m, x):
    return m.last(hidden(m, x) / m.tau)


def asks_its_mode(m, x):
    return m.last(F.dropout(hidden(m, x), 0.5, m.training))


def asks_for_gradients(m, x):
    y = hidden(m, x)
    return m.last(y if torch.is_grad_enabled() else y.tanh())


def asks_for_a_tensor(m, x):
    """What torch.fx hands around is none; the layer behind does not fit what the trace then does."""
    y = hidden(m, x)
    return m.last(y if torch.jit.isinstance(y, Tensor) else y[:, :2])


REASONS = {
    custom_norm: "arithmetic on tensors of its own",
    running_average: "arithmetic on tensors of its own",
    reassigned: "attributes or buffers",
    counter: "attributes or buffers",
    frozen: "no_grad",
    half_precision: "autocast",
    backward_of_its_own: "backward pass of its own",
    checkpointed: "checkpointing",
    numpys: "random numbers",
    pythons: "random numbers",
    torchs: "random numbers|arithmetic on tensors",
    temperature: r"attribute \(tau\)",
    asks_its_mode: "mode",
    asks_for_a_tensor: "another way through its code",
    asks_for_gradients: "other outputs than its trace, in eval mode",
}


def net(run) -> nn.Module:
    model = Net(run, a=conv(3, 6), b=conv(6, 5), last=conv(5, 2))
    model.tau, model.steps = 2.0, 0
    model.register_buffer("mean", torch.full((5,), 0.25))
    return prepared(model)


@pytest.mark.parametrize("run", REASONS, ids=lambda run: run.__name__)
def test_what_a_graph_would_lose_runs_in_place_with_the_reason(run) -> None:
    model = net(run)
    gated = swan.swanify(model, image(*X))
    assert gated.runs_in_place
    assert str(gated.channels.way).startswith("in place: ")
    assert gated.channels.way in str(gated.channels.explain())
    with pytest.raises(swan.TraceError, match=REASONS[run]):
        swan.swanify(model, image(*X), in_place=False)
    assert gated.model.steps == model.steps
    assert torch.equal(gated.model.mean, model.mean)


@pytest.mark.parametrize("run", REASONS, ids=lambda run: run.__name__)
def test_open_gates_change_nothing_while_it_trains(run) -> None:
    model = net(run).train()
    gated = swan.swanify(model, image(*X))
    for _ in range(3):
        found = []
        for own in (model, gated):
            torch.manual_seed(1)
            np.random.seed(1)  # noqa: NPY002
            random.seed(1)
            own.zero_grad()
            out = own(image(*X))
            out.square().sum().backward()
            base = own if own is model else own.model
            found.append([out, *(p.grad for p in base.parameters()), *base.buffers(), base.steps])
        assert [x is None for x in found[0]] == [x is None for x in found[1]]
        for one, two in zip(*found, strict=True):
            if isinstance(one, Tensor):
                torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-11)
            else:
                assert one == two


def test_a_hook_is_kept() -> None:
    model = net(lambda m, x: m.last(hidden(m, x)))
    model.b.register_forward_pre_hook(lambda _m, args: (args[0] + 1,))
    gated = swan.swanify(model, image(*X)).eval()
    assert gated.runs_in_place
    assert "hooks (b)" in gated.channels.way
    close_random_(gated, 0.4, 0)
    with torch.no_grad():
        assert tensor_error(gated(image(*X)), swan.prune(gated)(image(*X))) <= TOLERANCE


class Drop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


def test_a_part_may_be_in_another_mode_than_the_whole() -> None:
    model = Net(lambda m, x: m.last(m.drop(hidden(m, x))), a=conv(3, 6), b=conv(6, 5), drop=Drop(),
                last=conv(5, 2))  # fmt: skip
    gated = swan.swanify(prepared(model), image(*X)).eval()
    gated.model.drop.train()
    assert not torch.equal(gated(image(*X)), gated(image(*X)))
    gated.train()
    gated.model.drop.eval()
    assert torch.equal(gated(image(*X)), gated(image(*X)))


def test_a_frozen_batch_norm_follows_its_state_dict_and_its_type() -> None:
    def frozen_norm() -> nn.Module:
        def run(m, x):
            return m.last(F.relu(m.bn(m.a(x))))

        bn = torchvision.ops.FrozenBatchNorm2d(6)
        return Net(run, a=conv(3, 6), bn=bn, last=conv(6, 2)).double().eval()

    model = frozen_norm()
    model.bn.running_mean.normal_()
    gated = swan.swanify(model, image(*X))
    again = swan.swanify(frozen_norm(), image(*X))
    again.load_state_dict(gated.state_dict())
    assert torch.equal(again(image(*X)), gated(image(*X)))
    copy.deepcopy(gated).float()(image(*X).float())


class Structured(nn.Module):
    def __init__(self, *, has_shortcut: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.last = conv(3, 5), conv(5, 5), conv(5, 2)
        self.has_shortcut = has_shortcut

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = x + self.b(x) if self.has_shortcut else self.b(x)
        return self.last(F.relu(x))


def test_a_setting_that_changes_later_is_an_error_not_the_old_value() -> None:
    gated = swan.swanify(prepared(Structured()), image(*X))
    assert not gated.runs_in_place
    gated(image(*X))
    gated.model.has_shortcut = False
    with pytest.raises(swan.ModelError, match=r"'has_shortcut' .* was True .*in_place=True"):
        gated(image(*X))
    gated.model.has_shortcut = True
    gated(image(*X))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("resnet18", "squeezenet1_0"),
        *(
            pytest.param(name, marks=pytest.mark.thorough)
            for name in ("resnet50", "vgg16_bn", "mobilenet_v2")
        ),
    ],
)
def test_plain_networks_run_as_graphs(name) -> None:
    model = torchvision.models.get_model(name, weights=None, num_classes=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gated = swan.swanify(model, torch.randn(2, 3, 64, 64))
    assert not gated.runs_in_place
    assert gated.channels.way == "graph: torch.fx traces the model faithfully"


@pytest.mark.parametrize(("change", "is_same"), [(1e-14, True), (1e-7, False)])
def test_gradients_that_are_rounding_alone_may_differ(change, is_same):
    # A bias in front of a batch-norm: on a GPU its gradient is another 1e-17 in every run.
    one = [torch.ones(4).double(), torch.tensor([1e-17, -3e-17]).double(), None]
    two = [one[0], one[1] + change, None]
    assert _same(one, two, has_noise=True) is is_same
    assert not _same(one, two)
    assert not _same(one, [one[0], None, None], has_noise=True)
    assert not _same(one, [one[0] * (1 + 1e-7), one[1], None], has_noise=True)
