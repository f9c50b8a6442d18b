"""Improved precision and recall (Kynkaanniemi et al. 2019) of two feature sets, in blocks: no distance matrix is ever
held.

A set's manifold is the union of the balls around its points, each as large as the distance to its k-th nearest other
point. Precision is the share of samples that lie in the manifold of the real images, recall the share of real images in
the manifold of the samples. Only comparisons of distances decide, so how they are rounded does too; there are two ways:

- float32: distances come from float32 matrix products, as |u|^2 - 2 u.v + |v|^2, and every comparison that their
  rounding error could turn is done again in float64 from u - v. The result is the exact one, whatever blocks, threads
  or devices did.
- float16: as ADM's evaluator computes them: blocks of 10 000 x 10 000, features, norms, products and distances rounded
  to float16, a block with an overflow in float32 instead. Published numbers were made so; it moves the shares by some
  thousandths.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from star_fast.errors import UserError
from star_fast.model.ieee import ieee_products

Distances = Literal["float32", "float16"]
NEIGHBOURS = 3  # k of the ADM suite
ADM_BLOCK = 10_000  # rows and columns; which of them fall back to float32 depends on it
_ROWS, _COLUMNS = 2048, 4096  # of a block of float32 distances: 32 MiB
_SPARE = 8  # neighbours kept beyond the k-th, so that its exact distance is among theirs
_PAIRS = 4096  # compared in float64 at once
_MOST_WAITING = 2**22  # pairs that float32 left open, kept until later blocks may have made them needless
_FEW_ROWS = 64  # whose nearest points are looked for again at once: among near copies there may be N pairs a row
_PIECES = 8192  # rows turned into float64 at once


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    recall: float


@torch.no_grad()
def precision_recall(
    samples: Tensor,
    real: Tensor,
    neighbours: int = NEIGHBOURS,
    distances: Distances = "float32",
    *,
    progress: bool = False,
) -> PrecisionRecall:
    """Precision and recall of samples (N, D) against real images (N', D), float32 on one device; a ball holds its
    surface.

    Memory: beside the features about 0.5 GiB in float32, 1 GiB in float16, whatever N and N'.

    Raises:
        UserError: not more than `neighbours` points in a set. ValueError: shapes or dtypes that do not belong together.
    """
    if (
        samples.ndim != 2
        or real.ndim != 2
        or samples.shape[1] != real.shape[1]
        or {samples.dtype, real.dtype} != {torch.float32}
    ):
        raise ValueError(
            f"precision_recall: expected float32 (N, D) and (N', D), got {samples.dtype} {tuple(samples.shape)} and "
            f"{real.dtype} {tuple(real.shape)}"
        )
    for name, rows in (("samples", samples), ("reference images", real)):
        if len(rows) <= neighbours:
            raise UserError(f"precision and recall: expected more than {neighbours} {name}, got {len(rows)}")
    metric = _Exact() if distances == "float32" else _Half()
    with (
        ieee_products(),
        tqdm(
            desc="precision, recall",
            unit="distance",
            unit_scale=True,
            disable=not progress,
            leave=False,
            total=len(samples) ** 2 + len(real) ** 2 + len(samples) * len(real),
        ) as bar,
    ):
        real_radii = metric.radii(real, neighbours, bar)
        sample_radii = metric.radii(samples, neighbours, bar)
        precise, recalled = metric.inside(samples, sample_radii, real, real_radii, bar)
    return PrecisionRecall(precise.double().mean().item(), recalled.double().mean().item())


class _Exact:
    """Float32 products, float64 where they cannot decide. Radii are squared distances in float64.

    Products are of points less a common centre: distances stay what they are, and the rounding error falls with the
    norms.
    """

    def radii(self, points: Tensor, k: int, bar: tqdm) -> Tensor:
        """(N,) float64: squared distance of each point to its k-th nearest other point (itself, or a copy of it, counts
        as number 0).
        """
        keep, radii, centre = min(k + 1 + _SPARE, len(points)), [], points.mean(0)
        norms = _norms(points, centre)
        for row_start, rows, row_norms in _blocks(points, norms, centre, _ROWS):
            near = torch.empty(len(rows), 0, device=points.device)
            which = torch.empty(len(rows), 0, dtype=torch.int64, device=points.device)
            for start, columns, column_norms in _blocks(points, norms, centre, _COLUMNS):
                values, index = _squared(rows, row_norms, columns, column_norms).topk(
                    min(keep, len(columns)), largest=False
                )
                near, index = torch.cat([near, values], 1), torch.cat([which, index + start], 1)
                near, order = near.topk(min(keep, near.shape[1]), largest=False)
                which = index.gather(1, order)
                bar.update(len(rows) * len(columns))
            own = points[row_start : row_start + len(rows)]
            exact = (
                torch.stack([_exact_squared(own, points[which[:, column]]) for column in range(keep)], 1)
                .sort(1)
                .values[:, k]
            )
            # Any point that was not kept is at least as far as the last that was, less its error.
            missed = near[:, -1].double() - _error(points.shape[1], row_norms, norms.max())
            if keep < len(points):
                for few in ((exact > missed) & (exact > 0)).nonzero().flatten().split(_FEW_ROWS):
                    exact[few] = self._kth_within(row_start + few, exact[few], points, norms, centre, k)
            radii.append(exact)
        return torch.cat(radii)

    def _kth_within(
        self, chosen: Tensor, most: Tensor, points: Tensor, norms: Tensor, centre: Tensor, k: int
    ) -> Tensor:
        """(n,) float64: as `radii`, of the points numbered `chosen` (n,), whose radii are at most `most` (n,): all that
        may be as near is looked at.
        """
        rows, row_norms, pairs = points[chosen] - centre, norms[chosen], []
        bound = _up(most + _error(points.shape[1], row_norms, norms.max()))[:, None]
        for start, columns, column_norms in _blocks(points, norms, centre, _COLUMNS):
            found = (_squared(rows, row_norms, columns, column_norms) <= bound).nonzero()
            pairs.append(found + torch.tensor([0, start], device=found.device))
        row, column = torch.cat(pairs).T
        exact = torch.cat(
            [
                _exact_squared(points[chosen[a]], points[b])
                for a, b in zip(row.split(_PAIRS), column.split(_PAIRS), strict=True)
            ]
        )
        order = exact.argsort()
        order = order[row[order].argsort(stable=True)]  # by row, then by distance
        counts = torch.bincount(row, minlength=len(chosen))
        return exact[order][counts.cumsum(0) - counts + k]

    def inside(self, a: Tensor, a_radii: Tensor, b: Tensor, b_radii: Tensor, bar: tqdm) -> tuple[Tensor, Tensor]:
        """(N,) and (N',) bool: which points of a lie in a ball of b, and which of b in one of a."""
        centre = b.mean(0)
        a_norms, b_norms = _norms(a, centre), _norms(b, centre)
        a_side, b_side = _Side(0, a, b, b_radii), _Side(1, a, b, a_radii)
        for row_start, rows, row_norms in _blocks(a, a_norms, centre, _ROWS):
            here = slice(row_start, row_start + len(rows))
            for start, columns, column_norms in _blocks(b, b_norms, centre, _COLUMNS):
                there = slice(start, start + len(columns))
                squared = _squared(rows, row_norms, columns, column_norms)
                error = _error(a.shape[1], row_norms.max(), column_norms.max())
                a_side.see(squared, b_radii[None, there], error, here, (row_start, start))
                b_side.see(squared, a_radii[here, None], error, there, (row_start, start))
                bar.update(len(rows) * len(columns))
        return a_side.settle(), b_side.settle()


class _Side:
    """Which points of one set lie in a ball of the other: what float32 says for sure, and the pairs that it leaves
    open.

    Args:
        own: 0: the points of a in the balls of b; 1: the other way. radii: (N,) float64 of the balls.
    """

    def __init__(self, own: int, a: Tensor, b: Tensor, radii: Tensor) -> None:
        self.own, self.a, self.b, self.radii = own, a, b, radii
        self.inside = torch.zeros(len((a, b)[own]), dtype=torch.bool, device=a.device)
        self.open: list[Tensor] = []  # (pairs, 2) int64 each: point of a, point of b
        self.waiting = 0

    def see(self, squared: Tensor, radii: Tensor, error: Tensor, points: slice, corner: tuple[int, int]) -> None:
        """Judge a block of distances, wrong by less than `error`: `points` are our own in it, `corner` its first row
        and column.
        """
        inside, axis = self.inside[points], 1 - self.own
        inside |= (squared <= _down(radii - error)).any(axis)
        left = squared <= _up(radii + error)
        left &= ~inside.unsqueeze(axis)
        pairs = left.nonzero()
        self.open.append(pairs + torch.tensor(corner, device=pairs.device))
        self.waiting += len(pairs)
        if self.waiting > _MOST_WAITING:
            self.settle()

    def settle(self) -> Tensor:
        """Decide the open pairs in float64; returns `inside` (N,) bool."""
        pairs = torch.cat(self.open)
        pairs = pairs[~self.inside[pairs[:, self.own]]]
        # One pair of each point first: where many are copies of each other it settles nearly all of them.
        order = pairs[:, self.own].argsort(stable=True)
        in_order = pairs[order]
        first = torch.ones(len(pairs), dtype=torch.bool, device=pairs.device)
        first[1:] = in_order[1:, self.own] != in_order[:-1, self.own]
        for group in (in_order[first], in_order[~first]):
            for part in group[~self.inside[group[:, self.own]]].split(_PAIRS):
                part = part[~self.inside[part[:, self.own]]]
                hit = _exact_squared(self.a[part[:, 0]], self.b[part[:, 1]]) <= self.radii[part[:, 1 - self.own]]
                self.inside[part[hit, self.own]] = True
        self.open, self.waiting = [], 0
        return self.inside


class _Half:
    """Squared distances in float16 as ADM's evaluator takes them. Radii are float32."""

    def radii(self, points: Tensor, k: int, bar: tqdm) -> Tensor:
        """(N,) float32: squared distance to the k-th nearest other point; ADM counts the point itself as number 0 even
        where rounding moves it.
        """
        radii = []
        for rows in points.split(ADM_BLOCK):
            near = torch.empty(len(rows), 0, device=points.device)
            for columns in points.split(ADM_BLOCK):
                block = self._block(rows, columns)
                nearest = [
                    part.float().topk(min(k + 1, len(columns)), largest=False).values for part in block.split(_ROWS)
                ]
                near = torch.cat([near, torch.cat(nearest)], 1)
                bar.update(block.numel())
            radii.append(near.kthvalue(k + 1).values)
        return torch.cat(radii)

    def inside(self, a: Tensor, a_radii: Tensor, b: Tensor, b_radii: Tensor, bar: tqdm) -> tuple[Tensor, Tensor]:
        """As _Exact.inside."""
        a_in, b_in = (torch.zeros(len(points), dtype=torch.bool, device=points.device) for points in (a, b))
        for row_start in range(0, len(a), ADM_BLOCK):
            for start in range(0, len(b), ADM_BLOCK):
                there = slice(start, start + ADM_BLOCK)
                block = self._block(a[row_start : row_start + ADM_BLOCK], b[there])
                for first in range(0, len(block), _ROWS):
                    part = block[first : first + _ROWS].float()
                    here = slice(row_start + first, row_start + first + len(part))
                    a_in[here] |= (part <= b_radii[there]).any(1)
                    b_in[there] |= (part <= a_radii[here, None]).any(0)
                bar.update(block.numel())
        return a_in, b_in

    def _block(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Squared distances of one block: float16, or float32 where one of them overflows."""
        u, v = rows.half().float(), columns.half().float()
        u_norms, v_norms = ((x * x).half().float().sum(1).half() for x in (u, v))
        block = torch.empty(len(rows), len(columns), dtype=torch.float16, device=rows.device)
        for start in range(0, len(rows), _ROWS):
            here = slice(start, start + _ROWS)
            products = (u[here] @ v.T).half()  # float32 sums, rounded once, as tensor cores do
            block[here] = ((u_norms[here, None] - 2 * products) + v_norms).clamp_(min=0)
            if not block[here].isfinite().all():
                nowhere = torch.zeros((), device=rows.device)
                norms, column_norms = _norms(rows, nowhere), _norms(columns, nowhere)
                return torch.cat(
                    [
                        _squared(part, part_norms, columns, column_norms)
                        for part, part_norms in zip(rows.split(_ROWS), norms.split(_ROWS), strict=True)
                    ]
                )
        return block


def _blocks(points: Tensor, norms: Tensor, centre: Tensor, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Number of the first, points less `centre`, and their squared norms."""
    for start in range(0, len(points), size):
        yield start, points[start : start + size] - centre, norms[start : start + size]


def _norms(points: Tensor, centre: Tensor) -> Tensor:
    """(N,) float32 squared norms of points less `centre`, summed in float64 and rounded once."""
    return torch.cat([(part - centre).double().square().sum(1).float() for part in points.split(_PIECES)])


def _squared(u: Tensor, u_norms: Tensor, v: Tensor, v_norms: Tensor) -> Tensor:
    """(n, m) float32 squared distances."""
    return torch.addmm(v_norms[None] + u_norms[:, None], u, v.T, alpha=-2).clamp_(min=0)


def _error(width: int, u_norms: Tensor, most_norm: Tensor) -> Tensor:
    """float64, shape of `u_norms`: more than `_squared` can be wrong by for points whose squared norm is at most
    `most_norm`.

    A float32 product of D terms is off by at most D eps/2 |u| |v| in whatever order it is summed; subtracting the
    centre and the other few roundings are of numbers below (|u| + |v|)^2.
    """
    u_length, v_length, unit = u_norms.double().sqrt(), most_norm.double().sqrt(), torch.finfo(torch.float32).eps / 2
    return unit * (2 * width * u_length * v_length + 10 * (u_length + v_length).square()) * 1.01 + 1e-37


def _exact_squared(u: Tensor, v: Tensor) -> Tensor:
    """(n,) float64 squared distances of paired rows, from float32 rows: differences first."""
    return (u.double() - v.double()).square().sum(1)


def _down(bound: Tensor) -> Tensor:
    return torch.nextafter(bound.float(), torch.tensor(-torch.inf, device=bound.device))


def _up(bound: Tensor) -> Tensor:
    return torch.nextafter(bound.float(), torch.tensor(torch.inf, device=bound.device))
