"""The weights with which a layer best gives what it gave before: least squares of sums over rows."""

from dataclasses import dataclass

import torch
from torch import Tensor


ATTEMPTS = 8


@dataclass
class Sums:
    """Sums over rows, in float64: of x x', y x', x, y and y^2; per group [G, ...].

    Products of rows are in the rows' own precision (float32 at least), batch by batch.
    """

    count: int = 0
    xx: Tensor | None = None
    yx: Tensor | None = None
    x: Tensor | None = None
    y: Tensor | None = None
    yy: Tensor | None = None

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in rows x [R, G, n_in] and y [R, G, n_out]."""
        x, y = x.transpose(0, 1), y.transpose(0, 1)
        if x.dtype not in (torch.float32, torch.float64):
            x, y = x.float(), y.float()
        new = (
            (x.transpose(1, 2) @ x).double(),
            (y.transpose(1, 2) @ x).double(),
            x.double().sum(1),
            y.double().sum(1),
            y.double().square().sum(1),
        )
        if self.xx is None:
            self.xx, self.yx, self.x, self.y, self.yy = new
        else:
            for old, more in zip((self.xx, self.yx, self.x, self.y, self.yy), new, strict=True):
                assert old is not None  # noqa: S101 - all are set together
                old.add_(more)
        self.count += x.shape[1]

    def together(self, other: "Sums") -> "Sums":
        """Over the rows of both."""
        if other.xx is None:
            return self
        if self.xx is None:
            return other
        names = ("xx", "yx", "x", "y", "yy")
        return Sums(
            self.count + other.count, *(getattr(self, n) + getattr(other, n) for n in names)
        )

    def moments(self, *, centred: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gram and cross products per row, means of x and y, mean y^2; centred if asked."""
        assert self.xx is not None and self.yx is not None  # noqa: S101, PT018 - rows were added
        assert self.x is not None and self.y is not None and self.yy is not None  # noqa: S101, PT018
        n = self.count
        gram, cross, mx, my, yy = (t / n for t in (self.xx, self.yx, self.x, self.y, self.yy))
        if centred:
            gram = gram - mx[:, :, None] * mx[:, None, :]
            cross = cross - my[:, :, None] * mx[:, None, :]
            yy = yy - my.square()
        return gram, cross, mx, my, yy


def error(sums: Sums, weight: Tensor, *, centred: bool) -> float:
    """Mean squared error over the outputs' mean square (variance if centred) of [G, n_out, n_in]."""
    gram, cross, _, _, yy = sums.moments(centred=centred)
    found = ((weight @ gram) * weight).sum(2) - 2 * (weight * cross).sum(2) + yy
    return float(found.clamp_min(0).sum() / yy.sum().clamp_min(1e-300))


def solve(sums: Sums, start: Tensor, *, centred: bool, damping: float) -> Tensor | None:
    """W = W0 + (C - W0 G)(G + lambda I)^-1, lambda = damping x mean diagonal; None if it cannot be had.

    Args:
        sums: over the rows.
        start: W0, float64 [G, n_out, n_in].
        centred: means are somebody else's (a bias's, or a norm's).
        damping: lambda over the mean of the Gram's diagonal; times 10 until Cholesky succeeds.
    """
    gram, cross, *_ = sums.moments(centred=centred)
    scale = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    missing = cross - start @ gram
    for _ in range(ATTEMPTS):
        damped = gram + torch.diag_embed((damping * scale)[:, None].expand(gram.shape[:2]))
        factor, info = torch.linalg.cholesky_ex(damped)
        if not bool(info.any()):
            change = torch.cholesky_solve(missing.transpose(1, 2), factor).transpose(1, 2)
            return start + change if bool(change.isfinite().all()) else None
        damping = max(damping, 1e-8) * 10
    return None
