"""Farthest-first order from few exact distances: products of 8-bit integers propose tokens, float32 decides.

The order needs one row of the distance matrix per pick, and the nearest neighbour of every token for the
first pick alone. Processors with instructions for 8-bit products compute an approximate matrix many times as
fast as the exact one. Picks do not depend on how good it is: exact rows decide them, and for the first one
bounds that hold for every order of summation. With a poor approximation more rows are computed.
"""

import numpy as np
import torch
from torch import Tensor

from .duplicates import lowest_copies

BLOCK = 256  # rows of one product of integers
BATCH = (16, 64)  # exact rows of one product: from 16 on, products have the bits of one over all rows
SAMPLE = 64  # rows that the mean and the range of the integers are taken from
RANGE = 4.5  # standard deviations that the integers cover; values beyond are clipped
NORMS = (1e-12, 1e12)  # lengths that can be divided by as they are
ROUNDING = 2.0**-24  # of float32

Array = np.ndarray


def is_faster(tokens: int, width: int, count: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `screened_order` is worth its preparations: for many long rows on a CPU with 8-bit products."""
    large = tokens >= 1536 and width >= 512 and 0 < count <= tokens // 4
    if not large or device.type != "cpu" or dtype != torch.float32:
        return False
    # Names that PyTorch may change: without them the full matrix is computed.
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return hasattr(torch, "_int_mm") and supported is not None and supported()


def screened_order(features: Tensor, count: int) -> Tensor | None:
    """The order of `farthest_first` for features [N, D] on a CPU in float32, [count].

    None where rows are so long or short, or not finite, that they cannot be divided by their lengths.
    """
    features = features.float()
    norm = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    zero = norm == 0
    usable = bool((((norm > NORMS[0]) & (norm < NORMS[1])) | zero).all())
    if not usable or bool(features[zero[:, 0]].any()):  # squares of small numbers are 0, too
        return None
    screen = _Screen(features, norm.masked_fill(zero, 1))
    # A copy has the same integers, so that its approximate distance is that of a row to itself.
    may_be_copied = (screen.nearest <= screen.own + 1e-5) & ~zero[:, 0]
    group = lowest_copies(features, torch.where(may_be_copied, 0.0, 1.0), torch.float32)
    eligible = alone = np.ones(len(features), dtype=bool)
    if group is not None:
        lowest = group.numpy()
        eligible = lowest == np.arange(len(lowest))
        alone = np.bincount(lowest, minlength=len(lowest))[lowest] == 1
    first = screen.first_pick(alone.nonzero()[0], eligible) if alone.any() else 0
    order = screen.greedy(first, eligible, min(count, int(eligible.sum())))
    copies = (~eligible).nonzero()[0][: count - len(order)]
    return torch.from_numpy(np.concatenate([order, copies]))


class _Screen:
    """Cosine distances of features [N, D]: approximate ones of all pairs, and exact rows where needed.

    The approximation is a product of 8-bit integers, for rows of length 1 without their mean: what rows of
    similar direction have in common takes no part of the integers' range. `nearest` [N] is the least
    approximate distance of each row to another one, at the place `neighbour` [N], and `own` [N] the
    approximate distance to itself.
    """

    def __init__(self, features: Tensor, norm: Tensor) -> None:
        count, width = features.shape
        # What two values of one distance, whatever the order of their sums, differ by at most.
        self.margin = 2 * (width + 4) * ROUNDING
        self.exact: dict[int, Array] = {}
        step = max(1, count // SAMPLE)
        sample = features[::step] / norm[::step]
        mean = torch.full((len(sample),), 1 / len(sample)) @ sample
        variance = float(torch.linalg.vector_norm(sample - mean)) ** 2 / sample.numel()
        scale = variance**0.5 * RANGE / 127 or 1.0
        shift = mean / -scale
        self.unit, integers = torch.empty(count, width), torch.empty(count, width, dtype=torch.int8)
        for start in range(0, count, 64):  # few enough to stay in the cache
            part = slice(start, start + 64)
            unit = torch.div(features[part], norm[part], out=self.unit[part])
            integers[part] = torch.add(shift, unit, alpha=1 / scale).round_().clamp_(-127, 127)
        along = (1 + mean @ mean) / 2 - self.unit @ mean  # [N], the part that the mean has in distances
        approximate, self.along = torch.empty(count, count), along.numpy()
        self.approximate = approximate.numpy()  # [N, N] without along[i] in row i
        self.nearest, self.own = torch.empty(count), torch.empty(count)
        self.neighbour = np.empty(count, dtype=np.int64)
        for start in range(0, count, BLOCK):
            part = slice(start, start + BLOCK)
            block = approximate[part].copy_(torch._int_mm(integers[part], integers.T))
            torch.add(along, block, alpha=-(scale**2), out=block)
            diagonal = block[:, part].diagonal()
            self.own[part] = diagonal
            diagonal.fill_(torch.inf)
            self.neighbour[part] = self.approximate[part].argmin(1)
            torch.amin(block, 1, out=self.nearest[part])

    def first_pick(self, places: Array, eligible: Array) -> int:
        """The place, of `places` [n], whose nearest other row is farthest; `eligible` [N] rows come later.

        The distance to any other row, here to the likely neighbour, bounds that to the nearest from above.
        """
        unit = list(self.unit.numpy())
        dots = [np.dot(unit[i], unit[j]) for i, j in zip(places, self.neighbour[places], strict=True)]
        bounds = 1 - np.array(dots, dtype=np.float32)
        guess = places[bounds.argmax()]
        self.add_exact(self._likely_picks(_unpicked(eligible), int(guess), BATCH[1]))
        least = self._nearest(guess[None])
        candidates = np.union1d(places[bounds >= least - self.margin], guess)
        missing = np.array(
            [place for place in candidates.tolist() if place not in self.exact], dtype=np.int64
        )
        for start in range(0, len(missing), BLOCK):
            self.add_exact(missing[start : start + BLOCK])
        return int(candidates[self._nearest(candidates).argmax()])  # of equal ones the lowest place

    def greedy(self, first: int, eligible: Array, count: int) -> Array:
        """The greedy order from the `first` pick on, [count], among `eligible` [N] rows."""
        order, score, pick = np.empty(count, dtype=np.int64), _unpicked(eligible), first
        for number in range(count):
            if pick not in self.exact:
                batch = min(max(count - number, BATCH[0]), BATCH[1])
                self.add_exact(self._likely_picks(score, pick, batch))
            order[number] = pick
            np.minimum(score, self.exact[pick], out=score)
            score[pick] = -np.inf
            pick = int(score.argmax())  # of equal scores the first
        return order

    def add_exact(self, places: Array) -> None:
        """Compute the exact rows at `places` [n]."""
        if len(places) < BATCH[0]:
            places = np.union1d(places, np.arange(BATCH[0]))
        rows = torch.mm(self.unit[torch.from_numpy(places)], self.unit.T)
        self.exact.update(zip(places.tolist(), torch.sub(1, rows, out=rows).numpy(), strict=True))

    def _likely_picks(self, score: Array, pick: int, count: int) -> Array:
        """Places [count] whose exact rows are not known and that are likely to be picked: the next `pick`,
        and what follows it by approximate distances from the `score` [N] on."""
        score, places = score.copy(), []
        for _ in range(int((score > -np.inf).sum())):
            row = self.exact.get(pick)
            if row is None:
                places.append(pick)
                row = self.approximate[pick] + self.along[pick]
            if len(places) == count:
                break
            np.minimum(score, row, out=score)
            score[pick] = -np.inf
            pick = int(score.argmax())
        return np.array(places)

    def _nearest(self, places: Array) -> Array:
        """The distance of the exact rows at `places` [n] to the nearest other one, [n]."""
        matrix = np.stack([self.exact[place] for place in places.tolist()])
        # Two rows that are nearest to each other are equally far: one of the two roundings counts for both.
        matrix[:, places] = np.minimum(matrix[:, places], matrix[:, places].T)
        matrix[np.arange(len(places)), places] = np.inf
        return matrix.min(1)


def _unpicked(eligible: Array) -> Array:
    """Scores [N] before the first pick: infinite for `eligible` [N] rows, and below all for others."""
    return np.where(eligible, np.float32(np.inf), np.float32(-np.inf))
