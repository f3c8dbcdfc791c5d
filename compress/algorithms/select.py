"""Choosing which visual tokens to keep, as pure functions on tensors, independent of any model."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .duplicates import lowest_copies
from .screening import is_faster, screened_order

_PRECISION = threading.Lock()
BLOCK = 96  # rows of the distance matrix in one product
IDENTICAL = -1.0  # stands for the distance of identical rows: below every distance that rounding can give


def top_k(scores: Tensor, k: int) -> Tensor:
    """Places of the k highest of `scores` [..., N], best first, [..., k]; of equal scores the lowest place.

    The result is the same on every device. NaN counts as highest, as everywhere in torch. Raises ValueError
    unless 0 ≤ k ≤ N.
    """
    if not 0 <= k <= scores.shape[-1]:
        raise ValueError(f"k is {k}; of {scores.shape[-1]} tokens between 0 and all can be taken")
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def top_k_mask(scores: Tensor, k: int | Tensor) -> Tensor:
    """Which of `scores` [..., N] are among the k highest, bool [..., N]; k may differ from row to row, [...].

    The rule of `top_k`; a k above N takes all.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    in_top = (
        torch.arange(scores.shape[-1], device=scores.device)
        < torch.as_tensor(k, device=scores.device)[..., None]
    )
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, in_top.expand_as(order))


def class_top_k(attention: Tensor, k: int) -> Tensor:
    """The k patches that the class token attends to most, ascending: attention [..., H, N] → [..., k].

    FasterVLM (Zhang et al., "[CLS] Attention is All You Need for Training-Free Visual Token Pruning", 2024,
    arXiv 2412.01818): the class token's attention in the layer that made the features, mean over heads.
    """
    return top_k(attention.float().mean(-2), k).sort(-1).values


def uniform(n: int, k: int, device: torch.device | str | None = None) -> Tensor:
    """k of n places at equal distances, the first and the last included, ascending [k]."""
    _check_count(k, n)
    steps = torch.arange(k, dtype=torch.float64, device=device)
    return (steps * (n - 1) / max(k - 1, 1)).round().long()


def random(n: int, k: int, generator: torch.Generator | None = None) -> Tensor:
    """k of n places drawn without replacement, ascending [k], on the generator's device.

    Nested: from the same state of the generator a larger k takes the same places and more.
    """
    _check_count(k, n)
    device = None if generator is None else generator.device
    return torch.randperm(n, generator=generator, device=device)[:k].sort().values


def farthest_first(
    features: Tensor,
    count: int,
    *,
    compute_dtype: torch.dtype | Literal["input"] = torch.float32,
    mask: Tensor | None = None,
) -> Tensor:
    """Greedy order in which `count` tokens lie as far from each other as possible in cosine distance.

    features [N, D] → [count], or [B, N, D] → [B, count]; `mask` [N] or [B, N] is True for tokens that may be
    picked. The first pick is the token farthest from its nearest neighbour, each next one the token farthest
    from all picked so far; of equal scores the lowest place wins. Orders are nested (a smaller count gives a
    beginning of a larger one's) and never repeat a place: identical rows have identical scores and copies of
    picked rows come last, in ascending order. Rows of zeros are at distance 1 from every row.

    DivPrune (Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
    2025, arXiv 2503.02175, algorithm 1). The original computes in the model's precision
    (`compute_dtype="input"`), where many distances are equal; float32 is the default. Raises ValueError for
    features that are not finite floats and for a count above the number of tokens.
    """
    if features.ndim not in (2, 3) or not features.is_floating_point():
        raise ValueError(
            f"features are floats [N, D] or [B, N, D]; these are {features.dtype} {list(features.shape)}"
        )
    if mask is not None and (mask.shape != features.shape[:-1] or mask.dtype != torch.bool):
        raise ValueError(
            f"mask is {mask.dtype} {list(mask.shape)}; these features take bool {list(features.shape[:-1])}"
        )
    dtype = features.dtype if compute_dtype == "input" else compute_dtype
    single = features.ndim == 2
    with torch.no_grad(), full_precision(features.device):
        images = features.unsqueeze(0) if single else features
        masks = None if mask is None else (mask.unsqueeze(0) if single else mask)
        _check_count(count, images.shape[1] if masks is None or not len(masks) else int(masks.sum(1).min()))
        if images.device.type == "cpu":
            picks = [
                _pick_one(image, count, dtype, None if masks is None else masks[number])
                for number, image in enumerate(images)
            ]
            order = torch.stack(picks) if picks else torch.empty(0, count, dtype=torch.long)
        else:
            order = _pick_batch(images, count, dtype, masks)
    return order[0] if single else order


@torch.no_grad()
def cosine_distances(features: Tensor, compute_dtype: torch.dtype = torch.float32) -> Tensor:
    """1 − cosine of all pairs of rows of features [N, D], [N, N]; 1 for rows of zeros.

    Half of the matrix is computed and mirrored, so it is symmetric to the last bit. Raises ValueError for
    features that are not finite.
    """
    # In the original's order of operations, so that the bits are those of one full product on most machines.
    unit = _unit_rows(features, compute_dtype)
    distances = unit.new_empty(len(unit), len(unit))
    for start in range(0, len(unit), BLOCK):
        stop = start + BLOCK
        block = distances[start:stop, start:]
        torch.mm(unit[start:stop], unit[start:].T, out=block)
        torch.sub(1, block, out=block)
        corner = block[:, :BLOCK]
        corner.copy_(corner.triu() + corner.triu(1).T)
        distances[stop:, start:stop] = block[:, BLOCK:].T
    return distances


def farthest_order(distances: Tensor, count: int) -> Tensor:
    """The greedy order of `farthest_first` for any symmetric distances [N, N] on the CPU, [count].

    The diagonal does not matter. Raises ValueError for a count above N.
    """
    _check_count(count, len(distances))
    matrix = _array(distances)
    diagonal = matrix.diagonal().copy()
    np.fill_diagonal(matrix, np.inf)
    nearest = matrix.min(1)
    np.fill_diagonal(matrix, diagonal)
    return torch.from_numpy(_greedy(matrix, nearest, count))


def _unit_rows(features: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows [..., D] divided by their lengths, in `dtype`; rows of zeros stay zeros."""
    original, features = features, features.to(dtype)
    norm = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    # Squares of shorter rows underflow in float32, in which half precision adds up as well.
    usable = (norm > max(torch.finfo(dtype).tiny, 1e-16)) & (norm < torch.inf)
    if not bool(usable.all()):
        peak = features.abs().amax(-1, keepdim=True)
        if not bool(peak.isfinite().all()):
            wrong = int((~features.isfinite()).any(-1).sum())
            raise ValueError(
                f"{wrong} tokens hold NaN or infinity (as {dtype}), which no distance can rank; exclude them "
                "with `mask`, or run the encoder and projector in a wider type such as bfloat16 or float32"
            )
        features = features / torch.where(usable | (peak == 0), 1, peak)
        norm = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
        norm = norm.where(norm > 0, 1)
    return features / norm if features is original else features.div_(norm)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Float32 products in float32, not TF32 or bfloat16, and no autocast: both would change picks."""
    with torch.autocast(device.type, enabled=False), _PRECISION:  # a setting of the whole process
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def _pick_one(image: Tensor, count: int, dtype: torch.dtype, mask: Tensor | None) -> Tensor:
    """One image [N, D] on the CPU. Masked rows are left out, so that padding cannot change a rounding."""
    places = None if mask is None else mask.nonzero().squeeze(1)
    rows = image if places is None else image[places]
    if count == 0:
        return torch.empty(0, dtype=torch.long)
    order = screened_order(rows, count) if is_faster(*rows.shape, count, rows.device, dtype) else None
    if order is not None:
        return order if places is None else places[order]
    matrix = _array(cosine_distances(rows, dtype))
    np.fill_diagonal(matrix, np.inf)
    nearest = matrix.min(1)
    group = lowest_copies(rows, torch.from_numpy(nearest), dtype)
    if group is not None:
        matrix = _with_identical(torch.from_numpy(matrix), group).numpy()
        nearest = matrix.min(1)
    order = torch.from_numpy(_greedy(matrix, nearest, count))
    return order if places is None else places[order]


def _greedy(matrix: np.ndarray, nearest: np.ndarray, count: int) -> np.ndarray:
    """The loop of algorithm 1 on distances [N, N], starting from each row's nearest distance [N]."""
    order = np.empty(count, dtype=np.int64)
    if not count:
        return order
    pick = order[0] = nearest.argmax()
    score = matrix[pick].copy()
    score[pick] = -np.inf
    minimum, argmax = np.minimum, score.argmax
    for step in range(1, count):
        pick = argmax()  # of equal scores the first
        order[step] = pick
        minimum(score, matrix[pick], out=score)
        score[pick] = -np.inf
    return order


def _pick_batch(images: Tensor, count: int, dtype: torch.dtype, mask: Tensor | None) -> Tensor:
    """Images [B, N, D] together, with shapes that do not depend on the picks: the loop never waits for the
    device."""
    if mask is not None:
        images = images.masked_fill(~mask.unsqueeze(-1), 0)
    unit = _unit_rows(images, dtype)
    distances = torch.bmm(unit, unit.mT).neg_().add_(1)
    distances = torch.minimum(distances, distances.mT)  # the two roundings of a distance must not rank tokens
    del unit
    distances.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    nearest = distances.amin(-1) if distances.numel() else distances.new_zeros(distances.shape[:2])
    for number, image in enumerate(images):
        group = lowest_copies(image, nearest[number], dtype)
        if group is not None:
            distances[number] = _with_identical(distances[number], group)
    if mask is not None:
        distances.masked_fill_(~mask.unsqueeze(1), torch.inf)
    score = distances.amin(-1)
    excluded = torch.zeros_like(score, dtype=torch.bool) if mask is None else ~mask
    score.masked_fill_(excluded, -torch.inf)
    batch = torch.arange(len(images), device=images.device)
    order = torch.empty(len(images), count, dtype=torch.long, device=images.device)
    for step in range(count):
        pick = score.argmax(-1)  # of equal scores the first
        order[:, step] = pick
        row = distances[batch, pick]
        score = row.masked_fill(excluded, -torch.inf) if step == 0 else torch.minimum(score, row)
        score.scatter_(1, pick.unsqueeze(1), -torch.inf)
    return order


def _with_identical(distances: Tensor, group: Tensor) -> Tensor:
    """Distances [N, N] in which a group's rows are equally far from others and IDENTICAL to each other."""
    distances = distances[group][:, group]
    distances.masked_fill_(group[:, None] == group[None], IDENTICAL)
    return distances.fill_diagonal_(torch.inf)


def _array(distances: Tensor) -> np.ndarray:
    """Distances as NumPy's floats, which have no bfloat16; the same memory where that is possible."""
    return (distances if distances.dtype.itemsize >= 4 else distances.float()).detach().numpy()


def _check_count(count: int, available: int) -> None:
    if not 0 <= count <= available:
        raise ValueError(f"{count} tokens were requested; there are {available} to choose from")
