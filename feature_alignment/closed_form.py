"""What a linear map can do: ridge regression and its best rank-r part, from streamed sufficient statistics.

    y ≈ mean_y + B^T (x - mean_x),   B = (C_xx + λI)^-1 C_xy

Rank r (reduced-rank regression): project the fitted values on the top r eigenvectors V of B^T (C_xx + λI) B, i.e. B V V^T, the
exact optimum among maps of rank r (Eckart-Young on the fitted values).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Affine:
    """x [.., d_x] -> mean_y + (x - mean_x) B, float32."""

    mean_x: Tensor
    mean_y: Tensor
    weight: Tensor  # [d_x, d_y]

    def __call__(self, x: Tensor) -> Tensor:
        return self.mean_y + (x - self.mean_x) @ self.weight


class Moments:
    """Sums over positions, in float64: memory does not grow with their number."""

    def __init__(self, d_x: int, d_y: int) -> None:
        self.n = 0
        self.x, self.y = torch.zeros(d_x, dtype=torch.float64), torch.zeros(d_y, dtype=torch.float64)
        self.xx, self.xy = torch.zeros(d_x, d_x, dtype=torch.float64), torch.zeros(d_x, d_y, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """x [p, d_x], y [p, d_y]"""
        x, y = x.double(), y.double()
        self.n += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y

    def ridge(self, strength: float, rank: int | None = None) -> Affine:
        """Ridge regression; `strength` is relative to the mean variance of x. rank: keep only the best r directions of y."""
        mean_x, mean_y = self.x / self.n, self.y / self.n
        c_xx = self.xx / self.n - torch.outer(mean_x, mean_x)
        c_xy = self.xy / self.n - torch.outer(mean_x, mean_y)
        c_xx += strength * c_xx.diagonal().mean() * torch.eye(len(c_xx), dtype=torch.float64)
        weight = torch.linalg.solve(c_xx, c_xy)
        if rank is not None and rank < min(weight.shape):
            _, vectors = torch.linalg.eigh(weight.T @ c_xx @ weight)
            top = vectors[:, -rank:]
            weight = weight @ top @ top.T
        return Affine(mean_x.float(), mean_y.float(), weight.float())


def moments(pairs: Iterable[tuple[Tensor, Tensor]], d_x: int, d_y: int) -> Moments:
    """Sufficient statistics of a stream of (x [p, d_x], y [p, d_y])."""
    total = Moments(d_x, d_y)
    for x, y in pairs:
        total.add(x, y)
    return total
