"""Routed models in files: saved and loaded bitwise, exported and run."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import swan_surgery as swan
from swan_surgery.routing.exporting import export_routed
from tests.strategies import Case, build, networks
from tests.test_routing import Loop, halfway_, images, plain, same


# What says of a random network that no switch can stand there.
REFUSED = (swan.InputError, swan.NoGateableChannelsError, swan.BudgetError)


@pytest.mark.thorough
@settings(max_examples=max(2, settings.default.max_examples // 8))
@given(networks(), st.sampled_from([1.0, 0.5]), st.booleans())
def test_random_networks_come_back_bitwise(
    tmp_path_factory: pytest.TempPathFactory, case: Case, light: float, mask: bool
) -> None:
    try:
        routed = swan.add_switch(
            case.model,
            "blocks.0",
            example_inputs=case.inputs,
            light=light,
            mask=mask,
            decide="predicted",
        )
    except REFUSED:
        return
    if mask:
        with torch.no_grad():
            routed.gated.gates.logits[::3] = -3.0
    halfway_(routed, *case.inputs)
    path = tmp_path_factory.mktemp("law") / "routed.swan"
    swan.save(routed, path)
    found = swan.load(path, build(case.description).model)
    with torch.no_grad():
        assert same(found(*case.inputs), routed(*case.inputs))
    assert found.thresholds == routed.thresholds


@pytest.mark.thorough
@settings(max_examples=max(2, settings.default.max_examples // 200))
@given(networks())
def test_random_networks_are_exported_as_they_are(
    tmp_path_factory: pytest.TempPathFactory, case: Case
) -> None:
    model, inputs = case.model.float(), tuple(x.float() for x in case.inputs)
    try:
        routed = swan.add_switch(
            model, "blocks.0", example_inputs=inputs, light=1.0, decide="predicted"
        )
        halfway_(routed, *inputs)
        path = tmp_path_factory.mktemp("law") / "routed.onnx"
        found = swan.export(routed, path, inputs)
    except (*REFUSED, swan.ExportError):
        return
    assert found.relative_error <= 1e-5


@pytest.mark.parametrize(
    "kind", ["graph", "as it runs", "mask", "cut mask", "own light", "stop", "nested"]
)
def test_a_routed_model_comes_back_bitwise(kind: str, tmp_path: Path) -> None:
    x = images()
    model = Loop().double().eval() if kind == "as it runs" else plain()
    fresh = Loop().double() if kind == "as it runs" else plain()
    after = {"as it runs": "blocks.0", "nested": ["0", "2"]}.get(kind, "2")
    own = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).double()
    options = {
        "own light": {"light": own},
        "stop": {"light": None, "default": torch.tensor([1.0, 0, 0, 0, 0]).double()},
    }.get(kind, {"light": 0.6, "mask": "mask" in kind})
    routed = swan.add_switch(model, after, example_inputs=x, **options)
    if "mask" in kind:
        with torch.no_grad():
            routed.gated.gates.logits[:3] = -2.0
    if kind == "cut mask":
        routed = swan.cut_mask(routed)
    if kind != "stop":
        many = images(400)
        swan.calibrate_switch(routed, [(many, model(many).argmax(1))], share=0.5)
    swan.save(routed, tmp_path / "routed.swan")
    base: nn.Module = fresh
    if kind == "own light":
        base = swan.add_switch(fresh, after, example_inputs=x, **options)
    found = swan.load(tmp_path / "routed.swan", base)
    assert isinstance(found, swan.RoutedModel)
    assert found.thresholds == routed.thresholds
    assert found.decide == routed.decide
    assert found.certificate == routed.certificate
    assert [p.requires_grad for p in found.parameters()] == [
        p.requires_grad for p in routed.parameters()
    ]
    assert torch.equal(found(x), routed(x))
    swan.save(found, tmp_path / "again.swan")
    again = swan.load(tmp_path / "again.swan", base)
    assert torch.equal(again(x), routed(x))


def test_another_model_is_refused(tmp_path: Path) -> None:
    routed = swan.add_switch(plain(), "2", example_inputs=images(), light=0.6)
    swan.save(routed, tmp_path / "routed.swan")
    other = plain()
    other[3] = nn.Conv2d(8, 13, 3, padding=1)
    with pytest.raises(swan.ArtifactError, match="another model"):
        swan.load(tmp_path / "routed.swan", other)


def test_a_base_on_the_meta_device(tmp_path: Path) -> None:
    routed = swan.add_switch(plain(), "2", example_inputs=images(), light=0.6)
    halfway_(routed, images())
    swan.save(routed, tmp_path / "routed.swan")
    found = swan.load(tmp_path / "routed.swan", plain().to("meta"))
    assert torch.equal(found(images()), routed(images()))


@pytest.mark.parametrize(
    "kind",
    [
        "stop",
        *(pytest.param(k, marks=pytest.mark.thorough) for k in ("predicted", "margin", "nested")),
    ],
)
def test_one_onnx_file_routes_as_the_model(kind: str, tmp_path: Path) -> None:
    x = images(9).float()
    model = plain().float()
    options = (
        {"light": None, "default": torch.tensor([1.0, 0, 0, 0, 0])}
        if kind == "stop"
        else {"light": 1.0, "decide": "margin" if kind == "nested" else kind}
    )
    routed = swan.add_switch(
        model, ["0", "2"] if kind == "nested" else "2", example_inputs=x, **options
    )
    with torch.no_grad():
        for own in routed.parts.chain:
            for parameter in own.light.parameters():
                parameter.mul_(1.3)
    halfway_(routed, x)
    if kind == "nested":
        routed.thresholds *= 2
    exported = swan.export(routed, tmp_path / "routed.onnx", x)
    assert exported.relative_error <= 1e-5
    assert exported.has_dynamic_batch
    for thresholds in ([float("inf")], [float("-inf")]):  # a branch that no row takes
        routed.thresholds = thresholds * routed.num_switches
        assert swan.export(routed, tmp_path / "all.onnx", x).relative_error <= 1e-5


def test_three_files(tmp_path: Path) -> None:
    x = images(4).float()
    routed = swan.add_switch(plain().float(), "2", example_inputs=x, light=1.0)
    found = export_routed(routed, tmp_path / "net.onnx", split=True)
    assert isinstance(found, tuple)
    assert [e.path.name for e in found] == ["net.front.onnx", "net.light.onnx", "net.full.onnx"]
    assert max(e.relative_error for e in found) <= 1e-5
