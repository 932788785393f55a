"""The weights with which a layer best gives what it gave before: least squares of sums over rows."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


ATTEMPTS = 8
FEW = 10  # rows per input
STRONGER = (1, 10, 100, 1000)


@dataclass
class Sums:
    """Sums over rows, in float64: of x x', y x', x and y; per group [G, ...].

    Products of rows are in the rows' own precision (float32 at least), batch by batch.
    """

    count: int = 0
    xx: Tensor | None = None
    yx: Tensor | None = None
    x: Tensor | None = None
    y: Tensor | None = None

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in rows x [G, R, n_in] and y [G, R, n_out]."""
        new = (
            (x.transpose(1, 2) @ x).double(),
            (y.transpose(1, 2) @ x).double(),
            x.sum(1, dtype=torch.float64),
            y.sum(1, dtype=torch.float64),
        )
        if self.xx is None:
            self.xx, self.yx, self.x, self.y = new
        else:
            for old, more in zip((self.xx, self.yx, self.x, self.y), new, strict=True):
                assert old is not None  # noqa: S101 - all are set together
                old.add_(more)
        self.count += x.shape[1]

    def means(self) -> tuple[Tensor, Tensor]:
        """Of x [G, n_in] and y [G, n_out]."""
        assert self.x is not None  # noqa: S101 - rows were added
        assert self.y is not None  # noqa: S101
        return self.x / self.count, self.y / self.count

    def moments(self, *, centred: bool) -> tuple[Tensor, Tensor]:
        """Gram [G, n_in, n_in] and cross products [G, n_out, n_in] per row; centred if asked."""
        assert self.xx is not None  # noqa: S101 - rows were added
        assert self.yx is not None  # noqa: S101
        gram, cross = self.xx / self.count, self.yx / self.count
        if centred:
            x, y = self.means()
            gram.baddbmm_(x[:, :, None], x[:, None, :], alpha=-1)
            cross.baddbmm_(y[:, :, None], x[:, None, :], alpha=-1)
        return gram, cross


@dataclass
class Rows:
    """Rows that no solution has seen: x [G, R, n_in] and y [G, R, n_out], batch by batch."""

    parts: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def error(self, weight: Tensor, *, centred: bool) -> float:
        """Mean squared error of [G, n_out, n_in] over the outputs' mean square.

        Of both the means are taken away if `centred`: a bias or a norm takes care of these.
        """
        weight = weight.to(self.parts[0][0].dtype).transpose(1, 2)
        ys = torch.cat([y for _, y in self.parts], 1)
        missing = torch.cat([y - x @ weight for x, y in self.parts], 1)
        if centred:
            ys = ys - ys.mean(1, keepdim=True)
            missing = missing - missing.mean(1, keepdim=True)
        found = float(missing.square().sum(dtype=torch.float64))
        whole = float(ys.square().sum(dtype=torch.float64))
        return found / max(whole, 1e-300)


def solve_held(
    sums: Sums, start: Tensor, held: Rows, *, centred: bool, damping: float
) -> tuple[Tensor | None, float]:
    """The solution, and its error on rows that it has not seen; of few rows that of the best damping.

    With fewer rows than `FEW` per input the least squares fit their noise: weights are held more and more strongly,
    until the error on the held-out rows rises.
    """
    best, least = None, float("inf")
    for factor in STRONGER if sums.count < FEW * start.shape[2] else (1,):
        new = solve(sums, start, centred=centred, damping=factor * damping)
        error = least if new is None else held.error(new, centred=centred)
        if not error < least:
            break
        best, least = new, error
    return best, least


def solve(sums: Sums, start: Tensor, *, centred: bool, damping: float) -> Tensor | None:
    """W = W0 + (C - W0 G)(G + lambda I)^-1, lambda = damping x mean diagonal; None if it cannot be had.

    Args:
        sums: over the rows.
        start: W0, float64 [G, n_out, n_in].
        centred: means are somebody else's (a bias's, or a norm's).
        damping: lambda over the mean of the Gram's diagonal; times 10 until Cholesky succeeds.
    """
    gram, cross = sums.moments(centred=centred)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    plain, scale = diagonal.clone(), diagonal.mean(1, keepdim=True).clamp_min(1e-12)
    missing = cross - start @ gram
    for _ in range(ATTEMPTS):
        diagonal.copy_(plain + damping * scale)
        factor, info = torch.linalg.cholesky_ex(gram)
        if not bool(info.any()):
            change = torch.cholesky_solve(missing.transpose(1, 2), factor).transpose(1, 2)
            return start + change if bool(change.isfinite().all()) else None
        damping = max(damping, 1e-8) * 10
    return None
