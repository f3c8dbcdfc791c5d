"""Token merging against an oracle that merges one pair at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vision_oracle import merged_groups

from vistok.compress.algorithms.energy import energy, merged_count, pitome_matching
from vistok.compress.algorithms.merge import (
    Matching,
    bipartite_soft_matching,
    compose,
    kth_bipartite_soft_matching,
    r_schedule,
    representatives,
)
from vistok.compress.methods.pitome import PiToMe
from vistok.compress.methods.tome import ToMe

shapes = st.tuples(
    st.integers(1, 3), st.integers(1, 20), st.integers(1, 5), st.integers(0, 12), st.integers(0, 6)
)
seeds = st.integers(0, 2**31 - 1)


def drawn(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]


@settings(deadline=None, max_examples=60)
@given(shapes, seeds)
def test_merging_is_the_mean_of_the_most_similar_pairs(shape, seed):
    batch, tokens, dim, r, protected = shape
    metric, x = drawn(seed, (batch, tokens, 8), (batch, tokens, dim))
    matching = bipartite_soft_matching(metric, r, protected=protected)
    merged, restored = matching.merge(x), matching.unmerge(matching.merge(x))
    for image in range(batch):
        groups = merged_groups(metric[image], r, protected)
        means = torch.stack([x[image, sorted(group)].mean(0) for group in groups])
        torch.testing.assert_close(merged[image], means)
        for group in groups:
            mean = x[image, sorted(group)].mean(0)
            for place in group:
                torch.testing.assert_close(restored[image, place], mean)
    assert torch.equal(merged[:, :protected], x[:, :protected])


def test_protected_tokens_anywhere_stay_and_lead():
    (x,) = drawn(0, (2, 21, 6))
    mask = torch.zeros(21, dtype=torch.bool)
    mask[[3, 4, 11, 20]] = True
    matching = bipartite_soft_matching(x, 100, protected=mask)
    merged = matching.merge(x)
    assert merged.shape[1] == 21 - (21 - 4) // 2
    assert torch.equal(merged[:, :4], x[:, mask])
    everything = bipartite_soft_matching(x, 5, protected=torch.ones(21, dtype=torch.bool))
    assert torch.equal(everything.merge(x), x)


def test_equal_similarities_go_to_the_lower_place():
    x = torch.eye(2).repeat(4, 1).unsqueeze(0)  # even tokens equal, odd tokens equal
    matching = bipartite_soft_matching(x, 2)
    assert matching.source.tolist() == [[0, 2]]
    assert matching.kept.gather(1, matching.destination).tolist() == [[1, 1]]


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3),
    st.integers(2, 24),
    st.integers(0, 3),
    st.sampled_from(["pitome", "pitome_bsm", "bsm", "text"]),
    seeds,
)
def test_pitome_leaves_every_token_in_one_group_and_protects_the_first(batch, free, protected, rule, seed):
    metric, x = drawn(seed, (batch, free + protected, 8), (batch, free + protected, 4))
    r = seed % (free // 2 + 1)
    matching = pitome_matching(metric, r, 0.5, protected=protected, rule=rule)
    merged, size = matching.merge_weighted(x)
    assert merged.shape[1] == free + protected - r
    assert torch.equal(merged[:, :protected], x[:, :protected])
    torch.testing.assert_close((merged * size).sum(1), x.sum(1))
    assert torch.equal(size[..., 0].long(), torch.stack([g.bincount() for g in matching.groups]))


@settings(deadline=None, max_examples=30)
@given(st.integers(3, 20), seeds)
def test_pitome_merges_every_other_token_of_highest_energy_into_its_nearest(tokens, seed):
    (metric,) = drawn(seed, (1, tokens, 6))
    r = max(1, tokens // 4)
    margin = 0.4
    unit = [row / row.norm() for row in metric[0]]
    scores = []
    for a in unit:
        parts = [float(a @ b) - margin for b in unit]
        scores.append(sum(p if p > 0 else math.exp(p) - 1 for p in parts) / tokens)
    torch.testing.assert_close(energy(metric, margin)[0], torch.tensor(scores, dtype=torch.float64))
    order = sorted(range(tokens), key=lambda place: -scores[place])
    sources, targets = order[: 2 * r : 2], order[1 : 2 * r : 2]
    matching = pitome_matching(metric, r, margin)
    assert matching.source[0].tolist() == sources
    nearest = [max(targets, key=lambda b: float(unit[a] @ unit[b])) for a in sources]
    assert matching.kept[0, matching.destination[0]].tolist() == nearest
    assert matching.kept[0].tolist() == order[2 * r :] + targets


def test_pitome_refuses_to_merge_more_than_half():
    (metric,) = drawn(0, (1, 10, 4))
    with pytest.raises(ValueError, match="cannot merge 6 of 10 tokens"):
        pitome_matching(metric, 6, 0.5)
    with pytest.raises(ValueError, match="between half"):
        PiToMe(ratio=0.4)


def test_the_ratio_rounds_as_the_original_does():
    assert merged_count(100, 0.55) == 44 and merged_count(10, 1.0) == 0 and merged_count(10, 0.5) == 5


def test_strided_matching_keeps_the_last_of_every_k_and_drops_the_tail():
    (x,) = drawn(1, (2, 17, 4))
    matching = kth_bipartite_soft_matching(x, 3)
    assert matching.kept.tolist() == [[2, 5, 8, 11, 14]] * 2
    assert matching.merge(x).shape[1] == 5
    assert matching.unmerge(matching.merge(x)).shape[1] == 15
    with pytest.raises(ValueError, match="k is 18"):
        kth_bipartite_soft_matching(x, 18)


def test_schedules_of_r():
    assert r_schedule(4, 3) == [3] * 4
    assert r_schedule(12, (8, -1.0)) == [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]
    assert r_schedule(4, [5, 4]) == [5, 4, 0, 0]
    assert r_schedule(1, (8, -1.0)) == [16]


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 24), st.integers(1, 600), st.data())
def test_keep_is_met_exactly_and_spread_evenly(blocks, tokens, data):
    fewest = tokens
    for _ in range(blocks):
        fewest -= fewest // 2
    keep = data.draw(st.integers(fewest, tokens))
    plan = ToMe(keep=keep).plan(blocks, tokens, 1, keep)
    assert len(plan) == blocks and tokens - sum(plan) == keep
    left, most = tokens, max(plan)
    for r in plan:
        assert r <= left // 2 and (r >= most - 1 or r == left // 2)
        left -= r
    if fewest > 1:
        with pytest.raises(ValueError, match=f"the fewest are {fewest}"):
            ToMe(keep=fewest - 1).plan(blocks, tokens, 1, fewest - 1)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 24), st.integers(1, 600), st.floats(0.55, 1))
def test_pitome_meets_keep_exactly(blocks, tokens, ratio):
    keep = math.ceil(tokens * ratio**blocks)
    plan = PiToMe(keep=keep).plan(blocks, tokens, 1, keep)
    assert tokens - sum(plan) == keep and all(r >= 0 for r in plan)


def test_composed_matchings_tell_where_every_first_token_went():
    (x,) = drawn(2, (2, 15, 3))
    one = bipartite_soft_matching(x, 4, protected=1)
    two = bipartite_soft_matching(one.merge(x), 3, protected=1)
    groups = compose([one, None, two])
    twice = two.merge(one.merge(x))
    spread = twice.gather(1, groups[..., None].expand(-1, -1, 3))
    assert torch.equal(spread, one.unmerge(two.unmerge(twice)))
    assert compose([None, None]) is None
    first = representatives(groups, 8)
    assert [len(set(row)) for row in groups.gather(1, first).tolist()] == [8, 8]
    assert torch.equal(first, first.sort(1).values)
    assert torch.equal(representatives(Matching.identity(2, 5).groups, 5), torch.arange(5).expand(2, -1))


def test_half_precision_sums_are_taken_in_float32():
    x = torch.full((1, 400, 1), 0.1, dtype=torch.bfloat16)
    size = torch.full((1, 400, 1), 3.0)
    merged, total = bipartite_soft_matching(torch.ones(1, 400, 2), 200).merge_weighted(x, size)
    assert merged.dtype == torch.bfloat16 and total.dtype == torch.float32
    assert torch.equal(merged, x[:, :200]) and float(total.sum()) == 1200


def test_weighted_merging_keeps_the_mean_over_original_tokens():
    x = torch.randn(2, 33, 4, dtype=torch.float64)
    tokens, size = x, None
    for _ in range(4):
        tokens, size = bipartite_soft_matching(tokens, 6, class_token=True).merge_weighted(tokens, size)
    assert tokens.shape[1] == 33 - 4 * 6
    torch.testing.assert_close((tokens * size).sum(1), x.sum(1))
    torch.testing.assert_close(size.sum(1), torch.full((2, 1), 33.0, dtype=torch.float64))


def test_distillation_and_class_tokens_lead_and_unmerge_puts_them_back():
    x = torch.randn(2, 18, 5)
    matching = bipartite_soft_matching(x, 6, class_token=True, distill_token=True)
    merged = matching.merge(x)
    assert torch.equal(merged[:, :2], x[:, :2])
    assert torch.equal(matching.unmerge(merged)[:, :2], x[:, :2])


def test_equal_and_zero_tokens_merge_without_nan():
    matching = bipartite_soft_matching(torch.zeros(1, 8, 4), 2)
    assert matching.merge(torch.ones(1, 8, 3)).isfinite().all()


def test_nothing_to_merge_is_the_identity():
    x = torch.randn(1, 12, 3)
    matching = bipartite_soft_matching(x, 0)
    assert torch.equal(matching.merge(x), x) and torch.equal(matching.unmerge(x), x)


def test_a_metric_without_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"\[B, N, C\]"):
        bipartite_soft_matching(torch.randn(8, 4), 2)
