"""Feed-forward layers that are no module of their own: tokens choose in passing, and the rest runs as it is."""

from threading import Thread
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

import swan_surgery as swan
from swan_surgery.adaptive.span_block import SpanBlock
from tests.adaptive_laws import assert_near, check_free_laws, gate_, randomise_statistics_
from tests.conftest import PROFILE
from tests.test_adaptive_blocks import FeedForward, Stream, WithCache, seeded, tokens


class Layer(nn.Module):
    """Mixes tokens and feeds them forward, all in one module, as BERT's layers do."""

    def __init__(
        self, width: int, inner: int, *, gated: bool, bias: bool, before: bool, flat: bool
    ) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, inner, bias=bias)
        self.gate = nn.Linear(width, inner, bias=bias) if gated else None
        self.drop = nn.Dropout(0.1)
        self.fc2 = nn.Linear(inner, width, bias=bias)
        self.before, self.flat = before, flat

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, None]:
        mixed = x + self.mix(x).flatten(1, -2).mean(1).reshape(len(x), *[1] * (x.ndim - 2), -1)
        tokens = self.norm(mixed) if self.before else mixed
        if self.flat:
            tokens = tokens.reshape(-1, tokens.shape[-1])
        inner = F.silu(self.fc1(tokens)) * scale
        if self.gate is not None:
            inner = inner * self.gate(tokens)
        out = self.fc2(self.drop(inner)).view(mixed.shape)
        return (mixed + out if self.before else self.norm(mixed + out)), None


class Waiting(FeedForward):
    """Does something else in the middle."""

    meanwhile: ClassVar[Any] = None

    def forward(self, x: Tensor) -> Tensor:
        inner = F.gelu(self.up(x))
        if Waiting.meanwhile is not None:
            Waiting.meanwhile()
        if self.gate is not None:
            inner = inner * self.gate(x)
        return self.down(inner)


_PLAIN = {"gated": False, "bias": True, "before": True, "flat": False}


class Layers(nn.Module):
    """Such layers, one after the other."""

    def __init__(self, width: int, *layers: Layer) -> None:
        super().__init__()
        self.enter = nn.Linear(3, width)
        self.layers = nn.ModuleList(layers)
        self.leave = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for index, layer in enumerate(self.layers):
            x, _ = layer(x, scale=1.0 + index)
        return self.leave(x.flatten(1, -2).mean(1))


def bert() -> nn.Module:
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=50,
        max_position_embeddings=16,
    )
    return seeded(0, lambda: BertModel(config))


def opt() -> nn.Module:
    config = OPTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=24,
        vocab_size=50,
        word_embed_proj_dim=16,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=49,
    )
    return seeded(0, lambda: OPTForCausalLM(config))


def gpt2() -> nn.Module:
    """Whose linear layers hold their weights the other way round, in a module of their own."""
    config = GPT2Config(
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_inner=24,
        vocab_size=50,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=49,
    )
    return seeded(0, lambda: GPT2LMHeadModel(config))


IDS = torch.tensor([[5, 9, 3, 7, 11, 2], [4, 8, 6, 10, 12, 13]])  # no padding


@pytest.mark.law
@settings(max_examples=200 if PROFILE == "thorough" else 8)
@given(
    st.lists(
        st.tuples(st.integers(4, 21), *[st.booleans()] * 4),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from([(3,), (2, 3)]),
    st.integers(2, 5),
    st.integers(0, 2**16),
)
def test_laws_over_random_layers(layers, axes, block_size: int, seed: int) -> None:
    def make() -> nn.Module:
        return Layers(
            5,
            *(
                Layer(5, n, gated=gated, bias=bias, before=before, flat=flat)
                for n, gated, bias, before, flat in layers
            ),
        )

    model, x = seeded(seed, make), tokens(2, *axes, 3, seed=seed)
    adapted = check_free_laws(model, x, seed, structure="blocks", block_size=block_size)
    if adapted is not None:
        assert all(isinstance(block, SpanBlock) for block in adapted.blocks().values())
    wide = [n for n, *_ in layers if round(n / block_size) >= 2]
    assert len(wide) == (0 if adapted is None else len(adapted.costs.blocks))


@pytest.mark.parametrize("make", [bert, opt, gpt2])
@pytest.mark.law
def test_laws_of_transformers(make) -> None:
    adapted = check_free_laws(make(), IDS, 3, structure="blocks", block_size=8)
    assert adapted is not None
    assert [type(own) for own in adapted.blocks().values()] == [SpanBlock, SpanBlock]


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.law
def test_laws_of_torch_encoders(norm_first) -> None:
    """Whose layers have a kernel that calls none of their parts."""

    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 24, batch_first=True, norm_first=norm_first)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    model = seeded(0, make)
    adapted = check_free_laws(model, tokens(2, 5, 8), 3, structure="blocks", block_size=8)
    assert adapted is not None
    assert list(adapted.costs.blocks) == ["layers.0", "layers.1"]


def test_layers_inside_adapt_where_one_stands_around_them() -> None:
    class Around(Layers):
        def __init__(self) -> None:
            super().__init__(5)
            del self.layers  # and last among the modules
            self.first, self.second = nn.Linear(5, 12), nn.Linear(12, 5)
            self.layers = nn.ModuleList(Layer(5, 12, **_PLAIN) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            x = x + self.second(self.first(x).relu())
            for layer in self.layers:
                x, _ = layer(x)
            return self.leave(x.mean(1))

    adapted = check_free_laws(
        seeded(0, Around), tokens(2, 4, 3), 3, structure="blocks", block_size=4
    )
    assert adapted is not None
    assert list(adapted.costs.blocks) == ["layers.0", "layers.1"]
    reasons = [own.reason for own in adapted.structure.static if "first" in own.layers]
    assert len(reasons) == 1
    assert "adapts already" in reasons[0]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_with_the_line_that_works() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 24, batch_first=True)
    model = seeded(0, lambda: nn.TransformerEncoder(layer, 2))
    x, padded = tokens(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    padded[1, 3:] = True
    adapted: Any = swan.adapt(model, x, structure="blocks", block_size=8)
    with torch.no_grad():
        with pytest.raises(swan.PathError, match="use_nested_tensor = False"):
            adapted(x, src_key_padding_mask=padded)
        adapted.model.use_nested_tensor = False
        found = adapted(x, src_key_padding_mask=padded)
        wanted = model(x, src_key_padding_mask=padded)
    assert_near([found[~padded]], [wanted[~padded]], "all open")


def test_a_module_that_fills_a_cache_runs_as_it_is() -> None:
    class Cache(list):
        pass

    model = WithCache(Cache).double().eval()
    adapted = swan.adapt(model, tokens(2, 5, 3), structure="blocks", block_size=4)
    assert list(adapted.costs.blocks) == ["layers.0"]
    assert_near([adapted(tokens(3, 5, 3))], [model(tokens(3, 5, 3))], "all open")


def test_one_product_where_all_tokens_choose_alike() -> None:
    adapted = swan.adapt(bert(), IDS, structure="blocks", block_size=6)
    block: Any = adapted.blocks()["encoder.layer.0"]
    masks = torch.tensor([[True, True, False, True]]).repeat(12, 1)
    assert [(own.start, own.size, own.tokens) for own in block.pieces(masks)] == [
        (0, 12, None),
        (18, 6, None),
    ]
    masks[3, 1] = False
    assert [(own.start, own.size, own.count) for own in block.pieces(masks)] == [
        (0, 6, 12),
        (18, 6, 12),
        (6, 6, 11),
    ]


@pytest.mark.parametrize("make", [opt, gpt2])
@pytest.mark.parametrize("execution", ["masked", "group"])
def test_a_language_model_generates(make, execution) -> None:
    adapted: Any = swan.adapt(make(), IDS, structure="blocks", block_size=8)
    gate_(adapted, torch.Generator().manual_seed(0))
    adapted.execution = execution
    asked = {"max_new_tokens": 4, "do_sample": False}
    wanted = IDS
    for _ in range(4):
        wanted = torch.cat([wanted, adapted(wanted).logits[:, -1:].argmax(-1)], 1)
    for use_cache in (True, False):
        with adapted.acting() as model:
            found = model.generate(IDS, use_cache=use_cache, **asked)
        assert torch.equal(found, wanted)


def test_files_bring_it_back_and_widths_are_fitted(tmp_path) -> None:
    model = bert()
    adapted = swan.adapt(model, IDS, structure="blocks", block_size=8)
    batches = [torch.randint(50, (8, 6)) for _ in range(3)]
    swan.calibrate_widths(adapted, batches)
    swan.fit_widths(adapted, batches, macs=0.85)
    small = swan.compact(adapted)
    stats = swan.width_stats(small, batches)
    assert stats.mean_macs <= 0.85 * adapted.costs.dense
    swan.save(adapted, tmp_path / "x.swan")
    back = swan.load(tmp_path / "x.swan", bert())
    assert_near([back(IDS)[0]], [adapted(IDS)[0]], "as saved")


def test_masked_exports_as_one_graph(tmp_path) -> None:
    model = seeded(
        0, lambda: Layers(5, Layer(5, 12, gated=True, bias=True, before=True, flat=False))
    )
    adapted = swan.adapt(model, tokens(2, 4, 3), structure="blocks", block_size=4)
    gate_(adapted, torch.Generator().manual_seed(0))
    small = swan.compact(adapted.float(), execution="masked")
    for name in ("x.onnx", "x.pt2"):
        assert swan.export(small, tmp_path / name, tokens(2, 4, 3).float()).relative_error < 1e-4


def test_inputs_by_name_export(tmp_path) -> None:
    """The adaptive model hands them on, and so has no names of its own."""
    inputs = {"input_ids": IDS, "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
    adapted = swan.adapt(bert().float(), inputs, structure="blocks", block_size=8)
    gate_(adapted.double(), torch.Generator().manual_seed(0))
    small = swan.compact(adapted.float(), execution="masked")
    assert swan.export(small, tmp_path / "x.onnx", inputs).relative_error < 1e-4


def test_a_layer_recomputed_in_backward_has_the_same_gradients() -> None:
    class Saving(Layers):
        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            for layer in self.layers:
                x = checkpoint(lambda own, run=layer: run(own)[0], x, use_reentrant=False)
            return self.leave(x.mean(1))

    def made(kind: Any) -> swan.AdaptiveModel:
        model = seeded(0, lambda: kind(5, Layer(5, 12, **{**_PLAIN, "flat": True})))
        adapted = swan.adapt(model, tokens(2, 4, 3), structure="blocks", block_size=4)
        gate_(adapted, torch.Generator().manual_seed(0))
        return adapted

    found = []
    for adapted in (made(Saving), made(Layers)):
        adapted(tokens(3, 4, 3)).square().sum().backward()
        found.append([p.grad for p in adapted.parameters() if p.grad is not None])
    assert_near(found[0], found[1], "gradients")


def test_what_lies_between_is_told_apart_at_run_time_too() -> None:
    """A factor by token that the example inputs did not have."""

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.fc1, self.fc2 = nn.Linear(3, 3), nn.Linear(3, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
            inner = self.fc1(x + self.mix(x)).relu()
            return x + self.fc2(inner if factor is None else inner * factor)

    model = seeded(0, Sometimes)
    x = tokens(2, 4, 3)
    adapted = swan.adapt(model, x, structure="blocks", block_size=4)
    gate_(adapted, torch.Generator().manual_seed(0))
    factor = tokens(2, 4, 1, seed=3)
    masked = adapted(x, factor)
    assert masked.shape == x.shape
    with pytest.raises(swan.PathError, match="does not take each neuron by itself"):
        swan.compact(adapted)(x, factor)


@pytest.mark.parametrize("structure", ["blocks", "free", "nested"])
@pytest.mark.parametrize("execution", ["masked", "dense"])
def test_another_thread_runs_the_same_model_in_between(structure, execution) -> None:
    """One starts, and waits inside until another is done: each gets what it gets alone."""
    options = {"block_size": 4} if structure == "blocks" else {}
    model = seeded(0, lambda: Stream(6, Waiting(6, 20), Waiting(6, 16, gated=True)))
    adapted: Any = swan.adapt(model, tokens(2, 5, 3), structure=structure, **options)
    randomise_statistics_(adapted, torch.Generator().manual_seed(0))
    small = swan.compact(adapted, execution="masked" if execution == "masked" else "auto")
    x, y = tokens(3, 5, 3, seed=4), tokens(2, 5, 3, seed=5)
    for block in small.blocks().values():
        if structure == "nested":
            block.effort.weight.data.normal_(generator=torch.Generator().manual_seed(1))
        else:
            gate_(small, torch.Generator().manual_seed(1))
    with torch.no_grad():
        alone = small(x), small(y)
        other: list[Tensor] = []

        def run() -> None:
            with torch.no_grad():
                other.append(small(y))

        def meanwhile() -> None:
            Waiting.meanwhile = None
            thread = Thread(target=run)
            thread.start()
            thread.join()

        Waiting.meanwhile = meanwhile
        found = small(x)
    assert Waiting.meanwhile is None
    assert torch.equal(found, alone[0])
    assert torch.equal(other[0], alone[1])
    assert not any("forward" in vars(module) for module in small.modules())
