"""The distillation losses against their definitions."""

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

import swan_surgery as swan
from tests.gated_zoo import closed_zoo
from tests.test_plan import mlp


class TestDistillationLoss:
    def test_against_the_definition(self) -> None:
        torch.manual_seed(0)
        student, teacher = torch.randn(2, 5, 7, dtype=torch.float64).unbind()
        p, q = (teacher / 3).softmax(-1), (student / 3).softmax(-1)
        wanted = 9 * (p * (p.log() - q.log())).sum(-1).mean()
        torch.testing.assert_close(
            swan.distillation_loss(student, teacher, temperature=3.0), wanted
        )

    def test_tokens_and_batches_are_averaged(self) -> None:
        student, teacher = torch.randn(2, 5, 7, 4).unbind()
        flat = swan.distillation_loss(student.reshape(35, 4), teacher.reshape(35, 4))
        torch.testing.assert_close(swan.distillation_loss(student, teacher), flat)

    def test_no_gradient_into_the_teacher(self) -> None:
        student, teacher = (
            torch.randn(3, 4, requires_grad=True),
            torch.randn(3, 4, requires_grad=True),
        )
        swan.distillation_loss(student, teacher).backward()
        assert teacher.grad is None
        assert bool((student.grad != 0).any())

    def test_high_temperature_approaches_squared_differences(self) -> None:
        torch.manual_seed(0)
        student, teacher = torch.randn(2, 3, 4, dtype=torch.float64).unbind()
        centred = (student - teacher) - (student - teacher).mean(-1, keepdim=True)
        wanted = centred.square().sum(-1).mean() / 8
        found = swan.distillation_loss(student, teacher, temperature=1e3)
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=0)

    def test_bad_input(self) -> None:
        with pytest.raises(swan.InputError, match="must have the same shape"):
            swan.distillation_loss(torch.zeros(2, 3), torch.zeros(2, 4))
        with pytest.raises(swan.InputError, match="temperature must be above 0"):
            swan.distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature=0.0)


class TestOtherHeads:
    def test_sigmoid_is_cross_entropy_less_the_least_it_can_be(self) -> None:
        torch.manual_seed(0)
        student, teacher = torch.randn(2, 6, 5, dtype=torch.float64).unbind()
        p = (teacher / 2).sigmoid()
        cross, least = (binary_cross_entropy_with_logits(y / 2, p) for y in (student, teacher))
        found = swan.distillation_loss(student, teacher, temperature=2.0, head="sigmoid")
        torch.testing.assert_close(found, 4 * (cross - least))
        assert float(swan.distillation_loss(teacher, teacher, head="sigmoid")) == 0

    def test_sigmoid_of_two_is_softmax_of_one_and_zero(self) -> None:
        student, teacher = torch.randn(2, 6, 1, dtype=torch.float64).unbind()
        two = (torch.cat([y, torch.zeros_like(y)], -1) for y in (student, teacher))
        torch.testing.assert_close(
            swan.distillation_loss(student, teacher, head="sigmoid"), swan.distillation_loss(*two)
        )

    def test_regression_does_not_mind_the_unit(self) -> None:
        student, teacher = torch.randn(2, 9, 3, dtype=torch.float64).unbind()
        wanted = (student - teacher).square().mean() / teacher.var(correction=0)
        for unit in (1.0, 1000.0):
            found = swan.distillation_loss(unit * student, unit * teacher, head="regression")
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)

    def test_several_outputs_each_by_its_head(self) -> None:
        def drawn():
            return {"logits": torch.randn(4, 5), "boxes": [torch.randn(4, 2), torch.randn(4, 3)]}

        one, two = drawn(), drawn()
        kinds = {"logits": "sigmoid", "boxes.*": "regression"}
        parts = [swan.distillation_loss(one["logits"], two["logits"], head="sigmoid")]
        for y, w in zip(one["boxes"], two["boxes"], strict=True):
            parts.append(swan.distillation_loss(y, w, head="regression"))
        found = swan.distillation_loss(one, two, head=kinds)
        torch.testing.assert_close(found, torch.stack(parts).mean())
        only = swan.distillation_loss(one, two, head={"logits": "sigmoid"})
        torch.testing.assert_close(only, parts[0])
        with pytest.raises(swan.InputError, match=r"head names scores, but the outputs are called"):
            swan.distillation_loss(one, two, head={"scores": "softmax"})
        with pytest.raises(swan.InputError, match=r"head must be one of .*got 'tanh'"):
            swan.distillation_loss(one, two, head="tanh")


class TestFeatures:
    def test_widths_that_differ_learn_a_map_and_the_rest_none(self) -> None:
        torch.manual_seed(0)
        gated = closed_zoo("vgg")
        dense, small = swan.unswanify(gated), swan.prune(gated)
        names = [n for n, m in dense.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        x = gated.own_inputs().args[0]
        follow = swan.FeatureDistillation(small, dense, modules=names, example_inputs=x)
        narrower = {
            n for n in names
            if small.get_submodule(n).weight.shape[0] < dense.get_submodule(n).weight.shape[0]
        }  # fmt: skip
        assert {n.replace("/", ".") for n in follow.maps} == narrower < set(names)
        before = follow(x).item()
        optimizer = torch.optim.Adam([*small.parameters(), *follow.parameters()], lr=0.01)
        for _ in range(20):
            optimizer.zero_grad()
            follow(x).backward()
            optimizer.step()
        assert follow(x).item() < 0.7 * before
        assert all(p.grad is None for p in dense.parameters())
        assert not any(m._forward_hooks for m in (*small.modules(), *dense.modules()))
        torch.testing.assert_close(follow.teacher_output, dense.eval()(x))

    def test_of_itself_it_is_zero_and_gated_models_learn_too(self) -> None:
        gated = mlp(3, 8, 2)
        dense, x = swan.unswanify(gated), torch.randn(5, 3)
        follow = swan.FeatureDistillation(gated, dense, modules="1", example_inputs=x)
        assert not list(follow.parameters())
        assert follow(x).item() == pytest.approx(0, abs=1e-9)

    def test_bad_input(self) -> None:
        dense, x = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2)), torch.zeros(1, 3)
        with pytest.raises(swan.InputError, match="Sequential has no module '7'"):
            swan.FeatureDistillation(dense, dense, modules=["7"], example_inputs=x)
        other = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(-1, (2, 2)))
        reshaped = nn.Sequential(nn.Linear(3, 8), nn.Identity())
        with pytest.raises(swan.InputError, match=r"gives \(1, 8\) .* and \(1, 2, 2\)"):
            swan.FeatureDistillation(reshaped, other, modules=["1"], example_inputs=x)
