"""Gate sites: the modules that apply gate values where the graph says."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from swan_surgery.gates.bank import GateBank


class GateSite(nn.Module):
    """Multiplies an activation by its gate values (Eq. 1)."""

    def __init__(self, units: Tensor, bank: GateBank) -> None:
        """`units`: the unit at each position, -1 without a gate; broadcastable to the activation."""
        super().__init__()
        self._units = units.clone()
        self._bank = (bank,)  # a tuple, so that the bank is not registered a second time

    def forward(self, values: Tensor, x: Tensor) -> Tensor:  # [..., C, ...] -> [..., C, ...]
        """Apply the gates."""
        return x * values.to(x.dtype)

    def extra_repr(self) -> str:
        """Shown when the model is printed: `64 channels, 41 open`."""
        units = self._units.reshape(-1)
        mask = torch.cat([self._bank[0].open_mask().cpu(), torch.ones(1, dtype=torch.bool)])
        return f"{units.numel()} channels, {int(mask[units].sum())} open"


class FoldedGate(GateSite):
    """Applies gates by scaling the weight and bias of the layer in front: no extra pass.

    gamma*p and beta*p of a batch-norm, weight rows and bias of a convolution or linear layer. Where
    the weight is larger than the activation, the activation is scaled instead: the same function.
    """

    def __init__(self, units: Tensor, bank: GateBank, *, weight_axis: int, is_folded: bool) -> None:
        """`weight_axis`: the output axis of the layer's weight."""
        super().__init__(units, bank)
        self.weight_axis = weight_axis
        self.is_folded = is_folded

    def forward(self, layer: nn.Module, values: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        """Call the layer with gated parameters."""
        if not self.is_folded:
            out: Tensor = layer(x)
            return out * values.to(out.dtype)
        scaled = fold_scale(layer.weight, layer.bias, values.reshape(-1), self.weight_axis)  # type: ignore[arg-type]
        return _call_with(layer, scaled, x)

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"{super().extra_repr()}, {'folded' if self.is_folded else 'explicit'}"


def _call_with(layer: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """Call a layer with other parameters: `functional_call` without its bookkeeping per call."""
    result: Tensor
    if torch.compiler.is_compiling():
        result = functional_call(layer, tensors, (x,))
        return result
    own: dict[str, Any] = layer._parameters  # noqa: SLF001 - nn.Module's own store
    kept = {name: own[name] for name in tensors}
    own.update(tensors)
    try:
        result = layer(x)
    finally:
        own.update(kept)
    return result


def fold_scale(weight: Tensor, bias: Tensor | None, scale: Tensor, axis: int) -> dict[str, Tensor]:
    """Scale a layer's output channels through its parameters.

    Args:
        weight: any shape, the output channels along `axis`.
        bias: shape (C,), or None.
        scale: shape (C,).
        axis: of `weight`.
    """
    shape = [-1 if a == axis else 1 for a in range(weight.ndim)]
    scaled = {"weight": weight * scale.to(weight.dtype).view(shape)}
    if bias is not None:
        scaled["bias"] = bias * scale.to(bias.dtype)
    return scaled
