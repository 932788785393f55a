"""Activations with parameters: PReLU, ACON, StarReLU, polynomials, SMU, bounds, selective activation.

Sources: ACON-C and Meta-ACON, Ma et al. 2021; StarReLU, Yu et al. 2024; PolyReLU and PolyNorm, Zhuo et al. 2025;
SMU and Serf, Biswas et al. 2022, Nag et al. 2023; bounds per channel, as ProAct's; selective activation, Liu et al. 2023.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swan_surgery.activations.places import Axes
from swan_surgery.activations.scaling import along


class Slopes(nn.Module):
    """PReLU for channels on any axis: x where it is positive, a slope times x elsewhere."""

    def __init__(self, *, channels: int, axes: Axes, slope: float) -> None:
        """`slope`: that of all channels at the start."""
        super().__init__()
        self.axes = axes
        self.slope = nn.Parameter(torch.full((channels,), float(slope), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:  # [..., C, ...] -> the same
        """The activation."""
        return torch.where(x > 0, x, along(self.slope, self.axes, x) * x)


class ACON(nn.Module):
    """ACON-C: f(beta d x) / beta + p2 x with d = p1 - p2; with f = SiLU that is d x sigmoid(beta d x) + p2 x.

    With p1 = 1, p2 = 0, beta = 1 it is f.
    """

    def __init__(self, base: nn.Module, *, channels: int, axes: Axes, is_drawn: bool) -> None:
        """`is_drawn`: p1 and p2 start at random, as the authors' do; else at 1 and 0."""
        super().__init__()
        self.base, self.axes = base, axes
        self.beta = nn.Parameter(torch.ones(channels))
        self.first, self.second = (
            nn.Parameter(torch.randn(channels) if is_drawn else torch.full((channels,), start))
            for start in (1.0, 0.0)
        )

    def forward(self, x: Tensor) -> Tensor:  # [..., C, ...] -> the same
        """The activation."""
        first, second, beta = (
            along(own, self.axes, x) for own in (self.first, self.second, self.beta)
        )
        return switched(self.base, x, first, second, beta)


class MetaACON(nn.Module):
    """Meta-ACON: ACON-C whose beta is `ceiling` times the sigmoid of an MLP of each sample's channel means.

    The authors' ceiling is 1. With 2 and a last layer of zeros beta starts at 1. Their batch-norm between
    the layers is left out.
    """

    def __init__(
        self, base: nn.Module, *, channels: int, axes: Axes, is_drawn: bool, ceiling: float
    ) -> None:
        """As of `ACON`."""
        super().__init__()
        self.acon = ACON(base, channels=channels, axes=axes, is_drawn=is_drawn)
        del self.acon.beta
        self.base, self.axes = base, axes
        hidden = max(16, channels // 16)
        self.reduce, self.expand = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.ceiling: Tensor
        self.register_buffer("ceiling", torch.tensor(float(ceiling)))
        if not is_drawn:
            nn.init.zeros_(self.expand.weight)
            nn.init.zeros_(self.expand.bias)

    def forward(self, x: Tensor) -> Tensor:  # [B, ..., C, ...] -> the same
        """The activation."""
        over = self.axes.of_positions(x.ndim)
        mean = (x.mean(over, keepdim=True) if over else x).transpose(self.axes.channels, -1)
        beta = self.ceiling * torch.sigmoid(self.expand(self.reduce(mean)))
        first, second = (along(own, self.axes, x) for own in (self.acon.first, self.acon.second))
        return switched(self.base, x, first, second, beta.transpose(self.axes.channels, -1))


def switched(base: nn.Module, x: Tensor, first: Tensor, second: Tensor, beta: Tensor) -> Tensor:
    """f(beta (p1 - p2) x) / beta + p2 x."""
    own: Tensor = base(beta * (first - second) * x) / beta + second * x
    return own


class StarReLU(nn.Module):
    """s relu(x)^2 + b, two numbers; they start where a normal input comes out with mean 0 and variance 1."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(math.sqrt(0.8)))
        self.bias = nn.Parameter(torch.tensor(-math.sqrt(0.2)))

    def forward(self, x: Tensor) -> Tensor:  # [...] -> [...]
        """The activation."""
        own: Tensor = self.scale * F.relu(x).square() + self.bias
        return own


class PolyReLU(nn.Module):
    """a0 + a1 relu(x) + a2 relu(x)^2 + a3 relu(x)^3, with a1 = 1 and the others 0 at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.powers = nn.ParameterList([torch.tensor(float(k == 1)) for k in range(4)])

    def forward(self, x: Tensor) -> Tensor:  # [...] -> [...]
        """The activation."""
        positive = F.relu(x)
        constant, first, second, third = self.powers
        own: Tensor = constant + positive * (first + positive * (second + positive * third))
        return own


class PolyNorm(nn.Module):
    """a0 + sum of a_i x^i over its root mean square over the channels, i = 1 to 3; all a_i start at 1/3."""

    def __init__(self, *, axes: Axes) -> None:
        """`axes`: where the channels lie."""
        super().__init__()
        self.axes = axes
        self.powers = nn.ParameterList([torch.tensor(1 / 3 if k else 0.0) for k in range(4)])

    def forward(self, x: Tensor) -> Tensor:  # [..., C, ...] -> the same
        """The activation."""
        out: Tensor = self.powers[0]
        power = x
        for factor in list(self.powers)[1:]:
            square = power.square().mean((self.axes.channels,), keepdim=True)
            out = out + factor * power * (square + 1e-6).rsqrt()
            power = power * x
        return out


class SMU(nn.Module):
    """((1 + a) x + (1 - a) x erf(m (1 - a) x)) / 2: GELU with a = 0 and m = sqrt(1/2)."""

    def __init__(self, *, slope: float, steepness: float) -> None:
        """`slope`: a, `steepness`: m, at the start."""
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(float(slope)))
        # float32 of sqrt(1/2) is off by 1e-8: kept as a multiple of it.
        self.steepness = nn.Parameter(torch.tensor(float(steepness)))

    def forward(self, x: Tensor) -> Tensor:  # [...] -> [...]
        """The activation."""
        rest = 1 - self.slope
        gate = torch.erf(self.steepness * math.sqrt(0.5) * rest * x)
        own: Tensor = 0.5 * x * (1 + self.slope + rest * gate)
        return own


class Serf(nn.Module):
    """x erf(ln(1 + e^x))."""

    def forward(self, x: Tensor) -> Tensor:  # [...] -> [...]
        """The activation."""
        return x * torch.erf(F.softplus(x))


class Bounded(nn.Module):
    """min(f(x), bound) with a bound per channel, which starts above all that a number can be.

    `fit_bounds` sets them to what the channels reach on data, so that a fault in a weight or an
    activation cannot go further.
    """

    def __init__(self, base: nn.Module, *, channels: int, axes: Axes) -> None:
        """`base`: f."""
        super().__init__()
        self.base, self.axes = base, axes
        self.bound = nn.Parameter(torch.full((channels,), torch.finfo(torch.float32).max))

    def forward(self, x: Tensor) -> Tensor:  # [..., C, ...] -> the same
        """The activation."""
        return torch.minimum(self.base(x), along(self.bound, self.axes, x))


class Activated(nn.Module):
    """AP: f(x) + s (x - f(x)) on chosen channels, f on all others; none is chosen at the start.

    `activate_dead` chooses those that are dead most often on data.
    """

    def __init__(self, base: nn.Module, *, channels: int, axes: Axes) -> None:
        """`base`: f."""
        super().__init__()
        self.base, self.axes = base, axes
        self.slope = nn.Parameter(torch.zeros(channels))
        self.chosen: Tensor
        self.register_buffer("chosen", torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:  # [..., C, ...] -> the same
        """The activation."""
        given = self.base(x)
        return torch.lerp(given, x, along(self.slope * self.chosen, self.axes, given))
