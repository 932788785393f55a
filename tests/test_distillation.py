"""The distillation loss against its definition."""

import pytest
import torch

import swan_surgery as swan


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
        with pytest.raises(swan.InputError, match="same shape"):
            swan.distillation_loss(torch.zeros(2, 3), torch.zeros(2, 4))
        with pytest.raises(swan.InputError, match="temperature must be above 0"):
            swan.distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature=0.0)
