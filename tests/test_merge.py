"""Token merging against an oracle that merges one pair at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vistok.compress.merge import bipartite_soft_matching

shapes = st.tuples(
    st.integers(1, 3), st.integers(1, 20), st.integers(1, 5), st.integers(0, 12), st.booleans()
)


def oracle(metric: torch.Tensor, x: torch.Tensor, r: int, class_token: bool) -> list[set[int]]:
    """Groups of token places after merging the r best pairs of one image, by plain loops."""
    unit = metric / metric.norm(dim=-1, keepdim=True)
    even, odd = range(0, len(x), 2), range(1, len(x), 2)
    best = {}
    for a in even:
        if odd and not (class_token and a == 0):
            best[a] = max(odd, key=lambda b: float(unit[a] @ unit[b]))
    sources = sorted(best, key=lambda a: -float(unit[a] @ unit[best[a]]))[
        : min(r, (len(x) - class_token) // 2)
    ]
    groups = {b: {b} for b in odd}
    for a in sources:
        groups[best[a]].add(a)
    return [{a} for a in even if a not in sources] + list(groups.values())


@settings(deadline=None, max_examples=60)
@given(shapes, st.integers(0, 2**31 - 1))
def test_merging_is_the_mean_of_the_most_similar_pairs(shape, seed):
    batch, tokens, dim, r, class_token = shape
    random = torch.Generator().manual_seed(seed)
    metric = torch.randn(batch, tokens, 8, generator=random, dtype=torch.float64)
    x = torch.randn(batch, tokens, dim, generator=random, dtype=torch.float64)
    matching = bipartite_soft_matching(metric, r, class_token=class_token)
    merged, restored = matching.merge(x), matching.unmerge(matching.merge(x))
    for image in range(batch):
        groups = oracle(metric[image], x[image], r, class_token)
        assert merged.shape[1] == len(groups)
        for group in groups:
            mean = x[image, sorted(group)].mean(0)
            for place in group:
                torch.testing.assert_close(restored[image, place], mean)
    if class_token:
        torch.testing.assert_close(merged[:, 0], x[:, 0])


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
