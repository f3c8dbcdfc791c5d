"""Predictive coding over a grid: which vectors a causal predictor already gives, so that they can be dropped.

PixelPrune's selectors. Vectors lie on a grid of `height` rows and `width` columns, one row of the grid after
the other. Two vectors are similar when their distance is at most a threshold.
"""

from functools import cached_property
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

Metric = Literal["max", "mae", "rmse", "exact"]
METRICS: tuple[Metric, ...] = ("max", "mae", "rmse", "exact")
_CHUNK = 1024  # rows that are compared at once


class Similarity:
    """Which vectors of a grid [height · width, D] are similar.

    The distance is the largest ("max") or mean ("mae") absolute difference or the root of the mean square
    difference ("rmse"); "exact" is the first at threshold 0. At threshold 0 (`exact`) similar ones are equal.
    Raises ValueError for values that are not finite.
    """

    def __init__(self, vectors: Tensor, height: int, width: int, metric: Metric, threshold: float) -> None:
        # One sum is cheaper than a mask of all values, and only then is a second look needed.
        if not torch.isfinite(vectors.sum(dtype=torch.float32)) and not torch.isfinite(vectors).all():
            raise ValueError("the vectors hold NaN or infinite values, which equal no prediction")
        self.vectors, self.metric, self.threshold = vectors, metric, threshold
        self.places = torch.arange(height * width, device=vectors.device).view(height, width)
        self.exact = threshold == 0

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Whether the vectors numbered `a` and `b` [n] are similar, bool [n]."""
        width, later, gap = self.places.shape[1], torch.maximum(a, b), (a - b).abs()
        similar, below = gap == 0, gap == width
        beside = (gap == 1) & (later % width > 0)
        # Neighbours have been compared already.
        similar[below] = self.below.flatten()[later[below] - width]
        row, column = later[beside] // width, later[beside] % width
        similar[beside] = self.beside[row, column - 1]
        for part in ((gap > 0) & ~below & ~beside).nonzero().squeeze(1).split(_CHUNK):
            similar[part] = self._alike(self.vectors[a[part]], self.vectors[b[part]])
        return similar

    @cached_property
    def beside(self) -> Tensor:
        """Whether each vector is similar to the one left of it [height, width - 1]."""
        rows = self.vectors.unflatten(0, self.places.shape)
        return torch.stack([self._alike(row[1:], row[:-1]) for row in rows])

    @cached_property
    def below(self) -> Tensor:
        """Whether each vector is similar to the one above it [height - 1, width]."""
        rows = self.vectors.unflatten(0, self.places.shape)
        pairs = [self._alike(row, above) for above, row in pairwise(rows)]
        return torch.stack(pairs) if pairs else self.places[1:].bool()

    def _alike(self, a: Tensor, b: Tensor) -> Tensor:
        dtype = torch.promote_types(a.dtype, torch.float32)
        difference = (a.to(dtype) - b.to(dtype)).abs_()
        if self.metric in ("max", "exact") or self.exact:  # 0 for equal numbers and no others
            return difference.amax(1) <= self.threshold
        distance = difference.mean(1) if self.metric == "mae" else difference.square_().mean(1).sqrt()
        return distance <= self.threshold


def predicted_2d(similar: Similarity, *, anchored: bool = True) -> Tensor:
    """The positions [N] to keep, as a mask, when each is predicted from those left of and above it.

    The first position is kept, those of the first row are predicted by the left neighbour, those of the first
    column by the one above. Elsewhere the one above predicts if the neighbour above on the left is similar to
    the left one and not to the one above, else the left one. A position similar to its predictor is dropped.

    `anchored`: neighbours that were dropped count as the vector that they were replaced by, so that a dropped
    vector is similar to the kept one that stands for it; else neighbours are compared as they are, and slow
    gradients may vanish. At threshold 0 both are the same.
    """
    if not anchored or similar.exact:
        return _predicted_at_once(similar)
    places = similar.places
    (height, width), device = places.shape, places.device
    kept, anchors = torch.ones_like(places, dtype=torch.bool), places.clone()
    for diagonal in range(1, height + width - 1):  # its positions do not depend on each other
        rows = torch.arange(max(0, diagonal - width + 1), min(height, diagonal + 1), device=device)
        cols = diagonal - rows
        up, back = (rows - 1).clamp_min(0), (cols - 1).clamp_min(0)
        left, above, corner = anchors[rows, back], anchors[up, cols], anchors[up, back]
        like_left, like_above = similar(corner.repeat(2), torch.cat([left, above])).chunk(2)
        from_above = like_left & ~like_above
        predictor = torch.where(((rows > 0) & from_above) | (cols == 0), above, left)
        own = places[rows, cols]
        dropped = similar(own, predictor)
        anchors[rows, cols] = torch.where(dropped, predictor, own)
        kept[rows, cols] = ~dropped
    return kept.flatten()


def _predicted_at_once(similar: Similarity) -> Tensor:
    beside, below = similar.beside, similar.below
    dropped = torch.zeros_like(similar.places, dtype=torch.bool)
    dropped[0, 1:], dropped[1:, 0] = beside[0], below[:, 0]
    # The corner is above the left one and beside the one above.
    from_above = below[:, :-1] & ~beside[:-1]
    dropped[1:, 1:] = torch.where(from_above, below[:, 1:], beside[1:])
    return ~dropped.flatten()


def starts_of_runs(similar: Similarity, *, serpentine: bool = False) -> Tensor:
    """The positions [N] to keep, as a mask, when each is predicted by the last one kept before it.

    Positions follow row by row, each row from left to right or, with `serpentine`, every second one from
    right to left.
    """
    order = similar.places.clone()
    if serpentine:
        order[1::2] = order[1::2].flip(1)
    order = order.flatten()
    kept = torch.zeros_like(order, dtype=torch.bool)
    continues = similar(order[1:], order[:-1])
    if similar.exact:  # all vectors of a run are equal
        kept[order[0]], kept[order[1:]] = True, ~continues
        return kept
    starts, start, is_alike = [], 0, [*continues.tolist(), False]
    while start < len(order):
        starts.append(start)
        start = _end_of_run(similar, order, start) if is_alike[start] else start + 1
    kept[order[starts]] = True
    return kept


def _end_of_run(similar: Similarity, order: Tensor, start: int) -> int:
    """The first place after `start` whose vector is not similar to the one there."""
    place, count = start + 1, 1
    while place < len(order):
        ahead = order[place : place + count]
        differs = (~similar(order[start].expand(len(ahead)), ahead)).nonzero()
        if len(differs):
            return place + int(differs[0])
        place, count = place + len(ahead), 2 * count
    return place


def sample_of_components(
    similar: Similarity, skip: float, *, generator: torch.Generator | None = None
) -> Tensor:
    """The positions [N] to keep, as a mask: a share 1 - `skip` of each connected component of similar
    neighbours (four of them), at least one.

    Of n members they are those at even distances or, with a `generator`, random ones.
    """
    kept = torch.zeros(similar.places.numel(), dtype=torch.bool)
    for members in _components(similar):
        count = max(1, len(members) - round(len(members) * skip))
        if generator is None:
            chosen = torch.linspace(0, len(members) - 1, count, dtype=torch.float32).long()
        else:
            chosen = torch.randperm(len(members), generator=generator)[:count]
        kept[torch.tensor(members)[chosen]] = True
    return kept.to(similar.places.device)


def _components(similar: Similarity) -> list[list[int]]:
    """The connected components of similar neighbours, each ascending."""
    places = similar.places
    parents = list(range(places.numel()))

    def root(place: int) -> int:
        while parents[place] != place:
            parents[place] = place = parents[parents[place]]
        return place

    for a, b, alike in (
        (places[:, :-1], places[:, 1:], similar.beside),
        (places[:-1], places[1:], similar.below),
    ):
        for one, other in zip(a[alike].tolist(), b[alike].tolist(), strict=True):
            first, second = sorted((root(one), root(other)))
            parents[second] = first
    components: dict[int, list[int]] = {}
    for place in range(len(parents)):
        components.setdefault(root(place), []).append(place)
    return list(components.values())


def with_count(mask: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """A mask [N] with exactly `count` True: random entries of `mask` are cleared or set until there are."""
    surplus = int(mask.sum()) - count
    places = (mask == (surplus > 0)).nonzero().squeeze(1)
    chosen = torch.randperm(len(places), generator=generator)[: abs(surplus)]
    return mask.index_fill(0, places[chosen.to(places.device)], surplus < 0)
