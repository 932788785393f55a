"""The regularisers of the paper on the probabilities: Eq. 9, 10 and 12, normalised to [0, 1]."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

from torch import Tensor

from swan_surgery.errors import InputError


@dataclass(frozen=True, slots=True)
class Penalties:
    """Coefficients: `l0` on R_0, `flops` on R_F, `target_weight` on R_T above `target_active`."""

    l0: float = 0.0
    flops: float = 0.0
    target_active: float | None = None
    target_weight: float = 1.0

    def __post_init__(self) -> None:
        """Refuse negative coefficients and shares out of range."""
        for name in ("l0", "flops", "target_weight"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must not be negative; got {getattr(self, name)}")
            if getattr(self, name) == inf:
                raise InputError(f"{name} must be finite; got inf")
        if self.target_active is not None and not 0 < self.target_active <= 1:
            raise InputError(f"target_active is a share in (0, 1]; got {self.target_active}")

    @property
    def act(self) -> bool:
        """Whether any of them does anything."""
        return bool(self.l0 or self.flops or self.target_active is not None)

    def terms(
        self, p: Tensor, marginal: Tensor, scale: Mapping[str, float]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weighted terms, and the raw ones beside them.

        Args:
            p: probabilities, shape (num_units,).
            marginal: MACs that closing each unit saves, float64, shape (num_units,).
            scale: the factor of the ramp per term.
        """
        active = p.mean()  # Eq. 11
        flops = (p.double() * marginal).sum()  # Eq. 10
        terms = {
            "l0": self.l0 * scale["l0"] * active,
            "flops": self.flops * scale["flops"] * flops / marginal.sum(),
        }
        raw = {"l0": p.sum(), "flops": flops}
        if self.target_active is not None:
            raw["target"] = (active - self.target_active).clamp(min=0).square()  # Eq. 12
            terms["target"] = self.target_weight * scale["target_active"] * raw["target"]
        return terms, raw


def paper_penalties(share: float) -> Penalties:
    """Towards a mean probability of `share`, dear units first; the paper gives no coefficients."""
    return Penalties(flops=1.0, target_active=share, target_weight=100.0)
