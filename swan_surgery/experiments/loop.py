"""The training loop of everything here: it can be left after any step and taken up again."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from swan_surgery.experiments.processes import Processes
from swan_surgery.learning.objective import Objective


class Batches(Protocol):
    """What is left of an epoch."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


Loss = Callable[[nn.Module, Any], Tensor]


def cosine(place: float, length: float, warmup: float = 0.0) -> float:
    """Share of the peak learning rate at a place in a schedule, all in epochs: a rise, then half a cosine."""
    rise = min(1.0, (place + 1e-3) / warmup) if warmup else 1.0
    return rise * 0.5 * (1 + math.cos(math.pi * place / max(length, 1)))


class Loop:
    """Trains a model through epochs; `state_dict` and `load_state_dict` leave and take up in the middle of one.

    Attributes:
        model: what is trained, in place.
        optimizer: its; the learning rate that each group is given is its peak.
        epoch: that comes next, or that it stands in.
        rate: of the last step, that of the first group.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        *,
        share: Callable[[float], float],
        objective: Objective | None = None,
        processes: Processes | None = None,
    ) -> None:
        """Make a loop.

        Args:
            model: gated or plain.
            optimizer: of its parameters.
            loss: of the model, or of what stands for it among several processes, and a batch.
            share: of the peak learning rates, at a place in epochs.
            objective: of a gated model: what is added to the loss.
            processes: that train together; by default this one alone.
        """
        self.model, self.optimizer = model, optimizer
        self.rate = 0.0
        self._loss, self._share, self._objective = loss, share, objective
        self._processes = processes
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
        self.epoch, self._step = 0, 0
        self._losses = torch.zeros(())

    def run(
        self,
        epochs: range,
        batches: Callable[[int, int], Batches],
        *,
        after_epoch: Callable[[int, float], None],
        after_step: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Train through epochs, from where the loop stands.

        Args:
            epochs: which ones.
            batches: of an epoch, from one of its steps on.
            after_epoch: called with the epoch and its mean loss, without the objective's part.
            after_step: called with the number of steps that the epoch has behind it, not after its last.
        """
        wrapped = self.model if self._processes is None else self._processes.wrap(self.model)
        for epoch in range(max(epochs.start, self.epoch), epochs.stop):
            drawn = batches(epoch, self._step)
            number = self._step + len(drawn)
            wrapped.train()
            for batch in drawn:
                self._update(wrapped, batch, epoch + self._step / number)
                self._step += 1
                if self._step < number:
                    after_step(self._step)
            mean = float(self._mean(number))
            self.epoch, self._step = epoch + 1, 0
            self._losses = torch.zeros_like(self._losses)
            after_epoch(epoch, mean)

    def _update(self, wrapped: nn.Module, batch: Any, place: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self._share(place) * group["peak"]
        self.rate = self.optimizer.param_groups[0]["lr"]
        loss = self._loss(wrapped, batch)
        self._losses = self._losses.to(loss.device) + loss.detach()
        if self._objective is not None:
            loss = loss + self._objective(place)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def _mean(self, number: int) -> Tensor:
        if self._processes is None:
            return self._losses / number
        self._processes.agree_(self.model)
        return self._processes.total(self._losses) / (number * self._processes.count)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands: the model, the optimizer, the objective, epoch and step."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "objective": None if self._objective is None else self._objective.state_dict(),
            "place": [self.epoch, self._step],
            "losses": self._losses,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self._objective is not None:
            self._objective.load_state_dict(state["objective"])
        self.epoch, self._step = state["place"]
        self._losses = state["losses"]


__all__ = ["Batches", "Loop", "Loss", "cosine"]
