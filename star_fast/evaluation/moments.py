"""Mean and covariance of features that come in batches: float64, one pass, and memory for the covariance alone."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from star_fast.errors import UserError

_PIECE_ROWS = 4096  # of a batch, turned into float64 at once


class Moments:
    """Streaming mean and covariance of (N, D) rows.

    Each batch is centred on its own mean before it is squared, and batches are merged by the parallel form of the
    variance (Chan, Golub and LeVeque 1983): with n rows so far and m new ones, the sum of squares about the common mean
    is the sum of both, plus n m / (n + m) times the square of the difference of their means. That last term is one more
    row of the product. So features far from zero cost no digits, which the textbook E[x x'] - E[x] E[x]' does.

    Args:
        width: D. device: where the sums are kept; batches may come from elsewhere.
        name: what the features are, for messages.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu", name: str = "features") -> None:
        self.name, self.rows = name, 0
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self._squares = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> None:
        """Take (n, D) rows of any float dtype. Raises UserError where one is not finite, ValueError
        for another width.
        """
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"Moments: expected (n, {len(self.mean)}), got {tuple(features.shape)}")
        for piece in features.split(_PIECE_ROWS):
            rows = piece.to(self.mean.device, torch.float64)
            new = len(rows)
            if not new:
                continue
            mean = rows.mean(0)
            if not mean.isfinite().all():  # any row that is not makes the mean so
                raise UserError(
                    f"{self.name}: NaN or infinity among them; the network's weights or the images are damaged"
                )
            away = mean - self.mean
            between = math.sqrt(self.rows * new / (self.rows + new))
            stacked = torch.cat([rows - mean, between * away[None]])
            self._squares.addmm_(stacked.T, stacked)
            self.rows += new
            self.mean += away * (new / self.rows)

    def result(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean (D,) and covariance (D, D), divided by N - 1 as every FID code does. Raises UserError with fewer than
        two rows.
        """
        if self.rows < 2:
            raise UserError(f"{self.name}: of {self.rows} images; a covariance needs at least 2")
        return self.mean.cpu().numpy(), (self._squares / (self.rows - 1)).cpu().numpy()
