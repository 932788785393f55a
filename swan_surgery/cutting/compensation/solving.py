"""The weights with which a layer best gives what it gave before: least squares of sums over rows."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from swan_surgery.cutting.compensation.sums import Sums


ATTEMPTS = 8
FEW = 10  # rows per input
STRONGER = (1, 10, 100, 1000)


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
    change_of = _by_rows if sums.rows else _by_inputs
    for _ in range(ATTEMPTS):
        change = change_of(sums, start, centred=centred, damping=damping)
        if change is not None:
            return start + change if bool(change.isfinite().all()) else None
        damping = max(damping, 1e-8) * 10
    return None


def _by_inputs(sums: Sums, start: Tensor, *, centred: bool, damping: float) -> Tensor | None:
    gram, cross = sums.moments(centred=centred)
    missing = cross.baddbmm_(start, gram, alpha=-1)
    ridge = damping * gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).clamp_min(1e-12)
    change = _solved(gram, missing.transpose(1, 2), ridge)
    return None if change is None else change.transpose(1, 2)


def _by_rows(sums: Sums, start: Tensor, *, centred: bool, damping: float) -> Tensor | None:
    """The same with as many unknowns as rows: X'(X X' + lambda R I)^-1 = (X'X + lambda R I)^-1 X'."""
    x, y = sums.stacked()
    if centred:
        x -= x.mean(1, keepdim=True)
        y -= y.mean(1, keepdim=True)
    missing = y.baddbmm_(x, start.transpose(1, 2), alpha=-1)
    gram = x @ x.transpose(1, 2)
    scale = gram.diagonal(dim1=1, dim2=2).sum(1, keepdim=True) / x.shape[2]
    shares = _solved(gram, missing, damping * scale.clamp_min(1e-12 * sums.count))
    return None if shares is None else shares.transpose(1, 2) @ x


def _solved(matrix: Tensor, right: Tensor, ridge: Tensor) -> Tensor | None:
    """(matrix + ridge I)^-1 right, of symmetric matrices [G, n, n] that are used up; None if they are not positive."""
    matrix.diagonal(dim1=1, dim2=2).add_(ridge)
    factor = matrix.transpose(1, 2)  # column by column, as LAPACK wants it, so nothing is copied
    info = torch.empty(matrix.shape[0], dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    if bool(info.any()):
        return None
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    solution: Tensor = torch.linalg.solve_triangular(matrix, half, upper=True)
    return solution
