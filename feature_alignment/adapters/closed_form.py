"""Linear maps in closed form: ridge regression and its best rank-r part, from streamed sufficient statistics.

    y ≈ mean_y + B^T (x - mean_x),   B = (C_xx + λI)^-1 C_xy

Rank r (reduced-rank regression, Izenman 1975): project the fitted values on the top r eigenvectors V of B^T (C_xx + λI) B, i.e.
B V V^T, the exact optimum among maps of rank r (Eckart-Young on the fitted values).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from feature_alignment.storage.hidden_states import HiddenStates

POSITIONS = 1024  # per chunk: their logits are the largest tensor in memory
RIDGE_STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
TINY = 1e-20  # mean variances below it are rounding errors


@dataclass(frozen=True)
class Positions:
    """States of some unpadded positions.

    Args:
        draft: [p, d_draft] float32, the drafter's states.
        target: [p, d_target] float32, the target's states.
        rows: [p] int64, row of each position in its split.
        at: [p] int64, position in its text.
    """

    draft: Tensor
    target: Tensor
    rows: Tensor
    at: Tensor


def positions(states: HiddenStates, device: str = "cpu", number: int = POSITIONS) -> Iterator[Positions]:
    """All unpadded positions of a split, in order.

    Args:
        states: Of the split.
        device: Device of the tensors.
        number: Approximate number of positions per chunk.

    Raises:
        UserError: For states that are not finite; it names the sample.
    """
    width = states.mask.shape[1]
    for rows in torch.arange(len(states.mask)).split(max(1, number // width)):
        mask, draft, target = states.mask[rows], states.draft[rows], states.target[rows]
        states.refuse_non_finite(rows, draft, target)
        row, at = mask.nonzero(as_tuple=True)
        yield Positions(draft[mask].float().to(device), target[mask].float().to(device), rows[row], at)


@dataclass(frozen=True)
class Affine:
    """The map x [.., d_x] -> mean_y + (x - mean_x) B in float32.

    Args:
        mean_x: [d_x].
        mean_y: [d_y].
        factors: B [d_x, d_y], or for rank r its factors [d_x, r] and orthonormal [r, d_y].
    """

    mean_x: Tensor
    mean_y: Tensor
    factors: tuple[Tensor, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Map x [.., d_x] to [.., d_y]."""
        x = x - self.mean_x
        for factor in self.factors:
            x = x @ factor
        return self.mean_y + x

    @property
    def num_parameters(self) -> int:
        """Parameters needed to store this map: its factors and one offset."""
        return sum(factor.numel() for factor in self.factors) + len(self.mean_y)


class Moments:
    """First and second moments of x and y, summed over positions in constant memory.

    Products are taken in float32 around the first batch's mean, because channels of a residual stream may lie thousands of standard
    deviations from zero. Sums are float64.
    """

    def __init__(self, d_x: int, d_y: int, device: str = "cpu") -> None:
        """Start with empty sums for x of width d_x and y of width d_y."""
        self.n = 0
        sizes = (d_x,), (d_y,), (d_x, d_x), (d_x, d_y)
        self.x, self.y, self.xx, self.xy = (torch.zeros(size, dtype=torch.float64, device=device) for size in sizes)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add positions, in place.

        Args:
            x: [p, d_x] float32; a few thousand positions per call keep float32 products exact enough.
            y: [p, d_y] float32.
        """
        if not self.n:
            self._origin = x.mean(0), y.mean(0)
        x, y = x - self._origin[0], y - self._origin[1]
        self.n += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y

    @property
    def mean_y(self) -> Tensor:
        """[d_y] float32, mean of y."""
        return (self._origin[1] + self.y / self.n).float()

    def covariance(self) -> Tensor:
        """[d_x, d_x] float64, covariance of x."""
        mean = self.x / self.n
        return self.xx / self.n - torch.outer(mean, mean)

    def ridge(self, strength: float, rank: int | None = None) -> Affine:
        """Ridge regression of y on x.

        Args:
            strength: λ, relative to the mean variance of x.
            rank: Keep only the best r directions of y; default all.
        """
        mean_x, mean_y, c_xx = self.x / self.n, self.y / self.n, self.covariance()
        c_xy = self.xy / self.n - torch.outer(mean_x, mean_y)
        mean_variance = c_xx.diagonal().mean()
        if mean_variance <= TINY:  # all inputs are equal: only the mean can be learned
            c_xx, c_xy = torch.eye(len(c_xx), dtype=c_xx.dtype, device=c_xx.device), torch.zeros_like(c_xy)
        else:
            c_xx.diagonal().add_(strength * mean_variance)
        weight = torch.linalg.solve(c_xx, c_xy)
        means = (self._origin[0] + mean_x).float(), self.mean_y
        if rank is None:
            return Affine(*means, (weight.float(),))
        _, vectors = torch.linalg.eigh(weight.T @ (c_xx @ weight))
        right = vectors[:, -rank:].T
        return Affine(*means, ((weight @ right.T).float(), right.float()))


class PositionMeans:
    """The mean target state at each position of a text, and over all positions."""

    def __init__(self, width: int, d_y: int, device: str = "cpu") -> None:
        """Start with empty sums for `width` positions of states of width d_y."""
        self._total = torch.zeros(width, d_y, dtype=torch.float64, device=device)
        self._number = torch.zeros(width, dtype=torch.float64, device=device)

    def add(self, y: Tensor, at: Tensor) -> None:
        """Add states, in place.

        Args:
            y: [p, d_y] float32, states.
            at: [p] int64, position of each in its text.
        """
        self._total.index_add_(0, at, y.double())
        self._number.index_add_(0, at, torch.ones_like(at, dtype=torch.float64))

    def by_position(self) -> Tensor:
        """[width, d_y] float32; a position that no text reached gets the overall mean."""
        means = self._total / self._number.clamp(min=1)[:, None]
        overall = self._total.sum(0) / self._number.sum()
        return torch.where(self._number[:, None] > 0, means, overall).float()


def moments(pairs: Iterable[tuple[Tensor, Tensor]], d_x: int, d_y: int, device: str = "cpu") -> Moments:
    """Moments of a stream of pairs.

    Args:
        pairs: Of x [p, d_x] and y [p, d_y], float32.
        d_x: Width of x.
        d_y: Width of y.
        device: Device of the sums.
    """
    total = Moments(d_x, d_y, device)
    for x, y in pairs:
        total.add(x, y)
    return total
