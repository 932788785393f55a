"""Traced graphs: leaves stay whole, both modes are gated, and what folds is what may fold."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.gates import FoldedGate
from swan_surgery.gates.graph import trace
from swan_surgery.gates.graph.faithfulness import Watch
from tests.closing import assert_closed_equals_cut, close_, image, outputs, prepared, twin
from tests.small_nets import Net, conv


X = (2, 3, 4, 4)


class Standardised(nn.Conv2d):
    """Weight standardisation over each output row."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-3), self.bias)


class OddConv(nn.Conv2d):
    """Control flow that torch.fx could not follow."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() < float("inf") else x


class BatchNormRelu(nn.BatchNorm2d):
    """timm's BatchNormAct2d in small."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class BatchNormSigmoid(nn.BatchNorm2d):
    """Not affine in weight and bias: must not be folded."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(super().forward(x))


def calls(graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_module"]


@pytest.mark.parametrize("kind", [nn.Conv2d, Standardised, OddConv])
def test_subclasses_of_layers_are_leaves(kind: type[nn.Conv2d]) -> None:
    model = Net(lambda m, x: m.last(m.a(x)), a=kind(3, 4, 1), last=conv(4, 2))
    assert calls(trace(model, Watch(), training=False)) == ["a", "last"]


def test_modules_that_are_no_layers_are_traced_through() -> None:
    block = nn.Sequential(conv(3, 4), nn.ReLU())
    model = Net(lambda m, x: m.last(m.block(x)), block=block, last=conv(4, 2))
    assert calls(trace(model, Watch(), training=False)) == ["block.0", "block.1", "last"]


def test_the_two_modes_are_traced_apart() -> None:
    model = Net(lambda m, x: m.a(x) if m.training else m.b(x), a=conv(3, 4), b=conv(3, 4))
    assert calls(trace(model, Watch(), training=True)) == ["a"]
    assert calls(trace(model, Watch(), training=False)) == ["b"]


def test_what_fx_cannot_follow_is_an_error_that_says_so() -> None:
    model = Net(
        lambda m, x: m.b(m.a(x)) if x.sum() > 0 else m.b(-m.a(x)), a=conv(3, 4), b=conv(4, 2)
    )
    with pytest.raises(swan.TraceError, match=r"torch.fx cannot trace Net in eval mode"):
        trace(model, Watch(), training=False)
    with pytest.raises(swan.TraceError, match=r"torch.fx cannot trace Net"):
        swan.swanify(model, torch.ones(X), in_place=False)


@pytest.mark.parametrize("kind", [Standardised, BatchNormRelu, BatchNormSigmoid])
def test_subclasses_are_gated_exactly_and_not_folded(kind: type[nn.Module]) -> None:
    layers = {"a": kind(3, 4, 1)} if kind is Standardised else {"a": conv(3, 4), "bn": kind(4)}

    def run(m, x):
        x = m.a(x)
        return m.last(F.relu(m.bn(x)) if hasattr(m, "bn") else x)

    gated = assert_closed_equals_cut(prepared(Net(run, **layers, last=conv(4, 2))), image(*X))
    (site,) = {name.removesuffix("_2") for name in gated.sites}
    assert site == ("a" if kind is Standardised else "bn")
    assert not any(isinstance(module, FoldedGate) for module in gated.sites.values())


def test_a_plain_layer_is_folded_and_says_so() -> None:
    gated = swan.swanify(
        prepared(Net(lambda m, x: m.last(F.relu(m.a(x))), a=conv(3, 4), last=conv(4, 2))), image(*X)
    )
    assert isinstance(gated.sites["a"], FoldedGate)
    close_(gated, 2)
    assert "4 channels, 3 open, folded" in repr(gated)


def test_a_layer_with_a_hook_is_gated_in_place() -> None:
    """The hook may look at the weights, or change what goes in and comes out."""
    model = prepared(Net(lambda m, x: m.last(F.relu(m.a(x))), a=conv(3, 4), last=conv(4, 2)))
    model.a.register_forward_hook(lambda _m, _i, out: 2 * out)
    gated = assert_closed_equals_cut(model, image(*X))
    assert gated.runs_in_place


def test_a_layer_without_parameters_is_not_folded() -> None:
    model = prepared(
        Net(
            lambda m, x: m.last(F.relu(m.bn(m.a(x)))),
            a=conv(3, 4), bn=nn.BatchNorm2d(4, affine=False), last=conv(4, 2),
        )
    )  # fmt: skip
    gated = assert_closed_equals_cut(model, image(*X))
    assert not isinstance(gated.sites["bn"], FoldedGate)


def test_a_shared_convolution_is_exact() -> None:
    def run(m, x):
        return m.last(F.relu(m.both(F.relu(m.both(F.relu(m.stem(x)))))))

    model = prepared(Net(run, stem=conv(3, 4), both=conv(4, 4, 3), last=conv(4, 2)))
    gated = assert_closed_equals_cut(model, image(*X))
    assert gated.channels.num_units == 4


def test_a_module_called_with_different_neighbours_is_exact() -> None:
    def run(m, x):
        first = F.relu(m.both(m.a(x)))
        second = torch.sigmoid(m.both(m.b(x)))
        return m.last(torch.cat((first, second), 1))

    model = prepared(Net(run, a=conv(3, 4), b=conv(3, 4), both=conv(4, 3), last=conv(6, 2)))
    gated = assert_closed_equals_cut(model, image(*X))
    # `both` reads a and b with one weight, and writes one width twice.
    assert gated.channels.num_units == 7


def test_a_module_whose_second_output_nobody_gates_is_exact() -> None:
    """A softmax over channels pins; a mean over channels counts them with their gates."""

    def run(m, x):
        return m.last(F.relu(m.both(x))) + m.both(x).softmax(1)[:, :1]

    model = prepared(Net(run, both=conv(3, 4), last=conv(4, 2)))
    assert assert_closed_equals_cut(model, image(*X)) is None

    def averaged(m, x):
        return m.last(F.relu(m.both(x))) + m.both(x).mean(1, keepdim=True)

    model = prepared(Net(averaged, both=conv(3, 4), last=conv(4, 2)))
    assert assert_closed_equals_cut(model, image(*X)).channels.num_units == 4


def test_a_functional_convolution_is_gated_exactly() -> None:
    model = Net(
        lambda m, x: m.last(F.relu(F.conv2d(x, m.kernel, m.bias, padding=1))), last=conv(4, 2)
    )
    model.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))
    model.bias = nn.Parameter(torch.randn(4))
    gated = assert_closed_equals_cut(prepared(model), image(*X))
    assert {name.removesuffix("_2") for name in gated.sites} == {"conv2d"}


def test_a_convolution_called_by_its_weight_elsewhere_is_exact() -> None:
    def run(m, x):
        x = F.relu(m.a(x))
        return m.last(F.relu(F.conv2d(x, m.b.weight, m.b.bias)) + F.relu(m.b(x)))

    model = prepared(Net(run, a=conv(3, 4), b=conv(4, 5), last=conv(5, 2)))
    gated = assert_closed_equals_cut(model, image(*X))
    assert gated.channels.num_units == 9


def auxiliary() -> nn.Module:
    def run(m, x):
        x = F.relu(m.a(x))
        out = m.last(F.relu(m.b(x)))
        return (out, m.aux(x)) if m.training else out

    return prepared(
        Net(
            run, a=conv(3, 4), b=conv(4, 5), aux=conv(4, 2, bias=False), last=conv(5, 2, bias=False)
        )
    )


def test_both_modes_are_gated() -> None:
    gated = swan.swanify(auxiliary(), image(*X))
    base = twin(gated.model)
    with torch.no_grad():
        gated.gates.logits.zero_()
    gated.gates.mode = "soft"
    out, aux = outputs(gated.train(), image(*X))
    with torch.no_grad():
        half = F.relu(base.a(image(*X))) / 2
        assert torch.allclose(aux, base.aux(half), rtol=1e-12, atol=1e-14)
        assert torch.allclose(out, base.last(F.relu(base.b(half)) / 2), rtol=1e-12, atol=1e-14)
    with swan.soft_gates(gated.eval()):
        (evaluated,) = outputs(gated, image(*X))
    assert torch.allclose(evaluated, out, rtol=1e-12, atol=1e-14)


def test_the_mode_of_the_given_model_is_kept_and_switching_switches_the_graph() -> None:
    model = auxiliary().train()
    gated = swan.swanify(model, image(*X))
    assert gated.training
    assert gated.model.training
    assert len(outputs(gated, image(*X))) == 2
    assert len(outputs(gated.eval(), image(*X))) == 1
    assert not gated.model.training
    assert len(outputs(gated.train(), image(*X))) == 2


def test_dropout_follows_the_mode() -> None:
    def run(m, x):
        return m.last(F.dropout(F.relu(m.a(x)), 0.5, training=m.training))

    gated = swan.swanify(prepared(Net(run, a=conv(3, 4), last=conv(4, 2))), image(*X))
    (one,), (two,) = outputs(gated.eval(), image(*X)), outputs(gated, image(*X))
    assert torch.equal(one, two)
    (one,), (two,) = outputs(gated.train(), image(*X)), outputs(gated, image(*X))
    assert not torch.equal(one, two)


@pytest.mark.parametrize(
    "name", ["code", "graph", "gates", "sites", "model", "channels", "forward_", "print_readable"]
)
def test_a_model_may_use_any_name_for_its_modules(name: str) -> None:
    model = prepared(
        Net(lambda m, x: m.last(F.relu(getattr(m, name)(x))), **{name: conv(3, 4)}, last=conv(4, 2))
    )
    gated = assert_closed_equals_cut(model, image(*X))
    assert gated is not None
    assert gated.channels.num_units == 4


def test_tied_modules_called_in_another_order_than_registered_are_gated() -> None:
    model = Net(
        lambda m, x: m.last(F.relu(m.b(x)) * F.relu(m.a(x))),
        a=conv(3, 4, bias=False), b=conv(3, 4, bias=False), last=conv(4, 2),
    )  # fmt: skip
    model.b.weight = model.a.weight
    assert assert_closed_equals_cut(prepared(model), image(*X)).channels.num_units == 4


def test_keyword_calls_of_layers_are_exact() -> None:
    model = prepared(
        Net(lambda m, x: m.last(input=F.relu(m.a(input=x))), a=conv(3, 4), last=conv(4, 2))
    )
    assert assert_closed_equals_cut(model, image(*X)).channels.num_units == 4


def test_a_layer_s_own_output_twice_in_one_sum_is_exact() -> None:
    def run(m, x):
        x = m.a(x)
        return m.last(F.relu(x) + torch.sigmoid(x) * x)

    model = prepared(Net(run, a=conv(3, 4), last=conv(4, 2)))
    assert assert_closed_equals_cut(model, image(*X)).channels.num_units == 4


def test_gates_are_in_the_printed_model() -> None:
    gated = swan.swanify(
        prepared(Net(lambda m, x: m.last(torch.sigmoid(m.a(x))), a=conv(3, 4), last=conv(4, 2))),
        image(*X),
    )
    assert "(sigmoid): GateSite(4 channels, 4 open)" in repr(gated)
    assert "4 units, 4 open, threshold=0.5" in repr(gated)
