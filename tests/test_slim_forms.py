"""The written-out forms of torch functions equal torch's own, and take widths that torch's do not."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.calls.functions import SHARING
from swan_surgery.calls.resizing import Resized
from swan_surgery.calls.slim_forms import SLIM_FORMS, multi_head_attention_forward
from swan_surgery.channels import PINNED
from tests.closing import assert_closed_equals_cut, close_random_, image, prepared


LONG, SHORT, BATCH, WIDTH, HEADS = 5, 4, 2, 12, 3
TIGHT = {"rtol": 1e-11, "atol": 1e-12}
causal = torch.ones(LONG, LONG).triu(1).bool()
OPTIONS = {
    "plain": {},
    "weights of each head": {"average_attn_weights": False},
    "no weights": {"need_weights": False},
    "mask": {"attn_mask": causal},
    "additive mask": {"attn_mask": causal.double() * -3},
    "causal": {"attn_mask": causal, "is_causal": True, "need_weights": False},
    "a mask for each head": {"attn_mask": image(BATCH * HEADS, LONG, LONG) > 1},
    "padding": {
        "key_padding_mask": torch.arange(LONG).expand(BATCH, -1) > torch.tensor([[2], [3]])
    },
    "both": {"attn_mask": causal, "key_padding_mask": torch.arange(LONG).expand(BATCH, -1) > 3},
}


def test_every_function_that_shares_heads_has_a_form() -> None:
    assert SLIM_FORMS.keys() == SHARING


def arguments(x: Tensor, y: Tensor, *, extra: Tensor | None = None, zero: bool = False):
    weight, bias, last = image(3 * WIDTH, WIDTH) / 3, image(3 * WIDTH), image(WIDTH, WIDTH)
    return (x, y, y, WIDTH, HEADS, weight, bias, extra, extra, zero, 0.0, last, image(WIDTH))


def assert_same(args: tuple, **options) -> None:
    got = multi_head_attention_forward(*args, **options)
    wanted = F.multi_head_attention_forward(*args, **options)
    torch.testing.assert_close(got, wanted, **TIGHT)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_attention_is_torchs(options: dict) -> None:
    x = image(LONG, BATCH, WIDTH)
    assert_same(arguments(x, x), **options)


def test_attention_over_other_tokens_and_without_a_batch() -> None:
    assert_same(arguments(image(LONG, BATCH, WIDTH), image(SHORT, BATCH, WIDTH)))
    assert_same(arguments(image(LONG, WIDTH), image(SHORT, WIDTH)))
    mask = torch.arange(SHORT) > 2
    assert_same(arguments(image(LONG, WIDTH), image(SHORT, WIDTH)), key_padding_mask=mask)


@pytest.mark.parametrize("extra", [{"extra": image(1, 1, WIDTH)}, {"zero": True}], ids=str)
def test_more_tokens_than_projected_ones_are_torchs_affair(extra: dict) -> None:
    x = image(LONG, BATCH, WIDTH)
    assert_same(arguments(x, x, **extra))


def test_separate_projections_of_another_width() -> None:
    x = image(LONG, BATCH, WIDTH)
    parts = {f"{n}_proj_weight": image(8, WIDTH) for n in "qkv"}
    out, weights = multi_head_attention_forward(
        *(x, x, x, WIDTH, 2, None, image(24), None, None, False, 0.0, image(6, 8), image(6)),
        use_separate_proj_weight=True,
        **parts,
    )
    assert out.shape == (LONG, BATCH, 6)
    assert weights is not None
    assert weights.shape == (BATCH, LONG, LONG)


class Pool(nn.Module):
    """CLIP's attention pool: keyword arguments, projections that are linear layers of their own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.place = nn.Parameter(torch.zeros(17, width))
        self.q, self.k, self.v, self.c = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(0, keepdim=True), x]) + self.place[:, None]
        out, _ = F.multi_head_attention_forward(
            query=x[:1],
            key=x,
            value=x,
            embed_dim_to_check=x.shape[-1],
            num_heads=self.num_heads,
            q_proj_weight=self.q.weight,
            k_proj_weight=self.k.weight,
            v_proj_weight=self.v.weight,
            in_proj_weight=None,
            in_proj_bias=torch.cat([self.q.bias, self.k.bias, self.v.bias]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0,
            out_proj_weight=self.c.weight,
            out_proj_bias=self.c.bias,
            use_separate_proj_weight=True,
            training=self.training,
            need_weights=False,
        )
        return out[0]


@pytest.mark.parametrize("heads", [4, 16])
def test_trunk_and_heads_of_a_pool_are_cut(heads: int, tmp_path) -> None:
    model = prepared(nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), Pool(16, heads)))
    x = image(2, 3, 4, 4)
    channels = swan.channel_map(model, x)
    assert PINNED not in channels.layer("0").out_units
    assert len(set(channels.layer("2.q").out_units)) == heads
    gated = assert_closed_equals_cut(model, x, channels=channels)
    assert gated is not None
    close_random_(gated, 0.5, 5)
    small = swan.prune(gated)
    assert isinstance(small[2], Resized)
    assert isinstance(small[2], Pool)
    assert swan.hard_macs(gated) == swan.count_macs(small, x)
    swan.save(small, tmp_path / "small.swan")
    assert torch.equal(swan.load(tmp_path / "small.swan", model)(x), small(x))


def test_a_narrower_trunk_alone_needs_the_form_too() -> None:
    """All heads stay, so no number changes: torch's own would derive another width of a head."""
    model = prepared(nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), Pool(16, 4)))
    gated = swan.swanify(model, image(2, 3, 4, 4), ignore=["2.q"]).eval()
    assert set(gated.channels.layer("2.q").out_units) == {PINNED}
    with torch.no_grad():
        gated.gates.logits[:5] = -3.0
    small = swan.prune(gated)
    assert (small[0].out_channels, small[2].c.in_features) == (11, 16)
