"""Normalisation over gated channels as one node: values and gradients are those of the operations it stands for."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import swan_surgery as swan
from swan_surgery.gates.normalising import _How, _plain, normalised


# Shapes of activations and gates, and the axes: layer norm of tokens, of an image, and group norm.
SHAPES = {
    "tokens": ((2, 3, 5), (1, 1, 5), (2,)),
    "two axes": ((2, 3, 4), (1, 3, 1), (1, 2)),
    "groups": ((2, 2, 3, 2, 2), (1, 2, 3, 1, 1), (2, 3, 4)),
}


@pytest.fixture(params=SHAPES)
def given(request) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    shape, gates, axes = SHAPES[request.param]
    x = torch.randn(shape, dtype=torch.float64) + 0.5
    w = torch.rand(gates, dtype=torch.float64) + 0.1
    return x.requires_grad_(), w.requires_grad_(), axes


@pytest.mark.parametrize("centred", [True, False])
def test_gradients_are_those_of_finite_differences(given, centred):
    x, w, axes = given

    def run(x, w):
        return normalised(x, w, axes, 1e-3, centred=centred)

    assert torch.autograd.gradcheck(run, (x, w))
    assert torch.autograd.gradgradcheck(run, (x, w))


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
def test_values_and_gradients_are_those_of_the_operations(given, centred, wants):
    x, w, axes = given
    w = (w > 0.4).double()
    w[(0,) * (w.ndim - len(axes)) + (0,) * len(axes)] = 1.0
    x, w = (t.detach().requires_grad_(own) for t, own in zip((x, w), wants, strict=True))
    wanted = _plain(x, w, _How(axes, 1e-5, centred))[0]
    found = normalised(x, w, axes, 1e-5, centred=centred)
    assert torch.equal(found, wanted)
    g = torch.randn_like(found)
    sources = [t for t in (x, w) if t.requires_grad]
    for one, two in zip(
        torch.autograd.grad(found, sources, g),
        torch.autograd.grad(wanted, sources, g),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("centred", [True, False])
def test_transforms_and_forward_gradients_see_the_operations(given, centred):
    x, w, axes = (t.detach() if isinstance(t, Tensor) else t for t in given)

    def run(x):
        return normalised(x, w, axes, 1e-5, centred=centred).square().sum()

    by_hand = torch.autograd.functional.jacobian(run, x)
    torch.testing.assert_close(torch.func.grad(run)(x), by_hand)
    tangent = torch.randn_like(x)
    slope = torch.func.jvp(run, (x,), (tangent,))[1]
    torch.testing.assert_close(slope, (by_hand * tangent).sum())


def test_one_activation_beside_the_input_is_kept():
    x = torch.randn(4, 6, 32, requires_grad=True)
    w = torch.ones(1, 1, 32, requires_grad=True)
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        normalised(x, w, (2,), 1e-5, centred=True)
    assert sorted(sizes)[-2:] == [x.numel()] * 2
    assert sorted(sizes)[-3] < x.numel()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("make", [nn.LayerNorm, nn.RMSNorm, nn.GroupNorm])
def test_an_activation_may_work_in_place_behind_a_norm(make, affine):
    norm = make(1, 8) if make is nn.GroupNorm else make(8, elementwise_affine=affine)
    if make is nn.GroupNorm and not affine:
        norm = make(1, 8, affine=False)
    model = nn.Sequential(nn.Linear(5, 8), norm, nn.SiLU(inplace=True), nn.Linear(8, 3)).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    wanted = torch.autograd.grad(model(x).square().sum(), [*model.parameters()])
    gated = swan.swanify(model, x)
    gated.gates.logits.data.fill_(30.0)
    own = [p for name, p in gated.named_parameters() if "gates" not in name]
    found = torch.autograd.grad(gated(x).square().sum(), own)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


class Block(nn.Module):
    """Statistics that gates weigh, recomputed in the backward pass or not."""

    def __init__(self, *, again: bool | None = None) -> None:
        super().__init__()
        self.again = again
        self.first, self.norm, self.last = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def inside(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu())

    def forward(self, x: Tensor) -> Tensor:
        if self.again is None:
            return self.inside(x)
        return checkpoint(self.inside, x, use_reentrant=self.again)


@pytest.mark.parametrize("again", [True, False])
def test_recomputed_blocks_have_the_same_gradients(again):
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    found = []
    for kind in (None, again):
        torch.manual_seed(0)
        gated = swan.swanify(Block(again=kind).double(), x.detach()[:2], in_place=True).train()
        with torch.no_grad():
            gated.gates.logits[::3] = -3.0
        gated(x).square().sum().backward()
        found.append([p.grad.clone() for p in gated.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 6
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
