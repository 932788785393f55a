"""`SlimAttention` is `nn.MultiheadAttention`, with any number of heads."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.channels import PINNED
from swan_surgery.models.slim_attention import SlimAttention, put_back_, write_out_
from tests.closing import assert_closed_equals_cut, close_, image, prepared


TIGHT = {"rtol": 1e-11, "atol": 1e-12}
BATCH, LONG, SHORT, WIDTH, HEADS = 3, 5, 4, 12, 3


def attention(**options) -> nn.MultiheadAttention:
    return prepared(nn.MultiheadAttention(WIDTH, HEADS, **options))


def slim(module: nn.MultiheadAttention) -> SlimAttention:
    written = write_out_(copy.deepcopy(module))
    assert type(written) is SlimAttention
    return written


def drawn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def sequences(module: nn.MultiheadAttention, *, is_self: bool, is_batched: bool) -> list[Tensor]:
    """Query, key and value in the layout that the module wants."""
    kind = [(LONG, WIDTH), (SHORT, module.kdim), (SHORT, module.vdim)]
    if is_self:
        tensors = [drawn(BATCH, LONG, WIDTH)] * 3
    else:
        tensors = [drawn(BATCH, length, width) for length, width in kind]
    if not is_batched:
        taken = {id(t): t[0] for t in tensors}
    elif module.batch_first:
        return tensors
    else:
        taken = {id(t): t.transpose(0, 1) for t in tensors}
    return [taken[id(t)] for t in tensors]


def assert_same(module: nn.MultiheadAttention, inputs: list[Tensor], **options) -> None:
    wanted = module(*inputs, **options)
    got = slim(module)(*inputs, **options)
    assert (got[1] is None) == (wanted[1] is None) == (not options.get("need_weights", True))
    torch.testing.assert_close(got, wanted, **TIGHT)
    assert bool(wanted[0].isfinite().all())


def masks(kind: str, source: int, *, is_batched: bool) -> dict[str, Tensor]:
    """A mask of every form torch takes; no query may be left without a key."""
    batch = BATCH if is_batched else 1
    plane = drawn(LONG, source) > 0.5
    cube = drawn(batch * HEADS, LONG, source) > 0.5
    padding = torch.zeros(batch, source, dtype=torch.bool)
    padding[-1, -1] = True
    for blocked in (plane, cube):
        blocked[..., 0] = False
    padding = padding if is_batched else padding[0]
    additive = {True: float("-inf"), False: 0.0}
    as_floats = padding.double().masked_fill(padding, additive[True])
    return {
        "none": {},
        "bool": {"attn_mask": plane},
        "float": {"attn_mask": drawn(LONG, source)},
        "bool per head": {"attn_mask": cube},
        "float per head": {"attn_mask": drawn(batch * HEADS, LONG, source)},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": as_floats},
        "bool, padding": {"attn_mask": plane, "key_padding_mask": padding},
        "per head, padding": {"attn_mask": cube, "key_padding_mask": padding},
        "float, float padding": {
            "attn_mask": drawn(LONG, source),
            "key_padding_mask": drawn(*padding.shape),
        },
    }[kind]


MASKS = (
    "none", "bool", "float", "bool per head", "float per head", "padding", "float padding",
    "bool, padding", "per head, padding", "float, float padding",
)  # fmt: skip
WEIGHTS = [
    {"need_weights": False},
    {"need_weights": True},
    {"need_weights": True, "average_attn_weights": False},
]


@pytest.mark.parametrize("is_self", [True, False], ids=["self", "cross"])
@pytest.mark.parametrize("is_batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("kind", MASKS)
def test_every_mask(kind: str, is_batched: bool, is_self: bool) -> None:
    for batch_first, weights in itertools.product((True, False), WEIGHTS):
        module = attention(batch_first=batch_first)
        inputs = sequences(module, is_self=is_self, is_batched=is_batched)
        own = masks(kind, LONG if is_self else SHORT, is_batched=is_batched)
        assert_same(module, inputs, **own, **weights)


@pytest.mark.parametrize("weights", WEIGHTS, ids=["fast", "mean", "per head"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [{}, {"kdim": 7, "vdim": 5}, {"kdim": 7}], ids=str)
def test_every_parametrisation(widths: dict, bias: bool, weights: dict) -> None:
    for is_batched, batch_first in itertools.product((True, False), repeat=2):
        module = attention(bias=bias, batch_first=batch_first, **widths)
        assert (module.in_proj_weight is None) == bool(widths)
        inputs = sequences(module, is_self=False, is_batched=is_batched)
        assert_same(module, inputs, **weights)


def test_keys_that_are_also_the_values() -> None:
    module = attention(batch_first=True)
    query, memory = drawn(BATCH, LONG, WIDTH), drawn(BATCH, SHORT, WIDTH)
    assert_same(module, [query, memory, memory])
    assert_same(module, [query, query, query.clone()])


@pytest.mark.parametrize("weights", WEIGHTS, ids=["fast", "mean", "per head"])
def test_causal(weights: dict) -> None:
    module = attention(batch_first=True)
    inputs = sequences(module, is_self=True, is_batched=True)
    blocked = torch.ones(LONG, LONG, dtype=torch.bool).triu(1)
    assert_same(module, inputs, attn_mask=blocked, is_causal=True, **weights)
    own = slim(module)
    with_mask = own(*inputs, attn_mask=blocked, **weights)
    torch.testing.assert_close(own(*inputs, is_causal=True, **weights), with_mask, **TIGHT)
    assert not torch.allclose(own(*inputs, **weights)[0], with_mask[0])


@pytest.mark.parametrize("is_batched", [True, False])
def test_dropout_of_weights_in_training(is_batched: bool) -> None:
    module = attention(dropout=0.4, batch_first=True).train()
    inputs = sequences(module, is_self=True, is_batched=is_batched)
    results = []
    for own in (module, slim(module).train()):
        torch.manual_seed(3)
        results.append(own(*inputs))
    torch.testing.assert_close(*results, **TIGHT)
    assert not torch.allclose(results[0][0], module.eval()(*inputs)[0])


def test_gradients() -> None:
    module = attention(batch_first=True)
    own = slim(module)
    for each in (module, own):
        inputs = [t.requires_grad_() for t in sequences(each, is_self=False, is_batched=True)]
        each(*inputs)[0].square().sum().backward()
    for (name, one), (other, two) in zip(
        module.named_parameters(), own.named_parameters(), strict=True
    ):
        assert name == other
        torch.testing.assert_close(two.grad, one.grad, **TIGHT)


class TestWriteOut:
    def test_parameters_and_keys_stay_and_it_can_be_undone(self) -> None:
        module = attention(kdim=7)
        before = {name: id(p) for name, p in module.named_parameters()}
        keys = list(module.state_dict())
        attributes = dict(vars(module))
        written = write_out_(module)
        assert written is module
        assert isinstance(written, nn.MultiheadAttention)
        assert {name: id(p) for name, p in written.named_parameters()} == before
        assert list(written.state_dict()) == keys
        put_back_(written)
        assert type(written) is nn.MultiheadAttention
        assert vars(written).keys() == attributes.keys()
        assert written._qkv_same_embed_dim == attributes["_qkv_same_embed_dim"]

    def test_putting_back_keeps_the_fast_path_of_equal_widths(self) -> None:
        module = attention()
        assert module._qkv_same_embed_dim
        assert not write_out_(module)._qkv_same_embed_dim
        assert put_back_(module)._qkv_same_embed_dim

    @pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
    def test_what_it_cannot_do_stays_as_it_is(self, options) -> None:
        assert type(write_out_(attention(**options))) is nn.MultiheadAttention

    def test_a_subclass_stays_as_it_is(self) -> None:
        class Own(nn.MultiheadAttention):
            pass

        assert type(write_out_(Own(WIDTH, HEADS))) is Own

    def test_a_deep_copy_is_independent(self) -> None:
        own = slim(attention(batch_first=True))
        inputs = sequences(own, is_self=True, is_batched=True)
        wanted = own(*inputs)[0]
        twin = copy.deepcopy(own)
        assert type(twin) is SlimAttention
        assert torch.equal(twin(*inputs)[0], wanted)
        with torch.no_grad():
            twin.in_proj_weight.zero_()
        assert torch.equal(own(*inputs)[0], wanted)

    @pytest.mark.parametrize("training", [True, False])
    def test_torchs_encoder_layer_runs_it(self, training) -> None:
        """Its fused inference path would read the parameters itself."""
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 8, dropout=0.0, batch_first=True)
        layer = prepared(layer).train(training)
        x = drawn(BATCH, LONG, WIDTH)
        with torch.no_grad():
            wanted = layer(x)
            written = write_out_(copy.deepcopy(layer))
            calls = []
            written.self_attn.register_forward_hook(lambda *_: calls.append(1))
            own = written(x)
        torch.testing.assert_close(own, wanted, rtol=1e-9, atol=1e-10)
        assert calls == [1]


class Attending(nn.Module):
    """Tokens through one attention; `returns` says what of it the model shows."""

    def __init__(self, *, need_weights: bool = False, **options) -> None:
        super().__init__()
        self.embed, self.last = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)
        self.memory = nn.Linear(3, options.get("kdim", WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
        self.need_weights = need_weights

    def forward(self, x: Tensor):
        query, memory = self.embed(x), self.memory(x)
        out, weights = self.attention(query, memory, memory, need_weights=self.need_weights)
        return (self.last(out), weights) if self.need_weights else self.last(out)


@pytest.mark.parametrize("options", [{}, {"kdim": 8, "vdim": 8}, {"bias": False}], ids=str)
@pytest.mark.parametrize("need_weights", [True, False])
def test_heads_and_widths_are_units(need_weights: bool, options: dict) -> None:
    model = prepared(Attending(need_weights=need_weights, **options))
    gated = assert_closed_equals_cut(model, image(2, 5, 3), shares=(0.2, 0.5))
    own = gated.channels
    for layer in ("embed", "memory", "attention.out_proj"):
        assert PINNED not in own.layer(layer).out_units
    heads = own.units_on("attention.out_proj.weight", 1)
    assert len(set(heads)) == HEADS
    assert heads == tuple(h for h in dict.fromkeys(heads) for _ in range(WIDTH // HEADS))


def test_a_head_less_keeps_the_scale_of_the_others() -> None:
    gated = swan.swanify(prepared(Attending()), image(2, 5, 3))
    heads = tuple(dict.fromkeys(gated.channels.units_on("attention.out_proj.weight", 1)))
    close_(gated, heads[1])
    small = swan.prune(gated)
    own = small.attention
    assert isinstance(own, SlimAttention)
    assert (own.num_heads, own.head_dim, own.embed_dim) == (HEADS - 1, WIDTH // HEADS, WIDTH)
    assert own.in_proj_weight.shape == (3 * (HEADS - 1) * own.head_dim, WIDTH)
    kept = [i for i, unit in enumerate(gated.channels.units_on("attention.out_proj.weight", 1)) if unit != heads[1]]  # fmt: skip
    assert torch.equal(own.out_proj.weight, gated.model.attention.out_proj.weight[:, kept])
    assert small.state_dict().keys() == Attending().state_dict().keys()


@pytest.mark.parametrize("widths", [{}, {"kdim": 8, "vdim": 8}], ids=str)
def test_widths_that_torchs_module_does_not_know_are_not_given_to_it(widths: dict) -> None:
    """As many inputs and outputs fewer as one head is wide: torch wants all three to be equal."""
    gated = swan.swanify(prepared(Attending(**widths)), image(2, 5, 3))
    units = gated.channels
    out = units.layer("attention.out_proj").out_units
    heads = tuple(dict.fromkeys(units.units_on("attention.out_proj.weight", 1)))
    close_(gated, heads[0], *out[:4])
    small = swan.prune(gated)
    assert type(small.attention) is SlimAttention
    reads = units.layer("embed").out_units
    close_(gated, heads[0], *out[:4], *reads[:4])
    small = swan.prune(gated)
    assert type(small.attention) is nn.MultiheadAttention
    assert small.attention.embed_dim == WIDTH - 4


def test_a_narrower_trunk_keeps_the_width_of_a_head() -> None:
    gated = swan.swanify(prepared(Attending()), image(2, 5, 3))
    trunk = gated.channels.layer("embed").out_units
    close_(gated, *trunk[:5])
    own = swan.prune(gated).attention
    assert (own.num_heads, own.head_dim) == (HEADS, WIDTH // HEADS)
    assert own.in_proj_weight.shape == (3 * WIDTH, WIDTH - 5)


def test_nothing_closed_gives_torchs_own_module_back() -> None:
    model = prepared(Attending())
    gated = swan.swanify(model, image(2, 5, 3))
    assert type(swan.prune(gated).attention) is nn.MultiheadAttention
    assert type(swan.unswanify(gated).attention) is nn.MultiheadAttention
    assert type(model.attention) is nn.MultiheadAttention
