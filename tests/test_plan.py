"""Plans are data: what stays, and back from JSON."""

import json
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import nn

import swan_surgery as swan
from swan_surgery.cutting.plan import (
    AttributeValue,
    KeptPositions,
    NumberValue,
    PruningPlan,
    make_plan,
)
from swan_surgery.cutting.step import apply_plan
from swan_surgery.gates import GatedModel
from tests.closing import close_, image, outputs, prepared
from tests.gated_zoo import drawn_zoo
from tests.small_nets import Net, conv
from tests.zoo import ZOO


def zoo_gated(name: str = "resnet_projection", *, seed: int = 1) -> GatedModel:
    return drawn_zoo(name, dtype=torch.float32, seed=seed)


def mlp(*sizes: int) -> GatedModel:
    layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]  # noqa: RUF007
    return swan.swanify(nn.Sequential(*layers))


class TestMakePlan:
    def test_positions_of_every_shortened_axis(self) -> None:
        gated = mlp(3, 4, 2)
        plan = make_plan(gated.channels, torch.tensor([True, False, True, False]))
        assert plan.num_units == 4
        assert plan.open_units == (0, 2)
        assert set(plan.positions) == {
            KeptPositions("0.weight", 0, (0, 2)),
            KeptPositions("0.bias", 0, (0, 2)),
            KeptPositions("1.weight", 1, (0, 2)),
        }

    def test_keeping_all_shortens_nothing(self) -> None:
        gated = zoo_gated()
        plan = make_plan(gated.channels, torch.ones(gated.gates.num_units, dtype=torch.bool))
        assert plan.positions == ()
        assert plan.open_units == tuple(range(gated.gates.num_units))

    @pytest.mark.parametrize("name", sorted(ZOO))
    def test_positions_are_sorted_in_range_and_strictly_fewer(self, name) -> None:
        gated = zoo_gated(name)
        plan = make_plan(gated.channels, gated.gates.open_mask())
        shapes = {n: t.shape for n, t in gated.model.state_dict().items()}
        assert plan.positions
        seen = set()
        for entry in plan.positions:
            size = shapes[entry.tensor][entry.axis]
            assert list(entry.kept) == sorted(set(entry.kept))
            assert 0 < len(entry.kept) < size
            assert entry.kept[-1] < size
            assert (entry.tensor, entry.axis) not in seen
            seen.add((entry.tensor, entry.axis))

    def test_an_empty_layer_is_refused(self) -> None:
        gated = mlp(3, 4, 2)
        with pytest.raises(swan.EmptyLayerError, match="layer '0' would keep none of its 4"):
            make_plan(gated.channels, torch.zeros(4, dtype=torch.bool))

    def test_same_inputs_same_plan(self) -> None:
        first, second = (zoo_gated("densenet") for _ in range(2))
        plans = [make_plan(g.channels, g.gates.open_mask()) for g in (first, second)]
        assert plans[0] == plans[1]
        assert plans[0].to_json() == plans[1].to_json()

    def test_frozen(self) -> None:
        plan = PruningPlan(1, (0,), ())
        with pytest.raises(FrozenInstanceError):
            plan.num_units = 3


class TestJson:
    @pytest.mark.parametrize("name", sorted(ZOO))
    def test_round_trip(self, name) -> None:
        gated = zoo_gated(name)
        plan = make_plan(gated.channels, gated.gates.open_mask())
        again = PruningPlan.from_json(plan.to_json())
        assert again == plan
        assert hash(again) == hash(plan)
        assert again.to_json() == plan.to_json()

    def test_versioned_and_readable(self) -> None:
        plan = PruningPlan(
            3,
            (0, 2),
            (KeptPositions("a.weight", 1, (0, 5)),),
            (AttributeValue("a", "heads", None, 2), AttributeValue("a", "sizes", 1, 4)),
            (
                NumberValue("", "view", 1, 2, True, 8, "Net.forward+3"),
                NumberValue("b", "mul", 2, 1, False, 0.5),
            ),
        )
        assert json.loads(plan.to_json()) == {
            "version": 3,
            "num_units": 3,
            "open_units": "5",
            "kept": ["21"],
            "positions": [["a.weight", 1, 0]],
            "attributes": [["a", "heads", None, 2], ["a", "sizes", 1, 4]],
            "numbers": [
                ["", "view", 1, 2, True, 8, "Net.forward+3", False],
                ["b", "mul", 2, 1, False, 0.5, "", False],
            ],
        }
        assert PruningPlan.from_json(plan.to_json()) == plan

    def test_the_plan_cuts_another_copy_of_the_model_the_same_way(self) -> None:
        """Attributes and numbers in code included, by way of JSON."""

        def run(m, x):
            x = torch.relu(m.a(x)).view(-1, 6, 16).view(-1, m.width, 4, 4)
            return m.last(x)

        def model() -> Net:
            net = prepared(Net(run, a=conv(3, 6), last=conv(6, 2)))
            net.width = 6
            return net

        gated = swan.swanify(model(), image(2, 3, 4, 4))
        close_(gated, 1, 2)
        plan = make_plan(gated.channels, gated.gates.open_mask())
        assert plan.attributes == (AttributeValue("", "width", None, 4),)
        assert {(n.function, n.number, n.training, n.value) for n in plan.numbers} == {
            ("view", 1, True, 4),
            ("view", 1, False, 4),
        }
        small = apply_plan(model(), PruningPlan.from_json(plan.to_json()))
        assert small.width == 4
        assert small.a.out_channels == 4
        (got,), (wanted,) = outputs(small, image(2, 3, 4, 4)), outputs(gated, image(2, 3, 4, 4))
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)

    def test_nothing_follows_where_nothing_is_closed(self) -> None:
        def run(m, x):
            return m.last(torch.relu(m.a(x)).view(-1, 6, 4, 4))

        gated = swan.swanify(
            prepared(Net(run, a=conv(3, 6), last=conv(6, 2))), image(2, 3, 4, 4)
        )  # fmt: skip
        assert gated.channels.numbers
        plan = make_plan(gated.channels, torch.ones(6, dtype=torch.bool))
        assert (plan.positions, plan.attributes, plan.numbers) == ((), (), ())

    @pytest.mark.parametrize(
        "text",
        [
            "{",
            "3",
            "null",
            '{"version": 3, "positions": 4}',
            '{"version": 3, "kept": [], "positions": [], "numbers": []}',
            '{"version": 3, "kept": [], "positions": [], "attributes": [["a"]], "numbers": []}',
            '{"version": 3, "kept": [], "positions": [], "attributes": [], "numbers": [[1]]}',
            '{"version": 3, "kept": ["x"], "positions": [], "attributes": [], "numbers": []}',
            '{"version": 3, "kept": [], "positions": [["a", 0, 1]], "attributes": [], "numbers": []}',
        ],
    )
    def test_what_is_no_plan_is_an_input_error(self, text) -> None:
        with pytest.raises(swan.InputError, match="not a pruning plan"):
            PruningPlan.from_json(text)

    @pytest.mark.parametrize("version", [1, 2, "3"])
    def test_another_version_is_an_input_error(self, version) -> None:
        text = json.dumps({"version": version, "num_units": 1, "open_units": [0], "positions": []})
        with pytest.raises(swan.InputError, match=f"plan version {version} is not 3"):
            PruningPlan.from_json(text)
