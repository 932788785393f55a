"""Wrong arguments and wrong models: one clear error each, and nothing changed."""

import copy
import math
import re
import warnings
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.channels import Pin
from swan_surgery.gates import GatedModel
from tests.closing import learnt_
from tests.fingerprints import assert_same_fingerprint, fingerprint
from tests.gated_zoo import fresh_zoo
from tests.zoo import ZOO


IMAGE = torch.zeros(2, 3, 8, 8)


def gated_zoo(name: str = "resnet_projection") -> GatedModel:
    return fresh_zoo(name, dtype=torch.float32)


def refuse(error: type[Exception], match: str, call, *models: nn.Module) -> Exception:
    """The call raises, says so in one sentence, and leaves models and process as they were."""
    before = [fingerprint(model) for model in models]
    with pytest.raises(error, match=match) as caught:
        call()
    for model, own in zip(models, before, strict=True):
        assert_same_fingerprint(own, fingerprint(model))
    assert isinstance(caught.value, swan.SwanError)
    return caught.value


class Sorter(nn.Module):
    """Every channel goes through a sort over channels, which has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)).sort(dim=1).values)


class Fourier(nn.Module):
    """Two operations without any channel rule, in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 3)
        self.spectrum, self.values = _Spectrum(), _SingularValues()
        self.middle, self.fc = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.spectrum(self.conv(self.stem(x)).mean((2, 3)))
        return self.fc(self.values(self.middle(x)))


class _Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:  # [B, C] -> [B, C / 2 + 1]
        return torch.fft.rfft(x, dim=1).abs()


class _SingularValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:  # [B, C] -> [B, C]
        return torch.linalg.svdvals(x[:, :, None]) * x


class Branching(nn.Module):
    """Which layer runs depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x) if x.sum() > 0 else self.two(x)
        return self.fc(x.mean((2, 3)))


class Raising(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("my own mistake")


class TestModel:
    @pytest.mark.parametrize("thing", [None, 3, "resnet18", {"weight": torch.zeros(2)}])
    def test_not_a_module(self, thing) -> None:
        seen = type(thing).__name__
        for call in (
            lambda: swan.swanify(thing, IMAGE),
            lambda: swan.count_macs(thing, IMAGE),
            lambda: swan.report(thing, nn.Linear(1, 1), IMAGE),
            lambda: swan.calibrate(thing, [IMAGE]),
        ):
            refuse(swan.ModelError, rf"expected a torch\.nn\.Module, got {seen}", call)

    def test_a_class_in_place_of_a_model(self) -> None:
        for call in (swan.swanify, swan.count_macs):
            refuse(
                swan.ModelError,
                r"got its class Linear; pass one, as Linear\(\.\.\.\) makes it",
                lambda call=call: call(nn.Linear, IMAGE),
            )

    def test_not_a_module_for_the_channel_map(self) -> None:
        refuse(
            swan.ModelError,
            r"expected a torch\.nn\.Module, got int",
            lambda: swan.channel_map(3, IMAGE),
        )

    def test_already_gated(self) -> None:
        gated = gated_zoo()
        refuse(
            swan.ModelError, "gated already.*unswanify", lambda: swan.swanify(gated, IMAGE), gated
        )

    def test_gated_deep_inside(self) -> None:
        model = nn.Sequential(nn.Identity(), gated_zoo())
        refuse(
            swan.ModelError,
            r"module '1' is gated already.*unswanify",
            lambda: swan.swanify(model, IMAGE),
            model,
        )

    def test_what_compress_returns_names_its_model(self) -> None:
        net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        done = swan.compress(net, [torch.randn(8, 3)], macs=0.5, progress=False)
        with pytest.raises(swan.ModelError, match=r"got Compressed; pass its \.model"):
            swan.count_macs(done, torch.zeros(1, 3))

    @pytest.mark.parametrize(
        "call",
        [
            swan.prune,
            swan.unswanify,
            swan.Objective,
            swan.expected_macs,
            swan.hard_macs,
            swan.marginal_macs,
            lambda model: swan.parameter_groups(model, lr=0.1),
        ],
        ids=["prune", "unswanify", "Objective", "expected", "hard", "marginal", "groups"],
    )
    def test_ungated(self, call) -> None:
        model, _ = ZOO["vgg"]()
        refuse(
            swan.ModelError,
            r"expected a gated model, got VGG; call swan\.swanify",
            lambda: call(model),
            model,
        )

    def test_soft_gates_of_an_ungated_model(self) -> None:
        model, _ = ZOO["vgg"]()

        def enter() -> None:
            with swan.soft_gates(model):
                pass

        refuse(swan.ModelError, "expected a gated model, got VGG", enter, model)

    def test_dynamically_quantized(self) -> None:
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantized = torch.ao.quantization.quantize_dynamic(model)
        before = quantized(torch.ones(1, 4))
        refuse(
            swan.ModelError,
            r"module '0' is quantized \(Linear\); prune first, then quantize",
            lambda: swan.swanify(quantized, torch.zeros(1, 4)),
        )
        assert torch.equal(before, quantized(torch.ones(1, 4)))

    def test_quantized_tensor(self) -> None:
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
            model.register_buffer("table", table)
            with pytest.raises(swan.ModelError, match="'table' is a quantized tensor"):
                swan.swanify(model, torch.zeros(1, 4))

    @pytest.mark.parametrize("how", ["script", "trace"])
    def test_torchscript(self, how) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scripted = torch.jit.script(model) if how == "script" else torch.jit.trace(model, IMAGE)
        refuse(
            swan.ModelError,
            "TorchScript module; pass the nn.Module it was made from",
            lambda: swan.swanify(scripted, IMAGE),
        )

    def test_torchscript_deep_inside(self) -> None:
        inner = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = nn.Sequential(nn.Conv2d(3, 4, 1), torch.jit.script(inner), nn.Conv2d(4, 2, 1))
        refuse(swan.ModelError, "'1' is a TorchScript", lambda: swan.swanify(model, IMAGE))

    @pytest.mark.parametrize("name", ["no_layer", "one_layer", "pinned"])
    def test_no_gateable_channel_says_why(self, name) -> None:
        model, why = {
            "no_layer": (nn.ReLU(), "it has no conv or linear layer"),
            "one_layer": (nn.Conv2d(3, 4, 3), "4 channels pinned: part of the model's output"),
            "pinned": (
                Sorter(),
                r"conv: 4 channels pinned: .*\(aten.sort",
            ),
        }[name]
        refuse(
            swan.NoGateableChannelsError,
            rf"(?s)no channel of the model can be gated:.*{why}",
            lambda: swan.swanify(model, IMAGE),
            model,
        )

    def test_strict_lists_every_unknown_operation(self) -> None:
        model = Fourier()
        assert swan.swanify(model, IMAGE).channels.num_units == 5  # the stem's; the rest is pinned
        error = refuse(
            swan.UnsupportedOpError,
            r"^2 operations have no channel rule:\n"
            r"  aten\._fft_r2c  in module 'spectrum'  at tests/test_bad_input\.py:\d+   "
            r"return torch\.fft\.rfft\(x, dim=1\)\.abs\(\)\n"
            r"  aten\._linalg_svd  in module 'values'  at tests/test_bad_input\.py:\d+   "
            r"return torch\.linalg\.svdvals\(x\[:, :, None\]\) \* x\n"
            r"swan\.register_rule says what an operation does to channels\. "
            r"Without strict=True the channels that meet them stay as they are; all others get gates\.$",
            lambda: swan.swanify(model, IMAGE, strict=True),
            model,
        )
        assert isinstance(error, swan.UnsupportedOpError)
        pins = cast("tuple[Pin, ...]", error.pins)  # errors know nothing of channel maps
        assert {pin.layer for pin in pins if "fft" in pin.op} == {"conv"}

    def test_strict_names_every_line_that_calls_an_operation(self) -> None:
        class Twice(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                most = x.renorm(2, 1, 5.0)
                return most - x.neg().renorm(2, 1, 5.0)

        model = nn.Sequential(nn.Conv2d(3, 4, 1), Twice(), nn.Conv2d(4, 2, 1))
        error = refuse(
            swan.UnsupportedOpError,
            "^2 operations have no channel rule:",
            lambda: swan.swanify(model, IMAGE, strict=True),
            model,
        )
        assert str(error).count("aten.renorm  in module '1'  at tests/test_bad_input.py:") == 2
        assert swan.channel_map(model, IMAGE).unknown_ops == (("aten.renorm", "1"),)

    def test_untraceable(self) -> None:
        model = Branching()
        refuse(
            swan.TraceError,
            r"torch\.fx cannot trace Branching in eval mode: TraceError: .*control flow",
            lambda: swan.swanify(model, IMAGE, in_place=False),
            model,
        )
        assert swan.swanify(model, IMAGE).runs_in_place  # nobody insists on a graph

    def test_forward_that_raises(self) -> None:
        model = Raising()
        refuse(
            swan.InputError,
            r"Raising could not be run on example inputs of shape \(2, 3, 8, 8\): KeyError: 'my own",
            lambda: swan.swanify(model, IMAGE),
            model,
        )
        refuse(swan.TraceError, "KeyError", lambda: swan.channel_map(model, IMAGE), model)

    def test_a_model_that_cannot_be_copied(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
        model.stream = (i for i in range(3))
        refuse(
            swan.ModelError,
            "Sequential cannot be copied with copy.deepcopy",
            lambda: swan.swanify(model, IMAGE),
        )


class TestMeta:
    """Shapes without data: mapped, but neither gated nor costed nor cut."""

    MESSAGE = "hold no data. Materialise the model first"

    def test_a_model_without_data_is_mapped(self) -> None:
        model, inputs = ZOO["vgg"]()
        wanted = swan.channel_map(model, inputs)
        assert swan.channel_map(copy.deepcopy(model).to("meta"), inputs) == wanted

    def test_swanify_and_counting_say_to_materialise(self) -> None:
        model, inputs = ZOO["vgg"]()
        hollow = copy.deepcopy(model).to("meta")
        for what, call in (
            ("put gates in", lambda: swan.swanify(hollow, inputs)),
            ("put gates in", lambda: swan.swanify(hollow)),
            ("put gates in", lambda: swan.swanify(hollow, inputs, in_place=True)),
            ("count MACs", lambda: swan.count_macs(hollow, inputs)),
            ("count MACs", lambda: swan.report(hollow, hollow, inputs)),
            ("calibrate", lambda: swan.calibrate(hollow, [inputs[0]])),
        ):
            error = refuse(swan.ModelError, f"cannot {what}: 'features.0.weight' and", call)
            assert self.MESSAGE in str(error)
        assert all(parameter.is_meta for parameter in hollow.parameters())

    def test_one_hollow_layer_is_enough(self) -> None:
        model, inputs = ZOO["vgg"]()
        model.classifier[0].to("meta")
        refuse(
            swan.ModelError,
            "cannot put gates in: 'classifier.0.weight' and 1 other tensors of VGG",
            lambda: swan.swanify(model, inputs),
        )

    def test_a_gated_model_moved_to_meta(self) -> None:
        gated = gated_zoo().to("meta")
        for call in (swan.prune, swan.hard_macs, lambda g: swan.Objective(g, macs=0.5)):
            error = refuse(swan.ModelError, "lie on the meta device", lambda call=call: call(gated))
            assert self.MESSAGE in str(error)

    def test_inputs_without_data(self) -> None:
        model, _ = ZOO["vgg"]()
        inputs = torch.empty(2, 3, 8, 8, device="meta")
        assert swan.channel_map(model, inputs) == swan.channel_map(model, IMAGE)
        for call in (swan.swanify, swan.count_macs):
            refuse(
                swan.InputError,
                r"the example inputs \(float32\[2, 3, 8, 8\]\) lie on the meta device",
                lambda call=call: call(model, inputs),
                model,
            )


class TestInputs:
    @pytest.mark.parametrize(
        "first",
        [nn.Embedding(7, 4), nn.Conv1d(3, 4, 3), nn.Conv3d(3, 4, 3), nn.BatchNorm1d(4)],
        ids=lambda layer: type(layer).__name__,
    )
    def test_cannot_be_inferred(self, first) -> None:
        tail = [] if isinstance(first, nn.BatchNorm1d) else [nn.Linear(4, 2)]
        model = nn.Sequential(first, *tail)
        refuse(
            swan.InputError,
            r"cannot be inferred for Sequential: its first layer.*pass example_inputs=",
            lambda: swan.swanify(model),
            model,
        )

    def test_the_guess_does_not_fit(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        refuse(
            swan.InputError,
            r"guessed from the first layer do not fit: .*pass example_inputs=",
            lambda: swan.swanify(model),
            model,
        )
        swan.swanify(model, IMAGE)  # and that helps

    @pytest.mark.parametrize(
        ("inputs", "shape"),
        [
            (torch.zeros(2, 4, 8, 8), r"\(2, 4, 8, 8\)"),
            (torch.zeros(8), r"\(8,\)"),
            (torch.zeros(2, 3, 8, 8, dtype=torch.int64), r"\(2, 3, 8, 8\)"),
            (torch.zeros(2, 3, 8, 8, dtype=torch.float64), r"\(2, 3, 8, 8\)"),
        ],
        ids=["channels", "rank", "integers", "float64"],
    )
    def test_wrong_shape(self, inputs, shape) -> None:
        model, _ = ZOO["vgg"]()
        given = re.escape(f"{str(inputs.dtype)[6:]}{list(inputs.shape)}")
        refuse(
            swan.InputError,
            rf"VGG could not be run on example inputs of shape {shape}: .*; given {given} and "
            rf"parameters of float32: pass example_inputs that the model accepts$",
            lambda: swan.swanify(model, inputs),
            model,
        )
        refuse(
            swan.InputError,
            f"MACs of VGG cannot be counted on {given}",
            lambda: swan.count_macs(model, inputs),
            model,
        )

    @pytest.mark.parametrize(
        ("inputs", "what"),
        [
            ((IMAGE, IMAGE), r"too many positional arguments; given: {image}, {image}"),
            ({"y": IMAGE}, r"missing a required argument: 'x'; given: y={image}"),
            ({"x": IMAGE, "size": 3}, r"unexpected keyword argument 'size'; given: x=.*, size=int"),
            ((), "missing a required argument: 'x'; given: nothing"),
            ([[IMAGE], None], "too many positional arguments; given: list of {image}, NoneType"),
            ((1, 3, 8, 8), r"int; a shape is no input: torch\.zeros\(1, 3, 8, 8\) has it"),
        ],
        ids=["too_many", "keyword", "unknown_keyword", "none", "nested", "shape"],
    )
    def test_wrong_arity(self, inputs, what) -> None:
        model, _ = ZOO["vgg"]()
        what = what.replace("{image}", r"float32\[2, 3, 8, 8\]")
        for call in (swan.swanify, swan.count_macs):
            refuse(
                swan.InputError,
                rf"the example inputs do not fit VGG\.forward\(x\): .*{what}$",
                lambda call=call: call(model, inputs),
                model,
            )

    def test_wrong_arity_names_what_may_be_left_out(self) -> None:
        class Optional(nn.Sequential):
            def forward(
                self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0
            ) -> Tensor:
                return super().forward(x) * scale

        model = Optional(nn.Linear(3, 4), nn.Linear(4, 2))
        refuse(
            swan.InputError,
            r"Optional\.forward\(x, mask=\.\.\., scale=\.\.\.\): too many",
            lambda: swan.swanify(model, (torch.zeros(2, 3), None, 2.0)),
            model,
        )
        swan.swanify(model, (torch.zeros(2, 3), None))

    @pytest.mark.parametrize("inputs", [3, "image", 1.5])
    def test_wrong_kind(self, inputs) -> None:
        model, _ = ZOO["vgg"]()
        seen = type(inputs).__name__
        for call in (swan.swanify, swan.channel_map, swan.count_macs):
            refuse(
                swan.InputError,
                f"example_inputs must be a tensor, .*got {seen}",
                lambda call=call: call(model, inputs),
                model,
            )

    def test_ignore_that_matches_nothing_lists_the_nearest(self) -> None:
        model, inputs = ZOO["resnet_projection"]()
        error = refuse(
            swan.InputError,
            r"ignore='downsampel' matches no module; nearest names: .*downsample",
            lambda: swan.swanify(model, inputs, ignore=["stem", "downsampel"]),
            model,
        )
        assert "stem" not in str(error).split("nearest")[0]
        refuse(
            swan.InputError,
            "ignore='zzz' matches no module; nearest names: none",
            lambda: swan.swanify(model, inputs, ignore="zzz"),
            model,
        )
        refuse(swan.InputError, "'x.\\*'", lambda: swan.channel_map(model, inputs, ignore=["x.*"]))

    def test_parameters_without_a_shape(self) -> None:
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.LazyLinear(3))
        x = torch.zeros(2, 4)
        calls = [swan.swanify, swan.channel_map, swan.count_macs, swan.adapt]
        calls.append(lambda model, x: swan.add_switch(model, "1", example_inputs=x))
        for call in calls:
            with pytest.raises(swan.ModelError, match=r"'2\.weight' has no shape yet"):
                call(model, x)

    @pytest.mark.parametrize("given", [5, [5], None])
    @pytest.mark.parametrize("argument", ["ignore", "free_outputs"])
    def test_patterns_that_are_no_strings(self, argument: str, given: Any) -> None:
        model, inputs = ZOO["vgg"]()
        calls = [swan.swanify, swan.channel_map, *([swan.adapt] if argument == "ignore" else [])]
        for call in calls:
            refuse(
                swan.InputError,
                rf"{argument} must be a name or pattern, or several of them; got ",
                lambda call=call: call(model, inputs, **{argument: given}),
                model,
            )


class TestGates:
    def test_all_units_of_a_layer_closed(self) -> None:
        gated = gated_zoo()
        gated.gates.min_width = 0
        units = gated.channels.layer("reduce.0").out_units
        with torch.no_grad():
            gated.gates.logits[list(units)] = -9.0
        refuse(
            swan.EmptyLayerError,
            r"layer 'reduce.0' would keep none of its 3 channels; raise gates.min_width",
            lambda: swan.prune(gated),
            gated,
        )
        gated.gates.min_width = 1
        assert swan.prune(gated).reduce[0].out_channels == 1

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_logits_that_mean_nothing(self, value) -> None:
        gated = gated_zoo()
        with torch.no_grad():
            gated.gates.logits[[4, 7]] = value
        message = rf"2 of {gated.gates.num_units} gate logits are NaN or infinite \(first: unit 4\)"
        refuse(swan.GateError, message, lambda: swan.prune(gated), gated)
        refuse(swan.GateError, message, lambda: swan.prune(gated, macs=0.5), gated)

    def test_objective_refuses_nan_logits(self) -> None:
        gated = gated_zoo()
        objective = swan.Objective(gated, l0=1.0, macs=0.5)
        with torch.no_grad():
            gated.gates.logits[4] = math.nan
        refuse(swan.GateError, "1 of 23 gate logits are NaN", lambda: objective(3), gated)

    @pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
    def test_threshold(self, value) -> None:
        gated = gated_zoo()

        def assign() -> None:
            gated.gates.threshold = value

        refuse(swan.InputError, "threshold must be between 0 and 1, got", assign, gated)
        assert gated.gates.threshold == 0.5

    @pytest.mark.parametrize("value", ["hard", "", None, "STE"])
    def test_mode(self, value) -> None:
        gated = gated_zoo()

        def assign() -> None:
            gated.gates.mode = value

        refuse(swan.InputError, r"mode must be one of \('ste', 'soft'\), got", assign, gated)
        assert gated.gates.mode == "ste"


class TestBudget:
    @pytest.mark.parametrize("macs", [0, -0.5, 1.0001, 50, math.nan, math.inf])
    def test_outside_its_range(self, macs) -> None:
        gated = gated_zoo()
        refuse(
            swan.InputError,
            r"macs is a share of the base model's MACs, in \(0, 1\], or a number of them from 1,000 on; got",
            lambda: swan.prune(gated, macs=macs),
            gated,
        )
        refuse(
            swan.InputError,
            r"macs is a share of the base model's MACs, in \(0, 1\], or a number of them from 1,000 on; got",
            lambda: swan.Objective(gated, macs=macs),
            gated,
        )
        refuse(
            swan.InputError,
            r"target_active is a share in \(0, 1\]; got",
            lambda: swan.Objective(gated, target_active=macs),
            gated,
        )

    def test_out_of_reach(self) -> None:
        gated = gated_zoo()
        error = refuse(
            swan.BudgetError,
            r"macs=1e-06 cannot be reached: it asks for at most 0 MACs, but .*the model still costs",
            lambda: swan.prune(gated, macs=1e-6),
            gated,
        )
        assert isinstance(error, swan.BudgetError)
        total = swan.count_macs(gated, gated.example_inputs)
        assert 0 < error.least < error.most == total
        second = refuse(
            swan.BudgetError,
            r"macs=1e-06 cannot be reached: .*reachable: 0\.\d+ to 1",
            lambda: swan.Objective(gated, macs=1e-6),
            gated,
        )
        assert isinstance(second, swan.BudgetError)
        assert (second.least, second.most) == (error.least, error.most)
        # The range said to be reachable is.
        small = swan.prune(learnt_(gated), macs=error.least / total)
        assert swan.count_macs(small, gated.example_inputs) == error.least

    @pytest.mark.parametrize("round_to", [0, -8, 1.5])
    def test_round_to(self, round_to) -> None:
        gated = gated_zoo()
        refuse(
            swan.InputError,
            rf'round_to must be a whole number of channels >= 1, or "auto"; got {round_to}',
            lambda: swan.prune(gated, round_to=round_to),
            gated,
        )

    @pytest.mark.parametrize("name", ["l0", "flops", "target_weight"])
    @pytest.mark.parametrize("value", [-1e-9, math.nan])
    def test_negative_coefficient(self, name, value) -> None:
        gated = gated_zoo()
        refuse(
            swan.InputError,
            f"{name} must not be negative; got {value}",
            lambda: swan.Objective(gated, **{name: value}),
            gated,
        )

    @pytest.mark.parametrize(("delay", "length"), [(-1, 2), (0, -0.5)])
    def test_negative_ramp(self, delay, length) -> None:
        with pytest.raises(swan.InputError, match="delay and length must not be negative"):
            swan.CosineRamp(delay, length)

    def test_ramp_of_an_unknown_term(self) -> None:
        gated = gated_zoo()
        refuse(
            swan.InputError,
            "ramp has no term 'lo'; terms are l0, flops, target_active, macs",
            lambda: swan.Objective(gated, l0=1.0, ramp={"lo": swan.CosineRamp(1, 2)}),
            gated,
        )


class TestCalibrate:
    @pytest.mark.parametrize("loader", [[], iter([]), ()], ids=["list", "iterator", "tuple"])
    def test_empty_loader(self, loader) -> None:
        gated = gated_zoo()
        refuse(
            swan.InputError,
            "the loader yielded no batch; batch-norm statistics are unchanged",
            lambda: swan.calibrate(gated, loader),
            gated,
        )

    @pytest.mark.parametrize("num_batches", [0, -1])
    def test_num_batches(self, num_batches) -> None:
        gated = gated_zoo()
        refuse(
            swan.InputError,
            f"num_batches must be at least 1; got {num_batches}",
            lambda: swan.calibrate(gated, [IMAGE], num_batches=num_batches),
            gated,
        )

    def test_a_batch_that_does_not_fit_changes_nothing(self) -> None:
        gated = gated_zoo()
        before = fingerprint(gated)
        with pytest.raises(RuntimeError, match="channels"):
            swan.calibrate(gated, [torch.ones(2, 3, 8, 8), torch.ones(2, 4, 8, 8)])
        assert_same_fingerprint(before, fingerprint(gated))


class TestPlan:
    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("", "not a pruning plan"),
            ("[]", "not a pruning plan"),
            ("{}", "not a pruning plan: 'version'"),
            ('{"version": 99}', "plan version 99 is not 3"),
            ('{"version": 1, "num_units": 2}', "plan version 1 is not 3"),
            ('{"version": 3, "num_units": 2}', "not a pruning plan: 'kept'"),
        ],
    )
    def test_not_a_plan(self, text, match) -> None:
        with pytest.raises(swan.InputError, match=match):
            swan.PruningPlan.from_json(text)
