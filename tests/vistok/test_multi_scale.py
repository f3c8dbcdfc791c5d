"""Residual quantization over scales, latent perturbation, and the tokenizers that have both."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import SIDE, build

from vistok import create, load
from vistok.quantizers import (
    MultiScaleBinaryQuantizer,
    MultiScaleVectorQuantizer,
    VectorQuantizer,
    perturb,
    perturbation_ratio,
)

pytestmark = pytest.mark.usefixtures("small_and_quick")
SIDES = (1, 2, 4)


def both():
    torch.manual_seed(0)
    vector = MultiScaleVectorQuantizer(32, 5, SIDES, shared_convolutions=2)
    torch.nn.init.normal_(vector.embedding.weight)
    return [vector, MultiScaleBinaryQuantizer(5, SIDES, shared_convolutions=2)]


@pytest.mark.parametrize("quantizer", both(), ids=["vector", "binary"])
def test_what_all_scales_add_is_what_codes_decode_to(quantizer):
    latents = torch.randn(2, 16, 5)
    codes = quantizer.encode(latents)
    assert codes.shape == (2, 21) and quantizer.num_codes == 21
    grids = [quantizer.added(each, scale) for scale, each in enumerate(quantizer.split(codes))]
    for scales in (1, 2, 3):
        kept = codes[:, : sum(side**2 for side in SIDES[:scales])]
        expected = sum(grids[:scales]).flatten(2).transpose(1, 2)
        assert torch.allclose(quantizer.decode(kept), expected)
    quantized = quantizer(latents)
    assert torch.equal(quantized.codes, codes)
    assert torch.allclose(quantized.latents, quantizer.decode(codes), atol=1e-6)


def test_each_scale_takes_the_nearest_code_of_what_is_left():
    """The loop written out for one image and one convolution that does nothing."""
    torch.manual_seed(1)
    quantizer = MultiScaleVectorQuantizer(16, 3, (1, 2), l2_norm=False, shared_convolutions=1)
    torch.nn.init.normal_(quantizer.embedding.weight)
    with torch.no_grad():
        quantizer.quant_resi.qresi.weight.zero_()
        quantizer.quant_resi.qresi.bias.zero_()
    latents, rows = torch.randn(1, 4, 3), quantizer.embedding.weight.detach()
    first = int((rows - latents[0].mean(0)).square().sum(1).argmin())
    rest = latents[0] - 0.5 * rows[first]
    second = (rest[:, None] - rows).square().sum(-1).argmin(1)
    assert quantizer.encode(latents).tolist() == [[first, *second.tolist()]]


def test_bits_of_an_index_are_the_signs_with_the_first_channel_lowest():
    quantizer = MultiScaleBinaryQuantizer(3, (1,), shared_convolutions=1)
    latents = torch.tensor([[[0.5, -1.0, 2.0]], [[-1.0, 0.0, -1.0]]])
    assert quantizer.encode(latents).tolist() == [[0b101], [0]]


def test_dropped_scales_leave_the_sum_and_not_the_codes():
    quantizer, _ = both()
    quantizer.train()
    latents = torch.randn(3, 16, 5)
    whole = quantizer(latents, torch.tensor([3, 3, 3]))
    some = quantizer(latents, torch.tensor([1, 3, 2]))
    assert torch.equal(whole.codes, some.codes)
    assert torch.allclose(some.latents[0], quantizer.decode(some.codes[:1, :1])[0], atol=1e-6)
    assert torch.allclose(some.latents[2], quantizer.decode(some.codes[2:, :5])[0], atol=1e-6)


def test_hits_are_counted_in_training_only():
    quantizer, _ = both()
    latents = torch.randn(2, 16, 5)
    quantizer.eval()(latents)
    assert not quantizer.ema_vocab_hit_SV.any()
    codes = quantizer.train()(latents).codes
    first = torch.bincount(codes[:, 0], minlength=32).float()
    assert torch.equal(quantizer.ema_vocab_hit_SV[0], first)
    assert quantizer.hit_usage(2)[0] == (first >= 0.08 * 2 / 32).float().mean()


@pytest.mark.parametrize("count", [0, 2, 20, 22])
def test_codes_that_end_inside_a_scale_are_refused(count):
    with pytest.raises(ValueError, match="21 are those of all scales"):
        both()[0].decode(torch.zeros(1, count, dtype=torch.long))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sides": (2, 1)}, "in rising order"),
        ({"dropout": 1.5}, "a share of the images"),
        ({"dropout": 0.5, "first_dropped": 4}, "1 to 3 scales"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MultiScaleVectorQuantizer(8, 2, **{"sides": SIDES, **settings})


# Perturbation -----------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 1), st.integers(1, 8), st.floats(0, 1))
def test_perturbed_codes_are_among_the_nearest_and_only_in_the_first_images(alpha, delta, beta):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(8, 3, l2_norm=True)
    latents = torch.randn(4, 6, 3)
    clean = quantizer(latents).latents
    out = perturb(quantizer, latents, clean, alpha=alpha, beta=beta, delta=delta)
    first = int(4 * beta)
    assert torch.equal(out[first:], clean[first:])
    unit = F.normalize(latents, dim=-1)
    distances = (unit[:, :, None] - quantizer.decode(torch.arange(8))).square().sum(-1)
    codes = (out[:, :, None] - quantizer.decode(torch.arange(8))).square().sum(-1).argmin(-1)
    rank = (distances < distances.gather(-1, codes[..., None]) - 1e-6).sum(-1)
    assert rank.max() < delta
    if alpha == 0:
        assert torch.allclose(out, clean, atol=1e-6)


def test_the_schedule_falls_between_its_epochs():
    assert [perturbation_ratio(epoch) for epoch in (0, 39, 40, 80, 120, 121, 500)] == [
        1.0, 1.0, 1.0, 0.75, 0.5, 0.5, 0.5,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="delta 9"):
        perturb(VectorQuantizer(8, 3), *torch.zeros(2, 1, 1, 3), alpha=1, beta=1, delta=9)


# Tokenizers -------------------------------------------------------------------------------------------------


def test_scales_are_previews_that_end_at_the_picture():
    model = build("imagefolder")
    tokens = model.encode(torch.rand(2, 3, SIDE, SIDE))
    assert tokens.indices.shape == (2, 14, 2)
    assert torch.allclose(model.decode_scales(tokens.indices, 3), model.decode(tokens), atol=1e-6)
    assert not torch.allclose(model.decode_scales(tokens.indices, 1), model.decode(tokens), atol=1e-3)
    with pytest.raises(ValueError, match="scales is 4"):
        model.decode_scales(tokens.indices, 4)
    with pytest.raises(ValueError, match="has 1, so use decode"):
        build("xqgan-vq").decode_scales(tokens.indices, 1)


def test_latents_are_perturbed_in_training_only():
    model = build("xqgan-vq", alpha=1.0, beta=1.0, delta=32)
    images = torch.rand(2, 3, SIDE, SIDE)
    torch.manual_seed(0)
    trained = model.train()(images).images
    plain = model.eval()(images).images
    assert not torch.allclose(trained, plain, atol=1e-3)
    assert torch.allclose(plain, model.pixels(model.dequantize(model.encode(images))[0]), atol=1e-5)


@pytest.mark.parametrize("case", ["xqgan-vq", "xqgan-product"])
def test_published_files_prefer_the_average_and_need_no_teacher(case, tmp_path):
    model = build(case)
    state = model.state_dict()
    teacher = {"semantic_model.blocks.0.weight": torch.zeros(3), "sem_linear.bias": torch.zeros(2)}
    other = {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}
    torch.save({"model": other | teacher, "ema": state | teacher, "steps": 1}, tmp_path / "best_ckpt.pt")
    images = torch.rand(2, 3, SIDE, SIDE)
    loaded = load(tmp_path / "best_ckpt.pt")
    assert torch.equal(loaded.encode(images).indices, model.encode(images).indices)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_latent_tokens": 5}, "its side squared"),
        ({"lfq": True}, "one bit per channel"),
        ({"beta": 0.1, "product_quant": 2}, "one plain codebook"),
        ({"enc_type": "cnn", "dec_type": "cnn"}, "the published dinov2"),
    ],
)
def test_configurations_that_cannot_be_are_refused(change, message):
    tiny = {"image_size": 32, "num_latent_tokens": 4, "v_patch_nums": (2,)}
    with pytest.raises(ValueError, match=message):
        create("xqgan", **tiny | change)


def test_the_tick_rule_gives_the_published_convolutions():
    quantizer = MultiScaleVectorQuantizer(4, 2, (1, 1, 2, 3, 3, 4, 5, 6, 8, 11))
    assert quantizer.quant_resi.numbers == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert math.prod(quantizer.ema_vocab_hit_SV.shape) == 40
