"""fvcore's counts with our handles: every formula against torch's counter, nothing left uncounted unsaid."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import swan_surgery as swan
from swan_surgery.costs.counting import count_operators
from tests.fingerprints import assert_same_fingerprint, fingerprint
from tests.small_nets import Net
from tests.zoo import ZOO


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
    assert counts.uncounted == {"aten::cdist": 1}
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
