"""What a linear map can do: ridge regression and its best rank-r part, from streamed sufficient statistics.

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

POSITIONS = 1024  # at a time: their logits are the largest thing in memory
RIDGE_STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
TINY = 1e-20  # a mean variance that is rounding only


@dataclass(frozen=True)
class Positions:
    """Some real positions: draft [p, d_draft] and target [p, d_target] float32, rows [p], at [p] int64."""

    draft: Tensor
    target: Tensor
    rows: Tensor
    at: Tensor


def positions(states: HiddenStates, device: str = "cpu", number: int = POSITIONS) -> Iterator[Positions]:
    """All real positions of a split, in order, about `number` at a time.

    raises: UserError with the sample's id for states that are not finite
    """
    width = states.mask.shape[1]
    for rows in torch.arange(len(states.mask)).split(max(1, number // width)):
        mask, draft, target = states.mask[rows], states.draft[rows], states.target[rows]
        states.refuse_non_finite(rows, draft, target)
        row, at = mask.nonzero(as_tuple=True)
        yield Positions(draft[mask].float().to(device), target[mask].float().to(device), rows[row], at)


@dataclass(frozen=True)
class Affine:
    """x [.., d_x] -> mean_y + (x - mean_x) B, float32. factors: B [d_x, d_y] itself, or of rank r: [d_x, r] and orthonormal [r, d_y]."""

    mean_x: Tensor
    mean_y: Tensor
    factors: tuple[Tensor, ...]

    def __call__(self, x: Tensor) -> Tensor:
        x = x - self.mean_x
        for factor in self.factors:
            x = x @ factor
        return self.mean_y + x

    @property
    def num_parameters(self) -> int:
        """Numbers a copy of this map needs: its factors and one offset."""
        return sum(factor.numel() for factor in self.factors) + len(self.mean_y)


class Moments:
    """Sums over positions: memory does not grow with their number.

    Products are taken in float32 about the first batch's mean (channels of a residual stream may sit thousands of their own
    deviations from zero) and added up in float64.
    """

    def __init__(self, d_x: int, d_y: int, device: str = "cpu") -> None:
        self.n = 0
        zeros = lambda *size: torch.zeros(*size, dtype=torch.float64, device=device)  # noqa: E731
        self.x, self.y, self.xx, self.xy = zeros(d_x), zeros(d_y), zeros(d_x, d_x), zeros(d_x, d_y)

    def add(self, x: Tensor, y: Tensor) -> None:
        """x [p, d_x], y [p, d_y] float32; a few thousand positions at a time keep float32 products exact enough."""
        if not self.n:
            self._about = x.mean(0), y.mean(0)
        x, y = x - self._about[0], y - self._about[1]
        self.n += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y

    @property
    def mean_y(self) -> Tensor:
        """[d_y] float32"""
        return (self._about[1] + self.y / self.n).float()

    def covariance(self) -> Tensor:
        """[d_x, d_x] float64, of x"""
        mean = self.x / self.n
        return self.xx / self.n - torch.outer(mean, mean)

    def ridge(self, strength: float, rank: int | None = None) -> Affine:
        """Ridge regression; `strength` is relative to the mean variance of x. rank: keep only the best r directions of y."""
        mean_x, mean_y, c_xx = self.x / self.n, self.y / self.n, self.covariance()
        c_xy = self.xy / self.n - torch.outer(mean_x, mean_y)
        spread = c_xx.diagonal().mean()
        if spread <= TINY:  # all inputs are the same: nothing can be learned from them but the mean
            c_xx, c_xy = torch.eye(len(c_xx), dtype=c_xx.dtype, device=c_xx.device), torch.zeros_like(c_xy)
        else:
            c_xx.diagonal().add_(strength * spread)
        weight = torch.linalg.solve(c_xx, c_xy)
        means = (self._about[0] + mean_x).float(), self.mean_y
        if rank is None:
            return Affine(*means, (weight.float(),))
        _, vectors = torch.linalg.eigh(weight.T @ (c_xx @ weight))
        right = vectors[:, -rank:].T
        return Affine(*means, ((weight @ right.T).float(), right.float()))


class PositionMeans:
    """The mean target state of each position of a text, and of all."""

    def __init__(self, width: int, d_y: int, device: str = "cpu") -> None:
        self._total = torch.zeros(width, d_y, dtype=torch.float64, device=device)
        self._number = torch.zeros(width, dtype=torch.float64, device=device)

    def add(self, y: Tensor, at: Tensor) -> None:
        """y [p, d_y], at [p] int64 positions"""
        self._total.index_add_(0, at, y.double())
        self._number.index_add_(0, at, torch.ones_like(at, dtype=torch.float64))

    def by_position(self) -> Tensor:
        """[width, d_y] float32; a position no text reached gets the overall mean."""
        means = self._total / self._number.clamp(min=1)[:, None]
        overall = self._total.sum(0) / self._number.sum()
        return torch.where(self._number[:, None] > 0, means, overall).float()


def moments(pairs: Iterable[tuple[Tensor, Tensor]], d_x: int, d_y: int, device: str = "cpu") -> Moments:
    """Sufficient statistics of a stream of (x [p, d_x], y [p, d_y])."""
    total = Moments(d_x, d_y, device)
    for x, y in pairs:
        total.add(x, y)
    return total
