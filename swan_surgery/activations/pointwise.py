"""The activations that models have: torch's functions by name, and what any of them is by its values."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# Largest difference in float64 at which two functions are the same one.
SAME = 1e-12
# Where the probe is 0.
_ZERO = 400


@dataclass(frozen=True, slots=True)
class Pointwise:
    """A torch function of one tensor: what computes it, and its settings, in order."""

    run: Callable[..., Tensor]
    settings: tuple[str, ...] = ()


FUNCTIONS: Mapping[str, Pointwise] = {
    "relu": Pointwise(F.relu, ("inplace",)),
    "relu_": Pointwise(F.relu),
    "relu6": Pointwise(F.relu6, ("inplace",)),
    "leaky_relu": Pointwise(F.leaky_relu, ("negative_slope", "inplace")),
    "leaky_relu_": Pointwise(F.leaky_relu, ("negative_slope",)),
    "elu": Pointwise(F.elu, ("alpha", "inplace")),
    "elu_": Pointwise(F.elu, ("alpha",)),
    "celu": Pointwise(F.celu, ("alpha", "inplace")),
    "celu_": Pointwise(F.celu, ("alpha",)),
    "selu": Pointwise(F.selu, ("inplace",)),
    "selu_": Pointwise(F.selu),
    "gelu": Pointwise(F.gelu, ("approximate",)),
    "silu": Pointwise(F.silu, ("inplace",)),
    "mish": Pointwise(F.mish, ("inplace",)),
    "hardswish": Pointwise(F.hardswish, ("inplace",)),
    "hardtanh": Pointwise(F.hardtanh, ("min_val", "max_val", "inplace")),
    "hardtanh_": Pointwise(F.hardtanh, ("min_val", "max_val")),
    "sigmoid": Pointwise(torch.sigmoid),
    "sigmoid_": Pointwise(torch.sigmoid),
    "hardsigmoid": Pointwise(F.hardsigmoid, ("inplace",)),
    "tanh": Pointwise(torch.tanh),
    "tanh_": Pointwise(torch.tanh),
    "softplus": Pointwise(F.softplus, ("beta", "threshold")),
    "softsign": Pointwise(F.softsign),
    "logsigmoid": Pointwise(F.logsigmoid),
}
_SUBJECT = ("input", "self")


class Function(nn.Module):
    """An activation that is called as a function, as a module."""

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        """`settings`: by name, as in `{"approximate": "tanh"}`."""
        super().__init__()
        self.function, self.settings = name, dict(settings)

    def forward(self, x: Tensor, *, in_place: bool = False) -> Tensor:  # [...] -> [...]
        """The function of it; with `in_place`, x may be lost."""
        known = FUNCTIONS[self.function]
        if in_place and "inplace" in known.settings:
            return known.run(x, **self.settings, inplace=True)
        return known.run(x, **self.settings)

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return ", ".join([self.function, *(f"{k}={v!r}" for k, v in self.settings.items())])


def settings_of(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a call, by name; whether it was in place is left out."""
    named = dict(zip(FUNCTIONS[name].settings, args[0 if _is_named(kwargs) else 1 :], strict=False))
    named |= {key: value for key, value in kwargs.items() if key not in _SUBJECT}
    named.pop("inplace", None)
    return named


def _is_named(kwargs: Mapping[str, Any]) -> bool:
    return any(key in kwargs for key in _SUBJECT)


def as_module(module: nn.Module) -> nn.Module:
    """A copy of an activation module that works on a tensor of its own, never in place."""
    own = deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})
    if vars(own).get("inplace"):
        vars(own)["inplace"] = False
    return own


def probe() -> Tensor:
    """Where functions are compared: float64, shape (2, 803), both signs, fine and coarse."""
    fine = torch.linspace(-8.0, 8.0, 801, dtype=torch.float64)
    return torch.stack(
        [
            torch.cat([fine, fine.new_tensor([-40.0, 40.0])]),
            torch.full((803,), 0.3, dtype=torch.float64),
        ]
    )


def difference(one: Callable[[Tensor], Tensor], two: Callable[[Tensor], Tensor]) -> float:
    """The largest difference of two functions at the probe."""
    x = probe()
    with torch.no_grad():
        return float((one(x.clone()) - two(x.clone())).abs().max())


def is_homogeneous(function: Callable[[Tensor], Tensor]) -> bool:
    """Whether f(2 x) = 2 f(x), as of ReLU: a horizontal scale then cancels."""
    return difference(lambda x: function(2 * x), lambda x: 2 * function(x)) <= SAME


def why_not_self_gated(module: nn.Module) -> str | None:
    """Why a module without parameters is no activation x times a gate; None if it is one; "" if it is none.

    It must work position by position, be 0 at 0, no straight line, and treat the signs differently:
    sigmoid and tanh squash, and are left to what they gate.
    """
    x = probe()
    out = _at_every_position(module, x)
    if out is None:
        return ""
    zero, step = out[0, _ZERO], out[0, _ZERO + 1] - out[0, _ZERO]
    if torch.allclose(out[0] - zero, x[0] * step / x[0, _ZERO + 1], atol=SAME):
        return ""  # a straight line: dropout in eval mode, identity
    if float(zero.abs()) > SAME:
        return "it is not 0 at 0"
    mirrored = -out[0, : 2 * _ZERO + 1].flip(0)
    return (
        "it squashes both signs alike"
        if torch.allclose(out[0, : 2 * _ZERO + 1], mirrored)
        else None
    )


def _at_every_position(module: nn.Module, x: Tensor) -> Tensor | None:
    """What a module gives for x, if it works position by position."""
    try:
        with torch.no_grad():
            out = module(x.clone())
            reordered = module(x.flip(1).contiguous()).flip(1)
            alone = module(x[:1, :5].clone())
    except Exception:  # noqa: BLE001 - a module of any kind, on what it may not take
        return None
    if not isinstance(out, Tensor) or out.shape != x.shape or not out.is_floating_point():
        return None
    same = torch.allclose(out, reordered, atol=SAME) and torch.allclose(
        out[:1, :5], alone, atol=SAME
    )
    return out if same else None
