"""Gates of single units that look at the input: the laws over random networks, and what each part does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.adaptive.unit_gates import UnitGates
from tests.adaptive_laws import check_free_laws, gate_, randomise_statistics_
from tests.closing import image, prepared
from tests.conftest import PROFILE
from tests.random_layers import BLOCKS
from tests.strategies import Case, PartSpec, build, option_specs, simple_network
from tests.test_adaptive import SmallNet, loader, small_net


def free_net() -> swan.AdaptiveModel:
    adapted = swan.adapt(small_net(), image(2, 3, 8, 8), structure="free")
    randomise_statistics_(adapted, torch.Generator().manual_seed(0))
    return adapted.eval()


# An einsum over heads of one channel is no product as it runs; what that costs is not asked here.
@pytest.mark.filterwarnings("ignore:module .* MACs as it runs:UserWarning")
@pytest.mark.law
@pytest.mark.slow
@settings(max_examples=220 if PROFILE == "thorough" else 8)
@given(
    st.sampled_from(sorted(BLOCKS)).flatmap(
        lambda name: st.sampled_from(option_specs(BLOCKS, name))
    ),
    st.integers(0, 2**16),
)
def test_laws_over_random_networks(part: PartSpec, seed: int) -> None:
    case: Case = build(simple_network(part, seed=seed))
    check_free_laws(case.model, case.inputs, seed)


class NormedAttention(nn.Module):
    """Two heads on a map, whose queries are normalised: torch's gradients of one sample alone are wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(3, 4, 1) for _ in range(3))
        self.norm, self.out = nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.norm(self.q(x)), self.k(x), self.v(x)
        q, k, v = (t.reshape(len(x), -1, 2, t.shape[2] * t.shape[3]).transpose(2, 3) for t in parts)
        out = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)
        return x + self.out(out.reshape(len(x), -1, *x.shape[2:]))


def test_a_sample_alone_has_the_gradients_that_it_has_among_others() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), NormedAttention(), nn.Conv2d(3, 2, 1))
    assert check_free_laws(model.double().eval(), image(2, 3, 6, 6), 0) is not None


def test_laws_of_a_small_network() -> None:
    adapted = check_free_laws(small_net(), image(2, 3, 8, 8), 3)
    assert adapted is not None
    assert [len(group.units) for group in adapted.structure.groups] == [8, 8, 6]


def test_laws_of_a_model_that_is_one_block() -> None:
    model = nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 4))
    assert check_free_laws(prepared(model), image(2, 5), 0) is not None


def test_laws_with_flatten_stride_and_squeeze_excite() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grow, self.deep = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 3, 2, 2, 2, groups=6)
            self.squeeze, self.excite = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1)
            self.last = nn.Linear(6 * 9, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.deep(F.relu(self.grow(x)))
            h = h * self.excite(F.relu(self.squeeze(h.mean((2, 3), keepdim=True)))).sigmoid()
            return self.last(h.flatten(1))

    assert check_free_laws(prepared(nn.Sequential(Odd(), nn.ReLU())), image(2, 4, 6, 6), 1)


def test_gates_are_those_of_the_paper() -> None:
    gates = UnitGates(2, [2, 1], like=torch.zeros((), dtype=torch.float64))
    with torch.no_grad():
        gates.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
        gates.bias.copy_(torch.tensor([0.0, -1.0, -9.0]))
    features = torch.tensor([[0.5, 0.0], [-2.0, 3.0], [-2.0, 0.5]], dtype=torch.float64)
    logits = gates(features)
    masks = gates.with_gradients(gates.hard(logits), logits)
    # The last sample closes all of the first group but the more probable unit; the only one of the second stays.
    assert torch.equal(
        masks.detach().bool(), torch.tensor([[1, 0, 1], [0, 1, 1], [0, 1, 1]]).bool()
    )
    (slope,) = torch.autograd.grad(masks.sum(), logits)
    p = torch.sigmoid(logits)
    assert torch.allclose(slope, p * (1 - p))  # Eq. 6


def test_calibrated_means_keep_the_mean_of_what_a_block_adds() -> None:
    model = prepared(nn.Sequential(nn.Linear(5, 12), nn.GELU(), nn.Linear(12, 4)))
    adapted = swan.adapt(model, image(2, 5), structure="free").eval()
    x = image(200, 5)
    swan.calibrate_widths(adapted, [x[:120], x[120:]])
    mask = torch.arange(12) % 3 > 0
    with torch.no_grad(), adapted.holding(mask):
        assert torch.allclose(adapted(x).mean(0), model(x).mean(0), atol=1e-12)


def easy_and_hard() -> tuple[nn.Module, Tensor, Tensor]:
    """Eight units; the last four give their mean for two samples of three, and a feature says for which."""
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), nn.Identity())
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model[0][0].weight[:4, 0] = 1.0
        model[0][0].weight[4:, 1] = 1.0
        model[0][2].weight[0, :4] = 0.1
        model[0][2].weight[1, 4:] = 0.1
    hard = torch.arange(300) % 3 == 0
    x = torch.rand(300, 3, generator=torch.Generator().manual_seed(0)).double()
    x[:, 1] = 3 + 2 * hard * (x[:, 1] - 0.5).sign()
    x[:, 2] = hard.double()
    x = x[:, None].expand(-1, 16, -1).contiguous()  # tokens, beside which looking is cheap
    return model, x, hard


def test_fitted_gates_meet_the_budget_and_open_what_an_input_needs() -> None:
    model, x, hard = easy_and_hard()
    adapted = swan.adapt(model, x[:2], structure="free").eval()
    swan.calibrate_widths(adapted, [x])
    stats = swan.fit_widths(adapted, [x], macs=0.8)
    assert 0.6 * adapted.costs.dense <= stats.mean_macs <= 0.8 * adapted.costs.dense
    with torch.no_grad():
        open_share = adapted.taken(x).levels[:, 4:].double().mean(1)
    assert open_share[hard].mean() > open_share[~hard].mean() + 0.3
    assert stats.entropies["0"] > 0.1


@pytest.mark.filterwarnings("ignore:widths hardly vary")
def test_fitted_gates_of_a_network() -> None:
    adapted = swan.adapt(small_net(), image(2, 3, 8, 8), structure="free").eval()
    batches = loader()
    swan.calibrate_widths(adapted, batches)
    share = (0.3 * adapted.costs.least + 0.7 * adapted.costs.most) / adapted.costs.dense
    stats = swan.fit_widths(adapted, batches, macs=share, statistics=batches)
    assert adapted.costs.least <= stats.mean_macs <= share * adapted.costs.dense
    assert len(stats.shares["first"]) == 8
    assert stats.information is not None
    assert "units open" in str(stats)
    static = adapted.at(stats.usual)
    assert type(static) is SmallNet


def test_the_budget_is_a_mean_over_inputs_and_has_gradients() -> None:
    adapted = free_net()
    gate_(adapted, torch.Generator().manual_seed(1))
    taken = adapted.taken(image(6, 3, 8, 8))
    mean = float(taken.macs.double().mean()) / adapted.costs.dense

    def of(**terms) -> float:
        return float(swan.gate_penalty(adapted, taken, **terms).detach())

    found = of(macs=0.2, macs_weight=1.0)
    assert found == pytest.approx(max(0.0, mean - 0.2) ** 2)
    assert of(macs=1.0) == pytest.approx(max(0.0, mean - 1) ** 2 * 10)
    active = float(torch.cat([own.sigmoid() for own in taken.efforts.values()], 1).mean().detach())
    assert of(l0=2.0) == pytest.approx(2 * active)
    assert of(target_active=0.1) == pytest.approx((active - 0.1) ** 2)  # of the mean: Eq. 11, 12
    late = swan.CosineRamp(delay=2, length=4)
    assert of(macs=0.2, macs_weight=1.0, ramp=late, epoch=4) == pytest.approx(found / 2)


def test_gates_learn_a_budget_by_gradient() -> None:
    adapted = swan.adapt(small_net(), image(2, 3, 8, 8), structure="free")
    ((x, y),) = loader(1)
    swan.calibrate_widths(adapted, [(x, y)])
    gates = [p for block in adapted.blocks().values() for p in block.effort.parameters()]
    optimizer = torch.optim.Adam(gates, 0.1)
    share = (adapted.costs.least + adapted.costs.most) / 2 / adapted.costs.dense
    before = adapted.taken(x).macs.double().mean()
    for _ in range(60):
        taken = adapted.train().taken(x)
        penalty = swan.gate_penalty(adapted, taken, macs=share, macs_weight=100.0)
        optimizer.zero_grad()
        (F.cross_entropy(taken.output, y) + penalty).backward()
        optimizer.step()
    after = adapted.taken(x).macs.double().mean()
    assert float(after) < 0.5 * (float(before) + share * adapted.costs.dense)


@pytest.mark.parametrize("execution", ["masked", "gather"])
def test_free_units_are_saved_and_loaded(tmp_path, execution: str) -> None:
    adapted = free_net()
    gate_(adapted, torch.Generator().manual_seed(1))
    x = image(9, 3, 8, 8)
    for model in (adapted, swan.compact(adapted, execution=execution)):
        swan.save(model, tmp_path / "model.swan")
        again = swan.load(tmp_path / "model.swan", SmallNet().double())
        assert torch.equal(again.eval()(x), model(x))
        assert (again.is_compact, again.execution) == (model.is_compact, model.execution)


def test_a_mask_is_saved_and_loaded_as_any_cut_model(tmp_path) -> None:
    adapted = free_net()
    static = adapted.at({"first": torch.arange(8) % 2 == 0, "second": torch.arange(14) % 3 == 0})
    swan.save(static, tmp_path / "small.swan")
    again = swan.load(tmp_path / "small.swan", SmallNet().double())
    x = image(3, 3, 8, 8)
    assert torch.equal(again(x), static(x))


def test_copies_in_training_compute_the_same() -> None:
    """What a block keeps for a second run in backward is no graph, which nothing could copy."""
    adapted = free_net()
    gate_(adapted, torch.Generator().manual_seed(1))
    x = image(9, 3, 8, 8)
    wanted = adapted(x)
    assert torch.equal(copy.deepcopy(adapted)(x), wanted)


def test_gradients_under_activation_checkpointing_are_the_same() -> None:
    class Checkpointed(SmallNet):
        again = True

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in (self.first, self.second):
                x = (
                    torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
                    if self.again
                    else block(x)
                )
            return self.head(x.mean((2, 3)))

    adapted = swan.adapt(prepared(Checkpointed()), image(2, 3, 8, 8), structure="free").eval()
    randomise_statistics_(adapted, torch.Generator().manual_seed(0))
    gate_(adapted, torch.Generator().manual_seed(1))
    found = []
    for again in (True, False):
        adapted.model.again = again
        adapted.zero_grad()
        adapted(image(4, 3, 8, 8)).square().sum().backward()
        found.append([p.grad.clone() for p in adapted.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1])
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(*found, strict=True))


def test_an_empty_batch_comes_out_empty() -> None:
    adapted = free_net()
    gate_(adapted, torch.Generator().manual_seed(0))
    for model in (adapted, swan.compact(adapted)):
        assert model(image(2, 3, 8, 8)[:0]).shape == (0, 4)


@pytest.mark.thorough
def test_the_masked_model_exports_and_says_what_torch_says(tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    adapted = free_net().float()
    gate_(adapted, torch.Generator().manual_seed(1))
    x = torch.randn(6, 3, 8, 8)
    small = swan.compact(adapted, execution="masked")
    assert swan.export(small, tmp_path / "masked.onnx", x).relative_error < 1e-4


def adapt_free(**options) -> swan.AdaptiveModel:
    return swan.adapt(small_net(), image(2, 3, 8, 8), structure="free", **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: adapt_free(widths=(0.5, 1.0)), swan.InputError, "no widths"),
        (lambda: adapt_free(per="network"), swan.InputError, "looks for itself"),
        (lambda: swan.compact(free_net(), execution="group"), swan.InputError, '"gather"'),
        (lambda: free_net().holding(0).__enter__(), swan.InputError, "take masks"),
        (lambda: free_net().holding(torch.ones(3).bool()).__enter__(), swan.InputError, "22 units"),
        (
            lambda: free_net().holding({"first": torch.zeros(8).bool()}).__enter__(),
            swan.InputError,
            "closes all units",
        ),
        (
            lambda: free_net().holding({"first": torch.ones(8).long()}).__enter__(),
            swan.InputError,
            "are bool",
        ),
        (lambda: free_net().at({"first": torch.ones(8).bool()}), swan.InputError, "every block"),
        (lambda: free_net().at(torch.ones(2, 22).bool()), swan.InputError, "has one mask"),
        (
            lambda: swan.fit_widths(free_net(), loader(1), macs=0.9, distance=F.mse_loss),
            swan.InputError,
            "distance",
        ),
        (
            lambda: swan.sandwich_loss(free_net(), lambda m: m, step=0),
            swan.ModelError,
            "gate_penalty",
        ),
        (
            lambda: swan.gate_penalty(free_net(), free_net().taken(image(2, 3, 8, 8)), macs=2),
            swan.InputError,
            "share",
        ),
        (
            lambda: swan.gate_penalty(small_net(), None, macs=0.5),
            swan.ModelError,
            "swan.adapt",
        ),
    ],
    ids=map(str, range(13)),
)
def test_refusals_say_what_to_do(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_masks_of_another_batch_are_refused() -> None:
    adapted = free_net()
    with (
        adapted.holding(torch.ones(3, 22).bool()),
        pytest.raises(swan.ModelError, match="3 levels for the 2"),
    ):
        adapted(image(2, 3, 8, 8))


@pytest.mark.parametrize("structure", ["nested", "free"])
def test_instance_norms_without_weights_follow_the_width(structure) -> None:
    """Torch warns where their number is not the width, and here warnings are errors."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grow, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.InstanceNorm2d(8)
            self.last = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(self.grow(x)).relu())

    model = prepared(nn.Sequential(Block(), nn.ReLU()))
    adapted = swan.adapt(model, image(2, 3, 6, 6), structure=structure)
    narrow = torch.arange(8) < 4 if structure == "free" else 1
    static = adapted.at(narrow if structure == "free" else 0.5)
    adapted.execution = "gather" if structure == "free" else "group"
    x = image(3, 3, 6, 6)
    with adapted.holding(narrow):
        assert torch.allclose(adapted(x), static(x), atol=1e-12)
    assert static[0].norm.num_features == 4


def test_gathers_say_what_exports(tmp_path) -> None:
    small = swan.compact(swan.adapt(small_net(), image(2, 3, 8, 8), structure="free"))
    with pytest.raises(swan.ModelError, match='execution="masked"'):
        swan.export(small, tmp_path / "small.onnx", image(2, 3, 8, 8))
    assert not list(tmp_path.iterdir())
