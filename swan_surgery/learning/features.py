"""Learning from the dense network: what its layers give, through a linear map where widths differ."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from swan_surgery.errors import InputError
from swan_surgery.gates import GatedModel
from swan_surgery.models.batches import run_on_batch
from swan_surgery.models.modes import evaluating
from swan_surgery.models.outputs import spread_of


class FeatureDistillation(nn.Module):
    """How far the outputs of named modules are from those of the same modules of the dense network.

    Where a module of the smaller network is narrower, a linear map from its channels to the dense ones is
    learnt along (FitNets, arXiv:1412.6550): give the optimizer `follow.parameters()`, too. The networks are
    no part of it, so its parameters are the maps' alone, and nothing is left in either network.

    Attributes:
        output: what the network that learns returned last.
        teacher_output: what the dense network returned last, without gradient.

    Example:
        >>> dense = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> gated = swan.swanify(dense, torch.zeros(1, 3))
        >>> small = swan.prune_by_score(gated, swan.importance(gated, "magnitude"), macs=0.5)
        >>> x = torch.randn(16, 3)
        >>> follow = swan.FeatureDistillation(small, dense, modules=["1"], example_inputs=x)
        >>> optimizer = torch.optim.AdamW([*small.parameters(), *follow.parameters()])
        >>> loss = follow(x) + swan.distillation_loss(follow.output, follow.teacher_output)
        >>> loss.backward()
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        *,
        modules: Iterable[str],
        example_inputs: Any,
    ) -> None:
        """Run both once to see the widths.

        Args:
            model: that learns: a pruned, gated or any other network with modules of these names.
            teacher: the dense network; it runs in eval mode.
            modules: names whose outputs are compared; each returns one tensor.
            example_inputs: a batch, as `forward` of this takes it.

        Raises:
            InputError: no such module, one that does not run or returns no tensor, or outputs that differ
                in more than one axis.
        """
        super().__init__()
        self._networks = (model, teacher)  # a tuple: no part of this module
        self._names = (modules,) if isinstance(modules, str) else tuple(modules)
        self.output: Any = None
        self.teacher_output: Any = None
        self.maps = nn.ModuleDict()
        with torch.no_grad(), evaluating(model, teacher):
            found, wanted = (self._features(own, example_inputs)[0] for own in self._networks)
        self._axes: dict[str, int] = {}
        for name in self._names:
            axes = _differing(name, found[name], wanted[name])
            for axis in axes:
                into, out = found[name].shape[axis], wanted[name].shape[axis]
                like: dict[str, Any] = {"device": found[name].device, "dtype": found[name].dtype}
                self.maps[name.replace(".", "/")] = nn.Linear(into, out, **like)
                self._axes[name] = axis

    def forward(self, batch: Any) -> Tensor:
        """Run both networks on a batch: inputs, a tuple whose first element is the input, or a dict.

        Returns:
            A scalar: squared differences over the variance of the dense outputs, a mean over modules.
        """
        model, teacher = self._networks
        with torch.no_grad(), evaluating(teacher):
            wanted, self.teacher_output = self._features(teacher, batch)
        found, self.output = self._features(model, batch)
        parts = []
        for name in self._names:
            own, target = found[name], wanted[name]
            if name in self._axes:
                axis = self._axes[name]
                own = self.maps[name.replace(".", "/")](own.movedim(axis, -1)).movedim(-1, axis)
            parts.append((own - target).square().mean() / spread_of(target).square().to(own.dtype))
        return torch.stack(parts).mean()

    def _features(self, network: nn.Module, batch: Any) -> tuple[dict[str, Tensor], Any]:
        seen: dict[str, Any] = {}
        with _listening(network, self._names, seen):
            output = run_on_batch(network, batch)
        for name in self._names:
            if not isinstance(seen.get(name), Tensor):
                what = f"returned {type(seen[name]).__name__}" if name in seen else "did not run"
                raise InputError(
                    f"module {name!r} of {type(network).__name__} {what}; its output must be one tensor "
                    f"(of a gated model that runs as a graph only single layers do: swanify(in_place=True))"
                )
        return seen, output


@contextmanager
def _listening(network: nn.Module, names: Iterable[str], seen: dict[str, Any]) -> Iterator[None]:
    inner = network.model if isinstance(network, GatedModel) else network
    handles = []
    try:
        for name in names:
            try:
                module = inner.get_submodule(name)
            except AttributeError as err:
                raise InputError(f"{type(network).__name__} has no module {name!r}") from err

            def hear(_module: nn.Module, _args: Any, out: Any, name: str = name) -> None:
                seen[name] = out

            handles.append(module.register_forward_hook(hear))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _differing(name: str, one: Tensor, two: Tensor) -> list[int]:
    """The axis in which outputs differ, if there is one: the channels."""
    pairs = zip(one.shape, two.shape, strict=False)
    axes = [axis for axis, (own, wanted) in enumerate(pairs) if own != wanted]
    if one.ndim != two.ndim or len(axes) > 1:
        raise InputError(
            f"module {name!r} gives {tuple(one.shape)} in the smaller network and {tuple(two.shape)} in the "
            f"dense one; they may differ in their channels alone"
        )
    return axes


__all__ = ["FeatureDistillation"]
