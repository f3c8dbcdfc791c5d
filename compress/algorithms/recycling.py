"""Recycling of dropped tokens: a few means of them go on in their place.

SparseVLM (Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model
Inference", 2024, arXiv 2410.04417).
"""

import torch
from torch import Tensor

SHARE = 0.3  # of the dropped tokens are recycled
MEMBERS = 10  # recycled tokens per mean


def recycled_count(dropped: int) -> int:
    """How many of the `dropped` tokens are recycled: the best 30 %, and one."""
    return min(dropped, int(SHARE * dropped) + 1)


def mean_count(recycled: int) -> int:
    """How many means the recycled tokens become."""
    return int(recycled / MEMBERS) + 1 if recycled else 0


def split_count(tokens: int, count: int) -> tuple[int, int]:
    """`count` of an image's `tokens` as (kept ones, means of dropped ones); at least one is kept, and more
    only if their number and that of the means that the rest becomes are `count` or less."""
    kept = next(
        (k for k in range(count, 1, -1) if k + mean_count(recycled_count(tokens - k)) <= count), min(count, 1)
    )
    return kept, min(count - kept, recycled_count(tokens - kept))


def density_peaks(states: Tensor, count: int) -> Tensor:
    """The cluster [m], from 0 to `count` - 1, of each of `states` [m, C], by density peaks.

    A token is dense whose `count` nearest, itself included, are near, and a centre where it is dense and far
    from every denser one (of equally dense ones the lower place counts as denser). The others go to the
    nearest centre. Raises ValueError unless 1 ≤ count ≤ m.
    """
    if not 1 <= count <= len(states):
        raise ValueError(f"count is {count}; {len(states)} tokens form between 1 and {len(states)} clusters")
    states = states.float()
    distances = torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist")
    distances = distances / states.shape[-1] ** 0.5
    nearest = distances.sort(-1).values[:, :count]
    density = (-nearest.square().mean(-1)).exp()
    place = torch.arange(len(states), device=states.device)
    denser = (density[None] > density[:, None]) | (
        (density[None] == density[:, None]) & (place[None] < place[:, None])
    )
    gap = distances.masked_fill(~denser, torch.inf).amin(-1)
    gap = torch.where(denser.any(-1), gap, distances.max())
    centres = (density * gap).sort(descending=True, stable=True).indices[:count]
    groups = distances[:, centres].argmin(-1)
    groups[centres] = torch.arange(count, device=states.device)
    return groups


def group_means(states: Tensor, groups: Tensor, count: int) -> Tensor:
    """The mean of each group of `states` [m, C] by `groups` [m], [count, C].

    Parity: divided by one in a million more than the size, as the original does.
    """
    sizes = torch.bincount(groups, minlength=count).to(states)
    sums = states.new_zeros(count, states.shape[-1]).index_add(0, groups, states)
    return sums / (sizes + 1e-6)[:, None]
