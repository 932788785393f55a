"""What the scales of FleS are on data: quantiles per activation, and a picture of them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from torch import Tensor, nn

from swan_surgery.activations.hearing_data import run_hooked
from swan_surgery.activations.scaling import FleS, LearntScales
from swan_surgery.errors import InputError


_SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)
_ROW, _LEFT, _WIDTH = 16, 220, 260
_COLOURS = {"kappa_ve": "#2563eb", "kappa_ho": "#d97706"}


@dataclass(frozen=True, slots=True)
class Spread:
    """The 5, 25, 50, 75 and 95 % quantiles of one scale of one activation, over samples and channels."""

    name: str
    scale: str
    quantiles: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Kappas:
    """The scales of all FleS activations of a model on data; `to_svg()` draws them."""

    spreads: tuple[Spread, ...]

    def __str__(self) -> str:
        lines = ["activation  scale  5 %  25 %  50 %  75 %  95 %"]
        for own in self.spreads:
            numbers = "  ".join(f"{value:.3f}" for value in own.quantiles)
            lines.append(f"{own.name}  {own.scale}  {numbers}")
        return "\n".join(lines)

    def to_svg(self) -> str:
        """A self-contained picture: a bar from 5 to 95 %, a thick one from 25 to 75 %, the line at 1."""
        values = [value for own in self.spreads for value in own.quantiles] + [1.0]
        low, high = min(values), max(values)
        span = (high - low) or 1.0

        def place(value: float) -> float:
            return _LEFT + _WIDTH * (value - low) / span

        height = _ROW * (len(self.spreads) + 2)
        size = f"0 0 {_LEFT + _WIDTH + 20} {height}"
        one = f'x1="{place(1):.1f}" x2="{place(1):.1f}" y1="0" y2="{height - _ROW}"'
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" font-size="10">',
            f'<line {one} stroke="#999"/>',
        ]
        for row, own in enumerate(self.spreads):
            y, colour = _ROW * (row + 0.7), _COLOURS[own.scale]
            text = escape(f"{own.name} {own.scale}")
            parts.append(f'<text x="{_LEFT - 8}" y="{y + 3:.1f}" text-anchor="end">{text}</text>')
            for first, last, thick in ((0, 4, 1.5), (1, 3, 6)):
                ends = place(own.quantiles[first]), place(own.quantiles[last])
                parts.append(
                    f'<line x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{y:.1f}" y2="{y:.1f}" '
                    f'stroke="{colour}" stroke-width="{thick}"/>'
                )
            parts.append(
                f'<circle cx="{place(own.quantiles[2]):.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
            )
        parts += [
            f'<text x="{place(value):.1f}" y="{height - 3}" text-anchor="middle">{value:.2f}</text>'
            for value in sorted({low, 1.0, high})
        ]
        return "\n".join([*parts, "</svg>"])


def kappas(model: nn.Module, batches: Iterable[Any]) -> Kappas:
    """How far the scales of a model's FleS activations are from 1, where they all started.

    Args:
        model: with "fles" activations; it runs in eval mode and stays as it is.
        batches: inputs, or tuples whose first element is the input, or dicts of keyword arguments.

    Raises:
        InputError: the model has no such activation, or none ran.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2))
        >>> found = swan.kappas(swan.swap_activations(net, "fles", torch.randn(4, 3)), [torch.randn(4, 3)])
        >>> found.spreads[0]
        Spread(name='1', scale='kappa_ve', quantiles=(1.0, 1.0, 1.0, 1.0, 1.0))
    """
    scaled = {n: m for n, m in model.named_modules() if isinstance(m, (FleS, LearntScales))}
    if not scaled:
        raise InputError("the model has no FleS activation; swan.swap_activations puts them in")
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in scaled}
    run_hooked(model, {module: _noting(seen[name]) for name, module in scaled.items()}, batches)
    spreads = [
        Spread(name, scale, _quantiles([pair[index] for pair in pairs]))
        for name, pairs in seen.items()
        if pairs
        for index, scale in enumerate(_COLOURS)
    ]
    if not spreads:
        raise InputError("no batch ran through a FleS activation")
    return Kappas(tuple(spreads))


def _noting(seen: list[tuple[Tensor, Tensor]]) -> Callable[..., None]:
    def hook(module: Any, args: tuple[Tensor, ...], _out: Any) -> None:
        seen.append(module.kappas(args[0]))

    return hook


def _quantiles(parts: list[Tensor]) -> tuple[float, ...]:
    values = torch.cat([part.flatten().double() for part in parts]).sort().values
    return tuple(float(values[round(share * (len(values) - 1))]) for share in _SHARES)
