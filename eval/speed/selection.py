"""Speed of token selection, as a ratio against straightforward implementations in the same run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...compress.algorithms.anyres import globalcom2
from ...compress.algorithms.dpp import dpp_order
from ...compress.algorithms.grid import Grid
from ...compress.algorithms.select import cosine_distances, farthest_first, farthest_order
from ...compress.attention import attention_rows
from .paired import in_turn, ratios, seconds, spread

HEADER = ["selection", "plain ms", "vistok ms", "× plain (min–max)", "bar", "picks equal"]
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


@dataclass
class Comparison:
    """Two ways to select the same tokens, run in turn. `bar` is the ratio that vistok has to reach."""

    name: str
    plain: Callable[[], Tensor]
    vistok: Callable[[], Tensor]
    bar: float | None = None
    plain_seconds: list[float] = field(default_factory=list)
    our_seconds: list[float] = field(default_factory=list)
    equal: bool = True

    def run(self, repeats: int) -> None:
        """Measure pairs, after one that warms up."""

        def check(results: dict[str, Tensor]) -> None:
            self.equal &= same(results["plain"], results["vistok"])

        took = in_turn({"plain": self.plain, "vistok": self.vistok}, repeats, check=check)
        self.plain_seconds, self.our_seconds = seconds(took["plain"]), seconds(took["vistok"])

    @property
    def ratios(self) -> list[float]:
        """Plain time over vistok's, pair by pair."""
        return ratios(self.plain_seconds, self.our_seconds)

    @property
    def passed(self) -> bool:
        """Whether picks are equal and the median ratio reaches the bar."""
        return self.equal and (self.bar is None or median(self.ratios) >= self.bar)


@dataclass
class SelectionSpeed:
    """All comparisons of one run."""

    comparisons: list[Comparison]
    threads: int

    @property
    def title(self) -> str:
        """The title: what was measured, and on which hardware."""
        return f"selection on the CPU, {self.threads} thread{'s' * (self.threads > 1)}"

    def table(self) -> list[list[str]]:
        """Table rows in the columns of HEADER: medians, with the range over the pairs."""
        return [
            [
                c.name,
                f"{1e3 * median(c.plain_seconds):.2f}",
                f"{1e3 * median(c.our_seconds):.2f}",
                spread(c.ratios, ".1f"),
                "" if c.bar is None else f"{c.bar:g}" + (" ok" if c.passed else " MISSED"),
                "yes" if c.equal else "NO",
            ]
            for c in self.comparisons
        ]

    def record(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        return {
            "threads": self.threads,
            "torch": torch.__version__,
            "comparisons": [
                {"name": c.name, "plain_seconds": c.plain_seconds, "our_seconds": c.our_seconds}
                | {"ratio": c.ratios, "bar": c.bar, "equal": c.equal}
                for c in self.comparisons
            ],
        }


@torch.no_grad()
def run(comparisons: list[Comparison], repeats: int = 7, threads: int = 1) -> SelectionSpeed:
    """Time every comparison `repeats` times after a warm-up, plain and vistok in turn.

    Sets the number of threads of torch for the run only.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for comparison in comparisons:
            comparison.run(repeats)
    finally:
        torch.set_num_threads(before)
    return SelectionSpeed(comparisons, threads)


def comparisons() -> list[Comparison]:
    """Selection of tokens, at the sizes of LLaVA-1.5 and LLaVA-NeXT."""
    return [*_divprune(), *_cdpruner(), _globalcom2(300, 700), _globalcom2(600, 600), _class_rows()]


def same(expected: Tensor, picks: Tensor) -> bool:
    """Whether picks are equal, or scores equal within float32 rounding."""
    if expected.is_floating_point():
        return torch.allclose(picks, expected, rtol=1e-4, atol=1e-6)
    return torch.equal(picks, expected)


# DivPrune ---------------------------------------------------------------------------------------------------


def plain_distances(features: Tensor) -> Tensor:
    """1 − cosine of all pairs of rows [N, D], [N, N], by one full product."""
    unit = features / features.norm(dim=1, keepdim=True)
    return 1 - unit @ unit.T


def plain_farthest_order(distances: Tensor, count: int) -> Tensor:
    """Greedy picks [count] from distances [N, N]; each step gathers and reduces the rows of all picks."""
    nearest = distances.topk(2, dim=0, largest=False).values[1]
    picks = nearest.argmax().view(1)
    for _ in range(count - 1):
        rows = distances.gather(0, picks[:, None].expand(-1, len(distances)))
        picks = torch.cat([picks, rows.min(0).values.argmax().view(1)])
    return picks


def _divprune() -> list[Comparison]:
    rows = []
    sizes = ((2880, 4096, 288, 3.0), (2880, 1024, 288, None), (576, 4096, 58, 1.5), (576, 1024, 58, None))
    for count, width, keep, bar in sizes:
        features = _clusters(count, width)
        distances = cosine_distances(features)
        name = f"DivPrune {count}→{keep}, D={width}"
        rows.append(
            Comparison(
                f"{name}, total",
                lambda f=features, k=keep: plain_farthest_order(plain_distances(f), k),
                lambda f=features, k=keep: farthest_first(f, k),
                bar,
            )
        )
        rows.append(
            Comparison(
                f"{name}, greedy loop",
                lambda d=distances, k=keep: plain_farthest_order(d, k),
                lambda d=distances, k=keep: farthest_order(d, k),
                50.0 if count == 2880 and width == 4096 else None,
            )
        )
    return rows


def _clusters(count: int, width: int) -> Tensor:
    random = torch.Generator().manual_seed(count + width)
    centres = torch.randn(40, width, generator=random)
    which = torch.randint(0, 40, (count,), generator=random)
    return centres[which] + 0.5 * torch.randn(count, width, generator=random)


# CDPruner ---------------------------------------------------------------------------------------------------


def plain_dpp_order(features: Tensor, relevance: Tensor, count: int) -> Tensor:
    """Greedy picks [count] by the kernel of relevance [N] and cosines of features [N, D]: one full product,
    and for each pick the sum over all earlier ones."""
    unit = features / features.norm(dim=1, keepdim=True)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance[None]
    variance, parts, picks = kernel.diagonal().clone(), torch.zeros(0, len(features)), []
    for _ in range(count):
        pick = int(variance.argmax())
        along = (kernel[pick] - (parts[:, pick, None] * parts).sum(0)) / variance[pick].sqrt()
        parts = torch.cat([parts, along[None]])
        variance = variance - along.square()
        picks.append(pick)
        variance[picks] = -torch.inf
    return torch.tensor(picks)


def _cdpruner() -> list[Comparison]:
    rows = []
    for count, width, keep in ((576, 4096, 64), (576, 1024, 64)):
        features = _clusters(count, width)
        relevance = torch.rand(count, generator=torch.Generator().manual_seed(count + width))
        rows.append(
            Comparison(
                f"CDPruner {count}→{keep}, D={width}",
                lambda f=features, r=relevance, k=keep: plain_dpp_order(f, r, k),
                lambda f=features, r=relevance, k=keep: dpp_order(f, r, k),
            )
        )
    return rows


# GlobalCom² -------------------------------------------------------------------------------------------------


def plain_globalcom2(scores: Tensor, grid: Grid, ratio: float, temperature: float = 10.0) -> Tensor:
    """The packed tokens of `globalcom2`, by loops over tiles and tokens."""
    height, width, tokens = grid.height, grid.width, grid.tokens_per_tile
    whole = scores[0]
    mass = [0.0] * (grid.rows * grid.cols)
    for index in range(tokens):
        row = min(index // width // (height // grid.rows), grid.rows - 1)
        col = min(index % width // (width // grid.cols), grid.cols - 1)
        mass[row * grid.cols + col] += whole[index].item()
    weights = np.exp((np.array(mass) - max(mass)) / temperature)
    weights = weights / (weights.sum() + 1e-8)
    ratios = np.minimum(ratio * (1 + weights - weights.mean()), 1)
    is_patch = grid.place[grid.cut] >= 0
    top, bottom, left, right = grid.rectangle
    size = (bottom - top, right - left)
    resized = F.interpolate(whole.view(1, 1, height, width), size=size, mode="bilinear")[0, 0]
    placed = torch.full((grid.rows * height, grid.cols * width), -1)
    for tile in range(grid.rows * grid.cols):
        valid = [index for index in range(tokens) if is_patch[tile, index]]
        corner_row, corner_col = tile // grid.cols * height - top, tile % grid.cols * width - left
        guide = torch.stack([resized[corner_row + i // width, corner_col + i % width] for i in valid])
        own = scores[tile + 1][torch.tensor(valid)]
        combined = F.normalize(own, dim=0) + F.normalize(guide, dim=0)
        order = combined.argsort(descending=True, stable=True)
        for place in order[: int(len(valid) * ratios[tile])]:
            index = valid[place]
            row, col = corner_row + top + index // width, corner_col + left + index % width
            placed[row, col] = (tile + 1) * tokens + index
    packed = whole.argsort(descending=True, stable=True)[: int(tokens * ratio)].tolist()
    for row in range(top, bottom):
        packed += [int(name) for name in placed[row] if name >= 0]
        packed.append(-1)
    return torch.tensor(packed)


def _globalcom2(height: int, width: int) -> Comparison:
    grid = Grid.anyres((height, width), PINPOINTS, 24, tile_pixels=336)
    random = torch.Generator().manual_seed(height + width)
    scores = torch.randn(grid.num_tiles, grid.tokens_per_tile, generator=random)
    return Comparison(
        f"GlobalCom² {height}×{width}, {grid.num_tiles} tiles",
        lambda: plain_globalcom2(scores, grid, 0.25),
        lambda: globalcom2(scores, grid, ratio=0.25).packed,
        15.0,
    )


# Class-token rows -------------------------------------------------------------------------------------------


def _class_rows(tiles: int = 5, heads: int = 16, tokens: int = 577, width: int = 64) -> Comparison:
    random = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, tiles, heads, tokens, width, generator=random)

    def plain() -> Tensor:
        attention = (query * width**-0.5 @ key.mT).softmax(-1)
        return attention[:, :, 0, 1:].sum(1)

    def fast() -> Tensor:
        return attention_rows(query[:, :, :1], key)[:, :, 0, 1:].sum(1)

    return Comparison(f"HiRED class-token scores, {tiles} tiles, {heads} heads", plain, fast, 10.0)
