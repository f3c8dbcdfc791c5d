"""Each quantizer alone: codes in range, round trips, gradients, and the papers' formulae written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vistok.quantizers import DiagonalGaussian, FiniteScalarQuantizer, GaussianQuantizer, VectorQuantizer

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
        pytest.skip("continuous")
    codes = quantizer.encode(100 * torch.randn(8, 4, channels))
    assert codes.dtype == torch.int64
    assert codes.min() >= 0
    assert codes.max() < quantizer.codebook_sizes[0]


def test_an_empty_batch_stays_empty(quantizer):
    quantizer, channels = quantizer
    codes = quantizer.encode(torch.empty(0, 4, channels))
    assert codes.shape[:2] == (0, 4)
    assert quantizer.decode(codes).shape[:2] == (0, 4)


def test_training_reports_the_codes_that_encode_gives(quantizer):
    quantizer, channels = quantizer
    if quantizer.kind != "indices":
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
    if quantizer.kind == "indices":  # a posterior of standard deviation exp(10) may leave half precision
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
