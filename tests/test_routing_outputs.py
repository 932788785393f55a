"""Switches and what models return: several outputs, a single number, an end of its own; functions of the user's; broken data."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swan_surgery as swan


def mlp(out: int = 5) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, out)).eval()


def rows(count: int) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(1))


class TwoHeads(nn.Module):
    """Class scores and boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 64), nn.Linear(64, 64)
        self.cls, self.box = nn.Linear(64, 5), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = F.relu(self.b(F.relu(self.a(x))))
        return {"cls": self.cls(h), "box": self.box(h)}


def test_all_of_several_outputs_count() -> None:
    """The first one alone was compared and trained, and the model could not run."""
    torch.manual_seed(0)
    net, x = TwoHeads().eval(), rows(64)
    routed = swan.add_switch(net, "a", example_inputs=x[:2]).eval()
    assert all(torch.equal(own, net(x)[name]) for name, own in routed(x).items())
    routed.loss(x).backward()
    assert all(p.grad is not None for p in routed.parts.light.parameters())
    with torch.no_grad():
        routed.parts.light.box.bias += 100
        light = routed.parts.light(routed.parts.trunk(x))
        assert float(routed.discrepancies(light, net(x)).mean()) > 1000
    with pytest.raises(swan.InputError, match="margin"):
        swan.add_switch(net, "a", example_inputs=x[:2], decide="margin")


class Squeezed(nn.Module):
    """One number per sample, [B]."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(1)


@pytest.mark.parametrize("discrepancy", [None, "l1"])
def test_one_number_per_sample(discrepancy) -> None:
    net, x = Squeezed().eval(), rows(64)
    routed = swan.add_switch(
        net, "net.1", example_inputs=x[:2], light=0.5, batches=[x], discrepancy=discrepancy
    ).eval()
    routed.loss(x).backward()
    assert swan.calibrate_switch(routed, [x], share=0.5).shares[0] == 0.5
    assert swan.route_stats(routed, [x]).shares[0] == 0.5


def test_outputs_without_a_distance_need_one() -> None:
    class Best(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).argmax(1)

    x = rows(8)
    routed = swan.add_switch(Best().eval(), "net.1", example_inputs=x[:2], light=0.5)
    with pytest.raises(swan.InputError, match="discrepancy="):
        routed.loss(x)


def test_where_inputs_end_the_output_is_the_callers() -> None:
    """It was a view of the model's own default."""
    x = rows(8)
    routed = swan.add_switch(
        mlp(), "1", example_inputs=x[:2], light=None, default=torch.zeros(5)
    ).eval()
    routed.thresholds = [float("inf")]
    first = routed(x)
    first[0, 0] = 7
    first.add_(1)
    assert not routed(x).any()
    assert first[:, 0].tolist() == [8, *[1] * 7]


@pytest.mark.parametrize("light", [[0.5, None], [None, 0.5]])
@pytest.mark.parametrize("target", [{"share": 0.5}, {"harm": 0.5}])
def test_switches_of_both_kinds_are_calibrated(light, target) -> None:
    x, y = rows(300), torch.randint(5, (300,), generator=torch.Generator().manual_seed(2))
    routed = swan.add_switch(
        mlp(), ["1", "3"], example_inputs=x[:2], light=light, default=torch.zeros(5),
        positive=lambda labels: labels == 1,
    ).eval()  # fmt: skip
    found = swan.calibrate_switch(routed, [(x, y)], **target)
    kinds = ["label" if own is None else "other" for own in light]
    assert ["label" if way == "label" else "other" for way in found.decide] == kinds
    if "share" in target:
        assert sum(found.shares[:2]) == pytest.approx(0.5, abs=0.02)
        return
    # Each switch has the harm of its own kind: positives that end, or what only the full branch has right.
    with torch.no_grad():
        full, lights, _ = routed.parts(x)
    for level, own in enumerate(light):
        score, _ = routed.score(
            routed.parts.chain[level], level, _crossing(routed.parts.chain, level, x)
        )
        leaves = score <= routed.thresholds[level]
        lost = y == 1 if own is None else (full.argmax(1) == y) & (lights[level].argmax(1) != y)
        assert found.harmed[level] == float((leaves & lost).sum())


def _crossing(chain: Any, level: int, x: Tensor) -> Tensor:
    for own in chain[: level + 1]:
        x = own.trunk(x)
    return x


def test_gated_compression_has_no_harm_without_positives() -> None:
    x = rows(300)
    routed = swan.add_switch(
        mlp(), "1", example_inputs=x[:2], light=None, default=torch.zeros(5)
    ).eval()
    batches = [(x, torch.zeros(300, dtype=torch.int64))]
    with pytest.raises(swan.InputError, match="positive="):
        swan.calibrate_switch(routed, batches, harm=0.3)
    assert swan.calibrate_switch(routed, batches, share=0.3).shares[0] == pytest.approx(0.3)


def apart(light: Tensor, full: Tensor) -> Tensor:
    return (light - full).abs().amax(1)


def test_functions_of_the_users_are_handed_to_load(tmp_path: Path) -> None:
    """`positive` was dropped without a word, and harm meant something else from then on."""
    net, x = mlp(), rows(64)
    routed = swan.add_switch(net, "1", example_inputs=x[:2], light=0.5, discrepancy=apart).eval()
    swan.save(routed, tmp_path / "r.swan")
    with pytest.raises(swan.ArtifactError, match="discrepancy="):
        swan.load(tmp_path / "r.swan", mlp())
    again = swan.load(tmp_path / "r.swan", mlp(), discrepancy=apart)
    assert again.discrepancy is apart
    assert torch.equal(again(x), routed(x))

    def positive(labels: Tensor) -> Tensor:
        return labels == 2

    named = swan.add_switch(net, "1", example_inputs=x[:2], light=0.5)
    swan.save(named, tmp_path / "n.swan")
    with pytest.raises(swan.InputError, match="'kl'"):
        swan.load(tmp_path / "n.swan", mlp(), discrepancy=apart)
    swan.save(net, tmp_path / "p.swan")
    with pytest.raises(swan.InputError, match="holds none"):
        swan.load(tmp_path / "p.swan", mlp(), positive=positive)
    ending = swan.add_switch(
        net, "1", example_inputs=x[:2], light=None, default=torch.zeros(5), positive=positive
    ).eval()
    swan.save(ending, tmp_path / "e.swan")
    with pytest.raises(swan.ArtifactError, match="positive="):
        swan.load(tmp_path / "e.swan", mlp())
    again = swan.load(tmp_path / "e.swan", mlp(), positive=positive)
    assert again.positive is positive


@pytest.mark.parametrize("target", [{"harm": 0.2}, {"share": 0.2}])
def test_labels_with_some_batches_alone_are_refused(target) -> None:
    x, y = rows(300), torch.zeros(300, dtype=torch.int64)
    routed = swan.add_switch(mlp(), "1", example_inputs=x[:2], light=0.5).eval()
    for act in (swan.route_stats, lambda r, own: swan.calibrate_switch(r, own, **target)):
        with pytest.raises(swan.InputError, match="some batches"):
            act(routed, [(x, y), x])


def test_broken_samples_and_autocast_around() -> None:
    x = rows(64)
    bad = x.clone()
    bad[0, 0] = torch.nan
    with pytest.raises(swan.InputError, match="NaN"):
        swan.add_switch(mlp(), "1", example_inputs=x[:2], batches=[bad])
    plain = swan.add_switch(mlp(), "1", example_inputs=x[:2], batches=[x]).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = swan.add_switch(mlp(), "1", example_inputs=x[:2], batches=[x]).eval()
    plain.thresholds = made.thresholds = [float("inf")]
    assert torch.equal(made(x), plain(x))
