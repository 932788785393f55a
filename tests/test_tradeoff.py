"""Quality over budget from one scoring."""

import json
import xml.etree.ElementTree as ET

import pytest
import torch
from torch import Tensor, nn

import swan_surgery as swan


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)]
    return nn.Sequential(*layers)


def _data(count: int = 4) -> list[Tensor]:
    return list(torch.randn(count, 64, 8))


def test_each_point_is_the_cut_by_the_same_scores() -> None:
    net, data = _net().train(), _data()
    gated = swan.swanify(net, data[0][:1])
    scores = swan.importance(gated, "magnitude")
    state = {name: tensor.clone() for name, tensor in gated.state_dict().items()}
    asked: list[nn.Module] = []

    def evaluate(model: nn.Module) -> float:
        asked.append(model)
        assert not model.training
        return float(model(data[0]).detach().square().mean())

    curve = swan.tradeoff_curve(gated, data, evaluate=evaluate, scores=scores, macs=(0.25, 0.5))
    assert all(torch.equal(gated.state_dict()[name], own) for name, own in state.items())
    assert gated.training
    assert [own.budget for own in curve.points] == [0.5, 0.25]
    for point in curve.points:
        own = {"macs": point.budget, "round_to": "auto", "compensate": data}
        small = swan.prune_by_score(gated, scores, **own).eval()
        assert point.macs == swan.count_macs(small, data[0][:1])
        assert point.params == swan.count_params(small)
        assert point.quality == pytest.approx(
            float(small(data[0]).detach().square().mean()), rel=1e-5
        )
    assert curve.dense.macs == swan.count_macs(net, data[0][:1])
    assert len(asked) == 3


def test_without_labels_it_tells_how_much_of_the_outputs_is_explained() -> None:
    gated = swan.swanify(_net(), torch.zeros(1, 8))
    data = _data(8)
    curve, bare = (
        swan.tradeoff_curve(gated, data, compensate=own, macs=(0.75, 0.3)) for own in (True, False)
    )
    assert curve.dense.quality == 1
    assert 1 > curve.points[0].quality > curve.points[1].quality
    assert curve.points[1].quality > bare.points[1].quality
    by_params = swan.tradeoff_curve(gated, data, params=(0.5,))
    assert by_params.points[0].params <= 0.5 * by_params.dense.params
    assert "parameters" in str(by_params)


def test_a_table_a_picture_and_json_and_what_cannot_be_reached() -> None:
    gated = swan.swanify(_net(), torch.zeros(1, 8))
    curve = swan.tradeoff_curve(
        gated, _data(), evaluate=lambda _: 91.5, quality="accuracy in %", macs=(0.5, 0.001)
    )
    assert [budget for budget, _ in curve.refused] == [0.001]
    text = str(curve)
    assert "accuracy in %" in text
    assert "0.1 %: macs=0.001 cannot be reached" in text
    assert [row.split()[:2] for row in text.splitlines()[4:6]] == [["given", "model"], ["50", "%"]]
    ET.fromstring(f"<div>{curve._repr_html_()}</div>")  # noqa: S314 - our own
    assert curve.to_svg().count("<circle") == 2
    assert json.loads(curve.to_json())["points"][0]["quality"] == 91.5
    with pytest.raises(swan.BudgetError, match="reachable"):
        swan.tradeoff_curve(gated, _data(), macs=(0.001,))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"macs": (0.5,), "params": (0.5,)}, "give macs or params"),
        ({"macs": 0.5}, "several budgets"),
        ({"macs": ()}, "several budgets"),
        ({"macs": (2.0,)}, "share of the base model"),
        ({"scores": torch.ones(3)}, "one per unit"),
        ({"batches": []}, "no batch"),
    ],
    ids=["both", "number", "none", "share", "scores", "batches"],
)
def test_what_makes_no_curve(given: dict[str, object], message: str) -> None:
    gated = swan.swanify(_net(), torch.zeros(1, 8))
    options = {"batches": _data(1)} | given
    with pytest.raises(swan.InputError, match=message):
        swan.tradeoff_curve(gated, options.pop("batches"), **options)
