"""Each quantizer alone: codes in range, round trips, gradients, and the papers' formulae written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vistok import Tokens
from vistok.quantizers import (
    BinaryQuantizer,
    DiagonalGaussian,
    FiniteScalarQuantizer,
    GaussianQuantizer,
    LookupFreeQuantizer,
    ProductQuantizer,
    ResidualQuantizer,
    VectorQuantizer,
    bit_entropy,
    bits_to_integers,
    codebook_usage,
    integers_to_bits,
    perplexity,
)

HALVES = [torch.bfloat16, torch.float16]
LEVELS = [[8, 6, 5], [2, 3], [7, 5, 5, 5], [16], [4, 4, 4, 4], [5, 1, 3]]
ROWS = [[8, 2, 1], [4, 4, 1], [2, 2, 4], [16, 1, 1]]  # one row a token, all of 16 codes


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On a busy machine tiny kernels wait longer for a second thread than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def every_quantizer():
    torch.manual_seed(0)
    return {
        "fsq": (FiniteScalarQuantizer([5, 4, 3]), 3),
        "fsq rows": (FiniteScalarQuantizer([[8, 1], [4, 2], [2, 4], [1, 8]]), 2),
        "vq": (VectorQuantizer(16, 6), 6),
        "vq l2": (VectorQuantizer(16, 6, l2_norm=True), 6),
        "vq entropy": (VectorQuantizer(16, 6, entropy_weight=0.1, entropy_temperature=1.0), 6),
        "vq clustering": (VectorQuantizer(16, 6, clustering=True), 6),
        "gaussian": (GaussianQuantizer(3), 6),
        "lfq": (LookupFreeQuantizer(6), 6),
        "binary": (BinaryQuantizer(10, 6), 6),
        "binary entropy": (BinaryQuantizer(10, 6, entropy_weight=0.1, temperature=0), 6),
        "residual": (ResidualQuantizer([VectorQuantizer(16, 6, clustering=n == 1) for n in range(3)]), 6),
        "product": (ProductQuantizer([VectorQuantizer(16, 3), LookupFreeQuantizer(3)]), 6),
        "product of residuals": (
            ProductQuantizer(
                [ResidualQuantizer([VectorQuantizer(16, 3)] * 2), FiniteScalarQuantizer([4] * 3)]
            ),
            6,
        ),
    }


@pytest.fixture(params=every_quantizer())
def quantizer(request):
    return every_quantizer()[request.param]


# ---- every quantizer ---------------------------------------------------------------------------------------


def test_alone_in_five_lines(quantizer):
    quantizer, channels = quantizer
    latents = torch.randn(2, 4, channels)
    codes = quantizer.encode(latents)
    decoded = quantizer.decode(codes)
    result = quantizer(latents)
    assert (
        decoded.shape
        == result.latents.shape
        == (2, 4, channels // 2 if quantizer.kind == "latents" else channels)
    )
    assert result.codes.shape[:2] == codes.shape[:2] == (2, 4)
    assert all(loss.ndim == 0 and loss.isfinite() for loss in result.losses.values())


def test_indices_lie_in_the_codebook(quantizer):
    quantizer, channels = quantizer
    if quantizer.kind != "indices":
        pytest.skip("bits, or continuous")
    codes = quantizer.encode(100 * torch.randn(8, 4, channels))
    assert codes.dtype == torch.int64
    Tokens(indices=codes, codebook_sizes=quantizer.codebook_sizes).validate()


def test_an_empty_batch_stays_empty(quantizer):
    quantizer, channels = quantizer
    codes = quantizer.encode(torch.empty(0, 4, channels))
    assert codes.shape[:2] == (0, 4)
    assert quantizer.decode(codes).shape[:2] == (0, 4)


def test_training_reports_the_codes_that_encode_gives(quantizer):
    quantizer, channels = quantizer
    if quantizer.kind == "latents":
        pytest.skip("training samples")
    latents = torch.randn(2, 4, channels)
    result = quantizer.eval()(latents)
    assert torch.equal(result.codes, quantizer.encode(latents))
    torch.testing.assert_close(result.latents, quantizer.decode(result.codes))


def test_the_gradient_reaches_the_latents(quantizer):
    quantizer, channels = quantizer
    latents = torch.randn(2, 4, channels, requires_grad=True)
    output = quantizer(latents).latents
    (output * torch.randn_like(output)).sum().backward()
    used = (
        quantizer.used.expand(4, channels)
        if hasattr(quantizer, "used")
        else torch.ones(4, channels, dtype=bool)
    )
    assert (latents.grad[:, used] != 0).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_half_precision_latents_give_finite_results(quantizer, dtype, scale):
    quantizer, channels = quantizer
    latents = (scale * torch.randn(4, 4, channels, generator=seeded(0))).to(dtype)
    result = quantizer(latents)
    assert result.latents.dtype == dtype
    assert all(loss.isfinite() for loss in result.losses.values())
    if quantizer.kind != "latents":  # a posterior of standard deviation exp(10) may leave half precision
        assert result.latents.isfinite().all()
        assert torch.equal(quantizer.eval().encode(latents), quantizer.encode(latents.float()))


def test_latents_of_the_wrong_width_are_refused(quantizer):
    quantizer, channels = quantizer
    with pytest.raises(ValueError, match=str(channels + 1)):
        quantizer.encode(torch.randn(2, 4, channels + 1))


# ---- finite scalar -----------------------------------------------------------------------------------------


def plain_fsq(latent, levels):
    """Mentzer et al. 2023, section 3.1, scalar by scalar: the code (first channel fastest) and its point."""
    code, basis, digits = 0, 1, []
    for value, count in zip(latent, levels, strict=True):
        half = (count - 1) * (1 + 1e-3) / 2
        offset = 0.5 if count % 2 == 0 else 0.0
        shift = math.atanh(offset / half) if offset else 0.0
        digit = round(math.tanh(value + shift) * half - offset) + count // 2
        digits.append(digit)
        code += digit * basis
        basis *= count
    return code, [
        (digit - count // 2) / max(count // 2, 1) for digit, count in zip(digits, levels, strict=True)
    ]


@pytest.mark.parametrize("levels", LEVELS)
def test_fsq_is_the_papers_formula(levels):
    quantizer = FiniteScalarQuantizer(levels)
    latents = 2 * torch.randn(3, 50, len(levels), generator=seeded(1), dtype=torch.float64)
    codes = quantizer.encode(latents)
    decoded = quantizer.decode(codes)
    for latent, code, point in zip(
        latents.flatten(0, 1), codes.flatten(), decoded.flatten(0, 1), strict=True
    ):
        expected_code, expected_point = plain_fsq(latent.tolist(), levels)
        assert code == expected_code
        assert point.tolist() == pytest.approx(expected_point, abs=1e-6)


@given(levels=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_every_fsq_code_is_reached_and_comes_back(levels, seed):
    quantizer = FiniteScalarQuantizer(levels)
    size = math.prod(levels)
    assert quantizer.codebook_sizes == (size,)
    codes = torch.randint(size, (2, 5), generator=seeded(seed))
    points = quantizer.decode(codes)
    assert points.abs().max() <= 1
    # The latent in the middle of a cell: the bounding function of section 3.1 undone.
    counts = torch.tensor(levels, dtype=torch.float64)
    half, offset = (counts - 1) * (1 + 1e-3) / 2, torch.where(counts % 2 == 0, 0.5, 0.0)
    digits = points.double() * (counts // 2).clamp_min(1)
    bounded = ((digits + offset) / half.clamp_min(1e-9)).clamp(-0.9999999, 0.9999999)
    latents = torch.where(counts > 1, bounded.atanh() - (offset / half.clamp_min(0.5)).atanh(), 0.0)
    assert torch.equal(quantizer.encode(latents), codes)


@pytest.mark.parametrize("levels", LEVELS)
def test_fsq_codes_and_points_are_one_to_one(levels):
    codes = torch.arange(math.prod(levels))[None]
    points = FiniteScalarQuantizer(levels).decode(codes)[0]
    assert len(points.unique(dim=0)) == len(points)


def test_each_token_is_quantized_by_its_own_row():
    table = FiniteScalarQuantizer(ROWS)
    assert table.codebook_sizes == (16,)
    latents = 2 * torch.randn(5, 4, 3, generator=seeded(2))
    codes = table.encode(latents)
    for token, row in enumerate(ROWS):
        alone = FiniteScalarQuantizer(row)
        assert torch.equal(codes[:, token], alone.encode(latents[:, token : token + 1])[:, 0])
        assert torch.equal(table.decode(codes)[:, token], alone.decode(codes[:, token : token + 1])[:, 0])


def test_rows_serve_any_prefix_and_no_more():
    table = FiniteScalarQuantizer(ROWS)
    latents = torch.randn(2, 4, 3, generator=seeded(3))
    codes = table.encode(latents)
    for k in range(1, 5):
        assert torch.equal(table.encode(latents[:, :k]), codes[:, :k])
        assert torch.equal(table.decode(codes[:, :k]), table.decode(codes)[:, :k])
    with pytest.raises(ValueError, match=r"5 tokens.*levels for 4"):
        table.encode(torch.randn(1, 5, 3))


def test_a_channel_of_one_level_carries_nothing():
    quantizer = FiniteScalarQuantizer([5, 1, 3])
    latents = torch.randn(2, 4, 3, requires_grad=True)
    other = latents.detach().clone()
    other[..., 1] += 7
    assert torch.equal(quantizer.encode(latents), quantizer.encode(other))
    assert (quantizer.decode(quantizer.encode(latents))[..., 1] == 0).all()
    quantizer(latents).latents.sum().backward()
    assert (latents.grad[..., 1] == 0).all()
    assert quantizer.used.tolist() == [True, False, True]


def test_fsq_gradient_is_that_of_the_bounding_function():
    latents = torch.randn(1, 6, 2, generator=seeded(4), dtype=torch.float64).requires_grad_()
    FiniteScalarQuantizer([7, 5])(latents).latents.sum().backward()
    slope = (1 - latents.detach().tanh() ** 2) * torch.tensor([6, 4]) * 1.001 / 2 / torch.tensor([3, 2])
    torch.testing.assert_close(latents.grad, slope)


@pytest.mark.parametrize(
    ("levels", "said"), [([], "positive"), ([4, 0], "positive"), ([[4, 2], [3, 3]], r"sizes \[8, 9\]")]
)
def test_impossible_levels_are_refused(levels, said):
    with pytest.raises(ValueError, match=said):
        FiniteScalarQuantizer(levels)


def test_fsq_has_nothing_to_save():
    assert not FiniteScalarQuantizer([4, 4]).state_dict()


# ---- vector ------------------------------------------------------------------------------------------------


def squared_distances(latents, codebook, l2_norm):
    latents, codebook = latents.double(), codebook.double()
    if l2_norm:
        latents = latents / latents.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        codebook = codebook / codebook.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return (latents.unsqueeze(-2) - codebook).square().sum(-1)


@given(
    size=st.integers(2, 60),
    dim=st.integers(1, 17),
    l2_norm=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=50, deadline=None)
def test_vq_finds_the_nearest_row(size, dim, l2_norm, scale, seed):
    generator = seeded(seed)
    quantizer = VectorQuantizer(size, dim, l2_norm=l2_norm)
    quantizer.embedding.weight.data = scale * torch.randn(size, dim, generator=generator)
    latents = scale * torch.randn(2, 9, dim, generator=generator)
    exact = squared_distances(latents, quantizer.embedding.weight.detach(), l2_norm)
    found = exact.gather(-1, quantizer.encode(latents).unsqueeze(-1)).squeeze(-1)
    slack = 1e-5 * (1 if l2_norm else scale**2 * dim)
    assert (found <= exact.min(-1).values + slack).all()


@pytest.mark.parametrize("l2_norm", [False, True])
@pytest.mark.parametrize(("size", "dim"), [(6, 4), (37, 12), (1000, 16)])
def test_vq_takes_the_first_of_equal_rows(size, dim, l2_norm):
    quantizer = VectorQuantizer(2 * size, dim, l2_norm=l2_norm)
    rows = torch.randn(size, dim, generator=seeded(5))
    quantizer.embedding.weight.data = rows.repeat(2, 1)
    assert quantizer.encode(rows[None]).flatten().tolist() == list(range(size))


@pytest.mark.parametrize("l2_norm", [False, True])
def test_every_code_comes_back(l2_norm):
    quantizer = VectorQuantizer(50, 8, l2_norm=l2_norm)
    codes = torch.arange(50).view(2, 25)
    assert torch.equal(quantizer.encode(quantizer.decode(codes)), codes)


def test_l2_mode_ignores_lengths_and_returns_unit_vectors():
    quantizer = VectorQuantizer(20, 5, l2_norm=True)
    latents = torch.randn(2, 7, 5, generator=seeded(6))
    codes = quantizer.encode(latents)
    assert torch.equal(quantizer.encode(latents * 37), codes)
    torch.testing.assert_close(quantizer.decode(codes).norm(dim=-1), torch.ones(2, 7))
    torch.testing.assert_close(quantizer(latents).latents.norm(dim=-1), torch.ones(2, 7))


@pytest.mark.parametrize("l2_norm", [False, True])
def test_vq_losses_are_the_papers(l2_norm):
    torch.manual_seed(7)
    quantizer = VectorQuantizer(10, 4, l2_norm=l2_norm, commitment_cost=0.3)
    latents = torch.randn(2, 5, 4, requires_grad=True)
    result = quantizer(latents)
    total, elements = 0.0, 0
    for latent, code in zip(latents.flatten(0, 1).tolist(), result.codes.flatten().tolist(), strict=True):
        row = quantizer.embedding.weight[code].tolist()
        norms = [math.hypot(*latent), math.hypot(*row)] if l2_norm else [1, 1]
        total += sum((a / norms[0] - b / norms[1]) ** 2 for a, b in zip(latent, row, strict=True))
        elements += len(latent)
    assert set(result.losses) == {"commitment", "codebook"}
    assert result.losses["codebook"].item() == pytest.approx(total / elements, rel=1e-5)
    assert result.losses["commitment"].item() == pytest.approx(0.3 * total / elements, rel=1e-5)
    result.losses["commitment"].backward()
    assert latents.grad.any()
    assert quantizer.embedding.weight.grad is None or not quantizer.embedding.weight.grad.any()
    latents.grad = None
    quantizer(latents).losses["codebook"].backward()
    assert latents.grad is None or not latents.grad.any()
    touched = quantizer.embedding.weight.grad.abs().sum(-1).nonzero().flatten()
    assert torch.equal(touched, result.codes.unique())


@pytest.mark.parametrize("l2_norm", [False, True])
def test_the_gradient_passes_straight_through_but_through_the_normalisation(l2_norm):
    torch.manual_seed(8)
    quantizer = VectorQuantizer(10, 4, l2_norm=l2_norm)
    latents, upstream = torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 5, 4)
    (quantizer(latents).latents * upstream).sum().backward()
    again = latents.detach().clone().requires_grad_()
    ((F.normalize(again, dim=-1) if l2_norm else again) * upstream).sum().backward()
    torch.testing.assert_close(latents.grad, again.grad)
    assert quantizer.embedding.weight.grad is None or not quantizer.embedding.weight.grad.any()


def test_soft_decoding_of_a_certain_choice_is_decoding():
    for l2_norm in (False, True):
        quantizer = VectorQuantizer(12, 4, l2_norm=l2_norm)
        codes = torch.randint(12, (2, 5), generator=seeded(9))
        certain = F.one_hot(codes, 12).float()
        torch.testing.assert_close(quantizer.decode_soft(certain), quantizer.decode(codes))
    mixture = torch.full((1, 12), 1 / 12)
    plain = VectorQuantizer(12, 4)
    torch.testing.assert_close(plain.decode_soft(mixture)[0], plain.embedding.weight.mean(0))


def entropy_loss(quantizer, latents):
    return float(quantizer(latents).losses["entropy"].detach())


def test_entropy_rewards_certain_choices_that_use_the_whole_codebook():
    quantizer = VectorQuantizer(4, 4, entropy_weight=2.0, entropy_temperature=0.01)
    quantizer.embedding.weight.data = torch.eye(4)
    everywhere, collapsed, undecided = (
        torch.eye(4)[None],
        torch.eye(4)[:1].expand(1, 4, 4),
        torch.zeros(1, 4, 4),
    )
    assert entropy_loss(quantizer, everywhere) == pytest.approx(-2 * math.log(4), rel=1e-4)
    assert entropy_loss(quantizer, collapsed) == pytest.approx(0, abs=1e-4)
    assert entropy_loss(quantizer, undecided) == pytest.approx(0, abs=1e-4)


def test_entropy_is_the_formula_written_out():
    torch.manual_seed(10)
    quantizer = VectorQuantizer(5, 3, entropy_weight=0.1, entropy_temperature=0.7)
    quantizer.embedding.weight.data.normal_()
    latents = torch.randn(2, 6, 3)
    weights = (
        -squared_distances(latents, quantizer.embedding.weight.detach(), False).flatten(0, 1) / 0.7
    ).exp()
    p = weights / weights.sum(-1, keepdim=True)
    each = -(p * p.log()).sum(-1).mean()
    mean = -(p.mean(0) * p.mean(0).log()).sum()
    assert entropy_loss(quantizer, latents) == pytest.approx(float(0.1 * (each - mean)), rel=1e-4)


def cluster_by_hand(codebook, usage, latents, l2_norm):
    """The update of the family's specification, section 5, code by code in plain numbers; decay 0.99."""
    size = len(codebook)
    distances = squared_distances(latents, codebook, l2_norm)
    share = [0.0] * size
    for row in distances:
        share[int(row.argmin())] += 1 / len(latents)
    moved, used = codebook.clone(), usage.clone()
    for code in range(size):
        used[code] = 0.99 * usage[code] + 0.01 * share[code]
        anchor = latents[int(distances[:, code].argmin())]  # not normalised, in l2 models either
        pull = math.exp(-float(used[code]) * size * 10 / (1 - 0.99) - 1e-3)
        moved[code] = codebook[code] * (1 - pull) + anchor * pull
    return moved, used


@pytest.mark.parametrize("l2_norm", [False, True])
def test_clustering_moves_the_codebook_as_specified(l2_norm):
    torch.manual_seed(11)
    quantizer = VectorQuantizer(12, 4, l2_norm=l2_norm, clustering=True)
    codebook, usage = quantizer.embedding.weight.detach().clone(), torch.zeros(12)
    for step in range(4):
        latents = torch.randn(2, 5, 4, generator=seeded(step))
        quantizer(latents)
        codebook, usage = cluster_by_hand(codebook, usage, latents.flatten(0, 1), l2_norm)
        torch.testing.assert_close(quantizer.embed_prob, usage)
        torch.testing.assert_close(quantizer.embedding.weight.detach(), codebook, rtol=1e-4, atol=1e-6)


def test_clustering_leaves_this_steps_losses_and_gradients_alone():
    torch.manual_seed(12)
    moving = VectorQuantizer(12, 4, clustering=True)
    still = VectorQuantizer(12, 4)
    still.embedding.weight.data.copy_(moving.embedding.weight)
    latents = torch.randn(2, 5, 4)
    results = [quantizer(latents) for quantizer in (moving, still)]
    for result in results:
        sum(result.losses.values()).backward()
    assert torch.equal(results[0].latents, results[1].latents)
    assert torch.equal(moving.embedding.weight.grad, still.embedding.weight.grad)


def test_clustering_rests_in_eval_mode():
    quantizer = VectorQuantizer(12, 4, clustering=True).eval()
    before = quantizer.embedding.weight.detach().clone()
    quantizer(torch.randn(2, 5, 4))
    quantizer.encode(torch.randn(2, 5, 4))
    assert torch.equal(quantizer.embedding.weight, before)
    assert not quantizer.embed_prob.any()


def test_clustering_revives_dead_codes():
    torch.manual_seed(13)
    quantizer = VectorQuantizer(32, 2, clustering=True)
    quantizer.embedding.weight.data[1:] = 100 * torch.randn(31, 2).sign()  # all latents fall to code 0
    latents = torch.randn(4, 64, 2)
    assert len(quantizer.encode(latents).unique()) == 1
    for _ in range(20):
        quantizer(torch.randn(4, 64, 2))
    assert len(quantizer.encode(latents).unique()) > 4


@pytest.mark.parametrize("dtype", HALVES)
def test_vq_compares_in_float32_under_autocast(dtype):
    torch.manual_seed(14)
    quantizer = VectorQuantizer(200, 16, l2_norm=True)
    latents = torch.randn(2, 50, 16)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(quantizer.encode(latents), VectorQuantizer.encode(quantizer, latents))
        inside, result = quantizer.encode(latents), quantizer(latents)
    assert torch.equal(inside, quantizer.encode(latents))
    assert result.latents.dtype == result.losses["codebook"].dtype == torch.float32


def test_vq_of_a_double_model_works_in_double():
    quantizer = VectorQuantizer(20, 4).double()
    assert quantizer.distances(torch.randn(1, 3, 4)).dtype == torch.float64


# ---- Gaussian ----------------------------------------------------------------------------------------------


def moments(mean, logvar):
    return torch.tensor([[[*mean, *logvar]]], dtype=torch.float64)


def test_log_variance_is_clamped():
    posterior = DiagonalGaussian(moments([0.0, 0.0, 0.0], [-1000.0, 1000.0, 3.0]))
    assert posterior.logvar.flatten().tolist() == [-30, 20, 3]
    assert posterior.std.flatten().tolist() == pytest.approx([math.exp(-15), math.exp(10), math.exp(1.5)])


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-8, 3)), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_kl_is_that_of_torch_distributions(parameters):
    mean, logvar = zip(*parameters, strict=True)
    kl = DiagonalGaussian(moments(mean, logvar)).kl()
    assert kl.shape == (1, 1)
    normal = torch.distributions.Normal(
        torch.tensor(mean).double(), (0.5 * torch.tensor(logvar).double()).exp()
    )
    standard = torch.distributions.Normal(torch.zeros_like(normal.loc), torch.ones_like(normal.scale))
    expected = torch.distributions.kl_divergence(normal, standard).sum()
    assert float(kl) == pytest.approx(float(expected), rel=1e-6, abs=1e-6)


def test_kl_loss_is_summed_over_tokens_and_averaged_over_images():
    latents = torch.randn(3, 4, 6)
    expected = DiagonalGaussian(latents).kl().sum() / 3
    torch.testing.assert_close(GaussianQuantizer(3)(latents).losses["kl"], expected)


def test_a_standard_normal_posterior_costs_nothing():
    assert DiagonalGaussian(torch.zeros(2, 3, 8)).kl().abs().max() == 0


def test_gaussian_encode_is_the_mean_and_decode_the_identity():
    quantizer, latents = GaussianQuantizer(3), torch.randn(2, 4, 6)
    assert torch.equal(quantizer.encode(latents), latents[..., :3])
    assert torch.equal(quantizer.decode(latents[..., :3]), latents[..., :3])
    assert quantizer.codebook_sizes is None


def test_samples_follow_the_generator_and_the_posterior():
    quantizer, latents = GaussianQuantizer(3), torch.randn(2, 4, 6)
    one, same, other = (quantizer.encode(latents, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    noise = torch.ones(2, 4, 3)
    posterior = DiagonalGaussian(latents)
    torch.testing.assert_close(posterior.sample(noise=noise), latents[..., :3] + (latents[..., 3:] / 2).exp())
    many = DiagonalGaussian(moments([2.0], [math.log(9.0)]).expand(1, 20000, 2)).sample(seeded(2))
    assert float(many.mean()) == pytest.approx(2, abs=0.1)
    assert float(many.std()) == pytest.approx(3, abs=0.1)


def test_odd_moments_are_refused():
    with pytest.raises(ValueError, match="7 channels"):
        DiagonalGaussian(torch.zeros(1, 2, 7))


# ---- binary ------------------------------------------------------------------------------------------------


def test_a_bit_is_set_strictly_above_zero_and_a_latent_is_the_sum_of_its_set_bits():
    quantizer = BinaryQuantizer(3, 3)
    with torch.no_grad():
        quantizer.proj[0].weight.copy_(torch.eye(3))
        quantizer.proj[0].bias.zero_()
    bits = quantizer.encode(torch.tensor([[[1e-30, 0.0, -1e-30], [2.0, 1.0, -5.0]]]))
    assert bits.tolist() == [[[True, False, False], [True, True, False]]]
    decoded = quantizer.decode(bits)[0]
    torch.testing.assert_close(decoded[0], quantizer.embed[0])
    torch.testing.assert_close(decoded[1], quantizer.embed[0] + quantizer.embed[1])
    assert set(quantizer.state_dict()) == {"embed", "proj.0.weight", "proj.0.bias"}


def test_training_draws_bits_at_its_temperature_and_inference_does_not():
    torch.manual_seed(0)
    quantizer, latents = BinaryQuantizer(4, 4, temperature=0.5), torch.randn(1, 1, 4).expand(20000, 1, 4)
    logits = quantizer.logits(latents)[0].detach()
    share = quantizer.train()(latents).codes.float().mean(0)
    torch.testing.assert_close(share, (logits / 0.5).sigmoid(), rtol=0, atol=0.02)
    assert torch.equal(quantizer.eval()(latents).codes, quantizer.encode(latents))
    quantizer.train().temperature = 0  # the end of an annealing
    assert torch.equal(quantizer(latents).codes, quantizer.encode(latents))


@pytest.mark.parametrize("training", [False, True])
def test_binary_gradient_is_that_of_the_probabilities(training):
    torch.manual_seed(1)
    quantizer = BinaryQuantizer(8, 6).train(training)
    latents, upstream = torch.randn(2, 4, 6, requires_grad=True), torch.randn(2, 4, 6)
    result = quantizer(latents)
    (result.latents * upstream).sum().backward()
    again = latents.detach().clone().requires_grad_()
    ((quantizer.logits(again).sigmoid() @ quantizer.embed.detach()) * upstream).sum().backward()
    torch.testing.assert_close(latents.grad, again.grad)
    torch.testing.assert_close(result.latents, quantizer.decode(result.codes))
    quantizer.eval().zero_grad()
    (quantizer(latents.detach()).latents * upstream).sum().backward()
    expected = torch.einsum("bkn,bkd->nd", quantizer.encode(latents).float(), upstream)
    torch.testing.assert_close(quantizer.embed.grad, expected)


def test_binary_losses_are_the_formulae_written_out():
    torch.manual_seed(2)
    quantizer = BinaryQuantizer(5, 6, code_weight=0.3, entropy_weight=0.2).eval()
    latents = torch.randn(4, 3, 6)
    p = quantizer.logits(latents).sigmoid().double().detach()
    losses = quantizer(latents).losses
    assert float(losses["code"].detach()) == pytest.approx(0.3 * float((p * (1 - p)).mean()), rel=1e-5)

    def entropy(q):
        return float(-(q * q.log() + (1 - q) * (1 - q).log()).mean())

    expected = 0.2 * (entropy(p) - entropy(p.mean(0)))
    assert float(losses["entropy"].detach()) == pytest.approx(expected, rel=1e-3)


def test_entropy_regularisation_makes_bits_differ_between_images():
    torch.manual_seed(3)
    quantizer = BinaryQuantizer(16, 8, code_weight=0.01, entropy_weight=1.0)
    with torch.no_grad():
        quantizer.proj[0].bias.fill_(4)  # almost every bit is set in every image
    latents = torch.randn(64, 4, 8)
    before = float(quantizer.usage(quantizer.encode(latents))["bit_entropy"])
    optimizer = torch.optim.Adam(quantizer.parameters(), 0.05)
    for _ in range(100):
        optimizer.zero_grad()
        sum(quantizer(latents).losses.values()).backward()
        optimizer.step()
    after = float(quantizer.usage(quantizer.encode(latents))["bit_entropy"])
    assert before < 0.1
    assert after > 0.9


@given(
    batch=st.integers(0, 3), tokens=st.integers(1, 9), width=st.integers(1, 64), seed=st.integers(0, 2**31)
)
@settings(max_examples=50, deadline=None)
def test_bits_come_back_from_integers_and_from_one_bit_a_bit_files(batch, tokens, width, seed):
    bits = torch.rand(batch, tokens, width, generator=seeded(seed)) < 0.5
    assert torch.equal(integers_to_bits(bits_to_integers(bits), width), bits)
    packed = Tokens(bits=bits)
    assert packed.bits_per_image.tolist() == [tokens * width] * batch
    assert Tokens.from_bytes(packed.to_bytes()) == packed
    assert len(packed.to_bytes()) <= (batch * tokens * width + 7) // 8 + 32


def test_integers_of_64_bits_are_eight_little_endian_bytes_a_token():
    bits = torch.zeros(1, 2, 64, dtype=torch.bool)
    bits[0, 0, 0] = bits[0, 0, 9] = bits[0, 1, 63] = True
    data = bits_to_integers(bits).numpy().astype("<u8").tobytes()
    assert data == bytes([1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 128])
    with pytest.raises(ValueError, match=r"65 bits.*1 to 64"):
        bits_to_integers(torch.zeros(1, 65, dtype=torch.bool))


@pytest.mark.parametrize("bits", [torch.zeros(1, 2, 9, dtype=torch.bool), torch.zeros(1, 2, 10)])
def test_bits_of_another_width_or_type_are_refused(bits):
    with pytest.raises(ValueError, match=r"give bool \[\.\.\., 10\]"):
        BinaryQuantizer(10, 6).decode(bits)


@pytest.mark.parametrize(
    "make",
    [
        lambda: BinaryQuantizer(0, 4),
        lambda: BinaryQuantizer(4, 4, temperature=-1),
        lambda: LookupFreeQuantizer(64),
        lambda: LookupFreeQuantizer(4, temperature=0),
        lambda: LookupFreeQuantizer(4, group_bits=30),
        lambda: FiniteScalarQuantizer([2] * 64),
        lambda: ResidualQuantizer([]),
        lambda: ProductQuantizer([BinaryQuantizer(4, 4)]),
        lambda: ResidualQuantizer([GaussianQuantizer(3)]),
    ],
)
def test_impossible_quantizers_are_refused(make):
    with pytest.raises(ValueError, match=r"give|BinaryQuantizer|ProductQuantizer|GaussianQuantizer|none"):
        make()


# ---- lookup-free -------------------------------------------------------------------------------------------


@given(width=st.integers(1, 63), seed=st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_every_sign_code_comes_back_exactly_beyond_32_bits(width, seed):
    quantizer = LookupFreeQuantizer(width)
    assert quantizer.codebook_sizes == (2**width,)
    latents = torch.randn(2, 3, width, generator=seeded(seed))
    codes = quantizer.encode(latents)
    for latent, code in zip(latents.flatten(0, 1).tolist(), codes.flatten().tolist(), strict=True):
        assert code == int("".join("1" if value > 0 else "0" for value in latent), 2)
    assert torch.equal(quantizer.decode(codes), torch.where(latents > 0, 1.0, -1.0))
    tokens = Tokens(indices=codes, codebook_sizes=quantizer.codebook_sizes)
    assert Tokens.from_bytes(tokens.to_bytes()) == tokens


def test_zero_counts_as_negative():
    assert LookupFreeQuantizer(2).encode(torch.tensor([[[0.0, -0.0], [0.0, 1e-30]]])).tolist() == [[0, 1]]


def test_grouped_entropy_is_exact_for_independent_channels():
    values = torch.cartesian_prod(*[torch.tensor([-0.3, 0.2])] * 4)[None]  # every combination once
    exact, grouped = (
        LookupFreeQuantizer(4, temperature=1.0, group_bits=bits)(values).losses["entropy"] for bits in (9, 1)
    )
    torch.testing.assert_close(exact, grouped)
    tied = torch.tensor([[[0.3, 0.3], [-0.3, -0.3]]])  # channels that always agree: groups see more entropy
    exact, grouped = (
        LookupFreeQuantizer(2, temperature=0.1, group_bits=bits)(tied).losses["entropy"] for bits in (2, 1)
    )
    assert grouped < exact


# ---- residual and product ----------------------------------------------------------------------------------


def residual(parts=3, size=16, dim=6, **options):
    torch.manual_seed(20)
    quantizer = ResidualQuantizer([VectorQuantizer(size, dim, **options) for _ in range(parts)])
    for depth, part in enumerate(quantizer.parts):
        part.embedding.weight.data.normal_(std=0.5**depth)
    return quantizer


def test_each_residual_codebook_describes_what_is_left():
    quantizer, latents = residual(), torch.randn(2, 5, 6, generator=seeded(21))
    codes, left = quantizer.encode(latents), latents
    errors = []
    for depth, part in enumerate(quantizer.parts):
        assert torch.equal(codes[..., depth], part.encode(left))
        left = left - part.decode(codes[..., depth])
        torch.testing.assert_close(quantizer.decode(codes[..., : depth + 1]), latents - left)
        errors.append(float(left.detach().square().mean()))
    assert errors == sorted(errors, reverse=True)


def test_residual_gradient_passes_once():
    quantizer = residual()
    latents, upstream = torch.randn(2, 5, 6, requires_grad=True), torch.randn(2, 5, 6)
    (quantizer(latents).latents * upstream).sum().backward()
    torch.testing.assert_close(latents.grad, upstream)


def test_residual_losses_train_every_codebook():
    quantizer = residual()
    sum(quantizer(torch.randn(8, 5, 6)).losses.values()).backward()
    assert all(part.embedding.weight.grad.any() for part in quantizer.parts)


def test_residual_codebooks_revive_their_dead_codes():
    quantizer = residual(parts=2, size=32, dim=2, clustering=True)
    for part in quantizer.parts:
        part.embedding.weight.data[1:] = 100 * torch.randn(31, 2).sign()
    latents = torch.randn(4, 64, 2, generator=seeded(22))
    before = codebook_usage(quantizer.encode(latents), quantizer.codebook_sizes)
    for _ in range(20):
        quantizer(torch.randn(4, 64, 2))
    after = codebook_usage(quantizer.encode(latents), quantizer.codebook_sizes)
    assert (before * 32 <= 2).all()
    assert (after * 32 > 4).all()


def test_product_is_its_parts_side_by_side():
    torch.manual_seed(23)
    parts = [VectorQuantizer(16, 3), FiniteScalarQuantizer([5, 4, 3])]
    quantizer, latents = ProductQuantizer(parts), torch.randn(2, 5, 6)
    codes = quantizer.encode(latents)
    assert quantizer.codebook_sizes == (16, 60)
    for number, part in enumerate(parts):
        run = latents[..., 3 * number : 3 * number + 3]
        assert torch.equal(codes[..., number], part.encode(run))
        assert torch.equal(
            quantizer.decode(codes)[..., 3 * number : 3 * number + 3], part.decode(codes[..., number])
        )
    commitment = parts[0](latents[..., :3]).losses["commitment"]
    torch.testing.assert_close(quantizer(latents).losses["commitment"], commitment / 2)


def test_composites_nest_and_refuse_codes_of_another_width():
    quantizer = ProductQuantizer([residual(2, dim=3), residual(3, dim=3)])
    codes = quantizer.encode(torch.randn(2, 4, 6))
    assert codes.shape == (2, 4, 5)
    assert quantizer.decode(codes).shape == (2, 4, 6)
    with pytest.raises(ValueError, match=r"4 codebooks.*has 5"):
        quantizer.decode(codes[..., :4])
    with pytest.raises(ValueError, match=r"4 codebooks.*has 3"):
        residual(3).decode(torch.zeros(1, 2, 4, dtype=torch.int64))


# ---- beside vector-quantize-pytorch ------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [[8, 6, 5], [7, 5, 5, 5], [16], [4, 4, 4, 4], [3, 9]])
def test_fsq_equals_vector_quantize_pytorch(levels):
    from vector_quantize_pytorch import FSQ

    theirs, ours = FSQ(levels), FiniteScalarQuantizer(levels)
    latents = 2 * torch.randn(4, 50, len(levels), generator=seeded(30))
    one, other = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    quantized, indices = theirs(one)
    result = ours(other)
    assert torch.equal(result.codes, indices.long())
    torch.testing.assert_close(result.latents, quantized)
    torch.testing.assert_close(ours.decode(result.codes), theirs.indices_to_codes(indices))
    upstream = torch.randn(latents.shape, generator=seeded(31))
    (quantized * upstream).sum().backward()
    (result.latents * upstream).sum().backward()
    torch.testing.assert_close(other.grad, one.grad)


@pytest.mark.parametrize("width", [1, 5, 9])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_lfq_equals_vector_quantize_pytorch(width, temperature):
    from vector_quantize_pytorch import LFQ

    theirs = LFQ(dim=width, codebook_size=2**width, diversity_gamma=0.7, commitment_loss_weight=0.25).train()
    ours = LookupFreeQuantizer(width, diversity=0.7, temperature=temperature)
    latents = 0.3 * temperature * torch.randn(4, 50, width, generator=seeded(32))
    one, other = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    (quantized, indices, _), parts = theirs(one, inv_temperature=1 / temperature, return_loss_breakdown=True)
    result = ours(other)
    assert torch.equal(result.codes, indices.long())
    torch.testing.assert_close(result.latents, quantized)
    torch.testing.assert_close(ours.decode(result.codes), theirs.indices_to_codes(indices))
    entropy = 0.1 * (parts.per_sample_entropy - 0.7 * parts.batch_entropy)
    torch.testing.assert_close(result.losses["entropy"], entropy, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(result.losses["commitment"], 0.25 * parts.commitment)
    grads = [
        torch.autograd.grad(loss, x)[0] for loss, x in ((entropy, one), (result.losses["entropy"], other))
    ]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("cosine", [False, True])
def test_residual_vq_equals_vector_quantize_pytorch(cosine):
    from vector_quantize_pytorch import ResidualVQ

    torch.manual_seed(33)
    theirs = ResidualVQ(
        dim=6, num_quantizers=4, codebook_size=32, use_cosine_sim=cosine, commitment_weight=1.0
    )
    ours = ResidualQuantizer([VectorQuantizer(32, 6, l2_norm=cosine, commitment_cost=1.0) for _ in range(4)])
    for layer, part in zip(theirs.layers, ours.parts, strict=True):
        part.embedding.weight.data.copy_(layer.codebook)
    latents = torch.randn(4, 50, 6, generator=seeded(34))
    quantized, indices, _ = theirs.eval()(latents)
    codes = ours.eval().encode(latents)
    assert torch.equal(codes, indices)
    torch.testing.assert_close(ours.decode(codes), quantized)
    torch.testing.assert_close(ours(latents).latents, quantized)
    if not cosine:
        _, _, losses = theirs.train()(latents, freeze_codebook=True)
        torch.testing.assert_close(ours(latents).losses["commitment"], losses.sum())


# ---- any size ----------------------------------------------------------------------------------------------


@given(
    levels=st.lists(st.integers(2, 40), min_size=7, max_size=11).filter(
        lambda levels: 2**31 < math.prod(levels) < 2**62
    ),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=50, deadline=None)
def test_fsq_indices_are_exact_beyond_32_bits(levels, seed):
    quantizer = FiniteScalarQuantizer(levels)
    assert quantizer.codebook_sizes == (math.prod(levels),)
    latents = 2 * torch.randn(2, 3, len(levels), generator=seeded(seed), dtype=torch.float64)
    codes, result = quantizer.encode(latents), quantizer(latents)
    for latent, code in zip(latents.flatten(0, 1).tolist(), codes.flatten().tolist(), strict=True):
        assert code == plain_fsq(latent, levels)[0]
    torch.testing.assert_close(quantizer.decode(codes).double(), result.latents)
    assert torch.equal(result.codes, codes)


@pytest.mark.parametrize(
    ("quantizer", "channels"),
    [
        (lambda: VectorQuantizer(1, 4, clustering=True, entropy_weight=0.1), 4),
        (lambda: VectorQuantizer(2, 1, l2_norm=True, entropy_weight=0.1), 1),
        (lambda: VectorQuantizer(20000, 4, entropy_weight=0.1), 4),
        (lambda: FiniteScalarQuantizer([1]), 1),
        (lambda: FiniteScalarQuantizer([2]), 1),
        (lambda: FiniteScalarQuantizer([64] * 10), 10),
        (lambda: LookupFreeQuantizer(1), 1),
        (lambda: LookupFreeQuantizer(10), 10),
        (lambda: LookupFreeQuantizer(63), 63),
        (lambda: BinaryQuantizer(1, 4, entropy_weight=0.1), 4),
        (lambda: BinaryQuantizer(512, 4, entropy_weight=0.1), 4),
        (lambda: ResidualQuantizer([VectorQuantizer(300, 4), VectorQuantizer(1, 4)]), 4),
        (lambda: ProductQuantizer([LookupFreeQuantizer(40), LookupFreeQuantizer(40)]), 80),
    ],
)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_no_codebook_size_gives_nan_in_bfloat16(quantizer, channels, scale):
    torch.manual_seed(40)
    quantizer = quantizer()
    latents = (scale * torch.randn(2, 8, channels)).bfloat16().requires_grad_()
    result = quantizer(latents)
    assert result.latents.isfinite().all()
    assert quantizer.decode(result.codes).isfinite().all()
    (result.latents.float().sum() + sum(result.losses.values())).backward()
    assert latents.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in quantizer.parameters())
    assert all(value.isfinite() for value in quantizer.usage(result.codes).values())


# ---- usage -------------------------------------------------------------------------------------------------


def test_bit_entropy_is_measured_bit_by_bit_over_the_batch():
    bits = torch.zeros(4, 1, 3, dtype=torch.bool)
    bits[:2, 0, 1] = bits[0, 0, 2] = True  # never, half, a quarter
    expected = [0.0, 1.0, -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))]
    assert bit_entropy(bits)[0].tolist() == pytest.approx(expected, abs=1e-6)
    quantizer = BinaryQuantizer(3, 4)
    assert float(quantizer.usage(bits)["bit_entropy"]) == pytest.approx(sum(expected) / 3, abs=1e-6)


def test_codebook_usage_and_perplexity_count_each_codebook():
    indices = torch.tensor([[[0, 5], [1, 5]], [[2, 5], [3, 5]]])
    assert codebook_usage(indices, (8, 10)).tolist() == pytest.approx([0.5, 0.1])
    assert perplexity(indices, (8, 10)).tolist() == pytest.approx([4.0, 1.0])
    assert perplexity(torch.tensor([[0, 0, 0, 1]]), (2**40,)).tolist() == pytest.approx(
        [math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))]
    )
    with pytest.raises(ValueError, match=r"2 codebooks.*name 3"):
        codebook_usage(indices, (8, 8, 8))


def test_continuous_codes_have_no_usage():
    assert GaussianQuantizer(3).usage(torch.randn(2, 4, 3)) == {}
