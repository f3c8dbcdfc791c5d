"""Code statistics count what is there, whatever the split; means carry exact sums and bootstrap intervals."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap

from vistok.eval.metrics.codes import CodeStatistics
from vistok.eval.metrics.summary import interval, psnr_text, summarise
from vistok.tokens import Tokens

PIXELS = 64


def counted(*batches):
    statistics = CodeStatistics()
    for tokens in batches:
        statistics.update(tokens, PIXELS)
    return statistics


def indices(images=6, tokens=5, sizes=(8,), seed=0, lengths=None):
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(size, (images, tokens), generator=generator) for size in sizes]
    return Tokens(
        indices=columns[0] if len(sizes) == 1 else torch.stack(columns, -1),
        codebook_sizes=sizes,
        lengths=None if lengths is None else torch.tensor(lengths),
    )


def bits(images=40, tokens=3, channels=4, seed=0, lengths=None):
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(tokens, channels, generator=generator)
    drawn = torch.rand(images, tokens, channels, generator=generator) < shares
    return Tokens(bits=drawn, lengths=None if lengths is None else torch.tensor(lengths))


def test_a_codebook_used_evenly_by_half_has_half_usage_and_that_many_effective_codes():
    tokens = Tokens(indices=torch.arange(8).reshape(2, 4) % 4, codebook_sizes=(8,))
    found = counted(tokens).result()
    assert found.usage == (0.5,)
    assert found.perplexity == pytest.approx((4.0,))
    assert (found.images, found.tokens_per_image, found.bits_per_image) == (2, 4, 12)
    assert found.bits_per_pixel == 12 / PIXELS
    assert found.bit_entropy is None


def test_padding_is_not_counted():
    ragged = indices(images=4, lengths=[1, 0, 5, 2])
    codes = [int(code) for image, n in zip(ragged.indices, [1, 0, 5, 2], strict=True) for code in image[:n]]
    found = counted(ragged).result()
    assert found.usage == (len(set(codes)) / 8,)
    assert (found.tokens_per_image, found.bits_per_image) == (2, 6)


def test_every_codebook_is_told_apart():
    found = counted(indices(images=50, sizes=(2, 8, 3))).result()
    assert found.usage == (1, 1, 1)
    assert [p <= size for p, size in zip(found.perplexity, (2, 8, 3), strict=True)] == [True] * 3
    assert found.bits_per_image == 5 * (1 + 3 + 2)


def test_bit_statistics_equal_numpys():
    tokens = bits()
    share = tokens.bits.double().mean(0)
    entropy = -(share * share.log2() + (1 - share) * (1 - share).log2())
    matrix = np.abs(np.corrcoef(tokens.bits.reshape(-1, 4).double().numpy().T))
    found = counted(*(tokens[first : first + 7] for first in range(0, 40, 7))).result()
    assert found.bit_entropy == pytest.approx(float(entropy.nan_to_num().mean()), rel=1e-12)
    assert found.lowest_bit_entropy == pytest.approx(float(entropy.nan_to_num().min()), rel=1e-12)
    assert found.bit_correlation == pytest.approx(matrix[~np.eye(4, dtype=bool)].mean(), rel=1e-9)
    assert found.usage is None


def test_copied_bits_correlate_fully_and_constant_bits_are_left_out():
    column = torch.tensor([0, 1, 1, 0, 1]).bool()[:, None, None]
    tokens = Tokens(bits=torch.cat([column, ~column, torch.ones_like(column)], -1))
    assert counted(tokens).result().bit_correlation == pytest.approx(1)
    constant = counted(Tokens(bits=torch.ones(3, 2, 4).bool())).result()
    assert (constant.bit_entropy, constant.bit_correlation) == (0, None)


def test_latents_have_a_price_and_no_codes():
    found = counted(Tokens(latents=torch.zeros(2, 3, 4))).result()
    assert found.bits_per_image == 3 * 4 * 32
    assert found.usage is found.bit_entropy is None


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.sampled_from(["indices", "bits"]), st.data())
def test_merged_parts_equal_one_pass_to_the_bit(sizes, kind, data):
    images = sum(sizes) + 1
    lengths = data.draw(st.lists(st.integers(0, 3), min_size=images, max_size=images))
    make = {"indices": indices, "bits": bits}[kind]
    tokens = make(images=images, tokens=3, lengths=lengths)
    bounds = np.cumsum([0, *sizes, 1])
    parts = [tokens[int(a) : int(b)] for a, b in pairwise(bounds)]
    merged = CodeStatistics()
    for part in data.draw(st.permutations(parts)):
        statistics = CodeStatistics()
        longest = max([1, *part.lengths.tolist()])  # a tokenizer may pad every batch to its own longest
        statistics.update(part.prefix(longest), PIXELS)
        merged.merge(statistics)
    again = CodeStatistics()
    again.load_state_dict(merged.state_dict())
    assert again.result() == counted(tokens).result()


def test_tokens_that_cannot_be_counted_together_are_refused():
    statistics = counted(indices())
    with pytest.raises(ValueError, match="tokens of two kinds"):
        statistics.update(bits(), PIXELS)
    with pytest.raises(ValueError, match="tokens of two kinds"):
        statistics.update(indices(sizes=(9,)), PIXELS)
    with pytest.raises(ValueError, match="counted up to"):
        counted(Tokens(indices=torch.zeros(1, 1).long(), codebook_sizes=(2**40,)))
    with pytest.raises(ValueError, match="no tokens were counted"):
        CodeStatistics().result()


# ---- means -------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=15)
@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_a_mean_is_the_same_to_the_bit_in_any_order(values, random):
    shuffled = list(values)
    random.shuffle(shuffled)
    found = summarise(torch.tensor(values, dtype=torch.float64))
    assert found.value == summarise(torch.tensor(shuffled, dtype=torch.float64)).value
    assert found.n == len(values)
    assert found.low <= found.high


def test_the_interval_is_that_of_scipys_percentile_bootstrap():
    values = np.random.default_rng(0).exponential(size=300)
    expected = bootstrap((values,), np.mean, method="percentile", n_resamples=5000).confidence_interval
    found = summarise(values, seed=3)
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.05 * width)
    assert found.high == pytest.approx(expected.high, abs=0.05 * width)
    assert summarise(values, seed=3) == found
    assert summarise(values, seed=4) != found


def test_an_infinite_psnr_makes_the_mean_infinite_and_no_nan():
    found = summarise(np.array([30.0, math.inf, 31.0, 29.0]))
    assert (found.value, found.high) == (math.inf, math.inf)
    assert not math.isnan(found.low)


@pytest.mark.parametrize(
    ("values", "says"),
    [([], "n at least 1"), ([[1.0]], r"\[1, 1\]"), ([1, math.nan], r"images \[1\] are NaN")],
)
def test_no_mean_of_nothing(values, says):
    with pytest.raises(ValueError, match=says):
        summarise(np.array(values))


def test_exact_images_are_counted_and_left_out_of_the_mean():
    found = interval(np.array([30.0, math.inf, 32.0, math.inf]))
    assert found == {**interval(np.array([30.0, 32.0])), "exact": 2} and found["value"] == 31
    assert psnr_text(found) == "31.00, 2 exact"
    assert psnr_text(interval(np.array([30.0]))) == "30.00"
    assert interval(np.full(3, math.inf)) == {"value": math.inf, "exact": 3}
    assert psnr_text(interval(np.full(3, math.inf))) == "all exact"
