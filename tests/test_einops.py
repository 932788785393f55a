"""Numbers of heads written in einops' patterns follow; what einops computes is what it computed."""

import io
import subprocess
import sys

import einops
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from einops.layers.torch import Rearrange
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.calls.einops_moves import show_einops
from swan_surgery.channels import PINNED
from tests.closing import assert_closed_equals_cut, image, prepared
from tests.small_nets import Net, conv
from tests.test_sizes import assert_right_at


def in_batch(q: Tensor, k: Tensor, v: Tensor, y: int) -> Tensor:
    """As in CvT and LeViT of vit-pytorch."""
    q, k, v = (rearrange(t, "b (h d) x y -> (b h) (x y) d", h=4) for t in (q, k, v))
    attention = torch.softmax(torch.einsum("b i d, b j d -> b i j", q, k) * 8**-0.5, -1)
    out = torch.einsum("b i j, b j d -> b i d", attention, v)
    return rearrange(out, "(b h) (x y) d -> b (h d) x y", h=4, y=y)


def by_head(q: Tensor, k: Tensor, v: Tensor, y: int) -> Tensor:
    q, k, v = (rearrange(t, "b (h d) x y -> b h (x y) d", d=8) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)
    return rearrange(out, "b h (x y) d -> b (h d) x y", y=y)


def in_windows(q: Tensor, k: Tensor, v: Tensor, y: int) -> Tensor:
    """As in MaxViT: the windows are as many as the heads, so only the names tell them apart."""
    split = "b (h d) (x w1) (y w2) -> (b x y) h (w1 w2) d"
    b, (q, k, v) = len(q), (rearrange(t, split, h=4, w1=4, w2=4) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)
    joined = "(b x y) h (w1 w2) d -> b (h d) (x w1) (y w2)"
    return rearrange(out, joined, b=b, h=4, w1=4, w2=4, y=y // 4)


FORMS = {form.__name__: form for form in (in_batch, by_head, in_windows)}


class Attention(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.first, self.last = form, conv(3, 8), conv(8, 2)
        self.q, self.k, self.v, self.out = (*(conv(8, 32, 1) for _ in range(3)), conv(32, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        parts = self.q(x), self.k(x), self.v(x)
        return self.last(self.out(FORMS[self.form](*parts, x.shape[3])))


def network(name: str) -> nn.Module:
    return prepared(Attention(name))


@pytest.mark.parametrize("name", FORMS)
def test_heads_that_are_written_as_numbers_are_gated(name, tmp_path) -> None:
    net = network(name)
    gated = assert_closed_equals_cut(net, image(2, 3, 8, 8))
    assert gated is not None
    assert gated.channels.num_units == 8 + 4 + 8
    others = [(1, 3, 8, 8), (3, 3, 8, 12)] + ([] if name == "in_windows" else [(2, 3, 4, 6)])
    assert assert_right_at(gated, others) == 2 * len(others)
    gated = swan.swanify(net, image(2, 3, 8, 8))
    gated.close("q", range(8))
    small = swan.prune(gated)
    swan.save(small, tmp_path / "small.swan")
    loaded = swan.load(tmp_path / "small.swan", network(name))
    x = image(2, 3, 8, 8)
    assert torch.equal(loaded.eval()(x), small.eval()(x))
    again = swan.swanify(small, x)
    again.close("q", range(8, 16))
    assert swan.prune(again).q.out_channels == 16


def test_a_compiled_cut_model_has_its_numbers_replaced() -> None:
    net, x = network("in_batch"), image(2, 3, 8, 8)
    gated = swan.swanify(net, x)
    gated.close("q", range(8))
    small = swan.prune(gated).eval()
    script = (
        "import io, sys, torch\n"
        "small, x, wanted = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=False)\n"
        "found = torch.compile(small, backend='eager')(x)\n"
        "print(float((found - wanted).abs().max()))"
    )
    file = io.BytesIO()
    torch.save((small, x, small(x)), file)  # noqa: TID251 - what users do, in a fresh process
    done = subprocess.run(
        [sys.executable, "-c", script], input=file.getvalue(), capture_output=True, check=True
    )
    assert float(done.stdout) < 1e-9
    with torch.no_grad():
        assert torch.equal(torch.compile(small, backend="eager")(x), small(x))


def test_an_attribute_follows_as_an_attribute() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.heads, self.out = nn.Linear(8, 96), 4, nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = rearrange(self.qkv(x), "b n (a h d) -> a b h n d", a=3, h=self.heads)
            out = F.scaled_dot_product_attention(q, k, v)
            return self.out(rearrange(out, "b h n d -> b n (h d)"))

    net = prepared(nn.Sequential(nn.Linear(6, 8), Heads(), nn.Linear(8, 2)))
    gated = assert_closed_equals_cut(net, torch.randn(2, 5, 6).double())
    assert gated is not None
    gated = swan.swanify(net, torch.randn(2, 5, 6).double())
    assert gated.channels.num_units == 8 + 4 + 8
    gated.close("1.qkv", range(8))
    small = swan.prune(gated)
    assert type(small[1]) is Heads
    assert small[1].heads == 3


def test_layers_and_new_axes_are_what_they_were() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        y = m.tokens(F.relu(m.first(x)))
        token = repeat(m.token, "d -> b n d", b=len(x), n=2)
        return m.last(torch.cat([token, y], 1).mean(1))

    own = {"first": conv(3, 6, 3), "tokens": Rearrange("b c x y -> b (x y) c")}
    net = prepared(Net(run, **own, token=nn.Parameter(torch.randn(6)), last=nn.Linear(6, 2)))
    gated = assert_closed_equals_cut(net, image(2, 3, 4, 4))
    assert gated is not None
    assert PINNED not in gated.channels.layer("first").out_units


def test_outside_of_our_modes_einops_is_itself() -> None:
    show_einops()
    once = einops.einops.reduce
    show_einops()
    assert einops.einops.reduce is once
    x = torch.arange(24.0).reshape(2, 12)
    wanted = x.reshape(2, 3, 4).transpose(1, 2)
    with torch.device("cpu"):  # a mode of torch functions that is not ours
        assert torch.equal(rearrange(x, "b (h d) -> b d h", h=3), wanted)
    assert torch.equal(rearrange(x, "b (h d) -> b d h", h=3), wanted)
    assert torch.equal(einops.reduce(x, "b (h d) -> b d", "mean", h=3), wanted.mean(2))
    assert rearrange(x.numpy(), "b (h d) -> b d h", h=3).shape == (2, 4, 3)
    with pytest.raises(einops.EinopsError, match="divide axis"):
        rearrange(x, "b (h d) -> b d h", h=5)
