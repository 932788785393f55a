"""The loss with one group narrowed at a time."""

import json

import pytest
import torch
from torch import Tensor, nn

import swan_surgery as swan


class Net(nn.Module):
    """The second layer decides the output; the first stream is read with small weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 8)
        self.three, self.head = nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).relu()
        x = x + self.two(x).relu()
        return self.head(self.three(x).relu())


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def test_as_if_the_units_were_cut_and_the_gates_as_before() -> None:
    net, data = Net().double().train(), [torch.randn(16, 4).double() for _ in range(2)]
    gated = swan.swanify(net, data[0])
    before = gated.gates.logits.detach().clone()
    scores = torch.rand(gated.gates.num_units, dtype=torch.float64)
    found = swan.sensitivity(gated, data, loss=_loss, shares=(1.0, 0.5), scores=scores)
    assert torch.equal(gated.gates.logits.detach(), before)
    assert gated.training
    whole = float(sum(_loss(net.eval(), x) for x in data).detach()) / 2
    assert found.whole == pytest.approx(whole, rel=1e-12)
    assert {own.layers: own.units for own in found.groups} == {("one", "two"): 8, ("three",): 6}
    for group in found.groups:
        assert group.losses[0] == pytest.approx(whole, rel=1e-12)
        units = torch.tensor(gated.channels.layer(group.layers[0]).out_units)
        worst = units[scores[units].argsort()[: group.units // 2]]
        with torch.no_grad():
            gated.gates.logits.fill_(3.0)
            gated.gates.logits[worst] = -3.0
        small = swan.prune(gated).eval()
        cut = float(sum(_loss(small, x) for x in data).detach()) / 2
        assert group.losses[1] == pytest.approx(cut, rel=1e-9)


def test_told_as_a_table_and_as_json_worst_first() -> None:
    gated = swan.swanify(Net(), torch.zeros(1, 4))
    found = swan.sensitivity(gated, [torch.randn(8, 4)], loss=_loss)
    assert "75%" in str(found)
    assert "one +1" in str(found)
    last = [own.losses[-1] for own in found.groups]
    assert last == sorted(last, reverse=True)
    assert json.loads(found.to_json())["shares"] == [0.75, 0.5, 0.25]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batches": []}, "no batch"),
        ({"shares": (0.0,)}, "numbers in .0, 1."),
        ({"shares": ()}, "numbers in .0, 1."),
        ({"scores": torch.ones(3)}, "one per unit"),
    ],
    ids=["batches", "zero", "none", "scores"],
)
def test_what_cannot_be_measured(given: dict[str, object], message: str) -> None:
    gated = swan.swanify(Net(), torch.zeros(1, 4))
    options = {"batches": [torch.randn(8, 4)]} | given
    batches = options.pop("batches")
    with pytest.raises(swan.InputError, match=message):
        swan.sensitivity(gated, batches, loss=_loss, **options)
