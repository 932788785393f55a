"""Weights and gate logits in two groups of an optimizer."""

import torch
from torch import Tensor

import swan_surgery as swan
from swan_surgery.gates import GatedModel
from tests.test_objective import zoo_gated


class TestParameterGroups:
    def groups(self, **options) -> tuple[GatedModel, list[dict]]:
        gated = zoo_gated()
        next(gated.model.parameters()).requires_grad_(False)
        return gated, swan.parameter_groups(gated, lr=0.2, **options)

    def test_logits_apart_without_weight_decay(self) -> None:
        gated, groups = self.groups(weight_decay=0.01, gate_lr=0.5)
        (gate_group,) = [g for g in groups if any(p is gated.gates.logits for p in g["params"])]
        assert len(gate_group["params"]) == 1
        assert gate_group["weight_decay"] == 0
        assert gate_group["lr"] == 0.5
        (rest,) = [g for g in groups if g is not gate_group]
        assert rest["lr"] == 0.2
        assert rest["weight_decay"] == 0.01

    def test_weight_decay_is_the_optimizers_unless_given(self) -> None:
        optimizer = torch.optim.SGD(self.groups()[1], weight_decay=0.3)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]

    def test_gate_lr_defaults_to_ten_times_lr(self) -> None:
        assert self.groups()[1][1]["lr"] == 2.0
        assert self.groups(gate_lr=0.0)[1][1]["lr"] == 0.0

    def test_every_trainable_parameter_once_and_no_frozen_one(self) -> None:
        gated, groups = self.groups()
        listed = [id(p) for group in groups for p in group["params"]]
        assert sorted(listed) == sorted(id(p) for p in gated.parameters() if p.requires_grad)
        assert id(next(gated.model.parameters())) not in listed

    def test_weight_decay_does_not_move_the_logits(self) -> None:
        gated, groups = self.groups(weight_decay=0.5)
        before = gated.gates.logits.detach().clone()
        optimizer = torch.optim.SGD(groups)
        for parameter in gated.parameters():
            parameter.grad = torch.zeros_like(parameter)
        weight: Tensor = groups[0]["params"][0]
        start = weight.detach().clone()
        optimizer.step()
        assert torch.equal(gated.gates.logits, before)
        assert not torch.equal(weight, start)
