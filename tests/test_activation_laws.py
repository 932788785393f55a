"""The laws with other activations in: closed equals cut, exact costs, round trips, exports, and files that lie."""

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from typer.testing import CliRunner

import swan_surgery as swan
from swan_surgery.artifacts import container
from swan_surgery.artifacts.structures import pack, unpack
from swan_surgery_cli.commands import app
from tests.closing import assert_closed_equals_cut, image, learnt_, outputs, prepared
from tests.conftest import PROFILE
from tests.strategies import EASY_BLOCKS, EASY_HEADS, build, descriptions
from tests.test_activations import Around, Calls, Mlp, leaky, shake_, swapped_in


# Mapping a swapped network takes seconds: each activation brings three layers.
EXAMPLES = 200 if PROFILE == "thorough" else 4
ACTIVATIONS = ("fles", "fles-token", "acon-c", "meta-acon", "bounded", "ap")


def check_laws(
    model: nn.Module, swapped: nn.Module, inputs, folder: Path
) -> swan.GatedModel | None:
    """Laws 1 to 3 and 6."""
    gated = assert_closed_equals_cut(swapped, inputs, shares=(0.4,), seeds=(0,))
    if gated is None:
        return None
    small = swan.prune(gated)
    assert swan.hard_macs(gated) == swan.count_macs(small, inputs)
    assert swan.hard_params(gated) == swan.count_params(small)
    for index, saved in enumerate((swapped, small)):
        file = folder / f"{index}.swan"
        swan.save(saved, file)
        back = swan.load(file, model)
        assert type(back) is type(saved)
        for one, two in zip(
            outputs(saved.eval(), inputs), outputs(back.eval(), inputs), strict=True
        ):
            assert torch.equal(one, two)
    return gated


@pytest.mark.law
@pytest.mark.slow
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow])
@given(
    descriptions(EASY_BLOCKS, EASY_HEADS, max_blocks=1).map(build),
    st.sampled_from(ACTIVATIONS),
)
def test_laws_over_random_networks(tmp_path_factory, case, activation):
    try:
        swapped = swan.swap_activations(case.model, activation, case.inputs)
    except swan.InputError as err:
        assert "nothing could be swapped" in str(err)  # noqa: PT017 - lawful
        return
    for one, two in zip(
        outputs(case.model, case.inputs), outputs(swapped, case.inputs), strict=True
    ):
        assert float((one - two).abs().max()) <= 1e-12 * float(one.abs().max())
    check_laws(case.model, shake_(swapped), case.inputs, tmp_path_factory.mktemp("law"))


@pytest.mark.parametrize("model", [Calls, pytest.param(Around, marks=pytest.mark.thorough)])
def test_laws_with_calls(model, tmp_path):
    net, x = prepared(model()), image(2, 3, 8, 8)
    gated = check_laws(net, shake_(swapped_in(net, "fles", x)), x, tmp_path)
    assert gated is not None
    before = swan.channel_map(net, x)
    # The channels that were units are units still, and the MLPs bring their hidden ones.
    assert gated.channels.num_units > before.num_units


@pytest.mark.parametrize("activation", ["fles", "fles-token", "fles-dg", "polynorm", "starrelu"])
def test_laws_on_tokens(activation, tmp_path):
    net, x = prepared(Mlp("both")), image(2, 5, 4)
    start = "identity" if activation.startswith("fles") else "fresh"
    check_laws(net, shake_(swapped_in(net, activation, x, start=start)), x, tmp_path)


def test_budgets_count_the_mlps():
    net, x = prepared(Calls()), image(2, 3, 8, 8)
    swapped = swapped_in(net, "fles", x)
    gated = swan.swanify(swapped, x)
    added = sum(
        p.numel()
        for name, p in swapped.named_parameters()
        if name.startswith(tuple(place.name for place in swan.swaps(swapped).swapped))
    )
    assert swan.hard_params(gated) == swan.count_params(net) + added
    # One row per sample through the three layers of each MLP, and nothing else.
    widths = [(place.channels, 4) for place in swan.swaps(swapped).swapped]
    assert swan.hard_macs(gated) == swan.count_macs(net, x) + sum(2 * 3 * c * h for c, h in widths)
    small = swan.prune(learnt_(gated), macs=0.5)
    assert swan.count_macs(small, x) <= 0.5 * swan.count_macs(swapped, x)


def test_swapping_after_a_cut_and_cutting_again(tmp_path):
    net, x = prepared(Calls()), image(2, 3, 8, 8)
    small = swan.prune(learnt_(swan.swanify(net, x)), macs=0.6)
    swapped = shake_(swapped_in(small, "fles", x))
    assert swan.swaps(swapped).swapped[0].channels == small.a.out_channels
    again = swan.prune(learnt_(swan.swanify(swapped, x)), macs=0.6)
    swan.save(again, tmp_path / "again.swan")
    back = swan.load(tmp_path / "again.swan", net)
    assert torch.equal(again.eval()(x), back.eval()(x))


def test_a_second_swap_leaves_the_first_alone(tmp_path):
    net, x = prepared(Calls()), image(2, 3, 8, 8)
    first = shake_(swapped_in(net, "fles", x, where="relu_1"))
    second = shake_(swapped_in(first, "acon-c", x))
    done = swan.swaps(second)
    assert [place.name for place in done.swapped] == ["act_1", "act_2", "gelu_1", "leaky_relu_1"]
    assert ("relu_1", "swapped before") in {(own.name, own.why) for own in done.kept}
    swan.save(second, tmp_path / "two.swan")
    assert torch.equal(second.eval()(x), swan.load(tmp_path / "two.swan", net).eval()(x))


def test_gated_models_with_swaps_are_saved_in_training(tmp_path):
    net, x = prepared(Calls()), image(2, 3, 8, 8)
    gated = swan.swanify(shake_(swapped_in(net, "fles", x)), x)
    swan.save(gated, tmp_path / "gated.swan")
    back = swan.load(tmp_path / "gated.swan", net)
    assert isinstance(back, swan.GatedModel)
    assert torch.equal(gated.eval()(x), back.eval()(x))


def test_a_users_activation_is_made_again_by_its_name(tmp_path):
    net, x = prepared(Calls()), image(2, 3, 8, 8)
    swapped = swapped_in(net, leaky, x, where="relu_1")
    swan.save(swapped, tmp_path / "own.swan")
    back = swan.load(tmp_path / "own.swan", net)
    assert torch.equal(swapped(x), back(x))


def forged(path: Path, change) -> Path:
    """The same file with another swap in it; its checksum is right."""
    header, tensors = container.read(path)
    provenance = json.loads(unpack(header["provenance"]))
    change(provenance["steps"][0]["data"])
    header["provenance"] = pack(json.dumps(provenance))
    other = path.with_name("forged.swan")
    container.write(other, header, tensors)
    return other


LIES = {
    "activation": lambda data: data.update(activation="os.system"),
    "function": lambda data: data["swapped"][0].update(function="system"),
    "over a layer": lambda data: data["swapped"][0].update(name="a"),
    "width": lambda data: data["swapped"][0].update(channels=7),
    "nowhere": lambda data: data["swapped"][0].update(name="nowhere.relu_1", owner="nowhere"),
    "tensors": lambda data: data.update(tensors={}),
}


@pytest.mark.parametrize("change", LIES.values(), ids=LIES.keys())
def test_files_that_lie_are_refused(change, tmp_path):
    net, x = prepared(Calls()), image(2, 3, 8, 8)
    swan.save(swapped_in(net, "fles", x), tmp_path / "own.swan")
    with pytest.raises(swan.ArtifactError):
        swan.load(forged(tmp_path / "own.swan", change), net)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(Calls, marks=pytest.mark.thorough),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 2, 3)),
    ],
)
def test_export(model, tmp_path):
    net, x = prepared(model()).float(), image(2, 3, 8, 8).float()
    swapped = shake_(swapped_in(net, "fles", x))
    small = swan.prune(learnt_(swan.swanify(swapped, x)), macs=0.7)
    for name in ("small.onnx", "small.pt2"):
        assert swan.export(small, tmp_path / name, x).relative_error <= 1e-4


def test_copies_and_training():
    """Copies keep what was put in; a step of training moves it and nothing leaks into the given model."""
    net, x = prepared(Calls()), image(2, 3, 8, 8)
    swapped = copy.deepcopy(swapped_in(net, "fles", x)).train()
    optimizer = torch.optim.SGD(swapped.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        swapped(x).square().sum().backward()
        optimizer.step()
    assert float(swapped.relu_1.scales.vertical.weight.detach().abs().max()) > 0
    assert float(swapped.relu_1.base.share.detach().abs().max()) > 0
    assert not torch.equal(swapped.eval()(x), net(x))


class TestCommandLine:
    NAME = "tests.test_activation_laws:small_net"
    SHAPE = ("--input", "2,3,8,8")

    def test_swaps_saves_and_goes_on(self, tmp_path):
        file, small = tmp_path / "fles.swan", tmp_path / "small.swan"
        text = said("swap", self.NAME, *self.SHAPE, "-o", file)
        assert "fles in place of 5 of 5 activations" in text
        assert "parameters" in text
        said("prune", self.NAME, *self.SHAPE, "--weights", file, "--macs", 0.5, "-o", small)
        assert "SwappedCalls" in type(swan.load(small, small_net())).__name__

    def test_json_and_patterns(self, tmp_path):
        file = tmp_path / "acon.swan"
        words = ("--activation", "acon-c", "--where", "act*", "--json")
        facts = json.loads(said("swap", self.NAME, *self.SHAPE, "-o", file, *words))
        assert facts["swapped"] == ["act_1", "act_2"]
        assert facts["params"][1] == facts["params"][0] + 4 * 4 + 4 * 6

    def test_errors_are_one_line(self, tmp_path):
        file = tmp_path / "x.swan"
        result = CliRunner().invoke(
            app, ["swap", self.NAME, *self.SHAPE, "-o", str(file), "--activation", "x"]
        )
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
        assert not file.exists()


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return Calls().eval()


def said(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.stderr
    return result.stdout
