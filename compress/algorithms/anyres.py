"""Budgets for images that are cut into tiles: HiRED and GlobalCom², from class-token rows to packed tokens.

Both rank by what the class token attends to, so they need one row of attention per tile and no features.
Their `geometry="reference"` repeats the published code, `"correct"` what its authors describe.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .grid import Grid
from .select import top_k, top_k_mask

Geometry = Literal["correct", "reference"]
Newline = Literal["rows", "nonempty", "reference"]


@dataclass(frozen=True, eq=False)
class TileSelection:
    """The tokens kept of an image of P tiles. A token's number is tile · tokens_per_tile + index.

    `kept` [K] are the chosen tokens, ascending, before padding is cut away; `packed` [M] what enters the LLM,
    in order, with -1 for a newline vector; `places` [M] where in the Grid's sequence each stands, -1 where
    that sequence has no such token (a newline after a row of padding).
    """

    kept: Tensor
    packed: Tensor
    places: Tensor

    def mask(self, grid: Grid) -> Tensor:
        """Which tokens of the Grid's sequence stay, bool [N]."""
        mask = torch.zeros(grid.num_tokens, dtype=torch.bool, device=self.places.device)
        mask[self.places[self.places >= 0]] = True
        return mask


def split_budget(weights: Tensor, total: int, capacity: Tensor) -> Tensor:
    """Whole numbers [P] that add up to `total`, in proportion to `weights` [P], never above `capacity` [P].

    What a full place cannot take is shared by the others; remainders go to the largest fractions first, of
    equal ones to the first. Without any weight shares are even. Raises ValueError where total does not fit.
    """
    weights, capacity = weights.detach().double().cpu(), capacity.cpu().long()
    if not 0 <= total <= int(capacity.sum()):
        raise ValueError(f"{total} tokens were requested; there are {int(capacity.sum())} to choose from")
    full = capacity == 0
    while True:
        rest = total - int(capacity[full].sum())
        free_weights = weights.where(~full, 0)
        free_weights = free_weights if float(free_weights.sum()) > 0 else (~full).double()
        share = free_weights / free_weights.sum().clamp_min(1e-300) * rest
        over = ~full & (share >= capacity)
        if not bool(over.any()):
            break
        full |= over
    counts = torch.where(full, capacity, share.long())
    order = top_k((share - counts).masked_fill(full, -1), total - int(counts.sum()))
    counts[order] += 1
    return counts


def hired(
    early: Tensor,
    late: Tensor,
    grid: Grid,
    *,
    rate: float = 0.2,
    alpha: float = 0.5,
    total: int | None = None,
    salient: int | Literal["mass"] | None = None,
    redistribute: bool = False,
    geometry: Geometry = "correct",
) -> TileSelection:
    """Keep what the class token attends to in a late layer, in each tile as much as an early layer gives it.

    HiRED (Arif et al., "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution
    Vision-Language Models", 2024, arXiv 2408.10945, section 4). `early` and `late` [P, H, N] are the class
    token's attention to the N patches of each of the grid's tiles, after softmax; the original takes layers 0
    and 22 of CLIP-L. `rate` of all P · N tokens is the budget (`total` gives it as a number), of which
    `alpha` goes to the thumbnail. The rest is shared by where the thumbnail's salient tokens lie: its int(N ·
    (1 - alpha)) highest early scores, or `salient` of them, or with "mass" the sum of all early scores.
    Newline vectors are dropped.

    Tokens chosen in padding and fractions of shares are lost, so fewer tokens than the budget enter the LLM;
    `redistribute` spends it to the last token among those that do. Raises ValueError for scores that do not
    fit the grid, and where the reference fails.
    """
    tokens = grid.tokens_per_tile
    _check_rows(early, grid, 3)
    _check_rows(late, grid, 3)
    grid = grid.to(late.device)
    scores, valid = late.float().sum(1), grid.place >= 0  # [P, N]
    if total is None:
        total = int(grid.num_tiles * tokens * rate)
        total = min(total, int(valid.sum())) if redistribute else total
    elif total < 0 or (redistribute and total > int(valid.sum())):
        raise ValueError(f"total is {total}; this image has {int(valid.sum())} tokens")
    counts = torch.full((grid.num_tiles,), min(total, tokens), device=late.device)
    if grid.num_tiles > 1:
        full = min(int(total * alpha), tokens)
        shares = _hired_shares(early, grid, alpha, salient, geometry)
        if redistribute:
            capacity = grid.shown.sum(1)
            full = max(full, total - int(capacity.sum()))
            counts[grid.cut] = split_budget(shares, total - full, capacity).to(late.device)
        else:
            spare = min(total - full, grid.rows * grid.cols * tokens)
            counts[grid.cut] = _truncated_shares(shares, spare, tokens, geometry)
        counts[_thumbnail(grid, "HiRED")] = full
    if redistribute:
        scores = scores.masked_fill(~valid, -torch.inf)
    chosen = top_k_mask(scores, counts)
    packing = _swapped(grid).to(late.device) if geometry == "reference" else grid
    patches = packing.flat[~packing.separators]
    packed = patches[chosen.flatten()[patches]]
    return TileSelection(chosen.flatten().nonzero().squeeze(1), packed, grid.place.flatten()[packed])


def _hired_shares(
    early: Tensor, grid: Grid, alpha: float, salient: int | str | None, geometry: Geometry
) -> Tensor:
    """How much of the early layer's attention each cut tile has, [rows · cols]."""
    tokens, tiles = grid.tokens_per_tile, grid.rows * grid.cols
    score = early[_thumbnail(grid, "HiRED")].float().sum(0)  # [N]
    if salient == "mass":
        weight = score
    else:
        count = int(tokens * (1 - alpha)) if salient is None else int(salient)
        weight = top_k_mask(score, count).float()
    if geometry == "reference":
        # Parity: runs of consecutive tokens stand for the tiles, whatever the arrangement of the tiles.
        if tokens % tiles:
            raise ValueError(f'geometry="reference" cannot cut {tokens} tokens into {tiles} equal strips')
        return weight.view(tiles, -1).sum(1)
    return weight.new_zeros(tiles).index_add_(0, grid.block, weight)


def _truncated_shares(shares: Tensor, spare: int, tokens: int, geometry: Geometry) -> Tensor:
    """Shares of a budget, cut to whole numbers and to what a tile has; remainders are lost."""
    if spare <= 0:
        return torch.zeros_like(shares, dtype=torch.long)
    if geometry == "reference" and not bool(shares.any()):
        raise ValueError("no token of the thumbnail is salient (alpha is 1), where the reference fails")
    shares = torch.where(shares.any(), shares, 1)
    return (shares / shares.sum() * spare).long().clamp_max(tokens)  # in float32, as the original


def _check_anyres(grid: Grid) -> None:
    if grid.image_size is None or grid.thumbnail != 0:
        raise ValueError('geometry="reference" needs a grid made by Grid.anyres')


def _swapped(grid: Grid) -> Grid:
    """The layout in which HiRED's code packs."""
    _check_anyres(grid)
    # Parity: the published code takes rows for columns, and unpads the map it gets so.
    return Grid.tiled(
        grid.cols,
        grid.rows,
        grid.height,
        grid.width,
        thumbnail="first",
        image_size=grid.image_size,
        decimals=None,
    )


def globalcom2(
    scores: Tensor,
    grid: Grid,
    *,
    ratio: float = 0.25,
    total: int | None = None,
    temperature: float = 10.0,
    newline: Newline | None = None,
    geometry: Geometry = "correct",
) -> TileSelection:
    """Keep tokens that score high in their tile and in the thumbnail, more of them in tiles that score high.

    GlobalCom² (Liu et al., "Compression with Global Guidance: Towards Training-free High-Resolution MLLMs
    Acceleration", 2025, arXiv 2501.05179, section 4). `scores` [P, N] are the class token's attention logits
    (before softmax, mean over heads) to the patches of each tile of a grid with a thumbnail; the original
    takes the last layer of CLIP-L. `ratio` of the tokens is kept; `total` instead keeps exactly so many,
    newlines not counted. The thumbnail's tokens enter by falling score, the others in raster order.

    Newlines stay at the end of all rows of the unpadded map ("rows"), of rows that keep a token ("nonempty"),
    or of all rows, padding included ("reference"; the default with that geometry, "rows" without). Raises
    ValueError for scores that do not fit the grid.
    """
    _check_rows(scores, grid, 2)
    if newline not in (None, "rows", "nonempty", "reference"):
        raise ValueError(f'newline is {newline!r}; "rows", "nonempty" and "reference" are known')
    newline = newline or ("reference" if geometry == "reference" else "rows")
    layout = grid.to(scores.device)
    grid = unrounded(grid).to(scores.device) if geometry == "reference" else layout
    available = grid.shown.sum(1)
    if total is None:
        whole = int(grid.tokens_per_tile * ratio)
        counts = (available * globalcom2_ratios(scores, grid, ratio, temperature)).long()
    else:
        capacity = torch.cat([available.new_tensor([grid.tokens_per_tile]), available])
        rate = total / int(capacity.sum())
        guided = globalcom2_ratios(scores, grid, rate, temperature)
        weights = torch.cat([guided.new_tensor([rate]), guided]) * capacity
        whole, *counts = split_budget(weights, total, capacity).tolist()
        counts = torch.tensor(counts, device=scores.device)
    first = _thumbnail(grid) * grid.tokens_per_tile
    thumbnail = first + top_k(scores[_thumbnail(grid)], whole)
    combined, _ = globalcom2_scores(scores, grid)
    chosen = top_k_mask(combined, counts)  # invalid places are lowest
    tokens = chosen.flatten().nonzero().squeeze(1)
    tiles = tokens + grid.first * grid.tokens_per_tile
    rows, ends = _newlines(grid.map_row.flatten()[tokens], layout, newline)
    # Tokens by row and column of the map, a newline after the last column.
    width = grid.cols * grid.width + 1
    order = torch.cat([_map_order(grid, geometry)[tokens], (rows + 1) * width - 1]).argsort()
    names = torch.cat([tiles, torch.full_like(rows, -1)])[order]
    places = torch.cat([layout.place.flatten()[tiles], ends])[order]
    return TileSelection(
        torch.cat([thumbnail, tiles]).sort().values,
        torch.cat([thumbnail, names]),
        torch.cat([layout.place.flatten()[thumbnail], places]),
    )


def globalcom2_ratios(scores: Tensor, grid: Grid, ratio: float, temperature: float = 10.0) -> Tensor:
    """Share of its tokens that each cut tile keeps, float64 [rows · cols], around `ratio` and at most 1.

    The softmax, over tiles, of the thumbnail's scores [P, N] summed over the block that each tile shows.
    """
    grid = grid.to(scores.device)
    whole = scores[_thumbnail(grid)].double()
    mass = whole.new_zeros(grid.rows * grid.cols).index_add_(0, grid.block, whole)
    weight = ((mass - mass.max()) / temperature).exp()
    weight = weight / (weight.sum() + 1e-8)
    return (ratio * (1 + weight - weight.mean())).clamp_max(1)


def globalcom2_scores(scores: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Own scores of each tile plus the thumbnail's at the same places, both of unit length over its tokens.

    From scores [P, N]: the sum [rows · cols, N], -inf for padding, and the thumbnail's part of the same shape
    before it is normalised.
    """
    grid = grid.to(scores.device)
    top, bottom, left, right = grid.rectangle
    whole = scores[_thumbnail(grid)].float().view(1, 1, grid.height, grid.width)
    whole = F.interpolate(whole, size=(bottom - top, right - left), mode="bilinear", align_corners=False)
    guide, hidden = whole.flatten()[grid.rectangle_index], ~grid.shown
    both = torch.stack([scores[grid.cut].float(), guide]).masked_fill_(hidden, 0)
    return F.normalize(both, dim=2).sum(0).masked_fill_(hidden, -torch.inf), guide


def _map_order(grid: Grid, geometry: Geometry) -> Tensor:
    """Numbers that rise in the raster order of the stitched map, newlines counted, [tiles · N]."""
    row, col = grid.map_row, grid.map_col
    if geometry == "reference":
        # Parity: a token is put where it would be if the tile's padding came last.
        rank = grid.shown.cumsum(1) - 1
        tile = torch.arange(len(rank), device=rank.device)[:, None]
        row = tile // grid.cols * grid.height + rank // grid.width
        col = tile % grid.cols * grid.width + rank % grid.width
    return (row * (grid.cols * grid.width + 1) + col).flatten()


def _newlines(row: Tensor, grid: Grid, newline: Newline) -> tuple[Tensor, Tensor]:
    """Rows of the map that end in a newline, and its place in the Grid's sequence (-1: none)."""
    if newline == "reference":
        rows = torch.arange(grid.rows * grid.height, device=row.device)
    else:
        row_mask = grid.row_end >= 0
        if newline == "nonempty":
            row_mask &= torch.zeros_like(row_mask).index_fill_(0, row, True)
        rows = row_mask.nonzero().squeeze(1)
    return rows, grid.row_end[rows]


def unrounded(grid: Grid) -> Grid:
    """The layout that GlobalCom²'s code uses for the image of a grid made by `Grid.anyres`.

    Raises ValueError for other grids.
    """
    _check_anyres(grid)
    # Parity: lengths are cut to whole numbers without rounding first.
    return Grid.tiled(
        grid.rows,
        grid.cols,
        grid.height,
        grid.width,
        thumbnail="first",
        image_size=grid.image_size,
        newline=bool(grid.separators.any()),
        decimals=None,
    )


def _thumbnail(grid: Grid, method: str = "GlobalCom²") -> int:
    if grid.thumbnail is None:
        raise ValueError(f"{method} is guided by a thumbnail, which this grid does not have")
    return grid.thumbnail


def _check_rows(scores: Tensor, grid: Grid, ndim: int) -> None:
    shape = "[P, H, N]" if ndim == 3 else "[P, N]"
    if scores.ndim != ndim or len(scores) != grid.num_tiles or scores.shape[-1] != grid.tokens_per_tile:
        raise ValueError(
            f"scores are {list(scores.shape)}; this grid takes {shape} with P = {grid.num_tiles} tiles and "
            f"N = {grid.tokens_per_tile} patches"
        )
