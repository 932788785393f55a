"""Instance norms without any tensor repeat their width as a number, which warns when it is not met."""

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.models.inputs import Inputs
from swan_surgery.models.modes import evaluating


def bare_norms(model: nn.Module) -> list[nn.Module]:
    """The instance norms of a model whose width no tensor of their own tells."""
    return [m for m in model.modules() if isinstance(m, _InstanceNorm) and not m.affine]


def follow_width(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    """A forward pre-hook: the number becomes the width of what comes."""
    assert isinstance(module, _InstanceNorm)  # noqa: S101 - hooked on these alone
    width = args[0].shape[1 if args[0].ndim > 2 else 0]
    if module.num_features != width:
        module.num_features = width


def follow_widths_(model: nn.Module, inputs: Inputs) -> None:
    """Set the numbers of all bare norms by one run, where there are any."""
    bare = bare_norms(model)
    if not bare:
        return
    handles = [module.register_forward_pre_hook(follow_width) for module in bare]
    try:
        with evaluating(model), torch.no_grad(), streams_kept():
            inputs.run(model)
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["bare_norms", "follow_width", "follow_widths_"]
