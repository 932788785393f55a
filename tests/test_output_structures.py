"""Models that return anything: mapped, gated, cut, verified and counted, and the type stays."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field, fields

import pytest
import torch
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.cutting.verification import relative_error, tensor_error
from swan_surgery.models import as_inputs
from swan_surgery.models.outputs import iter_tensors
from tests.closing import TOLERANCE, close_, image, prepared


Pair = namedtuple("Pair", "logits features")


@dataclass
class Output:
    logits: Tensor
    others: object = field(default=None)


class ModelOutput(OrderedDict):
    """As transformers makes them: a dict, a dataclass, and attributes that may be None."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            if getattr(self, entry.name) is not None:
                self[entry.name] = getattr(self, entry.name)


@dataclass
class SequenceOutput(ModelOutput):
    logits: Tensor | None = None
    hidden: tuple[Tensor, ...] | None = None
    attentions: Tensor | None = None


class Named(OrderedDict):
    """A dict of a class of its own."""


class Returning(nn.Module):
    """Four layers; what is returned is built from the logits y and the features h."""

    def __init__(self, make) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.wide, self.fc = nn.Linear(6, 7), nn.Linear(7, 2)
        self.make = make

    def forward(self, x: Tensor):
        h = self.conv(self.stem(x).relu()).relu()
        return self.make(self.fc(self.wide(h.mean((2, 3))).relu()), h)


# what is made; whether it holds the features, whose six channels must stay then
STRUCTURES = {
    "tensor": (lambda y, h: y, False),
    "dict": (lambda y, h: {"y": y, "none": None, "n": 3}, False),
    "tuple": (lambda y, h: (y, None, 3), False),
    "list": (lambda y, h: [y, [h]], True),
    "nested": (lambda y, h: {"a": [y, (None, {"b": (h, 2.5)})], "n": (1, "s")}, True),
    "namedtuple": (Pair, True),
    "dataclass": (lambda y, h: Output(y, {"h": h}), True),
    "dataclass_in_dict": (lambda y, h: {"out": Output(y, 7)}, False),
    "ordered_dict": (lambda y, h: OrderedDict(y=y, h=h), True),
    "dict_subclass": (lambda y, h: Named(y=y), False),
    "model_output": (lambda y, h: SequenceOutput(logits=y, hidden=(h, y)), True),
    "model_output_in_tuple": (lambda y, h: (SequenceOutput(logits=y), None), False),
    "none": (lambda y, h: None, False),
    "int": (lambda y, h: 7, False),
    "text": (lambda y, h: ("done", 1), False),
}


def skeleton(value):
    """Types and everything that is no tensor."""
    if isinstance(value, Tensor):
        return "tensor"
    kind = type(value).__name__
    if isinstance(value, dict):
        return kind, {key: skeleton(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return kind, [skeleton(item) for item in value]
    if isinstance(value, Output):
        return kind, skeleton(value.logits), skeleton(value.others)
    return kind, value


@pytest.mark.parametrize("in_place", [False, True], ids=["traced", "in_place"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_any_output_is_gated_cut_and_counted(name, in_place) -> None:
    make, keeps_features = STRUCTURES[name]
    model, x = prepared(Returning(make)), image(2, 3, 8, 8)
    channels = swan.channel_map(model, x)
    assert channels.num_units == 8 + 7 + (0 if keeps_features else 6)
    gated = swan.swanify(model, x, in_place=in_place).eval()
    assert gated.channels.num_units == channels.num_units
    wanted, seen = model(x), gated(x)
    assert skeleton(seen) == skeleton(wanted)
    for one, two in zip(iter_tensors(wanted), iter_tensors(seen), strict=True):
        assert tensor_error(one, two) <= TOLERANCE
    close_(gated, 0, 3, 9)
    small = swan.prune(gated)
    assert skeleton(small(x)) == skeleton(wanted)
    assert relative_error(gated, small, gated.gates.open_mask(), gated.example_inputs) <= TOLERANCE
    assert swan.hard_macs(gated) == swan.count_macs(small, x)


@pytest.mark.parametrize("in_place", [False, True], ids=["traced", "in_place"])
def test_a_model_output_keeps_its_attributes(in_place) -> None:
    make, _ = STRUCTURES["model_output"]
    gated = swan.swanify(Returning(make), torch.zeros(2, 3, 8, 8), in_place=in_place)
    for training in (True, False):
        out = gated.train(training)(torch.zeros(2, 3, 8, 8))
        assert out.attentions is None
        assert torch.equal(out.hidden[1], out["logits"])


@pytest.mark.parametrize("name", ["dict", "dataclass", "none", "int"])
def test_a_verified_difference_hides_in_no_structure(name) -> None:
    """A wrongly cut model is caught wherever the tensors are; without any there is nothing to see."""
    make, _ = STRUCTURES[name]
    model, x = prepared(Returning(make)), image(2, 3, 8, 8)
    gated = swan.swanify(model, x).eval()
    small = swan.prune(gated)
    with torch.no_grad():
        small.fc.bias += 1
    error = relative_error(gated, small, gated.gates.open_mask(), gated.example_inputs)
    assert (error > 0.01) == (name not in ("none", "int"))


@pytest.mark.parametrize("name", ["dict", "dataclass", "model_output"])
def test_reports_measure_any_output(name) -> None:
    make, _ = STRUCTURES[name]
    model, x = Returning(make), torch.zeros(2, 3, 8, 8)
    gated = swan.swanify(model, x)
    close_(gated, 0, 3, 9)
    report = swan.report(model, swan.prune(gated), x)
    assert "MACs" in str(report)


class TestOutputsThatAreGivenUp:
    X = image(2, 3, 8, 8)

    def model(self) -> nn.Module:
        def make(logits, h):
            tokens = h.flatten(2).mT
            return logits, {"maps": [h, tokens], "flat": h.flatten(1)}

        return prepared(Returning(make))

    @pytest.mark.parametrize("in_place", [False, True])
    def test_they_pin_nothing_and_the_pruned_model_returns_what_stays(self, in_place) -> None:
        model = self.model()
        whole = swan.swanify(model, self.X, in_place=in_place)
        assert "conv" in {pin.layer for pin in whole.channels.pins if pin.op == "output"}
        gated = swan.swanify(model, self.X, free_outputs=["1.maps.*", "1.flat"], in_place=in_place)
        assert {pin.layer for pin in gated.channels.pins} == {"fc"}
        assert gated.channels.num_units == whole.channels.num_units + 6
        units = gated.channels.layer("conv").out_units
        close_(gated, *units[:2])
        small = swan.prune(gated)  # compares what stays
        logits, rest = small(self.X)
        kept = [i for i, unit in enumerate(units) if unit not in units[:2]]
        assert logits.shape == (2, 2)
        wanted = gated(self.X)[1]["maps"][0]
        torch.testing.assert_close(rest["maps"][0], wanted[:, kept], rtol=1e-9, atol=1e-12)
        assert rest["maps"][1].shape[2] == len(kept)
        assert rest["flat"].shape[1] == wanted[:, kept].flatten(1).shape[1]
        again = swan.swanify(model, self.X, free_outputs="1.*")
        assert again.free_outputs == ("1.*",)

    def test_a_wrong_channel_in_one_is_found(self) -> None:
        gated = swan.swanify(self.model(), self.X, free_outputs="1.*")
        close_(gated, *gated.channels.layer("conv").out_units[:2])
        small = swan.prune(gated)
        mask = gated.gates.open_mask()
        inputs = as_inputs(self.X)
        assert relative_error(gated, small, mask, inputs) < TOLERANCE
        with torch.no_grad():
            small.conv.weight[0] += 1
            small.fc.weight.zero_()
            gated.model.fc.weight.zero_()
        assert relative_error(gated, small, mask, inputs) > 1e-3

    def test_a_pattern_that_matches_nothing(self) -> None:
        with pytest.raises(
            swan.InputError,
            match=r"free_outputs='2\.\*' matches none .* in eval '0', '1\.maps\.0', '1\.maps\.1'",
        ):
            swan.swanify(self.model(), self.X, free_outputs="2.*")

    def test_they_are_remembered_in_files_and_costs(self, tmp_path) -> None:
        model = self.model()
        gated = swan.swanify(model, self.X, free_outputs="1.*")
        swan.save(gated, tmp_path / "gated.swan")
        back = swan.load(tmp_path / "gated.swan", model=self.model())
        assert back.channels.num_units == gated.channels.num_units
        assert back.free_outputs == ("1.*",)
        gated.example_inputs = gated.example_inputs.map(lambda x: torch.cat([x, x]))
        assert swan.hard_macs(gated) == 2 * swan.hard_macs(back)
