"""Counts of what runs: every formula against torch's counter and fvcore, nothing left uncounted unsaid."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import swan_surgery as swan
from swan_surgery.costs.counting import count_operators
from swan_surgery.models.provenance import provenance_of
from tests.closing import learnt_
from tests.fingerprints import assert_same_fingerprint, fingerprint
from tests.small_nets import Net
from tests.zoo import ZOO


with warnings.catch_warnings():  # importing fvcore meets torch's deprecation of torch.jit.script
    warnings.simplefilter("ignore", FutureWarning)
    from fvcore.nn import FlopCountAnalysis


class Calls(nn.Module):
    """Runs one function of the input and one parameter."""

    def __init__(self, function, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


# name -> (function, weight shape, input shape, MACs)
PRODUCTS = {
    "linear": (F.linear, (5, 4), (3, 4), 3 * 4 * 5),
    "linear_of_tokens": (F.linear, (5, 4), (2, 3, 4), 6 * 4 * 5),
    "mm": (torch.mm, (4, 5), (3, 4), 3 * 4 * 5),
    "bmm": (torch.bmm, (2, 4, 5), (2, 3, 4), 2 * 3 * 4 * 5),
    "baddbmm": (
        lambda x, w: torch.baddbmm(torch.ones(2, 3, 5), x, w),
        (2, 4, 5),
        (2, 3, 4),
        2 * 3 * 4 * 5,
    ),
    "matmul": (torch.matmul, (4, 5), (2, 3, 4), 2 * 3 * 4 * 5),
    "matmul_batch_on_the_right": (torch.matmul, (7, 4, 5), (3, 4), 7 * 3 * 4 * 5),
    "matmul_broadcast": (torch.matmul, (7, 1, 4, 5), (2, 3, 4), 7 * 2 * 3 * 4 * 5),
    "einsum": (lambda x, w: torch.einsum("bi,oi->bo", x, w), (5, 4), (3, 4), 3 * 4 * 5),
    "einsum_odd": (lambda x, w: torch.einsum("bij,jk->bik", x, w), (5, 7), (3, 1, 5), 3 * 5 * 7),
    "conv1d": (F.conv1d, (5, 4, 3), (2, 4, 8), 2 * 6 * 5 * 4 * 3),
    "conv2d_same": (
        lambda x, w: F.conv2d(x, w, padding="same"),
        (5, 4, 3, 3),
        (2, 4, 8, 8),
        2 * 64 * 5 * 4 * 9,
    ),
    "conv2d_valid": (
        lambda x, w: F.conv2d(x, w, padding="valid"),
        (5, 4, 3, 3),
        (2, 4, 8, 8),
        2 * 36 * 5 * 4 * 9,
    ),
    "conv2d_same_grouped": (
        lambda x, w: F.conv2d(x, w, padding="same", groups=2),
        (6, 2, 3, 3),
        (2, 4, 8, 8),
        2 * 64 * 6 * 2 * 9,
    ),
    "conv_transpose2d": (
        lambda x, w: F.conv_transpose2d(x, w, stride=2),
        (4, 5, 2, 2),
        (2, 4, 3, 3),
        2 * 9 * 4 * 5 * 4,
    ),
    "conv_transpose2d_grouped": (
        lambda x, w: F.conv_transpose2d(x, w, stride=2, groups=2),
        (4, 3, 2, 2),
        (2, 4, 3, 3),
        2 * 9 * 4 * 3 * 4,
    ),
    "conv3d": (F.conv3d, (5, 4, 2, 2, 2), (1, 4, 3, 3, 3), 8 * 5 * 4 * 8),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_by_hand_and_by_torch(name) -> None:
    function, weight, shape, wanted = PRODUCTS[name]
    model, x = Calls(function, *weight), torch.randn(shape)
    counts = count_operators(model, x)
    assert counts.macs[""] == wanted
    assert not counts.uncounted
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert counter.get_total_flops() == 2 * wanted


@pytest.mark.parametrize("name", sorted(ZOO))
def test_modules_add_up_to_the_whole(name) -> None:
    model, inputs = ZOO[name]()
    macs = count_operators(model, inputs).macs
    children = sum(macs.get(child, 0) for child, _ in model.named_children())
    own = name == "functional"  # its products are called in the model's own forward
    assert (children < macs[""]) if own else (children == macs[""])
    assert set(macs) <= {name for name, _ in model.named_modules()}


def test_what_has_no_formula_is_listed() -> None:
    model = Net(lambda m, x: torch.cdist(x, x))
    counts = count_operators(model, torch.zeros(3, 2, 4))
    assert counts.uncounted == {"aten::_cdist_forward": 1}
    assert counts.macs[""] == 0


def test_a_module_called_twice_counts_twice() -> None:
    layer = nn.Linear(4, 4)
    once = count_operators(nn.Sequential(layer), torch.zeros(1, 4))
    twice = count_operators(nn.Sequential(layer, layer), torch.zeros(1, 4))
    assert twice.macs[""] == 2 * once.macs[""] == 32


def test_keyword_inputs() -> None:
    model, (image, depth) = ZOO["multi_input"]()
    by_name = count_operators(model, {"depth": depth, "image": image})
    mixed = count_operators(model, (image, depth))
    assert by_name == mixed


@pytest.mark.parametrize("enabled", [True, False])
def test_the_fused_attention_path_is_off_meanwhile_and_as_before_afterwards(enabled) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        macs = count_operators(layer, x).macs[""]
        assert torch.backends.mha.get_fastpath_enabled() is enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    projections, feed_forward = 10 * (3 * 64 + 64), 10 * 2 * 8 * 16
    assert macs >= projections + feed_forward


def test_nothing_is_changed_and_nothing_is_said(recwarn, capsys) -> None:
    model, inputs = ZOO["vgg"]()
    model.train()
    before = fingerprint(model)
    count_operators(model, inputs)
    assert_same_fingerprint(before, fingerprint(model))
    assert not recwarn.list
    out, err = capsys.readouterr()
    assert not out
    assert not err


@pytest.mark.parametrize("error", [AssertionError, KeyError, AttributeError, RuntimeError])
def test_a_forward_that_raises_is_an_input_error(error) -> None:
    class Raising(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise error("three channels, please")

    with pytest.raises(swan.InputError, match=r"Raising cannot be counted .*three channels"):
        count_operators(Raising(), torch.zeros(1))


def test_not_a_module() -> None:
    with pytest.raises(swan.ModelError, match="got builtin_function"):
        count_operators(F.linear, torch.zeros(1))


class Doubled(torch.autograd.Function):
    """A convolution with a backward pass of its own."""

    @staticmethod
    def forward(ctx, x, weight):  # noqa: ARG004 - torch's signature
        return F.conv2d(x, weight)

    @staticmethod
    def backward(ctx, grad):  # noqa: ARG004 - torch's signature
        return None, None


def functional(m: nn.Module, x: Tensor) -> Tensor:
    return torch.func.functional_call(
        m.last, dict[str, Any](weight=2 * m.last.weight), (m.trunk(x),)
    )


def twice(m: nn.Module, x: Tensor) -> Tensor:
    for _ in range(2):
        unread = m.last(m.trunk(x))
    return unread


# Ways to run `trunk`, 6 channels out, and then a 1x1 convolution to 2 channels, or as much.
RUNS: dict[str, Any] = {
    "einsum as a permutation": lambda m, x: F.linear(
        torch.einsum("bchw->bhwc", m.trunk(x)), m.last.weight[:, :, 0, 0]
    ),
    "einsum of three": lambda m, x: torch.einsum(
        "bchw,kc,k->bkhw", m.trunk(x), m.last.weight[:, :, 0, 0], m.last.bias
    ),
    "inner": lambda m, x: torch.inner(m.trunk(x).movedim(1, -1), m.last.weight[:, :, 0, 0]),
    "a backward of its own": lambda m, x: Doubled.apply(m.trunk(x), m.last.weight),
    "functional_call": functional,
    "reentrant checkpoint": lambda m, x: m.last(checkpoint(m.trunk, x, use_reentrant=True)),
    "max-unpooling": lambda m, x: m.last(
        F.max_unpool2d(*F.max_pool2d(m.trunk(x), 2, return_indices=True), 2)
    ),
    "a run that nobody reads": twice,
}


class Running(nn.Module):
    def __init__(self, run) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU()
        )
        self.last = nn.Conv2d(6, 2, 1)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", RUNS)
def test_a_model_that_runs_has_a_cost_and_can_have_a_budget(name) -> None:
    model, x = Running(RUNS[name]).double().eval(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    trunk, last = 32 * (27 * 8 + 8 * 6), 32 * 6 * 2
    # What the third operand of an einsum multiplies is pointwise.
    wanted = 2 * (trunk + last) if name == "a run that nobody reads" else trunk + last
    assert swan.count_macs(model, x) == wanted
    gated = learnt_(swan.swanify(model, x))
    small = swan.prune(gated, macs=0.6)
    mask_macs = swan.count_macs(small, x)
    assert mask_macs <= 0.6 * wanted
    assert provenance_of(small).steps[0].macs.after == mask_macs


def test_rows_that_data_selects_are_priced_as_selected() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(8, 3)
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8)) for _ in range(3)
            )

        def forward(self, x: Tensor) -> Tensor:
            weights, chosen = self.gate(x).softmax(-1).topk(1, -1)
            out = torch.zeros_like(x)
            for index, expert in enumerate(self.experts):
                rows = (chosen == index).any(-1)
                out[rows] += weights[rows] * expert(x[rows])
            return out

    model, x = Experts(), torch.randn(9, 8)
    gated = learnt_(swan.swanify(model, x))
    assert gated.channels.selects_by_data
    wanted = 9 * (8 * 3 + 2 * 8 * 24)  # each row meets one expert
    assert swan.hard_macs(gated) == swan.count_macs(model, x) == wanted
    small = swan.prune(gated, macs=0.5)
    # Its routes are those of the gated model as long as the gate's inputs are not cut.
    assert swan.count_macs(small, x) <= 0.5 * wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers_whichever_kernel_runs_them(kind, dtype) -> None:
    layer = kind(4, 5, num_layers=2, bidirectional=True).to(dtype)
    weights = sum(p.numel() for p in layer.parameters() if p.ndim == 2)
    assert swan.count_macs(layer, torch.zeros(3, 2, 4, dtype=dtype)) == 3 * 2 * weights


def test_deformable_convolutions_are_counted() -> None:
    layer = torchvision.ops.DeformConv2d(4, 6, 3)
    x, offset = torch.randn(2, 4, 5, 5), torch.zeros(2, 18, 3, 3)
    assert swan.count_macs(layer, (x, offset)) == 2 * 9 * 4 * 6 * 9


@pytest.mark.parametrize("name", ["resnet_projection", "unet", "grouped", "densenet"])
def test_what_fvcore_counts(name) -> None:
    model, inputs = ZOO[name]()
    analysis = FlopCountAnalysis(model.eval(), inputs)
    analysis.unsupported_ops_warnings(enabled=False)
    analysis.uncalled_modules_warnings(enabled=False)
    counted = analysis.by_module_and_operator()
    ours = count_operators(model, inputs).macs
    products = ("conv", "linear", "addmm", "matmul", "mm", "bmm")
    theirs = {n: sum(by_op[op] for op in products) for n, by_op in counted.items()}
    assert ours[""] == theirs[""] > 0
    assert {n: m for n, m in ours.items() if m} == {n: m for n, m in theirs.items() if m}


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize(
    "equation",
    ["bnc,bcd,bn->bnd", "bnc,bnc,bn->bnc", "...c,...c,...->...c"],
    ids=["two", "one", "dots"],
)
def test_the_first_product_of_an_einsum_counts_however_torch_computes_it(width, equation):
    # At a width of one torch multiplies position by position.
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, width), nn.Linear(width, 2)

        def forward(self, x):
            y = self.first(x)
            mixed = y.transpose(1, 2) @ y if "bcd" in equation else y
            return self.last(torch.einsum(equation, y, mixed, y.mean(2)))

    layers = 2 * 5 * 4 * width + 2 * 5 * width * 2
    mixing = 2 * 2 * width * 5 * width if "bcd" in equation else 2 * 5 * width
    assert swan.count_macs(Model(), torch.randn(2, 5, 4)) == layers + mixing
