"""Farthest-first order from 8-bit proposals: picks are those of the whole matrix, whatever is proposed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vistok.compress.algorithms import screening, select
from vistok.compress.algorithms.screening import screened_order
from vistok.compress.algorithms.select import farthest_first

seeds = st.integers(0, 2**31 - 1)
quick = settings(deadline=None, max_examples=12)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def near_ties(n: int, seed: int, copies: int, zeros: int) -> torch.Tensor:
    """Rows of length 32 with cosines that are multiples of 2⁻¹⁸, exact in float32 in any order of summation.

    One entry is 31, which takes the range of 8-bit integers; what 256 entries of 1/16 add to a cosine they
    cannot show. With 62 entries of ±1, all cosines are above 0.87 and many equal.
    """
    random = generator(seed)
    rows = torch.zeros(n, 512)
    rows[:, 0] = 31
    for row in rows:
        places = 1 + torch.randperm(511, generator=random)[:318]
        row[places[:62]] = torch.randint(0, 2, (62,), generator=random).float() * 2 - 1
        row[places[62:]] = (torch.randint(0, 2, (256,), generator=random).float() * 2 - 1) / 16
    # A few rows that differ from another in one pair of small entries: the nearest of near ties.
    for _ in range(n // 8):
        source, target = torch.randint(0, n, (2,), generator=random).tolist()
        rows[target] = rows[source]
        small = (rows[target].abs() == 1 / 16).nonzero().squeeze(1)
        rows[target, small[0]] *= -1
    for _ in range(copies):
        source, target = torch.randint(0, n, (2,), generator=random).tolist()
        rows[target] = rows[source]
    rows[torch.randint(0, n, (zeros,), generator=random)] = 0
    return rows


def plain_order(features: torch.Tensor, count: int) -> list[int]:
    """Algorithm 1 of the paper on the whole matrix in float64; copies are nearer than anything."""
    rows = features.double()
    norm = rows.norm(dim=1, keepdim=True)
    unit = rows / torch.where(norm > 0, norm, 1)
    distances = 1 - unit @ unit.T
    same = (features[:, None, :8] == features[None, :, :8]).all(-1)
    for i, j in same.nonzero().tolist():
        if torch.equal(features[i], features[j]) and bool(features[i].any()):
            distances[i, j] = -1
    order: list[int] = []
    score = distances.clone().fill_diagonal_(torch.inf).amin(1)
    for _ in range(count):
        pick = int(score.argmax())  # the first of equal ones
        score = distances[pick].clone() if not order else torch.minimum(score, distances[pick])
        order.append(pick)
        score[order] = -torch.inf
    return order


@quick
@given(st.integers(40, 160), st.sampled_from([0, 3, 60]), st.sampled_from([0, 1, 3]), seeds)
def test_ties_and_near_ties_are_decided_as_by_the_whole_matrix(n, copies, zeros, seed):
    features = near_ties(n, seed, copies, zeros)
    for count in (1, n // 4, n):
        assert screened_order(features, count).tolist() == plain_order(features, count)


def test_all_rows_equal_or_zero():
    same = torch.ones(400, 512)
    assert screened_order(same, 7).tolist() == list(range(7))
    assert screened_order(torch.zeros(400, 512), 7).tolist() == list(range(7))
    pairs = near_ties(20, 0, 0, 0).repeat(2, 1)  # every row has a copy
    assert screened_order(pairs, 40).tolist() == plain_order(pairs, 40)


def cases():
    random = generator(5)
    iid = torch.randn(600, 512, generator=random)
    centres = torch.randn(20, 512, generator=random)
    clusters = centres[torch.randint(0, 20, (600,), generator=random)] + 0.5 * torch.randn(
        600, 512, generator=random
    )
    common = torch.randn(512, generator=random) * 20  # what all rows share is much longer than what differs
    outlier = iid.clone()
    outlier[:, 3] += 1000  # one channel takes the range of the integers
    return {"iid": iid, "clusters": clusters, "common": clusters + common, "outlier": outlier}


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_picks_do_not_depend_on_the_approximation(name, scale, monkeypatch):
    """Every pick is farthest up to the rounding of float32, also where all integers are clipped to ±127."""
    features = cases()[name]
    monkeypatch.setattr(screening, "RANGE", screening.RANGE * scale)
    order = screened_order(features, 100)
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    distances = 1 - unit @ unit.T
    score = distances.clone().fill_diagonal_(torch.inf).amin(1)
    for number, pick in enumerate(order.tolist()):
        assert score[pick] >= score.max() - 2e-6
        score = distances[pick].clone() if number == 0 else torch.minimum(score, distances[pick])
        score[order[: number + 1]] = -torch.inf
    assert len(order.unique()) == 100


def test_few_rows_are_computed(monkeypatch):
    rows, add = [], screening._Screen.add_exact

    def counted(screen, places):
        rows.extend(places.tolist())
        add(screen, places)

    monkeypatch.setattr(screening._Screen, "add_exact", counted)
    for name, features in cases().items():
        if name == "outlier":  # distances are so small that rounding decides about the first pick
            continue
        rows.clear()
        screened_order(features, 100)
        assert 100 <= len(rows) < 300


@pytest.mark.parametrize("fast", [False, True])
def test_the_order_is_that_of_the_whole_matrix(fast, monkeypatch):
    """`farthest_first` by either way, with a mask and for what the screen does not take."""
    monkeypatch.setattr(select, "is_faster", lambda *_: fast)
    features = near_ties(400, 1, 20, 1)
    expected = plain_order(features, 60)
    assert farthest_first(features, 60).tolist() == expected
    assert farthest_first(features.bfloat16(), 60).tolist() == expected  # exact in bfloat16, too
    mask = torch.rand(400, generator=generator(2)) < 0.8
    places = mask.nonzero().squeeze(1)
    masked = farthest_first(features.masked_fill(~mask[:, None], torch.nan), 40, mask=mask)
    assert masked.tolist() == places[plain_order(features[places], 40)].tolist()
    features[5, 5] = torch.inf
    with pytest.raises(ValueError, match="1 tokens hold NaN or infinity"):
        farthest_first(features, 60)


def test_lengths_whose_squares_float32_cannot_hold_are_left_to_the_whole_matrix():
    features = torch.randn(400, 512, generator=generator(0))
    for scale in (1e-30, 1e30):
        features[7] = features[8] * scale
        assert screened_order(features, 10) is None
    features[7] = 0
    assert len(screened_order(features, 10)) == 10


def test_the_screen_is_for_many_long_rows_in_float32_on_processors_that_are_fast_at_it(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    assert screening.is_faster(2880, 4096, 288, cpu, torch.float32)
    for arguments in (
        (576, 4096, 58, cpu, torch.float32),
        (2880, 64, 288, cpu, torch.float32),
        (2880, 4096, 2000, cpu, torch.float32),
        (2880, 4096, 288, torch.device("cuda"), torch.float32),
        (2880, 4096, 288, cpu, torch.bfloat16),
    ):
        assert not screening.is_faster(*arguments)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert not screening.is_faster(2880, 4096, 288, cpu, torch.float32)
