"""What is built on gates, on a CUDA device: compensation, `compress`, switches, adaptive models, activations.

The device is a parameter whose CUDA value is marked `gpu`, as in `test_gpu.py`.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swan_surgery as swan
from tests.closing import learnt_
from tests.test_adaptive_blocks import small as stream, tokens as seeded
from tests.test_gpu import assert_on, close, close_some, images, net


pytestmark = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
EXECUTIONS = {"nested": "group", "free": "gather"}


class Attentive(nn.Module):
    """One block of a vision transformer, with a feed-forward part that can work in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.feed = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        own = self.norm(x)
        x = x + self.attention(own, own, own, need_weights=False)[0]
        return self.head((x + self.feed(x)).mean(1))


def tokens(device, count=4):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 5, 6, generator=generator, dtype=torch.float64).to(device)


def transformer(device):
    torch.manual_seed(0)
    return Attentive().to(device, torch.float64).eval()


def labels(device, count=8):
    return torch.arange(count, device=device) % 5


def on_cpu(model):
    return copy.deepcopy(model).cpu()


@pytest.mark.parametrize("make", [net, transformer])
def test_compensation_is_that_of_the_cpu(device, make):
    model, draw = make(device).eval(), images if make is net else tokens
    gated = swan.swanify(model, draw(device, 2))
    close_some(gated)
    small = swan.prune(gated)
    there = on_cpu(small)
    x = draw(device, 64)
    done = swan.compensate(small, model, list(x.split(16)))
    assert_on(small, device)
    assert any(layer.after < layer.before for layer in done.layers)
    swan.compensate(there, on_cpu(model), list(x.cpu().split(16)))
    for one, two in zip(small.parameters(), there.parameters(), strict=True):
        close(one.cpu(), two, 1e-6)


@pytest.mark.parametrize("score", ["fisher", "random"])
def test_a_cut_by_score_is_compensated_with_batches_from_the_cpu(device, score):
    model = net(device).eval()
    gated = swan.swanify(model, images(device, 2))
    batches = [(images("cpu", 8), labels("cpu"))] * 3
    scores = swan.importance(gated, score, batches=batches, loss=loss_of)
    small = swan.prune_by_score(gated, scores, macs=0.5, compensate=batches)
    assert_on(small, device)
    assert swan.count_macs(small, images(device, 1)) <= 0.5 * swan.count_macs(
        model, images(device, 1)
    )


def loss_of(model, batch):
    x, y = (own.to(next(model.parameters()).device) for own in batch)
    return F.cross_entropy(model(x), y)


def test_compress_goes_from_model_to_model_on_its_device(device):
    model = net(device, torch.float32).eval()
    data = [(images("cpu", 8, torch.float32), labels("cpu"))] * 4
    done = swan.compress(model, data, macs=0.5, finetune=1, round_to=1)
    assert_on(done.model, device)
    x = images(device, 2, torch.float32)
    assert swan.count_macs(done.model, x[:1]) <= 0.5 * swan.count_macs(model, x[:1])
    assert bool(done.model(x).isfinite().all())


@pytest.mark.parametrize("mask", [False, True])
def test_a_switch_splits_a_batch_on_the_device(device, mask):
    model = net(device).eval()
    x = images(device, 8)
    routed = swan.add_switch(
        model, "norm", example_inputs=x, light=0.5, mask=mask, decide="predicted"
    )
    assert_on(routed, device)
    if mask:
        with torch.no_grad():
            routed.gated.gates.logits[::3] = -3.0
    with torch.no_grad(), routed.acting() as parts:
        scores = routed.score(parts, 0, parts.trunk(x))[0].sort().values
    routed.thresholds = [float(scores[3:5].mean())]
    together = routed(x)
    close(together, torch.cat([routed(one) for one in x.split(1)]))
    if mask:
        close(together, swan.cut_mask(routed)(x))


def test_a_switch_learns_is_calibrated_and_comes_back(device, tmp_path):
    torch.manual_seed(0)
    model = net(device, torch.float32).eval()
    data = [(images(where, 64, torch.float32), labels(where, 64)) for where in (device, "cpu")]
    x, y = data[0]
    routed = swan.add_switch(model, "norm", example_inputs=x[:4], light=0.5)
    routed.train()
    optimizer = torch.optim.Adam([p for p in routed.parameters() if p.requires_grad], 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        routed.loss((x, y)).backward()
        optimizer.step()
    certificate = swan.calibrate_switch(routed.eval(), data, share=0.5)
    assert 0.3 < certificate.shares[0] < 0.7
    stats = swan.route_stats(routed, data)
    assert "MACs" in stats.to_markdown()
    swan.save(routed, tmp_path / "routed.swan")
    back = swan.load(tmp_path / "routed.swan", net(device, torch.float32).eval())
    assert_on(back, device)
    assert torch.equal(back(x), routed(x))


# Images of noise are alike, and of that adaptive models warn.
@pytest.mark.filterwarnings("ignore:widths hardly vary")
@pytest.mark.parametrize("structure", EXECUTIONS)
def test_an_adaptive_model_is_fitted_and_compact(device, structure, tmp_path):
    model, x = net(device).eval(), images(device, 32)
    adapted = swan.adapt(model, x[:2], structure=structure).eval()
    assert_on(adapted, device)
    close(adapted(x), model(x))
    data = [x, images("cpu", 16)]
    swan.calibrate_widths(adapted, data)
    swan.fit_widths(adapted, data, macs=0.8)
    fast = swan.compact(adapted)
    assert fast.execution == EXECUTIONS[structure]
    close(fast(x), adapted(x))
    close(fast(x[:1]), adapted(x[:1]))
    assert swan.width_stats(fast, data).mean_macs > 0
    swan.save(adapted, tmp_path / "adapted.swan")
    back = swan.load(tmp_path / "adapted.swan", net(device).eval())
    assert_on(back, device)
    assert torch.equal(back.eval()(x), adapted(x))


def test_widths_are_allocated_by_scores_and_compensated(device, tmp_path):
    model, x = net(device).eval(), images(device, 32)
    gated = swan.swanify(model, x[:2])
    scores = swan.importance(gated, "magnitude")
    adapted = swan.adapt(gated, scores=scores).eval()
    data = [x, images("cpu", 32)]
    swan.calibrate_widths(adapted, data)
    assert any(own.kept for own in swan.compensate_widths(adapted, data).values())
    assert_on(adapted, device)
    fast = swan.compact(adapted)
    adapted.execution = "masked"
    for levels in (torch.arange(32) % 4, torch.arange(32, device=device) % 4):
        with fast.holding(levels), adapted.holding(levels):
            close(fast(x), adapted(x))
    swan.save(adapted, tmp_path / "adapted.swan")
    back = swan.load(tmp_path / "adapted.swan", net(device).eval())
    assert_on(back, device)
    assert torch.equal(back.eval()(x), adapted(x))


def test_tokens_choose_blocks_of_neurons(device, tmp_path):
    model, x = stream().to(device), seeded(8, 5, 3).to(device)
    adapted = swan.adapt(model, x[:2], structure="blocks", block_size=4).eval()
    assert_on(adapted, device)
    close(adapted(x), model(x))
    swan.calibrate_widths(adapted, [x])
    swan.fit_widths(adapted, [x], macs=0.8)
    fast = swan.compact(adapted)
    close(fast(x), adapted(x))
    close(fast(x[:1, :1]), adapted(x[:1, :1]))
    swan.save(adapted, tmp_path / "adapted.swan")
    back = swan.load(tmp_path / "adapted.swan", stream().to(device))
    assert_on(back, device)
    assert torch.equal(back.eval()(x), adapted(x))


@pytest.mark.parametrize("structure", ["nested", "free"])
def test_adaptive_models_learn_and_become_static(device, structure):
    model, x = net(device).eval(), images(device, 8)
    adapted = swan.adapt(model, x[:2], structure=structure).train()
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-3)
    batch = x, labels(device)
    for step in range(2):
        if structure == "nested":
            loss = swan.sandwich_loss(adapted, lambda m: loss_of(m, batch), step=step)
        else:
            taken = adapted.taken(x)
            loss = F.cross_entropy(taken.output, batch[1])
            loss = loss + swan.gate_penalty(adapted, taken, macs=0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in adapted.parameters())
    if structure == "nested":
        static = adapted.eval().at(0.5)
        assert_on(static, device)
        with adapted.holding(1):
            close(static(x), adapted(x))


@pytest.mark.parametrize("kind", ["fles", "acon-c", "meta-acon", "prelu", "bounded"])
def test_activations_start_as_they_were_and_stay_prunable(device, kind):
    model, x = net(device).eval(), images(device, 8)
    swapped = swan.swap_activations(model, kind, x[:2])
    assert_on(swapped, device)
    if kind == "bounded":
        swan.fit_bounds(swapped, [x, images("cpu")])
    else:
        close(swapped(x), model(x), 1e-12)
    gated = swan.swanify(swapped.eval(), x[:1])
    close_some(gated)
    small = swan.prune(gated)
    assert_on(small, device)
    close(gated(x), small(x))
    small(x).square().sum().backward()


def test_example_inputs_from_the_cpu_serve_a_model_elsewhere(device, tmp_path):
    model, x = net(device, torch.float32).eval(), images("cpu", 2, torch.float32)
    there = x.to(device)
    assert swan.count_macs(model, x) == swan.count_macs(model, there)
    assert swan.measure_latency(model, x, seconds=0.01).latency.median_ms > 0
    swapped = swan.swap_activations(model, "fles", x)
    routed = swan.add_switch(model, "norm", example_inputs=x, light=0.5)
    adapted = swan.adapt(model, x)
    for own in (swapped, routed, adapted):
        assert_on(own, device)
        assert own.eval()(there).device.type == device
    small = swan.prune(learnt_(swan.swanify(model, x)), macs=0.5)
    assert swan.report(model, small, x).after.macs == swan.count_macs(small, there)
    assert swan.export(small, tmp_path / "small.pt2", example_inputs=x).path.exists()


def test_all_gates_of_a_vgg_fold_into_its_graph(device):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    layers += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    # Gradients of biases in front of batch-norms are zero but for rounding.
    gated = swan.swanify(model.to(device), images(device, 2, torch.float32))
    assert not gated.runs_in_place
