"""How wide blocks are at a width, and the readers that a width has for itself."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.adaptive.rows import in_groups, in_runs
from swan_surgery.artifacts.adaptive import adaptive_part
from swan_surgery.costs.macs import cost_table
from tests.adaptive_laws import own_readers_, randomise_statistics_
from tests.closing import image
from tests.test_adaptive import SmallNet, adapted_net, loader, small_net


X = image(2, 3, 8, 8)


class Feed(nn.Module):
    """A feed-forward layer on a stream."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8, bias=bias), nn.Linear(8, 6, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def scored(scores: Tensor | None = None, **options) -> swan.AdaptiveModel:
    """The small net with its widths allocated by scores: one unit after the other by default."""
    gated = swan.swanify(small_net(), X)
    if scores is None:
        scores = torch.arange(1.0, gated.channels.num_units + 1)
    return swan.adapt(gated, scores=scores, **options)


def open_counts(adapted: swan.AdaptiveModel, level: int) -> list[int]:
    return [counts[level] for counts in adapted.structure.counts]


def test_what_matters_stays_wider() -> None:
    gated = swan.swanify(small_net(), X)
    scores = torch.rand(gated.channels.num_units) + 0.1
    scores[list(scored().structure.groups[0].units)] *= 1e6
    adapted = swan.adapt(gated, scores=scores)
    assert [len(own) for own in adapted.structure.counts] == [4, 4, 4]
    kept, *others = open_counts(adapted, 1)
    uniform = open_counts(swan.adapt(gated, scores=scores, allocation="uniform"), 1)
    assert uniform == [4, 4, 3]
    assert kept > 4 and max(others) < 4, (kept, others)  # noqa: PT018 - one statement about all


def test_widths_are_shares_of_the_macs_that_adapt() -> None:
    adapted = scored(widths=(0.3, 0.6, 1.0))
    table = cost_table(swan.swanify(small_net(), X))
    outside = torch.ones(table.num_units, dtype=torch.float64)
    for group in adapted.structure.groups:
        outside[list(group.units)] = 0
    without = float(table.at(outside)) / 2
    total = table.total / 2
    dearest = float(table.prices(torch.ones(table.num_units, dtype=torch.float64)).max()) / 2
    for level, width in enumerate(adapted.widths):
        macs = swan.count_macs(adapted.at(width), X) / 2
        most = without + width * (total - without)
        assert most - dearest < macs <= most * (1 + 1e-9), (level, macs, most)


def test_narrower_widths_lie_within_wider_ones() -> None:
    for seed in range(8):
        scores = torch.rand(28, generator=torch.Generator().manual_seed(seed))
        for counts in scored(scores).structure.counts:
            assert list(counts) == sorted(counts)
            assert counts[0] >= 1


def test_gates_that_have_learnt_say_how_wide_blocks_are() -> None:
    gated = swan.swanify(small_net(), X)
    groups = swan.adapt(gated).structure.groups
    gated.gates.logits.data[list(groups[0].units[2:])] = -3.0
    adapted = swan.adapt(gated, widths=(0.8, 1.0))
    counts = {own.block: own_counts for own, own_counts in zip(groups, adapted.structure.counts)}  # noqa: B905
    assert counts["first"][0] < 8
    rest = [own[0] for own in adapted.structure.counts[1:]]
    assert rest == [8, 6]  # of these none has closed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allocation": "even"}, r'allocation must be "scores" or "uniform"; got \'even\''),
        ({"allocation": "scores", "structure": "free"}, "allocation is of nested widths"),
        ({"allocation": "scores", "scores": -1.0}, "scores must not be negative where they say"),
    ],
)
def test_bad_allocations_are_refused(options: dict[str, Any], message: str) -> None:
    gated = swan.swanify(small_net(), X)
    if "scores" in options:
        options = options | {"scores": torch.full((gated.channels.num_units,), -1.0)}
    with pytest.raises(swan.InputError, match=message):
        swan.adapt(gated, **options)


def test_negative_scores_are_an_order_alone() -> None:
    gated = swan.swanify(small_net(), X)
    scores = -torch.arange(1.0, gated.channels.num_units + 1)
    counts = swan.adapt(gated, scores=scores).structure.counts
    assert [own[1] for own in counts] == [4, 4, 3]


def test_compensated_widths_are_nearer_to_the_full_one() -> None:
    adapted = adapted_net()
    batches = [x for x, _ in loader(8, 32)]
    swan.calibrate_widths(adapted, batches)
    before = [error_at(adapted, level) for level in range(3)]
    assert "parameters more than given" not in adapted.explain()
    narrow = [p.clone() for p in adapted.dense_model().parameters()]
    done = swan.compensate_widths(adapted, batches)
    assert list(done) == [0.25, 0.5, 0.75]
    count = sum(p.numel() for p in adapted.parameters())
    more = count - sum(p.numel() for p in [*adapted.dense_model().parameters(), *efforts(adapted)])
    assert f"{more:,} parameters more than given" in adapted.explain()
    assert all(own.kept for own in done.values())
    assert [layer.name for layer in done[0.5].layers] == [
        "first.conv2.weight",
        "second.b.weight",
        "second.c.weight",
    ]
    after = [error_at(adapted, level) for level in range(3)]
    assert all(one < other for one, other in zip(after, before, strict=True)), (before, after)
    for one, other in zip(adapted.dense_model().parameters(), narrow, strict=True):
        assert torch.equal(one, other)  # the full width is as it was


def efforts(adapted: Any) -> list[Tensor]:
    return [p for block in adapted.blocks().values() for p in block.effort.parameters()]


def error_at(adapted: swan.AdaptiveModel, level: int) -> float:
    """Mean squared distance from the full width, on images that nobody has seen."""
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(9)).double()
    with torch.no_grad():
        with adapted.eval().holding(-1):
            wanted = adapted(x)
        with adapted.holding(level):
            return float((adapted(x) - wanted).square().mean())


def test_a_copy_of_readers_that_change_nothing_is_exact() -> None:
    """Where closed channels are linear copies of open ones, narrow widths give what the full one gives."""
    model = small_net()
    block: Any = model.get_submodule("first")
    with torch.no_grad():
        block.conv1.weight[4:] = block.conv1.weight[:4]
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(block.bn1, name)[4:] = getattr(block.bn1, name)[:4]
    options: dict[str, Any] = {"widths": (0.5, 1.0), "ignore": ["second.*"]}
    adapted = swan.adapt(model, X, allocation="uniform", scores=torch.ones(8), **options)
    before = error_at(adapted, 0)
    swan.compensate_widths(adapted, [x for x, _ in loader(8, 32)], damping=1e-9)
    assert before > 0.01
    assert error_at(adapted, 0) < 1e-10


def test_readers_of_a_width_train_apart() -> None:
    adapted = adapted_net().train()
    own_readers_(adapted, torch.Generator().manual_seed(1))
    block: Any = adapted.blocks()["first"]
    for level in (0, 3):
        adapted.zero_grad()
        with adapted.holding(level):
            adapted(loader(1)[0][0]).square().sum().backward()
        is_narrow = block.statistics[0].weight_0.grad is not None
        assert is_narrow == (level == 0)
        assert (block.full.conv2.weight.grad is None) == (level == 0)
        assert block.full.conv1.weight.grad is not None  # what writes the channels is shared


@pytest.mark.parametrize("is_compact", [False, True])
def test_they_are_saved_and_loaded(tmp_path, is_compact: bool) -> None:
    adapted = scored(widths=(0.3, 0.6, 1.0)).eval()
    randomise_statistics_(adapted, torch.Generator().manual_seed(0))
    own_readers_(adapted, torch.Generator().manual_seed(1))
    if is_compact:
        adapted = swan.compact(adapted)
    swan.save(adapted, tmp_path / "a.swan")
    found = swan.load(tmp_path / "a.swan", SmallNet().double())
    assert isinstance(found, swan.AdaptiveModel)
    assert found.structure.counts == adapted.structure.counts
    x = loader(1)[0][0]
    with torch.no_grad():
        for level in (0, 1, 2, torch.randint(3, (len(x), 2))):
            with found.holding(level), adapted.holding(level):
                assert torch.equal(found(x), adapted(x))


def test_a_width_with_its_readers_is_a_model_of_its_own(tmp_path) -> None:
    adapted = adapted_net()
    own_readers_(adapted, torch.Generator().manual_seed(1))
    small = adapted.at(0.5)
    swan.save(small, tmp_path / "small.swan")
    found = swan.load(tmp_path / "small.swan", SmallNet().double())
    x = loader(1)[0][0]
    with torch.no_grad():
        assert torch.equal(found.eval()(x), small.eval()(x))


@pytest.mark.parametrize("bias", [False, True])
def test_readers_of_a_width_that_closes_nothing_keep_their_bias(bias: bool) -> None:
    """By scores one block may be whole at a width: its readers by themselves have a bias all the same."""
    model = nn.Sequential(
        OrderedDict(
            first=Feed(bias=bias),
            second=Feed(bias=bias),
        )
    ).double()
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).double()
    gated = swan.swanify(model, x)
    scores = torch.ones(gated.channels.num_units)
    scores[:8] = 1e9
    adapted = swan.adapt(gated, scores=scores, widths=(0.6, 1.0)).eval()
    assert open_counts(adapted, 0)[0] == 8
    own_readers_(adapted, torch.Generator().manual_seed(1))
    with torch.no_grad(), adapted.holding(0):
        torch.testing.assert_close(adapted.at(0.6)(x), adapted(x), rtol=1e-12, atol=1e-12)


def test_a_static_width_is_compensated_as_any_cut() -> None:
    """Its readers have biases that the dense model has not."""
    adapted = adapted_net()
    batches = [x for x, _ in loader(8, 32)]
    swan.calibrate_widths(adapted, batches)
    small = adapted.at(0.5)
    done = swan.compensate(small, adapted.dense_model(), batches)
    assert done.kept
    assert done.after < done.before


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), swan.ModelError, "expected an adaptive model to compensate"),
        (lambda: adapted_net(structure="free"), swan.ModelError, "have no widths to compensate"),
        (lambda: swan.compact(adapted_net()), swan.ModelError, "cannot compensate the widths of"),
    ],
)
def test_what_has_no_widths_is_refused(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        swan.compensate_widths(make(), [X])


def test_without_batches_nothing_changes() -> None:
    adapted = adapted_net()
    with pytest.raises(swan.InputError, match="no batch"):
        swan.compensate_widths(adapted, [])
    assert not any(own.has_own for own in adapted.blocks()["first"].statistics)


def test_runs_are_neighbours_and_groups_are_all_of_a_kind() -> None:
    assert in_runs([1, 1, 0, 1]) == [(1, [0, 1]), (0, [2]), (1, [3])]
    assert in_groups([1, 1, 0, 1]) == [(1, [0, 1, 3]), (0, [2])]
    assert in_runs([]) == in_groups([]) == []


@pytest.mark.parametrize(("size", "pieces"), [(4, [3, 2]), (48, [2, 1, 1, 1])])
def test_samples_that_are_dear_to_copy_are_taken_as_they_lie(size: int, pieces: list[int]) -> None:
    adapted = adapted_net().eval()
    levels = torch.tensor([2, 2, 0, 2, 0])
    x = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(2)).double()
    seen: list[int] = []
    first: Any = adapted.blocks()["first"]
    at = first.at

    def watched(key: int, args: Any, kwargs: Any) -> Any:
        seen.append(len(args[0]))
        return at(key, args, kwargs)

    first.at = watched
    with torch.no_grad(), adapted.holding(levels):
        found = adapted(x)
        assert seen == pieces
        adapted.execution = "masked"
        torch.testing.assert_close(found, adapted(x), rtol=1e-12, atol=1e-12)


def test_gradients_reach_samples_that_are_taken_as_they_lie() -> None:
    adapted = adapted_net().eval()
    levels = torch.tensor([2, 2, 0, 2, 0])
    found = []
    for way in ("group", "masked"):
        adapted.execution = way
        adapted.zero_grad()
        x = torch.randn(5, 3, 48, 48, generator=torch.Generator().manual_seed(2)).double()
        with adapted.holding(levels):
            adapted(x.requires_grad_()).square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("counts", [3, [3], [["a", 4, 8]] * 3, [[1, 2]] * 3, [[4, 3, 8]] * 3, []])
def test_a_file_with_other_counts_is_refused(tmp_path, monkeypatch, counts) -> None:
    adapted = adapted_net(widths=(0.3, 0.6, 1.0))
    header, tensors = adaptive_part(adapted)
    monkeypatch.setattr(
        "swan_surgery.artifacts.saving.adaptive_part",
        lambda _: (header | {"counts": counts}, tensors),
    )
    swan.save(adapted, tmp_path / "a.swan")
    with pytest.raises(swan.ArtifactError, match="units"):
        swan.load(tmp_path / "a.swan", SmallNet().double())


def test_a_file_of_a_version_without_counts_has_the_same_share_everywhere(
    tmp_path, monkeypatch
) -> None:
    adapted = adapted_net(widths=(0.3, 0.6, 1.0))
    header, tensors = adaptive_part(adapted)
    del header["counts"]
    monkeypatch.setattr("swan_surgery.artifacts.saving.adaptive_part", lambda _: (header, tensors))
    swan.save(adapted, tmp_path / "a.swan")
    found = swan.load(tmp_path / "a.swan", SmallNet().double())
    assert isinstance(found, swan.AdaptiveModel)
    assert found.structure.counts == adapted.structure.counts


def test_in_inference_mode_readers_can_still_be_trained() -> None:
    adapted = adapted_net()
    with torch.inference_mode():
        swan.compensate_widths(adapted, [x for x, _ in loader(8, 32)])
    statistics: Any = adapted.blocks()["first"].statistics[0]
    assert statistics.weight_0.requires_grad
    assert not statistics.weight_0.is_inference()


def test_a_state_dict_brings_its_readers_along() -> None:
    adapted = adapted_net()
    own_readers_(adapted, torch.Generator().manual_seed(1))
    fresh = swan.adapt(small_net(), X)
    fresh.load_state_dict(adapted.state_dict())
    x = loader(1)[0][0]
    with torch.no_grad(), fresh.eval().holding(0), adapted.eval().holding(0):
        assert torch.equal(fresh(x), adapted(x))
    plain = swan.adapt(small_net(), X).state_dict()
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh.load_state_dict(plain)
