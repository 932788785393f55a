"""What the user gave stays as it was, on success and on every failure; what they get keeps its kind."""

from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.gates import GatedModel
from swan_surgery.models.copies import copy_of, sharing_copy_of, shell_of
from tests.fingerprints import assert_same_fingerprint, fingerprint
from tests.zoo import ZOO


IMAGE = torch.zeros(2, 3, 8, 8)


def odd_model(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A zoo model with hooks, a frozen layer, mixed modes and gradients: much to get wrong."""
    model, inputs = ZOO[name]()
    model.train()
    modules = list(model.modules())
    modules[len(modules) // 2].eval()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[-1].grad = torch.ones_like(parameters[-1])
    modules[1].register_forward_hook(lambda module, args, out: None)
    modules[-1].register_forward_pre_hook(lambda module, args: None)
    model.remark = "mine"
    return model, inputs


def close(gated: GatedModel, share: float = 0.5) -> None:
    drawn = torch.rand(gated.gates.num_units, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        gated.gates.logits.copy_(torch.where(drawn < share, -3.0, 3.0) + 0.1 * drawn)


class Fuse(nn.Module):
    """Identity that raises at the n-th call of its life."""

    def __init__(self, *, calls: int) -> None:
        super().__init__()
        self.left = [calls]

    def __deepcopy__(self, memo):
        twin = Fuse(calls=0)
        twin.left = self.left  # shared, so that a copy burns the same fuse
        memo[id(self)] = twin
        return twin

    def forward(self, x: Tensor) -> Tensor:
        self.left[0] -= 1
        if self.left[0] < 0:
            raise AssertionError("blown")  # the way most models check their input
        return x


def fused(*, calls: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        Fuse(calls=calls),
        nn.ReLU(),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(144, 2),
    )


class TestTheGivenModelStays:
    # Of so few channels a step of two is a large part.
    @pytest.mark.filterwarnings("ignore:multiples of 2 channels leave")
    @pytest.mark.parametrize("name", sorted(ZOO))
    def test_on_success(self, name) -> None:
        model, inputs = odd_model(name)
        kept_inputs = [tensor.clone() for tensor in inputs]
        before = fingerprint(model)
        gated = swan.swanify(model, inputs)
        swan.channel_map(model, inputs)
        swan.count_macs(model, inputs)
        swan.count_params(model)
        assert_same_fingerprint(before, fingerprint(model))
        close(gated)
        gated_before = fingerprint(gated)
        small = swan.prune(gated)
        swan.prune(gated, macs=0.7, round_to=2)
        swan.unswanify(gated)
        swan.expected_macs(gated)
        swan.hard_macs(gated)
        swan.marginal_macs(gated)
        swan.count_macs(gated, inputs)
        assert_same_fingerprint(gated_before, fingerprint(gated))
        assert_same_fingerprint(before, fingerprint(model))
        for one, two in zip(inputs, kept_inputs, strict=True):
            assert torch.equal(one, two)
        # Nothing is shared: what is done to the result is not done to the given model.
        with torch.no_grad():
            for result in (gated, small):
                for tensor in [*result.parameters(), *result.buffers()]:
                    tensor.zero_()
        assert_same_fingerprint(before, fingerprint(model))

    @pytest.mark.slow
    def test_by_report(self) -> None:
        model, inputs = odd_model("vgg")
        gated = swan.swanify(model, inputs)
        close(gated)
        small = swan.prune(gated)
        models = (model, gated, small)
        before = [fingerprint(each) for each in models]
        swan.report(model, small, inputs, evaluate=lambda m: float(m(*inputs).detach().sum()))
        swan.report(model, gated, inputs)
        for own, each in zip(before, models, strict=True):
            assert_same_fingerprint(own, fingerprint(each))

    def test_by_a_report_that_fails(self) -> None:
        model, inputs = odd_model("vgg")
        gated = swan.swanify(model, inputs)
        before = fingerprint(model), fingerprint(gated)
        with pytest.raises(swan.InputError):
            swan.report(model, gated, torch.zeros(2, 5, 8, 8))
        assert_same_fingerprint(before[0], fingerprint(model))
        assert_same_fingerprint(before[1], fingerprint(gated))

    @pytest.mark.parametrize("calls", range(12))
    def test_where_a_module_raises_at_any_point_of_swanify(self, calls) -> None:
        model = fused(calls=calls)
        model.train()
        before = fingerprint(model)
        with suppress(swan.SwanError, AssertionError):  # late calls may not happen
            swan.swanify(model, IMAGE)
        assert_same_fingerprint(before, fingerprint(model))

    @pytest.mark.parametrize("calls", range(3))
    def test_where_a_module_raises_in_counting(self, calls) -> None:
        model = fused(calls=calls)
        before = fingerprint(model)
        with suppress(swan.SwanError, AssertionError):  # late calls may not happen
            swan.count_macs(model, IMAGE)
        assert_same_fingerprint(before, fingerprint(model))

    @pytest.mark.parametrize("copied", [shell_of, copy_of, sharing_copy_of])
    def test_copies_have_dictionaries_of_their_own(self, copied) -> None:
        """Empty ones too: a hook or a child put on a copy would be the given model's."""
        model, _ = ZOO["resnet_projection"]()
        for given, own in zip(model.modules(), copied(model).modules(), strict=True):
            for name, value in vars(given).items():
                assert not isinstance(value, dict) or vars(own)[name] is not value, name

    def test_where_counting_cannot_run_the_model(self) -> None:
        model = fused(calls=0)
        before = fingerprint(model)
        with pytest.raises(swan.InputError, match="blown"):
            swan.count_macs(model, IMAGE)
        assert_same_fingerprint(before, fingerprint(model))

    @pytest.mark.parametrize("calls", range(4))
    def test_where_a_module_raises_in_prune(self, calls) -> None:
        model = fused(calls=10**6)
        gated = swan.swanify(model, IMAGE)
        close(gated, 0.3)
        before = fingerprint(gated), fingerprint(model)
        # The fuse is traced away in the gated model, not in the pruned one.
        model[2].left[0] = calls
        with suppress(swan.SwanError, AssertionError):  # late calls may not happen
            swan.prune(gated)
        assert_same_fingerprint(before[0], fingerprint(gated))
        assert_same_fingerprint(before[1], fingerprint(model))

    def test_where_a_batch_raises_in_calibrate(self) -> None:
        model = fused(calls=1)
        before = fingerprint(model)
        with pytest.raises(AssertionError, match="blown"):
            swan.calibrate(model, [torch.ones(2, 3, 8, 8), torch.ones(2, 3, 8, 8)])
        assert_same_fingerprint(before, fingerprint(model))

    def test_where_the_loader_raises_in_calibrate(self) -> None:
        def loader():
            yield torch.ones(2, 3, 8, 8)
            raise OSError("the disk")

        model = fused(calls=5)
        before = fingerprint(model)
        with pytest.raises(OSError, match="the disk"):
            swan.calibrate(model, loader())
        assert_same_fingerprint(before, fingerprint(model))

    def test_by_calibrate_but_for_the_statistics(self) -> None:
        gated = swan.swanify(*odd_model("resnet_projection"))
        close(gated)
        gated.train()
        before = fingerprint(gated)
        swan.calibrate(gated, [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))])
        after = fingerprint(gated)
        changed = {
            name
            for name, tensor in before["tensors"].items()  # type: ignore[attr-defined]
            if not torch.equal(tensor, after["tensors"][name])
        }
        assert changed
        assert all(name.endswith(("running_mean", "running_var")) for name in changed)
        before["tensors"] = after["tensors"]
        assert_same_fingerprint(before, after)


class TestHooks:
    def test_swanify_and_prune_never_call_the_users_hooks_on_the_given_model(self) -> None:
        seen: list[nn.Module] = []
        model, inputs = ZOO["vgg"]()
        model.features[0].register_forward_hook(lambda module, args, out: seen.append(module))
        swan.prune(swan.swanify(model, inputs))
        assert not any(module is model.features[0] for module in seen)

    def test_a_hook_keeps_acting_in_the_gated_and_the_pruned_model(self) -> None:
        model, inputs = ZOO["vgg"]()
        model.features[0].register_forward_hook(lambda module, args, out: 2 * out)
        wanted = model(*inputs)
        gated = swan.swanify(model, inputs).eval()
        torch.testing.assert_close(gated(*inputs), wanted, rtol=1e-5, atol=1e-6)
        close(gated)
        gated.gates.logits.data[list(gated.channels.layer("features.0").out_units)] = 3.0
        small = swan.prune(gated)
        torch.testing.assert_close(small(*inputs), gated(*inputs), rtol=1e-4, atol=1e-5)
        assert len(small.features[0]._forward_hooks) == 1


class TestProcessState:
    def test_the_random_streams_go_on_as_if_nothing_had_happened(self) -> None:
        torch.manual_seed(7)
        wanted = torch.rand(3)
        torch.manual_seed(7)
        model, inputs = odd_model("vgg")
        gated = swan.swanify(model, inputs)
        close(gated)
        swan.prune(gated)
        swan.Objective(gated, macs=0.5)(1.0)
        swan.calibrate(gated, [inputs])
        assert torch.equal(torch.rand(3), wanted)

    @pytest.mark.parametrize("enabled", [True, False])
    def test_grad_mode(self, enabled) -> None:
        model, inputs = ZOO["vgg"]()
        with torch.set_grad_enabled(enabled):
            gated = swan.swanify(model, inputs)
            swan.prune(gated)
            swan.calibrate(gated, [inputs])
            assert torch.is_grad_enabled() is enabled
        assert gated.gates.logits.requires_grad

    def test_default_dtype(self) -> None:
        model, inputs = ZOO["vgg"]()
        torch.set_default_dtype(torch.float64)
        try:
            gated = swan.swanify(model, inputs)
            assert gated.gates.logits.dtype == torch.float32  # the model's, not the process's
            close(gated)
            small = swan.prune(gated)
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(p.dtype == torch.float32 for p in small.parameters())

    def test_inference_mode(self) -> None:
        model, inputs = ZOO["vgg"]()
        with torch.inference_mode():
            gated = swan.swanify(model, inputs)
        out = gated.train()(*inputs)
        out.sum().backward()
        assert gated.gates.logits.grad is not None


class TestWhatPruneKeeps:
    @pytest.mark.parametrize("name", ["vgg", "resnet_projection", "unet", "grouped"])
    def test_frozen_parameters(self, name) -> None:
        model, inputs = ZOO[name]()
        frozen = {n for i, (n, _) in enumerate(model.named_parameters()) if i % 2}
        for n, parameter in model.named_parameters():
            parameter.requires_grad_(n not in frozen)
        gated = swan.swanify(model, inputs)
        close(gated)
        for result in (gated.model, swan.prune(gated), swan.unswanify(gated)):
            assert {n for n, p in result.named_parameters() if not p.requires_grad} == frozen

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_dtype(self, dtype) -> None:
        model, inputs = ZOO["resnet_projection"]()
        model = model.to(dtype)
        gated = swan.swanify(model, tuple(t.to(dtype) for t in inputs))
        close(gated)
        small = swan.prune(gated)
        wanted = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        assert {name: tensor.dtype for name, tensor in small.state_dict().items()} == wanted

    def test_mixed_dtypes(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        model.register_buffer("scale", torch.ones(1, dtype=torch.float64))
        model.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        gated = swan.swanify(model, IMAGE)
        close(gated)
        small = swan.prune(gated)
        assert small.scale.dtype == torch.float64
        assert small.steps.dtype == torch.int64

    def test_channels_last(self) -> None:
        model, inputs = ZOO["resnet_projection"]()
        model = model.to(memory_format=torch.channels_last)
        gated = swan.swanify(model, inputs)
        close(gated)
        weights = [m.weight for m in swan.prune(gated).modules() if isinstance(m, nn.Conv2d)]
        thick = [weight for weight in weights if weight.shape[1] > 1 and weight.shape[2] > 1]
        assert thick
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in thick)
        assert not any(weight.is_contiguous() for weight in thick)

    def test_contiguous_stays_contiguous(self) -> None:
        gated = swan.swanify(*ZOO["resnet_projection"]())
        close(gated)
        assert all(parameter.is_contiguous() for parameter in swan.prune(gated).parameters())

    def test_tied_weights(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stem = nn.Conv2d(3, 6, 1)
                self.first, self.second = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
                self.second.weight = self.first.weight
                self.fc = nn.Linear(6, 2)

            def forward(self, x: Tensor) -> Tensor:
                x = self.first(self.stem(x).relu()).relu()
                return self.fc(self.second(x).relu().mean((2, 3)))

        torch.manual_seed(3)
        model = Tied()
        gated = swan.swanify(model, IMAGE)
        assert gated.model.second.weight is gated.model.first.weight
        close(gated)
        small = swan.prune(gated)
        assert small.second.weight is small.first.weight
        assert small.first.out_channels < 6
        back = swan.unswanify(gated)
        assert back.second.weight is back.first.weight
        assert back.first.weight is not model.first.weight

    @pytest.mark.parametrize("training", [True, False])
    def test_mode(self, training) -> None:
        model, inputs = ZOO["vgg"]()
        model.train(training)
        gated = swan.swanify(model, inputs)
        close(gated)
        for result in (gated, swan.prune(gated), swan.unswanify(gated)):
            assert all(module.training is training for module in result.modules())

    def test_modes_of_single_layers(self) -> None:
        model, inputs = ZOO["vgg"]()
        model.train()
        model.features[4].eval()
        gated = swan.swanify(model, inputs)
        close(gated)
        for result in (gated.model, swan.prune(gated), swan.unswanify(gated)):
            assert [n for n, m in result.named_modules() if not m.training] == ["features.4"]

    def test_class_attributes_and_extra_state(self) -> None:
        model, inputs = ZOO["vgg"]()
        model.remark = {"author": "me"}
        gated = swan.swanify(model, inputs)
        close(gated)
        small = swan.prune(gated)
        assert type(small) is type(model)
        assert small.remark == {"author": "me"}
        assert small.remark is not model.remark
        # One text more: what `swan.save` needs to know.
        assert sorted(vars(small)) == sorted([*vars(model), "swan_provenance"])
