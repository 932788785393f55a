"""The training after a cut: a function of the user's, or the short one that is built in."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import cos, inf, pi
from typing import Any, Literal

import torch
from torch import nn

from swan_surgery.compressing.cutter import Loss
from swan_surgery.compressing.own_outputs import unlikeness
from swan_surgery.compressing.telling import Tell
from swan_surgery.environment.kinds_of_numbers import is_number, is_whole
from swan_surgery.errors import InputError
from swan_surgery.models.modes import modes_kept


Finetune = Callable[[nn.Module, range], None]


@dataclass(frozen=True, slots=True)
class Training:
    """How the smaller model is trained, in one schedule over all cuts.

    Attributes:
        teacher: the given model.
        data: batches, again and again.
        loss: "self" (toward the teacher's outputs), or `loss(model, batch)`.
        finetune: how many steps, or a function told which of `steps` are its.
        steps: of a function.
        lr: peak learning rate of the built-in training.
    """

    teacher: nn.Module
    data: Iterable[Any]
    loss: Loss | Literal["self"]
    finetune: int | Finetune
    steps: int
    lr: float

    @property
    def total(self) -> int:
        """Steps in all."""
        return self.steps if callable(self.finetune) else self.finetune

    def check(self) -> None:
        """Refuse what cannot be trained, before anything else is done.

        Raises:
            InputError: an iterator, a number of steps or a learning rate that is none.
        """
        if callable(self.finetune):
            if self.steps < 1:
                raise InputError(
                    f"finetune is a function, so say how many steps there are in all: steps=1000; got {self.steps}"
                )
            return
        if self.steps:
            raise InputError("steps belongs to a finetune function; give finetune=1000 alone")
        lr: Any = self.lr
        if not is_whole(self.finetune) or not is_number(lr):
            raise InputError(
                f"finetune is a function or a number of steps, and lr a number; got {self.finetune!r} and {lr!r}"
            )
        if self.finetune < 0 or not 0 < lr < inf:
            raise InputError(f"finetune and lr must not be negative; got {self.finetune} and {lr}")
        if self.finetune and isinstance(self.data, Iterator):
            raise InputError(
                "training reads the data again and again; pass a loader or a list, no iterator"
            )

    def run(self, model: nn.Module, steps: range, tell: Tell) -> None:
        """Train a model in place; its mode is as before afterwards."""
        if callable(self.finetune):
            tell(f"training, steps {steps.start} to {steps.stop}", 0.0)
            self.finetune(model, steps)
            return
        with modes_kept(model, self.teacher):
            self._run(model.train(), steps, tell)

    def _run(self, model: nn.Module, steps: range, tell: Tell) -> None:
        self.teacher.eval()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            raise InputError(
                "no parameter of the model requires a gradient, so nothing can be trained"
            )
        optimizer = torch.optim.AdamW(trained, self.lr)
        batches = self._batches()
        with torch.enable_grad():
            for step in steps:
                for group in optimizer.param_groups:
                    group["lr"] = self.lr * 0.5 * (1 + cos(pi * step / self.total))
                optimizer.zero_grad()
                self._loss(model, next(batches)).backward()
                optimizer.step()
                tell("training", (step + 1 - steps.start) / len(steps))

    def _loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        if self.loss == "self":
            return unlikeness(model, self.teacher, batch)
        return self.loss(model, batch)

    def _batches(self) -> Iterator[Any]:
        while True:
            yield from self.data


__all__ = ["Finetune", "Training"]
