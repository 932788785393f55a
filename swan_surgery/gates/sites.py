"""Gate sites: the modules that apply gate values where the graph says."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from swan_surgery.gates.bank import GateBank
from swan_surgery.gates.index_tables import IndexTables


class GateSite(nn.Module):
    """Multiplies an activation by its gate values (Eq. 1)."""

    def __init__(self, units: Tensor, bank: GateBank) -> None:
        """`units`: the unit at each position, -1 without a gate; broadcastable to the activation."""
        super().__init__()
        self._units = units.clone()
        flat = self._units.reshape(-1)
        self._free = bool((flat < 0).any())
        self._tables = IndexTables(flat.clamp(min=0), (flat < 0).view(units.shape))
        self._bank = (bank,)  # a tuple, so that the bank is not registered a second time

    def values(self, is_open: Tensor) -> Tensor:
        """The gate values here, broadcastable to the activation, from the logits alone.

        Args:
            is_open: the bank's open mask.
        """
        bank = self._bank[0]
        units, is_free = self._tables.on(bank.logits.device)
        values = bank.values(units, is_open).view(self._units.shape)
        return values.masked_fill(is_free, 1.0) if self._free else values

    def forward(self, values: Tensor, x: Tensor) -> Tensor:  # [..., C, ...] -> [..., C, ...]
        """Apply the gates."""
        return x * values.to(x.dtype)

    def extra_repr(self) -> str:
        """Shown when the model is printed: `64 channels, 41 open`."""
        units = self._units.reshape(-1)
        mask = torch.cat([self._bank[0].open_mask().cpu(), torch.ones(1, dtype=torch.bool)])
        return f"{units.numel()} channels, {int(mask[units].sum())} open"


class ParameterGate(GateSite):
    """Scales the columns of a parameter that read gated channels: the layer reads x * p (Eq. 1)."""

    def __init__(self, units: Tensor, bank: GateBank, *, names: Sequence[str]) -> None:
        """`names`: the dotted names of the parameter in the base model, several if it is tied."""
        super().__init__(units, bank)
        self.names = tuple(names)

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"{super().extra_repr()}, folded into what {self.names[0]!r} reads"


class StatisticGate(GateSite):
    """Weighs one statistic over gated channels: the `number`-th `function` in a run of `module`."""

    def __init__(
        self,
        units: Tensor,
        bank: GateBank,
        *,
        module: str,
        call: tuple[str, int],
        training: bool,
        site: str,
    ) -> None:
        """`site`: where in the code the call stands."""
        super().__init__(units, bank)
        self.site = site
        self.module = module
        self.call = call
        self.in_training = training

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"{super().extra_repr()}, weighs {self.call[0]} in {self.module!r}"


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

    def forward(  # type: ignore[override]
        self,
        layer: nn.Module,
        values: Tensor,
        x: Tensor,
        scaled: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Call the layer with gated parameters: `scaled`, where they are at hand (`fold_vectors`)."""
        if not self.is_folded:
            out: Tensor = layer(x)
            return out * values.to(out.dtype)
        if scaled is None:
            scaled = fold_scale(layer.weight, layer.bias, values.reshape(-1), self.weight_axis)  # type: ignore[arg-type]
        return _call_with(layer, scaled, x)

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"{super().extra_repr()}, {'folded' if self.is_folded else 'explicit'}"


def _call_with(layer: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """Call one of torch's own layers with other parameters; the layer itself stays as it is.

    What is called is a stand-in that shares everything else, so threads may call the layer at once.
    """
    result: Tensor
    if torch.compiler.is_compiling():
        result = functional_call(layer, tensors, (x,))
        return result
    stand_in = object.__new__(type(layer))
    own = vars(layer)
    vars(stand_in).update(own, _parameters={**own["_parameters"], **tensors})
    result = stand_in(x)
    return result


def fold_vectors(layers: Sequence[nn.Module], values: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """Scale the vectors of many normalisations in one product: a GPU takes as long for each as for all.

    Args:
        layers: whose `weight`, and `bias` where there is one, have shape (C,).
        values: of each layer's gates, C of them.

    Returns:
        Per layer its scaled parameters by name.
    """
    found: list[dict[str, Tensor]] = [{} for _ in layers]
    # Of weights and biases alike, so that the gradients on gates meet once.
    scales: dict[tuple[int, ...], Tensor] = {}
    for name in ("weight", "bias"):
        alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for index, layer in enumerate(layers):
            vector = getattr(layer, name)
            if vector is not None:
                alike.setdefault((vector.device, vector.dtype), []).append(index)
        for (_, dtype), members in alike.items():
            vectors = [getattr(layers[index], name) for index in members]
            own = tuple(members)
            if own not in scales:
                scales[own] = torch.cat([values[index].reshape(-1) for index in own])
            whole = torch.cat(vectors) * scales[own].to(dtype)
            parts = whole.split([vector.numel() for vector in vectors])
            for index, part in zip(members, parts, strict=True):
                found[index][name] = part
    return found


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
