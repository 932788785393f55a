"""What least squares need to know of rows: their sums of products, or the rows themselves where these are less."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Sums:
    """Sums over rows, in float64: of x x', y x', x and y; per group [G, ...].

    Products of rows are in the rows' own precision (float32 at least), batch by batch. Until there are more rows
    than inputs the rows themselves are kept.
    """

    count: int = 0
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    xx: Tensor | None = None
    yx: Tensor | None = None
    x: Tensor | None = None
    y: Tensor | None = None

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in rows x [G, R, n_in] and y [G, R, n_out]."""
        self.count += x.shape[1]
        self.rows.append((x, y))
        if self.count > x.shape[2]:
            while self.rows:
                self._sum(*self.rows.pop(0))

    def _sum(self, x: Tensor, y: Tensor) -> None:
        new = (
            x.transpose(1, 2) @ x,
            y.transpose(1, 2) @ x,
            x.sum(1, dtype=torch.float64),
            y.sum(1, dtype=torch.float64),
        )
        if self.xx is None:
            self.xx, self.yx, self.x, self.y = (own.double() for own in new)
            return
        for old, more in zip((self.xx, self.yx, self.x, self.y), new, strict=True):
            assert old is not None  # noqa: S101 - all are set together
            old.add_(more)

    def means(self) -> tuple[Tensor, Tensor]:
        """Of x [G, n_in] and y [G, n_out]."""
        if self.rows:
            x, y = self.stacked()
            return x.mean(1), y.mean(1)
        assert self.x is not None  # noqa: S101 - rows were added
        assert self.y is not None  # noqa: S101
        return self.x / self.count, self.y / self.count

    def moments(self, *, centred: bool) -> tuple[Tensor, Tensor]:
        """Gram [G, n_in, n_in] and cross products [G, n_out, n_in] per row; centred if asked."""
        assert self.xx is not None  # noqa: S101 - more rows were added than inputs
        assert self.yx is not None  # noqa: S101
        gram, cross = self.xx / self.count, self.yx / self.count
        if centred:
            x, y = self.means()
            gram.baddbmm_(x[:, :, None], x[:, None, :], alpha=-1)
            cross.baddbmm_(y[:, :, None], x[:, None, :], alpha=-1)
        return gram, cross

    def stacked(self) -> tuple[Tensor, Tensor]:
        """The rows that were kept, x [G, R, n_in] and y [G, R, n_out] in float64."""
        xs, ys = zip(*self.rows, strict=True)
        return torch.cat(xs, 1).double(), torch.cat(ys, 1).double()
