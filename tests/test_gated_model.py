"""The gated model is an ordinary nn.Module, and its gates do what the equations say."""

import copy
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.gates import FoldedGate, GateBank, GatedModel, GateSite
from tests.gated_zoo import drawn_zoo
from tests.zoo import ZOO


RTOL, ATOL = 1e-9, 1e-12


def gated_zoo(name: str = "resnet_projection") -> tuple[GatedModel, tuple[Tensor, ...]]:
    """In float64 and eval mode, with the gates of about half the units closed."""
    gated = drawn_zoo(name, seed=2)
    return gated, gated.example_inputs.args


def spread_(gated: GatedModel) -> None:
    drawn = torch.randn(gated.gates.num_units, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        gated.gates.logits.copy_(drawn)


def assert_equal_outputs(one, two) -> None:
    torch.testing.assert_close(one, two, rtol=0, atol=0)


class Dropping(nn.Module):
    """Dropout as a module, its training flag in functional form, and an auxiliary head in training."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.fc, self.aux = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor):
        x = self.bn(self.stem(x)).relu().mean((2, 3))
        out = self.fc(nn.functional.dropout(self.drop(x), 0.5, training=self.training))
        return (out, self.aux(x)) if self.training else out


class TestPrinting:
    def test_sites_and_bank_show_how_many_are_open(self) -> None:
        gated, _ = gated_zoo("vgg")
        with torch.no_grad():
            gated.gates.logits.fill_(2.0)
            gated.gates.logits[list(gated.channels.layer("features.0").out_units)[:2]] = -2.0
        text = str(gated)
        assert "(features_0): FoldedGate(6 channels, 4 open, folded)" in text
        assert "(gates): GateBank(24 units, 22 open, threshold=0.5)" in text
        assert "VGG: 24 of 29 channels gated by 24 units" in text
        assert len(re.findall(r"\d+ channels, \d+ open", text)) == len(gated.sites)

    def test_an_explicit_site_says_so(self) -> None:
        gated, _ = gated_zoo("functional")
        assert re.search(r"GateSite\(6 channels, \d open\)", str(gated))


class TestModule:
    def test_no_parameter_but_the_logits_is_added(self) -> None:
        model, inputs = ZOO["resnet_projection"]()
        gated = swan.swanify(model, inputs)
        names = {name for name, _ in gated.named_parameters()}
        assert names == {f"model.{n}" for n, _ in model.named_parameters()} | {"gates.logits"}
        assert gated.gates.logits.shape == (gated.channels.num_units,)
        # The initial gates are open and near one.
        assert bool(gated.gates.open_mask().all())
        assert float(gated.gates.probabilities().detach().min()) > 0.9

    def test_state_dict_into_a_fresh_gated_model(self) -> None:
        gated, inputs = gated_zoo()
        gated.gates.threshold = 0.61
        fresh = swan.swanify(ZOO["resnet_projection"]()[0].double(), inputs).eval()
        with torch.no_grad():
            for parameter in gated.parameters():
                parameter.add_(0.01)
        result = fresh.load_state_dict(gated.state_dict(), strict=True)
        assert not result.missing_keys
        assert not result.unexpected_keys
        assert fresh.gates.threshold == gated.gates.threshold == pytest.approx(0.61)
        assert torch.equal(fresh.gates.open_mask(), gated.gates.open_mask())
        assert_equal_outputs(fresh(*inputs), gated(*inputs))
        with swan.soft_gates(fresh), swan.soft_gates(gated):
            assert_equal_outputs(fresh(*inputs), gated(*inputs))
        assert_equal_outputs(fresh.train()(*inputs), gated.train()(*inputs))

    def test_state_dict_through_safetensors(self, tmp_path) -> None:
        from safetensors.torch import load_file, save_file  # noqa: PLC0415 - this test alone

        gated, inputs = gated_zoo()
        save_file(gated.state_dict(), tmp_path / "gated.safetensors")
        fresh = swan.swanify(ZOO["resnet_projection"]()[0].double(), inputs)
        fresh.load_state_dict(load_file(tmp_path / "gated.safetensors"))
        assert_equal_outputs(fresh(*inputs), gated(*inputs))

    @pytest.mark.parametrize("name", ["resnet_projection", "functional", "multi_output"])
    def test_deepcopy_is_equal_and_independent(self, name) -> None:
        gated, inputs = gated_zoo(name)
        wanted = gated(*inputs)
        twin = copy.deepcopy(gated)
        assert_equal_outputs(twin(*inputs), wanted)
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in gated.parameters()}
        with torch.no_grad():
            for tensor in [*twin.parameters(), *twin.buffers()]:
                tensor.zero_()
        twin.gates.mode = "soft"
        twin.gates.min_width = 3
        twin.train()
        assert_equal_outputs(gated(*inputs), wanted)
        assert (gated.gates.mode, gated.gates.min_width, gated.training) == ("ste", 1, False)

    def test_a_deepcopy_prints_and_prunes_by_its_own_gates(self) -> None:
        gated, _ = gated_zoo("vgg")
        twin = copy.deepcopy(gated)
        with torch.no_grad():
            twin.gates.logits.fill_(4.0)
        assert "(features_0): FoldedGate(6 channels, 6 open, folded)" in str(twin)
        assert swan.count_macs(swan.prune(twin), twin.example_inputs) == swan.hard_macs(twin)
        assert swan.hard_macs(twin) > swan.hard_macs(gated)

    def test_to_float64_and_back(self) -> None:
        model, inputs = ZOO["resnet_projection"]()
        gated = swan.swanify(model, inputs)
        spread_(gated)
        wanted = gated(*inputs)
        double = copy.deepcopy(gated).to(torch.float64)
        assert {p.dtype for p in double.parameters()} == {torch.float64}
        out = double(*(tensor.double() for tensor in inputs))
        assert out.dtype == torch.float64
        torch.testing.assert_close(out.float(), wanted, rtol=1e-4, atol=1e-5)
        assert_equal_outputs(copy.deepcopy(double).float()(*inputs), wanted)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_cost_and_prune_after_a_change_of_dtype(self, dtype) -> None:
        model, inputs = ZOO["resnet_projection"]()
        gated = swan.swanify(model, inputs)
        spread_(gated)
        wanted = swan.hard_macs(gated)
        moved = copy.deepcopy(gated).to(dtype)
        assert swan.hard_macs(moved) == wanted
        small = swan.prune(moved)
        assert next(small.parameters()).dtype == dtype
        assert swan.calibrate(moved, [tuple(tensor.to(dtype) for tensor in inputs)]) == 1

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype) -> None:
        gated, inputs = gated_zoo()
        gated = gated.to(dtype)
        small = tuple(tensor.to(dtype) for tensor in inputs)
        for training in (False, True):
            out = gated.train(training)(*small)
            assert out.dtype == dtype
            assert bool(out.isfinite().all())
        out.float().sum().backward()
        assert gated.gates.logits.grad.dtype == dtype

    @pytest.mark.parametrize("mode", ["ste", "soft"])
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("name", ["resnet_projection", "functional", "densenet"])
    def test_autocast(self, name, training, mode) -> None:
        model, inputs = ZOO[name]()
        gated = swan.swanify(model, inputs)
        spread_(gated)
        gated.train(training)
        gated.gates.mode = mode
        twin, reference = copy.deepcopy(gated), copy.deepcopy(gated.model).train(training)
        exact = twin(*inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, base = gated(*inputs), reference(*inputs)
        assert out.dtype == base.dtype  # gates change no dtype
        error = (out.float() - exact).detach().abs().max()
        assert error <= 0.05 * exact.detach().abs().max()  # bfloat16 has 8 bits
        if training:
            out.float().square().sum().backward()
            assert gated.gates.logits.grad.dtype == torch.float32
            assert bool(gated.gates.logits.grad.isfinite().all())

    # What dynamo takes in is the same for both backends; the other pairs are in `make thorough`.
    @pytest.mark.parametrize(
        ("name", "backend"),
        [
            ("resnet_projection", "eager"),
            ("functional", "aot_eager"),
            pytest.param("vgg", "aot_eager", marks=pytest.mark.thorough),
            pytest.param("vgg", "eager", marks=pytest.mark.thorough),
            pytest.param("resnet_projection", "aot_eager", marks=pytest.mark.thorough),
            pytest.param("functional", "eager", marks=pytest.mark.thorough),
        ],
    )
    @pytest.mark.slow
    def test_compiled_equals_eager(self, name, backend) -> None:
        gated, inputs = gated_zoo(name)
        torch.compiler.reset()
        compiled: Any = torch.compile(copy.deepcopy(gated), backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), gated(*inputs), rtol=RTOL, atol=ATOL)
        for mode in ("ste", "soft"):
            gradients = []
            for model, own in ((gated, gated), (compiled, compiled._orig_mod)):
                model.train()
                own.gates.mode = mode
                own.zero_grad()
                torch.manual_seed(11)  # for dropout
                out = model(*inputs)
                out.square().sum().backward()
                gradients.append([out, *(parameter.grad for parameter in own.parameters())])
            torch.testing.assert_close(*gradients, rtol=RTOL, atol=ATOL)
        # What was learned in between is seen: nothing about the gates is baked in.
        with torch.no_grad():
            for own in (gated, compiled._orig_mod):
                own.gates.logits.neg_()
                own.gates.threshold = 0.4
        torch.testing.assert_close(
            compiled.eval()(*inputs), gated.eval()(*inputs), rtol=RTOL, atol=ATOL
        )
        torch.compiler.reset()


class TestHooks:
    def test_of_a_layer_fire_and_of_a_container_are_named(self) -> None:
        inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        gated = swan.swanify(nn.Sequential(nn.Linear(3, 8), inner, nn.Linear(8, 2)), in_place=False)
        seen: list[str] = []
        gated.model[1][0].register_forward_hook(lambda *_: seen.append("layer"))
        gated(torch.zeros(1, 3))
        assert seen == ["layer"]
        handle = gated.model[1].register_forward_pre_hook(lambda *_: seen.append("container"))
        with pytest.warns(swan.SwanWarning, match=r"hooks of '1' \(Sequential\) do not fire"):
            gated(torch.zeros(1, 3))
        handle.remove()
        gated(torch.zeros(1, 3))
        assert "container" not in seen

    def test_in_place_all_of_them_fire(self) -> None:
        gated = swan.swanify(nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2)), in_place=True)
        seen: list[str] = []
        gated.model.register_forward_hook(lambda *_: seen.append("model"))
        gated(torch.zeros(1, 3))
        assert seen == ["model"]


class TestTrainAndEval:
    def test_the_auxiliary_head_runs_in_training_only(self) -> None:
        model, x = Dropping(), torch.randn(4, 3, 8, 8)
        gated = swan.swanify(model, x)
        out, aux = gated.train()(x)
        assert out.shape == aux.shape == (4, 4)
        assert isinstance(gated.eval()(x), Tensor)
        out, aux = gated.train()(x)
        (out.sum() + aux.sum()).backward()
        assert gated.model.aux.weight.grad is not None

    def test_dropout_acts_in_training_only(self) -> None:
        model, x = Dropping(), torch.randn(4, 3, 8, 8)
        gated = swan.swanify(model, x).eval()
        assert_equal_outputs(gated(x), gated(x))
        torch.testing.assert_close(gated(x), model.eval()(x))
        gated.train()
        gated.model.bn.eval()
        first, second = gated(x)[0], gated(x)[0]
        assert not torch.equal(first, second)
        torch.manual_seed(4)
        first = gated(x)
        torch.manual_seed(4)
        second = gated(x)
        assert_equal_outputs(first, second)

    def test_the_auxiliary_head_reads_gated_channels(self) -> None:
        x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
        gated = swan.swanify(Dropping().double(), x).train()
        gated.gates.logits.data[:] = 3.0
        gated.gates.logits.data[2] = -3.0
        gated.model.bn.eval()
        gated(x)[1].sum().backward()
        gradient = gated.model.aux.weight.grad
        assert bool((gradient[:, 2] == 0).all())
        assert bool((gradient[:, [0, 1, 3]] != 0).any())

    @pytest.mark.thorough  # the same on a small network above
    def test_googlenet_has_both_paths(self) -> None:
        model = torchvision.models.googlenet(aux_logits=True, init_weights=False)
        x = torch.randn(2, 3, 64, 64)
        gated = swan.swanify(model, x)
        names = {layer.name for layer in gated.channels.layers}
        assert {"aux1.fc1", "aux2.fc1"} <= names
        out = gated.train()(x)
        assert [tensor.shape for tensor in out] == [(2, 1000)] * 3
        assert type(out).__name__ == "GoogLeNetOutputs"
        assert gated.eval()(x).shape == (2, 1000)
        pinned = {pin.layer for pin in gated.channels.pins}
        assert pinned == {"fc", "aux1.fc2", "aux2.fc2"}

    def test_the_mode_of_the_given_model_is_kept(self) -> None:
        x = torch.randn(4, 3, 8, 8)
        for training in (True, False):
            gated = swan.swanify(Dropping().train(training), x)
            assert gated.training is gated.gates.training is training


class TestSoftGates:
    def test_soft_and_hard_evaluation_differ_and_come_back(self) -> None:
        gated, inputs = gated_zoo()
        hard = gated(*inputs)
        with swan.soft_gates(gated) as inner:
            assert inner is gated
            soft = gated(*inputs)
            with swan.soft_gates(gated):
                assert_equal_outputs(gated(*inputs), soft)
            assert_equal_outputs(gated(*inputs), soft)  # leaving the inner block changes nothing
        assert not torch.allclose(soft, hard)
        assert_equal_outputs(gated(*inputs), hard)

    def test_hard_again_after_an_exception(self) -> None:
        gated, inputs = gated_zoo()
        hard = gated(*inputs)
        with pytest.raises(RuntimeError, match="evaluation"), swan.soft_gates(gated):
            raise RuntimeError("evaluation failed")
        assert_equal_outputs(gated(*inputs), hard)

    def test_training_is_not_affected(self) -> None:
        gated, _ = gated_zoo()
        gated.train()
        wanted = gated.gates.values()
        with swan.soft_gates(gated):
            assert_equal_outputs(gated.gates.values(), wanted)

    def test_holding_a_mask_comes_back_after_an_exception(self) -> None:
        gated, _ = gated_zoo()
        before = gated.gates.open_mask()
        with gated.gates.holding(~before):
            assert torch.equal(gated.gates.open_mask(), ~before)
        with pytest.raises(ValueError, match="stop"), gated.gates.holding(~before):
            raise ValueError("stop")
        assert torch.equal(gated.gates.open_mask(), before)


def bank_of(logits: list[float], widths: list[list[int]] | None = None) -> GateBank:
    bank = GateBank(len(logits), widths or [], [])
    bank.to(torch.float64)
    with torch.no_grad():
        bank.logits.copy_(torch.tensor(logits, dtype=torch.float64))
    return bank


class TestValues:
    LOGITS = (-2.0, -0.1, 0.0, 0.1, 2.0)

    def test_probabilities_are_eq_3(self) -> None:
        wanted = [1 / (1 + 2.718281828459045 ** (-z)) for z in self.LOGITS]
        bank = bank_of(list(self.LOGITS))
        torch.testing.assert_close(
            bank.probabilities(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0
        )

    def test_open_is_eq_4_with_equality(self) -> None:
        bank = bank_of(list(self.LOGITS))
        assert bank.open_mask().tolist() == [False, False, True, True, True]  # p(0) = 0.5 = tau
        assert bank.open_mask().dtype == torch.bool
        bank.threshold = 0.6
        assert bank.open_mask().tolist() == [False, False, False, False, True]

    def test_ste_forward_is_exactly_hard_and_backward_p_one_minus_p(self) -> None:
        bank = bank_of(list(self.LOGITS)).train()
        values = bank.values()
        assert values.tolist() == [0, 0, 1, 1, 1]  # exactly
        weights = torch.tensor([1.0, -2, 3, 5, 7], dtype=torch.float64)
        (values * weights).sum().backward()
        p = bank.probabilities().detach()
        torch.testing.assert_close(bank.logits.grad, weights * p * (1 - p), rtol=1e-12, atol=0)

    def test_ste_is_exactly_hard_in_float32_for_any_logit(self) -> None:
        bank = GateBank(4001, [], [])
        with torch.no_grad():
            bank.logits.copy_(torch.linspace(-12, 12, 4001))
        values = bank.train().values()
        assert torch.equal(values, bank.open_mask().float())
        assert bool(((values == 0) | (values == 1)).all())

    def test_soft_forward_and_backward(self) -> None:
        bank = bank_of(list(self.LOGITS)).train()
        bank.mode = "soft"
        assert torch.equal(bank.values(), bank.probabilities())
        bank.values().sum().backward()
        p = bank.probabilities().detach()
        torch.testing.assert_close(bank.logits.grad, p * (1 - p), rtol=1e-12, atol=0)

    @pytest.mark.parametrize("mode", ["ste", "soft"])
    def test_evaluation_is_hard_and_without_gradient(self, mode) -> None:
        bank = bank_of(list(self.LOGITS)).eval()
        bank.mode = mode
        assert bank.values().tolist() == [0, 0, 1, 1, 1]
        assert not bank.values().requires_grad
        with bank.soft_evaluation():
            assert torch.equal(bank.values(), bank.probabilities())

    def test_ste_output_equals_hard_output_and_its_gradient_that_of_eq_6(self) -> None:
        # y = g * h with h = x w: dL/dz = <dL/dh~, h> p (1 - p).
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
        x = torch.randn(5, 3, dtype=torch.float64)
        gated = swan.swanify(model, x).train()
        with torch.no_grad():
            gated.gates.logits.copy_(torch.tensor([-1.0, 0.5, 2.0, -0.2]))
        out = gated(x)
        hidden = model[0](x)
        g = torch.tensor([0.0, 1, 1, 0], dtype=torch.float64)
        torch.testing.assert_close(out, model[1](hidden * g), rtol=1e-12, atol=1e-12)
        out.square().sum().backward()
        before_gate = (hidden * g).detach().requires_grad_()
        model[1](before_gate).square().sum().backward()
        p = gated.gates.probabilities().detach()
        wanted = (before_gate.grad * hidden.detach()).sum(0) * p * (1 - p)
        torch.testing.assert_close(gated.gates.logits.grad, wanted, rtol=1e-10, atol=1e-12)


class TestOpenMask:
    def test_the_best_of_a_layer_stays(self) -> None:
        bank = bank_of([-3.0, -1, -2, 4, -5, -4], [[0, 1, 2], [3], [4, 5]])
        assert bank.open_mask().tolist() == [False, True, False, True, False, True]

    def test_ties_go_to_the_lowest_index(self) -> None:
        bank = bank_of([-3.0] * 5, [[0, 1, 2], [4, 3]])
        assert bank.open_mask().tolist() == [True, False, False, True, False]

    @pytest.mark.parametrize("min_width", [1, 2, 3, 9])
    def test_min_width(self, min_width) -> None:
        gated, _ = gated_zoo("resnet_option_a")
        gated.gates.min_width = min_width
        with torch.no_grad():
            gated.gates.logits.sub_(20)
        mask = gated.gates.open_mask()
        for layer in gated.channels.layers:
            units = sorted(set(layer.out_units) - {-1})
            if not units or -1 in layer.out_units:
                continue
            num_open = int(mask[units].sum())
            assert num_open >= min(min_width, len(units))
        if min_width == 1:
            assert 0 < int(mask.sum()) < mask.numel()

    def test_min_width_with_ties_takes_the_first(self) -> None:
        bank = bank_of([-1.0, -1, -1, -1], [[0, 1, 2, 3]])
        bank.min_width = 2
        assert bank.open_mask().tolist() == [True, True, False, False]

    def test_min_width_zero_allows_empty_layers(self) -> None:
        bank = bank_of([-1.0, -2, 3], [[0, 1], [2]])
        bank.min_width = 0
        assert bank.open_mask().tolist() == [False, False, True]

    def test_a_unit_in_two_layers_counts_in_both(self) -> None:
        bank = bank_of([-1.0, -2, -3], [[0, 1], [1, 2]])
        # Layer one keeps unit 0; layer two keeps unit 1, its best.
        assert bank.open_mask().tolist() == [True, True, False]

    def test_the_mask_does_not_depend_on_the_mode(self) -> None:
        gated, _ = gated_zoo()
        wanted = gated.gates.open_mask()
        for training in (True, False):
            for mode in ("ste", "soft"):
                gated.train(training)
                gated.gates.mode = mode
                assert torch.equal(gated.gates.open_mask(), wanted)

    @pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
    def test_threshold_round_trip(self, value) -> None:
        bank = bank_of([0.0])
        bank.threshold = value
        assert bank.threshold == value


class Layered(nn.Module):
    """The given layer alone between two that read it."""

    def __init__(self, layer: nn.Module, channels: int, rank: int) -> None:
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank] if rank else nn.Linear
        kernel = (1,) if rank else ()
        self.stem, self.layer = conv(3, 4, *kernel), layer
        self.last = conv(channels, 2, *kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.layer(self.stem(x))))


LAYERS = {
    "linear": (lambda: nn.Linear(4, 6), 0),
    "linear_without_bias": (lambda: nn.Linear(4, 6, bias=False), 0),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), 1),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), 2),
    "conv2d_without_bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), 2),
    "conv2d_grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), 2),
    "conv2d_reflected": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), 2),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3), 3),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), 2),
    "transposed_grouped": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), 2),
    "bn1d": (lambda: nn.BatchNorm1d(4), 1),
    "bn2d": (lambda: nn.BatchNorm2d(4), 2),
    "bn2d_without_affine": (lambda: nn.BatchNorm2d(4, affine=False), 2),
    "bn2d_without_statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), 2),
    "bn3d": (lambda: nn.BatchNorm3d(4), 3),
}


class TestFolding:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("name", sorted(LAYERS))
    def test_folded_equals_multiplied(self, name, training) -> None:
        make, rank = LAYERS[name]
        torch.manual_seed(6)
        layer = make()
        channels = 4 if isinstance(layer, nn.modules.batchnorm._NormBase) else 6
        model = Layered(layer, channels, rank).double()
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter)
        x = torch.randn(4, 3, *([8] * rank), dtype=torch.float64)
        folded = swan.swanify(model, x).train(training)
        folded.gates.mode = "soft"
        spread_(folded)
        explicit = copy.deepcopy(folded)
        site = folded.sites["layer"]
        assert isinstance(site, FoldedGate) is (
            not name.endswith(("transposed_grouped", "without_affine"))
        )
        if isinstance(site, FoldedGate):
            assert site.weight_axis == (1 if "transposed" in name else 0)
        for site in folded.sites.values():
            if isinstance(site, FoldedGate):
                site.is_folded = True
        for site in explicit.sites.values():
            if isinstance(site, FoldedGate):
                site.is_folded = False
        results = []
        for gated in (folded, explicit):
            own = x.clone().requires_grad_()
            with swan.soft_gates(gated):
                out = gated(own)
            (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
            assert float(gated.gates.logits.grad.abs().min()) > 0
            grads = [parameter.grad for parameter in gated.parameters()]
            results.append([out, own.grad, *grads, *gated.buffers()])
        torch.testing.assert_close(*results, rtol=RTOL, atol=ATOL)

    @pytest.mark.parametrize("name", sorted(ZOO))
    def test_both_on_the_zoo(self, name) -> None:
        folded, inputs = gated_zoo(name)
        explicit = copy.deepcopy(folded)
        for site in folded.sites.values():
            if isinstance(site, FoldedGate):
                site.is_folded = True
        for site in explicit.sites.values():
            if isinstance(site, FoldedGate):
                site.is_folded = False
        for gated in (folded, explicit):
            gated.train()
        results = []
        for gated in (folded, explicit):
            torch.manual_seed(3)
            out = gated(*inputs)
            leaves = torch.utils._pytree.tree_leaves(out)
            sum(leaf.square().sum() for leaf in leaves).backward()
            results.append([out, *(p.grad for p in gated.parameters()), *gated.buffers()])
        torch.testing.assert_close(*results, rtol=RTOL, atol=ATOL)

    def test_the_layer_keeps_its_own_weights(self) -> None:
        gated, inputs = gated_zoo("vgg")
        before = {name: parameter.clone() for name, parameter in gated.model.named_parameters()}
        identities = {name: id(parameter) for name, parameter in gated.model.named_parameters()}
        gated(*inputs)
        gated.train()(*inputs)
        with pytest.raises(RuntimeError):
            gated(torch.zeros(2, 9, 8, 8, dtype=torch.float64))  # fails inside a folded layer
        for name, parameter in gated.model.named_parameters():
            assert id(parameter) == identities[name]
            assert isinstance(parameter, nn.Parameter)
            assert torch.equal(parameter, before[name])

    def test_a_layer_with_a_hook_is_not_folded(self) -> None:
        model, inputs = ZOO["vgg"]()
        seen = []
        model.features[0].register_forward_hook(lambda module, args, out: seen.append(out.clone()))
        gated = swan.swanify(model, inputs).eval()
        with torch.no_grad():
            gated.gates.logits[gated.channels.layer("features.0").out_units[0]] = -5.0
        gated(*inputs)
        # The hook sees the convolution's own output, before the gate.
        torch.testing.assert_close(seen[-1], nn.Conv2d.forward(model.features[0], *inputs))


class TestWhatIsGated:
    def test_the_classifier_never(self) -> None:
        for name in ZOO:
            gated, inputs = gated_zoo(name)
            out = gated(*inputs)
            small = swan.prune(gated)(*inputs)
            leaves = torch.utils._pytree.tree_leaves
            assert [leaf.shape for leaf in leaves(out)] == [leaf.shape for leaf in leaves(small)]
            last = gated.channels.layers[-1]
            if last.name == "fc":
                assert set(last.out_units) == {-1}

    @pytest.mark.parametrize(
        ("ignore", "closed_to"),
        [
            (["reduce.0"], {"reduce.0"}),
            ("reduce.*", {"reduce.0"}),
            (["reduce"], {"reduce.0"}),
            (["r*.0"], {"reduce.0"}),
            (["middle", "second.0"], {"middle.0", "second.0.0"}),
        ],
        ids=["name", "string", "parent", "glob", "two"],
    )
    def test_ignore(self, ignore, closed_to) -> None:
        model, inputs = ZOO["resnet_projection"]()
        everything = gated_zoo("resnet_projection")[0].channels
        gated = swan.swanify(model, inputs, ignore=ignore)
        for layer in gated.channels.layers:
            wanted = everything.layer(layer.name)
            if layer.name in closed_to:
                assert set(layer.out_units) == {-1}
            else:
                free = [unit != -1 for unit in wanted.out_units]
                assert [unit != -1 for unit in layer.out_units] == free
        reasons = {pin.layer: pin.reason for pin in gated.channels.pins}
        assert all(reasons[name] == "listed in ignore=" for name in closed_to)
        with torch.no_grad():
            gated.gates.logits.fill_(-5.0)
        small = swan.prune(gated)
        for name in closed_to:
            assert small.get_submodule(name).weight.shape[0] == len(
                everything.layer(name).out_units
            )

    def test_ignoring_one_residual_branch_keeps_the_whole_trunk(self) -> None:
        model, inputs = ZOO["resnet_projection"]()
        gated = swan.swanify(model, inputs, ignore=["downsample"])
        for name in ("downsample.0", "expand.0", "second.2.0"):
            assert set(gated.channels.layer(name).out_units) == {-1}
        assert -1 not in gated.channels.layer("stem.0").out_units

    def test_sites_point_at_units_and_no_gate_is_duplicated(self) -> None:
        gated, _ = gated_zoo("resnet_projection")
        for site in gated.sites.values():
            assert isinstance(site, GateSite)
            assert int(site._units.max()) < gated.gates.num_units
        # No chain of two gates over the same units between producer and consumer: with every p at
        # 1/2 in soft mode, a linear chain loses exactly one factor 1/2 per gated layer.
        torch.manual_seed(0)
        sizes = [3, 5, 4, 6, 2]
        chain = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes))).double()
        x = torch.randn(2, 3, dtype=torch.float64)
        gated = swan.swanify(chain, x).eval()
        with torch.no_grad():
            gated.gates.logits.zero_()
        with swan.soft_gates(gated):
            torch.testing.assert_close(gated(x), chain(x) / 2**3, rtol=1e-12, atol=1e-12)


class TestInferredInputs:
    def test_a_convolution_first(self) -> None:
        model = nn.Sequential(
            nn.Conv2d(5, 4, 7, stride=16), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten()
        )
        gated = swan.swanify(model)
        assert [tuple(t.shape) for t in gated.example_inputs.args] == [(1, 5, 224, 224)]
        assert gated.channels.num_units == 4

    def test_a_linear_first(self) -> None:
        model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 2)).double()
        gated = swan.swanify(model)
        (x,) = gated.example_inputs.args
        assert x.shape == (1, 7)
        assert x.dtype == torch.float64

    def test_the_guess_is_the_same_every_time(self) -> None:
        model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 2))
        first, second = (swan.swanify(model).example_inputs.args[0] for _ in range(2))
        assert torch.equal(first, second)

    def test_the_size_that_fits_is_found(self) -> None:
        # 224 gives 14 x 14 in front of the linear layer, 299 gives 18 x 18.
        model = nn.Sequential(
            nn.Conv2d(3, 2, 16, stride=16), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 18 * 18, 2)
        )
        gated = swan.swanify(model)
        assert gated.example_inputs.args[0].shape == (1, 3, 299, 299)

    def test_keyword_inputs(self) -> None:
        model, (image, depth) = ZOO["multi_input"]()
        gated = swan.swanify(model, {"depth": depth, "image": image}).eval()
        torch.testing.assert_close(gated(image=image, depth=depth), model(image, depth))
        torch.testing.assert_close(gated(image, depth), model(image, depth))
        torch.testing.assert_close(gated(image, depth=depth), model(image, depth))

    def test_another_size_and_batch_than_the_example(self) -> None:
        model, inputs = ZOO["resnet_projection"]()
        gated = swan.swanify(model, inputs).eval()
        x = torch.randn(3, 3, 12, 10)
        torch.testing.assert_close(gated(x), model(x), rtol=1e-4, atol=1e-5)


class TestResNet18:
    def test_at_64(self) -> None:
        model = torchvision.models.resnet18().eval()
        x = torch.randn(1, 3, 64, 64)
        gated = swan.swanify(model, x)
        # 4 stage trunks (64, 128, 256, 512; the stem shares the first) and 8 inner widths.
        assert gated.channels.num_units == 2 * (64 + 128 + 256 + 512) + 64 + 128 + 256 + 512
        assert [pin.layer for pin in gated.channels.pins] == ["fc"]
        torch.testing.assert_close(gated(x), model(x), rtol=1e-4, atol=1e-5)
        trunk = {gated.channels.layer(n).out_units for n in ("conv1", "layer1.0.conv2")}
        assert len(trunk) == 1
