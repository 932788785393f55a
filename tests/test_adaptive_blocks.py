"""Blocks of neurons that every token chooses for itself: the laws, and what each part does."""

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import swan_surgery as swan
from swan_surgery.adaptive.neuron_blocks import balanced_clusters, even_sizes
from swan_surgery.adaptive.span_block import SpanBlock
from swan_surgery.adaptive.token_block import TokenBlock
from tests.adaptive_laws import assert_near, check_free_laws, gate_, randomise_statistics_
from tests.conftest import PROFILE


class FeedForward(nn.Module):
    """A layer of a transformer as they come: gated or not, with biases or without, with dropout.

    `scaled`: by a number that each token has, so that the module takes each token by itself, but what lies between
    its linear layers not each neuron.
    """

    def __init__(
        self,
        width: int,
        inner: int,
        *,
        gated: bool = False,
        bias: bool = True,
        scaled: bool = False,
    ) -> None:
        super().__init__()
        self.scaled = scaled
        self.up = nn.Linear(width, inner, bias=bias)
        self.gate = nn.Linear(width, inner, bias=bias) if gated else None
        self.drop = nn.Dropout(0.1)
        self.down = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.gelu(self.up(x))
        if self.gate is not None:
            inner = inner * self.gate(x)
        if self.scaled:
            inner = inner * x.mean(-1, keepdim=True)
        return self.down(self.drop(inner))


class Stream(nn.Module):
    """Layers on a residual stream of tokens."""

    def __init__(self, width: int, *layers: nn.Module) -> None:
        super().__init__()
        self.enter = nn.Linear(3, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in layers)
        self.layers = nn.ModuleList(layers)
        self.leave = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.leave(x.flatten(1, -2).mean(1))


def seeded(seed: int, make: Any) -> Any:
    torch.manual_seed(seed)
    return make().double().eval()


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def small() -> nn.Module:
    return seeded(
        0, lambda: Stream(6, FeedForward(6, 20), FeedForward(6, 16, gated=True, bias=False))
    )


def adapted_small(*, scaled: bool = False) -> swan.AdaptiveModel:
    model = small()
    for layer in model.layers:
        layer.scaled = scaled
    adapted = swan.adapt(model, tokens(2, 5, 3), structure="blocks", block_size=4).eval()
    randomise_statistics_(adapted, torch.Generator().manual_seed(0))
    return adapted


class Residual(FeedForward):
    """The stream runs inside the module: what blocks give must not bring it along."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


@pytest.mark.parametrize("kind", [Residual])
@pytest.mark.law
def test_laws_where_the_module_does_more_than_feed_forward(kind) -> None:
    model = seeded(0, lambda: Stream(6, kind(6, 20), kind(6, 16, gated=True, bias=False)))
    adapted = check_free_laws(model, tokens(2, 5, 3), 3, structure="blocks", block_size=4)
    assert adapted is not None
    assert len(adapted.costs.blocks) == 2


def batches(count: int = 3) -> list[Tensor]:
    return [tokens(16, 5, 3, seed=seed) for seed in range(count)]


@pytest.mark.law
@settings(max_examples=200 if PROFILE == "thorough" else 6)
@given(
    st.lists(st.tuples(st.integers(4, 21), *[st.booleans()] * 3), min_size=1, max_size=3),
    st.sampled_from([(), (3,), (2, 3)]),
    st.integers(2, 7),
    st.integers(0, 2**16),
)
def test_laws_over_random_feed_forward_layers(
    layers: list[tuple[int, bool, bool, bool]], axes: tuple[int, ...], block_size: int, seed: int
) -> None:
    def make() -> nn.Module:
        return Stream(5, *(FeedForward(5, n, gated=g, bias=b, scaled=s) for n, g, b, s in layers))

    model, x = seeded(seed, make), tokens(2, *(axes or (1,)), 3, seed=seed)
    adapted = check_free_laws(model, x, seed, structure="blocks", block_size=block_size)
    whole = [
        name for name, (inner, *_) in enumerate(layers) if len(even_sizes(inner, block_size)) < 2
    ]
    assert (adapted is None) == (len(whole) == len(layers))
    if adapted is not None:
        assert len(adapted.costs.blocks) == len(layers) - len(whole)
        for name, block in adapted.blocks().items():
            assert type(block) is (TokenBlock if block.full.scaled else SpanBlock), name


def test_a_closed_block_of_neurons_reads_its_mean() -> None:
    """Against arithmetic by hand, token by token."""
    adapted = adapted_small()
    layer: Any = adapted.blocks()["layers.0"]
    own, (statistics,) = layer.full, layer.statistics
    x = tokens(2, 5, 6)
    masks = torch.tensor([True, False, True, True, False])
    inner = F.gelu(own.up(x))
    is_open = masks.repeat_interleave(torch.tensor(layer.sizes))
    mean = statistics.mean("down").squeeze(1)
    wanted = own.down(torch.where(is_open, inner, mean))
    with layer.masked(masks, None):
        assert_near([own(x)], [wanted], "masked")
    assert_near([layer.at(masks.expand(2, 5, -1), (x,), {})], [wanted], "by token")
    assert_near([layer.at(bytes(masks.to(torch.uint8).tolist()), (x,), {})], [wanted], "as a cut")


def test_clusters_are_as_large_as_asked_and_find_what_was_planted() -> None:
    generator = torch.Generator().manual_seed(0)
    planted = torch.arange(5).repeat(8)[torch.randperm(40, generator=generator)]
    centres = torch.randn(5, 12, generator=generator)
    rows = centres[planted] * torch.rand(40, 1, generator=generator).add(0.5)
    rows = rows + 0.05 * torch.randn(40, 12, generator=generator)
    found = balanced_clusters(rows, [8] * 5)
    assert torch.bincount(found).tolist() == [8] * 5
    pairs = set(zip(planted.tolist(), found.tolist(), strict=True))
    assert len(pairs) == 5, "every cluster is one of those planted"
    assert torch.equal(found, balanced_clusters(rows, [8] * 5))


@pytest.mark.parametrize(
    ("units", "size", "wanted"),
    [(20, 4, (4,) * 5), (10, 4, (5, 5)), (11, 4, (4, 4, 3)), (3, 128, (3,))],
)
def test_sizes_of_blocks_are_even(units: int, size: int, wanted: tuple[int, ...]) -> None:
    assert even_sizes(units, size) == wanted


def test_what_is_fitted_keeps_the_budget_and_beats_gates_at_random() -> None:
    adapted = swan.adapt(small(), tokens(2, 5, 3), structure="blocks", block_size=4)
    swan.calibrate_widths(adapted, batches())
    stats = swan.fit_widths(adapted, batches(), macs=0.75, statistics=batches())
    assert 0.65 < stats.mean_macs / adapted.costs.dense <= 0.75
    assert stats.per_unit
    assert stats.information is None
    assert len(stats.shares["layers.0"]) == 5
    x = tokens(64, 5, 3, seed=9)
    with torch.no_grad():
        taken = adapted.taken(x)
        with adapted.holding(-1):
            wanted = adapted(x)
        fitted = (taken.output - wanted).square().mean()
        errors = []
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            # As many blocks of neurons for every token, but others.
            held = {
                name: own[torch.randperm(64, generator=generator)]
                for name, own in taken.choices.items()
            }
            with adapted.holding(held):
                errors.append((adapted(x) - wanted).square().mean())
    assert fitted < min(errors)


def test_train_mode_reaches_gates_and_weights() -> None:
    adapted = adapted_small().train()
    gate_(adapted, torch.Generator().manual_seed(1))
    taken = adapted.taken(tokens(4, 5, 3))
    penalty = swan.gate_penalty(adapted, taken, macs=0.05)
    (taken.output.square().mean() + penalty).backward()
    for block in adapted.blocks().values():
        assert block.effort.weight.grad.abs().sum() > 0
        assert block.full.up.weight.grad.abs().sum() > 0


def test_a_compact_model_copies_no_weight_and_runs_one_token_at_a_time() -> None:
    adapted = adapted_small(scaled=True)
    gate_(adapted, torch.Generator().manual_seed(2))
    fast = swan.compact(adapted)
    x = tokens(1, 1, 3)
    assert_near([fast(x)], [adapted(x)], "one token")
    memories = {p.untyped_storage().data_ptr() for p in adapted.parameters()}
    layer: Any = fast.blocks()["layers.0"]
    held = [p for view in layer.views.values() for p in view.parameters() if p.ndim == 2]
    assert held
    assert {p.untyped_storage().data_ptr() for p in held} <= memories


def test_neighbours_that_all_tokens_run_are_one_product() -> None:
    adapted = adapted_small(scaled=True)
    fast = swan.compact(adapted, verify=False)
    layer: Any = fast.blocks()["layers.0"]
    masks = torch.tensor([True, True, False, True, True])
    with fast.holding({"layers.0": masks.expand(1, 5)}), torch.no_grad():
        fast(tokens(1, 5, 3))
    assert set(layer.views) == {(0, 2), (3, 5)}


def test_files_bring_it_back(tmp_path) -> None:
    adapted = adapted_small()
    gate_(adapted, torch.Generator().manual_seed(3))
    x = tokens(4, 5, 3)
    for own in (adapted, swan.compact(adapted)):
        swan.save(own, tmp_path / "model.swan")
        again = swan.load(tmp_path / "model.swan", small())
        assert torch.equal(again.eval()(x), own(x))


def test_masked_exports_as_one_graph(tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    adapted = swan.compact(adapted_small().float(), execution="masked", verify=False)
    found = swan.export(adapted, tmp_path / "m.onnx", tokens(2, 5, 3).float())
    assert found.relative_error < 1e-5


class Normed(FeedForward):
    """What follows the sum is not linear in it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(super().forward(x), (x.shape[-1],))


class Rolled(FeedForward):
    """Tokens do not stay apart."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.roll(1, dims=1))


class Convolved(nn.Module):
    """Positions behind the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(6, 20, 1), nn.Conv1d(20, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x.transpose(1, 2)))).transpose(1, 2)


class Cache:
    """What transformers keeps keys in: torch does not look inside."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def append(self, x: Tensor) -> None:
        self.seen.append(x)


class Remembering(FeedForward):
    """A cache among its arguments grows with every run."""

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        seen = getattr(cache, "seen", cache)
        assert not seen or len(seen[-1]) == len(x)
        cache.append(x)
        return super().forward(x)


class WithCache(Stream):
    def __init__(self, make_cache: Any) -> None:
        super().__init__(6, Remembering(6, 20))
        self.make_cache = make_cache

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.leave((x + self.layers[0](x, self.make_cache())).mean(1))


class Mixed(FeedForward):
    """What lies between mixes tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu().cumsum(1))


class Shared(FeedForward):
    """The linear layer that writes runs twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu() + self.up(x.roll(1, dims=1)).tanh())


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Mixed(6, 20), "does not take each neuron by itself"),
        (Shared(6, 20), "'layers.0.up' runs more than once"),
        (Convolved(), "something else than one linear layer"),
        (FeedForward(6, 4), "make one block"),
    ],
)
def test_what_stays_static_says_why(layer: nn.Module, reason: str) -> None:
    model = Stream(6, layer, FeedForward(6, 16)).double().eval()
    adapted = swan.adapt(model, tokens(2, 5, 3), structure="blocks", block_size=4)
    assert list(adapted.costs.blocks) == ["layers.1"]
    own = [s.reason for s in adapted.structure.static if any("layers.0" in n for n in s.layers)]
    assert any(re.search(reason, text) for text in own), own


@pytest.mark.parametrize("structure", ["nested", "free"])
@pytest.mark.parametrize(
    ("make_cache", "reason"),
    [(Cache, "does not run again with some of its samples"), (list, "changes its input in place")],
)
def test_a_block_that_fills_a_cache_among_its_arguments_stays_static(
    structure: Any, make_cache: Any, reason: str
) -> None:
    model = WithCache(make_cache).double().eval()
    with pytest.raises(swan.NoGateableChannelsError, match=reason):
        swan.adapt(model, tokens(2, 5, 3), structure=structure)


@pytest.mark.parametrize(
    ("act", "error", "match"),
    [
        (
            lambda: swan.adapt(small(), tokens(2, 5, 3), structure="blocks", block_size=0),
            swan.InputError,
            "block_size",
        ),
        (
            lambda: swan.adapt(small(), tokens(2, 5, 3), structure="blocks", widths=(0.5, 1)),
            swan.InputError,
            "no widths",
        ),
        (
            lambda: swan.fit_widths(adapted_small(), batches(1), macs=0.9, distance=F.mse_loss),
            swan.InputError,
            "distance",
        ),
        (
            lambda: swan.fit_widths(adapted_small(), batches(1), macs=0.01),
            swan.BudgetError,
            "narrowest",
        ),
        (
            lambda: swan.sandwich_loss(adapted_small(), lambda m: m(tokens(2, 5, 3)).sum(), step=0),
            swan.ModelError,
            "gate_penalty",
        ),
        (
            lambda: (
                adapted_small().holding({"layers.0": torch.ones(4, dtype=torch.bool)}).__enter__()
            ),
            swan.InputError,
            "blocks of neurons",
        ),
        (
            lambda: (
                adapted_small().holding({"layers.0": torch.zeros(5, dtype=torch.bool)}).__enter__()
            ),
            swan.InputError,
            "stays open",
        ),
        (lambda: adapted_small().holding(0).__enter__(), swan.InputError, "-1 with all"),
        (
            lambda: adapted_small().at({"layers.0": torch.ones(2, 5).bool(), "layers.1": -1}),
            swan.InputError,
            "one mask",
        ),
        (
            lambda: swan.fit_widths(
                adapted_small(), [torch.full((4, 5, 3), torch.nan).double()], macs=0.9
            ),
            swan.InputError,
            "finite",
        ),
    ],
)
def test_bad_input_is_refused(act, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        act()


def test_it_says_what_it_is() -> None:
    adapted = adapted_small()
    assert "5 blocks of 4 to 4 neurons" in repr(adapted)
    assert "blocks of neurons by token" in adapted.explain()
    assert adapted.costs.least < adapted.costs.dense < adapted.costs.most


def test_autocast_gives_what_the_layer_gives() -> None:
    adapted = adapted_small().float()
    gate_(adapted, torch.Generator().manual_seed(1))
    fast, x = swan.compact(adapted), tokens(4, 5, 3).float()
    layer: Any = fast.blocks()["layers.0"]
    kinds = []
    layer.register_forward_hook(lambda _m, _a, y: kinds.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = fast(x).float()
    assert kinds == [torch.bfloat16]
    assert (found - adapted(x)).abs().max() < 0.02


def test_what_is_fitted_keeps_budget_and_ceiling() -> None:
    adapted = adapted_small()
    stats = swan.fit_widths(adapted, batches(), macs=0.8, max_macs=0.82)
    assert adapted.max_macs == int(0.82 * adapted.costs.dense)
    assert stats.mean_macs <= 0.8 * adapted.costs.dense
    macs = [adapted.taken(batch).macs for batch in batches()]
    assert int(torch.cat(macs).max()) <= adapted.max_macs
    adapted.max_macs = None
    assert int(torch.cat([adapted.taken(batch).macs for batch in batches()]).max()) > 0.82 * (
        adapted.costs.dense
    )


def test_a_ceiling_is_named_where_a_model_is_exported(tmp_path) -> None:
    adapted = adapted_small()
    adapted.max_macs = adapted.costs.dense
    fast = swan.compact(adapted, execution="masked")
    with pytest.raises(swan.ModelError, match="max_macs = None to export"):
        swan.export(fast.float(), tmp_path / "a.onnx", tokens(2, 5, 3).float())


def test_a_ceiling_closes_the_least_likely_of_all_tokens() -> None:
    adapted = adapted_small()
    gate_(adapted, torch.Generator().manual_seed(0))
    x = tokens(4, 5, 3)
    free = adapted.taken(x)
    adapted.max_macs = (int(free.macs.min()) + adapted.costs.least) // 2
    taken = adapted.taken(x)
    first = next(iter(adapted.costs.blocks))
    logits = taken.efforts[first].reshape(4, -1)
    before, after = (own.choices[first].flatten(1).bool() for own in (free, taken))
    best = adapted.blocks()[first].effort.least(taken.efforts[first]).reshape(4, -1)
    for sample in range(4):
        closed = logits[sample][before[sample] & ~after[sample]]
        left = logits[sample][after[sample] & ~best[sample]]
        assert closed.numel()
        assert not left.numel() or closed.max() <= left.min()


@pytest.mark.parametrize("has_ceiling", [False, True])
def test_a_layer_recomputed_in_backward_has_the_same_gradients(has_ceiling) -> None:
    class Again(Stream):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    plain = adapted_small().train(False)
    gate_(plain, torch.Generator().manual_seed(1))
    if has_ceiling:
        plain.max_macs = (int(plain.taken(tokens(4, 5, 3)).macs.min()) + plain.costs.least) // 2
    again = copy.deepcopy(plain)
    again.model.__class__ = Again
    found = []
    for own in (plain, again):
        own.zero_grad()
        own(tokens(4, 5, 3)).square().sum().backward()
        found.append([p.grad for p in own.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 0
    assert_near(found[1], found[0], "recomputed")


def test_the_least_budget_is_kept_where_blocks_differ_in_size() -> None:
    """Eleven neurons in blocks of 4, 4 and 3: the one that stays open may be a large one."""
    model = seeded(2, lambda: Stream(6, FeedForward(6, 11), FeedForward(6, 11)))
    adapted = swan.adapt(model, tokens(2, 5, 3), structure="blocks", block_size=4)
    swan.calibrate_widths(adapted, batches())
    share = adapted.costs.least / adapted.costs.dense
    stats = swan.fit_widths(adapted, batches(), macs=share + 1e-9)
    assert stats.mean_macs <= adapted.costs.least + 1e-6


@pytest.mark.parametrize("execution", ["masked", "group"])
def test_a_language_model_generates_with_its_blocks_looking(execution) -> None:
    numbers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 40}
    config = LlamaConfig(**numbers, num_attention_heads=2, num_key_value_heads=1)
    words = torch.randint(0, 40, (2, 5), generator=torch.Generator().manual_seed(0))
    model = seeded(0, lambda: LlamaForCausalLM(config))
    adapted = swan.adapt(model, {"input_ids": words}, structure="blocks", block_size=8).eval()
    randomise_statistics_(adapted, torch.Generator().manual_seed(0))
    gate_(adapted, torch.Generator().manual_seed(0))
    compacted = swan.compact(adapted, execution=execution)
    wanted = words
    for _ in range(6):
        following = compacted(input_ids=wanted).logits[:, -1].argmax(-1, keepdim=True)
        wanted = torch.cat([wanted, following], 1)
    shares = compacted.taken(input_ids=wanted).levels
    assert 0 < float(shares.mean()) < 1
    with compacted.acting() as acting:
        found = acting.generate(words, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(found, wanted)
    with pytest.raises(swan.ModelError, match="adaptive"):
        compacted.model.generate(words, max_new_tokens=1)
