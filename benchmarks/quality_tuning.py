"""Other ways to fine-tune what was cut, on top of one cut that is compensated; `quality.py` compares them.

None is part of the training that all methods share, and none makes the network larger in the end.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import swan_surgery as swan


Loss = Callable[[nn.Module, Any], Tensor]
# Weights of the average: about the last 50 steps of 234 count.
_DECAY = 0.98
# What features weigh beside the cross entropy, both in units of their own size.
_FEATURES = 0.3


class Tuning:
    """How a small network is fine-tuned: nothing is changed here."""

    def __init__(self, small: nn.Module, dense: nn.Module, example: Tensor) -> None:
        self.small, self.dense, self.example = small, dense, example

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer gets beside the network's own."""
        return []

    def loss(self, plain: Loss, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Of a batch."""
        return plain(model, batch)

    def after_step(self) -> None:
        """When weights have moved."""

    def finish_(self) -> None:
        """Before the end is measured."""


class Averaged(Tuning):
    """The network that is kept is the average of those that were met (batch-norm statistics, too)."""

    def __init__(self, small: nn.Module, dense: nn.Module, example: Tensor) -> None:
        super().__init__(small, dense, example)
        self.average = copy.deepcopy(small)

    def after_step(self) -> None:
        """The average moves a little."""
        with torch.no_grad():
            pairs = zip(
                self.average.state_dict().values(), self.small.state_dict().values(), strict=True
            )
            for mean, own in pairs:
                if own.is_floating_point():
                    mean.lerp_(own, 1 - _DECAY)

    def finish_(self) -> None:
        """The average takes the network's place."""
        self.small.load_state_dict(self.average.state_dict())


class Features(Tuning):
    """Blocks' outputs follow the dense network's, by linear maps that are learnt along."""

    def __init__(self, small: nn.Module, dense: nn.Module, example: Tensor) -> None:
        super().__init__(small, dense, example)
        names = [
            name
            for name, module in small.named_modules()
            if type(module).__name__ in ("Block", "BasicBlock")
        ]
        inputs = torch.cat([example, example])
        self.follow = swan.FeatureDistillation(small, dense, modules=names, example_inputs=inputs)

    def parameters(self) -> list[nn.Parameter]:
        """The maps'."""
        return list(self.follow.parameters())

    def loss(self, plain: Loss, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:  # noqa: ARG002 - it runs inside
        """The plain loss, and the distance of features."""
        x, y = batch
        distance: Tensor = self.follow(x)

        def ran(_: Tensor) -> Any:
            return self.follow.output

        return plain(ran, (x, y)) + _FEATURES * distance  # type: ignore[arg-type]  # called as one


class Factored(Tuning):
    """Weights of what reads cut channels keep those of the closed ones, and learn what stands for them.

    The weight is W + V E: V [outputs, closed, ...] as the dense network has it, E [closed, kept] from zero on, both
    learnt, merged when training ends: what was cut still shapes how what stayed learns.
    """

    def __init__(self, small: nn.Module, dense: nn.Module, example: Tensor) -> None:
        super().__init__(small, dense, example)
        self.factored: list[nn.Module] = []
        kept, before = swan.kept(small), dict(dense.named_parameters())
        for name, module in small.named_modules():
            axes = kept.get(f"{name}.weight", {})
            if not isinstance(module, nn.Conv2d) or 1 not in axes:
                continue
            weight = before[f"{name}.weight"].detach()
            rows = torch.tensor(axes.get(0, range(len(weight))))
            closed = sorted(set(range(weight.shape[1])) - set(axes[1]))
            if closed:
                gone = weight.index_select(0, rows)[:, closed].clone()
                parametrize.register_parametrization(
                    module, "weight", _Sum(gone, module.weight.shape[1])
                )
                self.factored.append(module)

    def finish_(self) -> None:
        """One weight is left."""
        for module in self.factored:
            parametrize.remove_parametrizations(module, "weight")


class _Sum(nn.Module):
    """W + V E."""

    def __init__(self, gone: Tensor, kept: int) -> None:
        super().__init__()
        self.gone = nn.Parameter(gone)
        self.stands = nn.Parameter(gone.new_zeros(gone.shape[1], kept))

    def forward(self, weight: Tensor) -> Tensor:
        """Of the weight by itself."""
        return weight + torch.einsum("oc...,ck->ok...", self.gone, self.stands)


TUNINGS: dict[str, type[Tuning]] = {
    "": Tuning,
    "averaged": Averaged,
    "features": Features,
    "factored": Factored,
}
