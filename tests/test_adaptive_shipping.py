"""Adaptive models in another runtime: samples and tokens choose there as they do in torch, groups in which nobody is included."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.exporting import OnnxSession
from swan_surgery.models import Inputs
from tests.adaptive_laws import aim_, gate_, randomise_statistics_
from tests.random_layers import randomise_
from tests.test_adaptive import SmallNet
from tests.test_adaptive_blocks import adapted_small, tokens


pytest.importorskip("onnxruntime")


def aimed(per: Any, x: Tensor, *, compensated: bool) -> swan.AdaptiveModel:
    """A small network whose blocks really choose on `x`."""
    model = SmallNet()
    randomise_(model, torch.Generator().manual_seed(0))
    adapted = swan.adapt(model.eval(), x[:2], per=per, widths=(0.25, 0.6, 1.0))
    randomise_statistics_(adapted, torch.Generator().manual_seed(0))
    if compensated:
        swan.compensate_widths(adapted, [torch.randn(32, *x.shape[1:])])
    aim_(adapted, torch.Generator().manual_seed(1))
    for name, efforts in adapted.taken(x).efforts.items():
        looks: Any = adapted.blocks()[name].effort
        looks.thresholds.copy_(efforts.detach().quantile(torch.tensor([0.3, 0.6])))
    return adapted


def ran(path: Path, x: Tensor) -> Tensor:
    """What the file says."""
    session = OnnxSession(path)
    return torch.from_numpy(session.run(session.feed(Inputs((x,), {})))[0])


@pytest.mark.parametrize(("per", "compensated"), [("block", False), ("network", True)])
def test_groups_of_equal_width_run_in_onnx(per, compensated, tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 3, 8, 8)
    small = swan.compact(aimed(per, x, compensated=compensated))
    levels = small.taken(x).levels
    assert all(len(own.unique()) == 3 for own in levels.T)  # every group of every block is there
    exported = swan.export(small, tmp_path / "groups.onnx", x)
    assert exported.has_dynamic_batch
    # Mixed, one by one (all other groups are empty), and all alike.
    for batch in (x, *x.split(1), x[levels[:, 0] == 0]):
        torch.testing.assert_close(
            ran(exported.path, batch), small(batch).detach(), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("kind", ["module", "in passing"])
def test_blocks_of_neurons_run_their_tokens_in_onnx(kind, tmp_path) -> None:
    adapted = adapted_small()
    if kind == "in passing":
        layer = nn.TransformerEncoderLayer(4, 2, 12, batch_first=True)
        model = nn.Sequential(nn.Linear(3, 4), layer).double().eval()
        adapted = swan.adapt(model, tokens(2, 4, 3), structure="blocks", block_size=4)
    gate_(adapted, torch.Generator().manual_seed(0))
    randomise_statistics_(adapted, torch.Generator().manual_seed(0))
    small = swan.compact(adapted.float(), verify=False)
    x = tokens(6, 5 if kind == "module" else 4, 3).float()
    shares = small.taken(x).levels
    assert 0 < float(shares.mean()) < 1
    exported = swan.export(small, tmp_path / "tokens.onnx", x)
    assert exported.has_dynamic_batch
    for batch in (x, *x.split(1)):
        torch.testing.assert_close(
            ran(exported.path, batch), small(batch).detach(), rtol=1e-4, atol=1e-4
        )


def test_what_cannot_hold_groups_says_what_does(tmp_path) -> None:
    x = torch.randn(4, 3)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    nested = swan.adapt(net, x)
    with pytest.raises(swan.ModelError, match=r"which \.pt2 cannot hold.*masked"):
        swan.export(swan.compact(nested), tmp_path / "x.pt2", x)
    assert not list(tmp_path.iterdir())
