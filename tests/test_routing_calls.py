"""How a routed model is called, trained and refused: arguments, branches that work in place, other surgery."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.errors import InputError
from tests.small_nets import Net
from tests.test_routing import halfway_


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()


class Mlp(nn.Module):
    """Four layers; a flag and a factor are read behind the second."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 8)
        self.c, self.d = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, scale: Tensor | None = None, *, twice: bool = False) -> Tensor:
        h = F.relu(self.a(x))
        h = self.b(h if scale is None else h * scale)
        h = self.d(F.relu(self.c(F.relu(h))))
        return 2 * h if twice else h


def mlp() -> nn.Module:
    return Mlp().double().eval()


def chain() -> nn.Module:
    layers = (nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    return nn.Sequential(*layers).double().eval()


IN_PLACE = {
    "module": lambda: nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    ),
    "dropout": lambda: nn.Sequential(
        nn.Linear(4, 8), nn.Dropout(0.5, inplace=True), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    ),
    "as it runs": lambda: Net(
        lambda m, x: x if x.sum() > 1e9 else m.c(m.b(getattr(m, "0")(x).mul_(2)).relu_()),
        **{"0": nn.Linear(4, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 3)},
    ),
}


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("decide", ["predicted", "margin"])
@pytest.mark.parametrize("own", [False, True])
def test_no_branch_changes_what_the_others_read(kind: str, decide: str, own: bool) -> None:
    model = IN_PLACE[kind]().double().eval()
    light = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 3)).double() if own else 1.0
    routed = swan.add_switch(model, "0", example_inputs=X, light=light, decide=decide).eval()
    routed.parts.light.train(kind == "dropout")
    parts = routed.parts
    with torch.no_grad():
        crossing, wanted = parts.trunk(X), model(X)
        before = crossing.clone()
        for branch in (parts.light, parts.full, parts.switch):
            branch(crossing)
            assert torch.equal(crossing, before)
        full, _, (predicted,) = parts(X)
        assert torch.equal(full, wanted)
        assert torch.equal(predicted, parts.switch(before))
        if kind != "dropout":
            halfway_(routed, X)
            found = routed(X)
            is_hard = routed.score(parts, 0, before)[0] > routed.thresholds[0]
            torch.testing.assert_close(found[is_hard], wanted[is_hard], rtol=1e-9, atol=1e-12)


def test_a_trunk_that_is_trained_keeps_its_gradients_behind_an_in_place_branch() -> None:
    routed = swan.add_switch(IN_PLACE["module"]().double(), "0", example_inputs=X, light=0.5)
    routed.unfreeze().train()
    routed.loss(
        (X, X.argmax(1) % 3), task=lambda out, batch: F.cross_entropy(out, batch[1])
    ).backward()
    assert all(p.grad is not None for p in routed.parts.trunk.parameters())


@pytest.mark.parametrize(
    ("given", "call", "name"),
    [
        (X, lambda m: m(X, twice=True), "twice"),
        ({"x": X, "twice": True}, lambda m: m(X), "twice"),
        ((X, X[:, :1]), lambda m: m(X), "scale"),
        (X, lambda m: m(X, X[:, :1]), "scale"),
    ],
    ids=["flag", "no flag", "none", "not none"],
)
def test_arguments_the_model_was_not_cut_for_are_refused(given, call, name: str) -> None:
    routed = swan.add_switch(mlp(), "b", example_inputs=given, light=0.5).eval()
    with pytest.raises(swan.PathError, match=f"{name!r}.*when the switch was put in"):
        call(routed)
    batch = {"x": X, "twice": True} if given is X else {"x": X}
    with pytest.raises(swan.PathError):
        routed.loss(batch)
    with pytest.raises(swan.PathError):
        swan.calibrate_switch(routed, [batch], share=0.5)


def test_arguments_by_name_or_place_are_the_same() -> None:
    model = mlp()
    routed = swan.add_switch(model, "b", example_inputs=(X, X[:, :1]), light=0.5).eval()
    assert torch.equal(routed(scale=X[:, :1], x=X), model(X, X[:, :1]))


@pytest.mark.parametrize("after", ["b", ["a", "b"]])
def test_the_base_for_a_file_may_have_another_type(after, tmp_path: Path) -> None:
    routed = swan.add_switch(mlp(), after, example_inputs=X, light=0.5).eval()
    swan.save(routed, tmp_path / "routed.swan")
    for base in (Mlp(), Mlp().bfloat16()):
        assert torch.equal(swan.load(tmp_path / "routed.swan", base)(X), routed(X))


def test_the_light_branch_of_a_frozen_model_learns() -> None:
    routed = swan.add_switch(mlp().requires_grad_(False), "b", example_inputs=X, light=0.5)
    routed.train().loss(X).backward()
    assert all(p.grad is not None for p in routed.parts.light.parameters())
    assert not any(p.requires_grad for p in routed.parts.full.parameters())


@pytest.mark.parametrize(
    "change",
    [
        lambda m: swan.swanify(m, X),
        lambda m: swan.swap_activations(m, "fles", X),
        lambda m: swan.add_switch(m, "1", example_inputs=X),
        lambda m: swan.adapt(nn.Sequential(m), X),
    ],
    ids=["swanify", "swap", "add_switch", "adapt around"],
)
@pytest.mark.parametrize("form", ["routed", "adaptive"])
def test_surgery_comes_before_switches_and_widths(change, form: str) -> None:
    model = chain()
    routed = swan.add_switch(model, "1", example_inputs=X, light=0.5)
    made = routed if form == "routed" else swan.adapt(model, X)
    with pytest.raises(swan.ModelError, match=r"has a switch|adaptive already"):
        change(made)


def test_thresholds_lie_between_samples() -> None:
    routed = swan.add_switch(chain(), "1", example_inputs=X, light=0.5).eval()
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1)).double()
    labels = chain()(x).argmax(1)
    for target in ({"share": 0.5}, {"harm": 0.3}):
        swan.calibrate_switch(routed, [(x, labels)], **target)
        with torch.no_grad():
            scores = routed.score(routed.parts, 0, routed.parts.trunk(x))[0]
        assert float((scores - routed.thresholds[0]).abs().min()) > 1e-12
        alone = torch.cat([routed(row) for row in x.split(1)])
        torch.testing.assert_close(alone, routed(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"after": 3}, swan.InputError, "module's name"),
        ({"after": ["1", 2]}, swan.InputError, "module's name"),
        ({"after": ["1", "1"]}, swan.InputError, "one behind the other"),
        ({"after": ["3", "1"], "light": 1.0}, swan.InputError, "one behind the other"),
        ({"hidden": 0}, swan.InputError, "hidden"),
        ({"light": None, "default": 0.5}, swan.InputError, "a tensor"),
        ({"positive": 3}, swan.InputError, "positive"),
        ({"batches": 3}, swan.InputError, "loader"),
        ({"batches": [3]}, swan.InputError, "a batch is a tensor"),
        ({"batches": [X[:0]]}, swan.InputError, "no samples"),
        ({"example_inputs": X[:, :2]}, swan.InputError, "cannot be run"),
        ({"after": "3", "light": 0.5}, swan.NoGateableChannelsError, "switch earlier"),
    ],
    ids=map(str, range(12)),
)
def test_bad_options_are_refused(options, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        swan.add_switch(
            chain(), options.get("after", "1"), **{"example_inputs": X, "light": 0.5}
            | {key: value for key, value in options.items() if key != "after"},
        )  # fmt: skip


def test_a_margin_needs_class_scores_at_once() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    with pytest.raises(swan.InputError, match="class scores"):
        swan.add_switch(model, "1", example_inputs=X.float(), light=0.5, decide="margin")


@pytest.mark.parametrize(
    "batch", [3, (), [], X[:0], (X[:0], X[:0])], ids=["int", "tuple", "list", "empty", "no samples"]
)
def test_what_is_no_batch_is_refused(batch) -> None:
    routed = swan.add_switch(chain(), "1", example_inputs=X, light=0.5)
    with pytest.raises(swan.InputError, match="batch"):
        routed.loss(batch)
    with pytest.raises(swan.InputError, match="batch"):
        swan.calibrate_switch(routed, [batch], share=0.5)
    with pytest.raises(swan.InputError, match="loader"):
        swan.calibrate_switch(routed, 3, share=0.5)


@pytest.mark.parametrize("shape", [(), (3,), (6, 2)])
def test_a_harm_that_is_not_one_number_per_sample_is_refused(shape) -> None:
    """Flattened, the losses of (6, 2) would have been taken for those of other samples."""
    routed = swan.add_switch(chain(), "1", example_inputs=X, light=0.5)
    with pytest.raises(swan.InputError, match="one number per sample"):
        swan.calibrate_switch(
            routed, [X], harm=0.9, confidence=0.2, loss=lambda *_: torch.zeros(shape)
        )


def test_the_output_of_an_ending_has_the_type_of_the_model() -> None:
    routed = swan.add_switch(
        chain(), "1", example_inputs=X, light=None, default=torch.tensor([1, 0, 0])
    )
    routed.thresholds = [float("inf")]
    assert routed.eval()(X).dtype is torch.float64


def test_an_empty_batch_comes_out_empty() -> None:
    routed = swan.add_switch(chain(), "1", example_inputs=X, light=0.5).eval()
    routed.thresholds = [0.5]
    assert routed(X[:0]).shape == (0, 3)


def test_a_model_that_is_not_routed_is_not_exported_as_one(tmp_path: Path) -> None:
    with pytest.raises(swan.ModelError, match="add_switch"):
        swan.export_routed(chain(), tmp_path / "a.onnx")


def test_a_swapped_model_takes_arguments_by_name_or_place() -> None:
    model = swan.swap_activations(mlp(), "fles", X)
    routed = swan.add_switch(model, "b", example_inputs=X, light=0.5).eval()
    assert "as it runs" in routed.way[0]
    assert torch.equal(routed(x=X), model(X))
    assert torch.equal(routed(X, twice=False), model(X))
    with pytest.raises(swan.PathError, match="twice"):
        routed(X, twice=True)


def test_arguments_in_lists_and_dicts_come_back_from_a_file(tmp_path: Path) -> None:
    """Lists came back as tuples, and dicts as nothing."""

    class Nested(Mlp):
        def forward(self, given: dict[str, list[Tensor]], pair: tuple[Tensor, Tensor]) -> Tensor:
            return super().forward(given["x"][0] + pair[1])

    given, pair = {"x": [X, X]}, (X, X)
    routed = swan.add_switch(Nested().double(), "b", example_inputs=(given, pair), light=0.5)
    swan.save(routed.eval(), tmp_path / "routed.swan")
    loaded = swan.load(tmp_path / "routed.swan", Nested().double())
    assert torch.equal(loaded(given, pair), routed(given, pair))
    with pytest.raises(swan.PathError, match="given"):
        loaded({"x": [X]}, pair)


CHANGED = {
    "graph": lambda: Net(
        lambda m, x: m.c(m.b(F.relu(m.a(x.mul_(2))))),
        a=nn.Linear(4, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 3),
    ),
    "as it runs": lambda: Net(
        lambda m, x: m.c(m.b(F.relu(m.a(x.mul_(2 if x.sum() < 1e9 else 1))))),
        a=nn.Linear(4, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", CHANGED)
@pytest.mark.parametrize("after", ["a", "auto"])
def test_a_model_that_changes_its_inputs_is_cut_and_the_examples_stay(
    way: str, after: str, tmp_path: Path
) -> None:
    model = CHANGED[way]().eval()
    x = torch.randn(8, 4)
    given = x.clone()
    batches = None if after == "a" else [x, x]
    routed = swan.add_switch(model, after, example_inputs=x, light=0.5, batches=batches).eval()
    assert routed.way[0].startswith(way)
    assert torch.equal(x, given)
    assert torch.equal(routed(x.clone()), model(x.clone()))
    swan.count_macs(routed, x)
    if way == "graph":
        routed.thresholds = [math.inf]
        swan.export_routed(routed, tmp_path / "routed.onnx")
    assert torch.equal(x, given)
    assert torch.equal(routed.example_inputs.args[0], given)


@pytest.mark.parametrize("thresholds", [[], [0.5, 0.5], [math.nan], 0.5, ["a"], [None]])
def test_there_is_one_threshold_for_each_switch(thresholds: Any) -> None:
    routed = swan.add_switch(chain(), "0", example_inputs=X, light=0.5)
    with pytest.raises(InputError, match="1 number, one for each switch"):
        routed.thresholds = thresholds
    assert routed.thresholds == [-math.inf]


@pytest.mark.parametrize("decide", ["predicted", "margin"])
def test_a_sample_without_its_batch_is_refused(decide: str) -> None:
    routed = swan.add_switch(chain(), "0", example_inputs=X, light=0.5, decide=decide).eval()
    with pytest.raises(InputError, match=r"1 axes, and the example inputs had 2.*x\[None\]"):
        routed(X[0])
