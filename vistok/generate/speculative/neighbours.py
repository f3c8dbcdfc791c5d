"""The nearest codes of every code, by which relaxed acceptance groups tokens."""

import torch
from torch import Tensor

BLOCK = 1024  # rows whose distances are in memory at a time


def neighbour_table(codebook: Tensor, count: int | None = None) -> Tensor:
    """The `count` (default: all others) nearest rows of every row of a codebook [V, D]: int32 [V, count].

    By squared Euclidean distance of the rows as they are stored, ascending, without the row itself; of equal
    distances the lower number first. Computed once per codebook; callers keep it.

    Raises:
        ValueError: a codebook of another shape or with NaN, or a count outside 1 … V - 1.
    """
    if codebook.ndim != 2 or len(codebook) < 2 or not bool(codebook.isfinite().all()):
        raise ValueError(f"the codebook is {list(codebook.shape)}; it is finite rows [V, D], two or more")
    most = len(codebook) - 1
    count = most if count is None else count
    if not 1 <= count <= most:
        raise ValueError(f"count is {count}; a codebook of {most + 1} rows has 1 to {most} neighbours")
    rows, tables = codebook.double(), []
    for start in range(0, len(rows), BLOCK):
        part = rows[start : start + BLOCK]
        distances = torch.cdist(part, rows, compute_mode="donot_use_mm_for_euclid_dist")
        distances[torch.arange(len(part)), start + torch.arange(len(part))] = -1  # the row itself, first
        tables.append(distances.sort(dim=1, stable=True).indices[:, 1 : count + 1].int())
    return torch.cat(tables)
