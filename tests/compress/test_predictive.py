"""Predictive coding of a grid of vectors, against plain loops over the rules of the paper."""

import pytest
import torch

from vistok.compress import PixelPrune
from vistok.compress.algorithms.predictive import (
    Similarity,
    predicted_2d,
    sample_of_components,
    starts_of_runs,
    with_count,
)

SIZES = ((1, 1), (1, 7), (6, 1), (4, 5), (7, 6))
DISTANCES = {
    "max": lambda a, b: (a - b).abs().max(),
    "mae": lambda a, b: (a - b).abs().mean(),
    "rmse": lambda a, b: (a - b).square().mean().sqrt(),
}


def flat_colours(height, width, colours, seed):
    """Vectors [N, 6] of few colours, which often equal their neighbours."""
    random = torch.Generator().manual_seed(seed)
    palette = torch.rand(colours, 6, generator=random)
    return palette[torch.randint(0, colours, (height * width,), generator=random)]


def gradients(height, width, seed):
    """Vectors that change little from one to the next."""
    random = torch.Generator().manual_seed(seed)
    steps = 0.02 * torch.randint(-1, 2, (height, width, 6), generator=random)
    return (0.5 + steps.cumsum(0).cumsum(1) / 3).flatten(0, 1)


def by_the_rules(x, height, width, metric, threshold, anchored):
    """The mask of pred_2d, one position after the other."""
    grid = x.view(height, width, -1).clone()
    true, mask = grid.clone(), torch.ones(height, width, dtype=torch.bool)

    def alike(a, b):
        return bool(DISTANCES[metric](a, b) <= threshold)

    for r in range(height):
        for c in range(width):
            if r == c == 0:
                continue
            neighbours = grid if anchored else true
            if r == 0:
                predictor = neighbours[0, c - 1]
            elif c == 0:
                predictor = neighbours[r - 1, 0]
            else:
                left, above, corner = neighbours[r, c - 1], neighbours[r - 1, c], neighbours[r - 1, c - 1]
                predictor = above if alike(corner, left) and not alike(corner, above) else left
            if alike(true[r, c], predictor):
                mask[r, c] = False
                grid[r, c] = predictor
    return mask.flatten()


def decoded(values, mask, height, width):
    """Every vector from the kept ones and their mask, by the rules on decoded values."""
    grid, values = torch.zeros(height, width, values.shape[1]), iter(values)
    for place, kept in enumerate(mask.tolist()):
        r, c = divmod(place, width)
        if kept:
            grid[r, c] = next(values)
        elif r and c:
            left, above, corner = grid[r, c - 1], grid[r - 1, c], grid[r - 1, c - 1]
            from_above = torch.equal(corner, left) and not torch.equal(corner, above)
            grid[r, c] = above if from_above else left
        else:
            grid[r, c] = grid[r, c - 1] if c else grid[r - 1, c]
    return grid.flatten(0, 1)


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("metric", DISTANCES)
@pytest.mark.parametrize("size", SIZES)
def test_the_prediction_follows_the_rules(size, metric, anchored):
    for seed in range(6):
        for x, threshold in (
            (flat_colours(*size, 3, seed), 0.0),
            (flat_colours(*size, 3, seed), 0.35),
            (gradients(*size, seed), 0.011),
            (gradients(*size, seed), 0.03),
        ):
            mask = predicted_2d(Similarity(x, *size, metric, threshold), anchored=anchored)
            assert torch.equal(mask, by_the_rules(x, *size, metric, threshold, anchored)), (seed, threshold)


@pytest.mark.parametrize("size", SIZES)
def test_at_threshold_0_kept_vectors_and_their_mask_determine_everything(size):
    lost = 0
    for seed in range(20):
        x = flat_colours(*size, 2, seed)
        x[seed % len(x)] = 0.0
        x[(seed + 1) % len(x)] = -0.0
        mask = PixelPrune().mask(x, *size)
        assert torch.equal(decoded(x[mask], mask, *size), x)
        lost += int((~mask).sum())
    assert lost > 0 or size == (1, 1)


@pytest.mark.parametrize("metric", DISTANCES)
def test_anchored_errors_stay_below_the_threshold_and_sliding_ones_add_up(metric):
    size, threshold = (9, 8), 0.015
    x = (0.01 * torch.arange(8.0)).repeat(9)[:, None].expand(-1, 6).contiguous()  # a slow gradient
    masks = {
        anchored: predicted_2d(Similarity(x, *size, metric, threshold), anchored=anchored)
        for anchored in (True, False)
    }
    errors = {
        anchored: max(min(float(DISTANCES[metric](a, b)) for b in x[mask]) for a in x)
        for anchored, mask in masks.items()
    }
    assert errors[True] <= threshold < 0.05 < errors[False]
    assert int(masks[False].sum()) == 1 < int(masks[True].sum())


@pytest.mark.parametrize("serpentine", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_runs_are_compared_with_their_first_vector(size, serpentine):
    height, width = size
    for seed in range(6):
        for x, threshold in ((flat_colours(*size, 2, seed), 0.0), (gradients(*size, seed), 0.02)):
            kept = []
            for r in range(height):
                for c in range(width) if r % 2 == 0 or not serpentine else reversed(range(width)):
                    place = r * width + c
                    if not kept or (x[place] - x[kept[-1]]).abs().max() > threshold:
                        kept.append(place)
            mask = starts_of_runs(Similarity(x, *size, "max", threshold), serpentine=serpentine)
            assert mask.nonzero().squeeze(1).tolist() == sorted(kept)


def test_a_difference_in_one_value_is_a_difference():
    x = torch.zeros(2000, 3000)
    x[1500, 2999] = 1e-30
    assert predicted_2d(Similarity(x, 40, 50, "exact", 0.0)).nonzero().flatten().tolist() == [
        0,
        1500,
        1501,
        1550,
    ]


def components(x, height, width):
    """Connected components of equal neighbours, by flooding."""
    left, result = set(range(height * width)), []
    while left:
        queue = [min(left)]
        left.remove(queue[0])
        members = list(queue)
        while queue:
            r, c = divmod(queue.pop(), width)
            for rr, cc in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
                place = rr * width + cc
                inside = 0 <= rr < height and 0 <= cc < width
                if inside and place in left and torch.equal(x[r * width + c], x[place]):
                    left.remove(place)
                    queue.append(place)
                    members.append(place)
        result.append(sorted(members))
    return result


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_each_component_keeps_its_share(size, random):
    for seed, skip in enumerate((0.0, 0.3, 0.5, 1.0)):
        x = flat_colours(*size, 2, seed)
        generator = torch.Generator().manual_seed(1) if random else None
        mask = sample_of_components(Similarity(x, *size, "max", 0.0), skip, generator=generator)
        for members in components(x, *size):
            n = len(members)
            count = max(1, n - round(n * skip))
            own = mask[members]
            assert int(own.sum()) == count
            if not random:
                assert own[0] and (own[-1] or count == 1)


def test_baselines_keep_as_many_as_the_prediction_and_draw_by_their_seed():
    size = (8, 9)
    for seed in range(4):
        x = flat_colours(*size, 3, seed)
        count = int(PixelPrune().mask(x, *size).sum())
        for method, options in (("random", {}), ("conncomp", {}), ("conncomp", {"rand": False})):
            masks = [PixelPrune(method=method, seed=s, **options).mask(x, *size) for s in (42, 42, 7)]
            assert all(int(mask.sum()) == count for mask in masks)
            assert torch.equal(masks[0], masks[1])
            assert method == "conncomp" or not torch.equal(masks[0], masks[2])


def test_a_mask_is_filled_up_or_thinned_out_to_a_count():
    mask = torch.arange(10) < 4
    for count in (0, 2, 4, 7, 10):
        changed = with_count(mask, count, torch.Generator().manual_seed(0))
        assert int(changed.sum()) == count
        assert not (changed & ~mask).any() if count <= 4 else not (mask & ~changed).any()


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="NaN or infinite"):
        Similarity(torch.tensor([[0.0], [torch.nan]]), 1, 2, "max", 0.0)
