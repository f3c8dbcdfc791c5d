"""PSNR and SSIM equal scikit-image's, image by image, and refuse what they cannot score."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import GOLDEN
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import structural_similarity_index_measure

from vistok.eval.metrics.image import psnr, ssim
from vistok.eval.parity.case import CannotBuild
from vistok.eval.parity.verify import verify

CASE = GOLDEN / "eval_metrics_a.json"

SSIM_OPTIONS = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}


def noisy_pair(batch, channels, height, width, noise, seed):
    generator = torch.Generator().manual_seed(seed)
    references = torch.rand(batch, channels, height, width, generator=generator)
    images = references + noise * torch.randn(references.shape, generator=generator)
    return images.clamp(0, 1), references


def as_arrays(batch):
    return [np.asarray(image) for image in batch.double()]  # [C, H, W] each


@settings(deadline=None, max_examples=15)
@given(
    st.integers(1, 2),
    st.sampled_from([1, 3]),
    st.integers(11, 24),
    st.integers(11, 24),
    st.floats(1e-3, 1),
    st.integers(0, 999),
)
def test_both_equal_scikit_image_per_image(batch, channels, height, width, noise, seed):
    images, references = noisy_pair(batch, channels, height, width, noise, seed)
    pairs = list(zip(as_arrays(images), as_arrays(references), strict=True))
    expected_psnr = [peak_signal_noise_ratio(reference, image, data_range=1) for image, reference in pairs]
    expected_ssim = [structural_similarity(*pair, channel_axis=0, **SSIM_OPTIONS) for pair in pairs]
    torch.testing.assert_close(psnr(images, references).tolist(), expected_psnr, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ssim(images, references).tolist(), expected_ssim, rtol=1e-9, atol=1e-9)


def test_an_identical_image_has_infinite_psnr_and_ssim_one():
    images, references = noisy_pair(2, 3, 16, 16, 0.1, 0)
    images[1] = references[1]
    assert psnr(images, references).isinf().tolist() == [False, True]
    assert ssim(images, references)[1] == pytest.approx(1, abs=1e-12)


def test_known_error_gives_known_psnr():
    references = torch.full((1, 3, 8, 8), 0.5)
    assert psnr(references + 0.1, references).item() == pytest.approx(20, abs=1e-5)


def test_both_are_symmetric():
    images, references = noisy_pair(2, 3, 16, 20, 0.2, 1)
    torch.testing.assert_close(psnr(images, references), psnr(references, images))
    torch.testing.assert_close(ssim(images, references), ssim(references, images))


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    ("images", "references", "error", "says"),
    [
        (torch.zeros(3, 16, 16), torch.zeros(3, 16, 16), ValueError, "batch axis"),
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 17), ValueError, r"\[1, 3, 16, 17\]"),
        (torch.zeros(0, 3, 16, 16), torch.zeros(0, 3, 16, 16), ValueError, "non-empty"),
        (torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), -0.5), ValueError, "references span"),
        (torch.full((1, 3, 16, 16), torch.nan), torch.zeros(1, 3, 16, 16), ValueError, "images span"),
        (torch.zeros(1, 3, 16, 16).byte(), torch.zeros(1, 3, 16, 16), TypeError, "divide by 255"),
    ],
)
def test_unfit_images_are_refused(metric, images, references, error, says):
    with pytest.raises(error, match=says):
        metric(images, references)


def test_ssim_refuses_images_smaller_than_its_window():
    with pytest.raises(ValueError, match=r"10x16.*11x11"):
        ssim(torch.zeros(1, 3, 10, 16), torch.zeros(1, 3, 10, 16))


def test_reflected_border_equals_scikit_image_on_a_mirrored_image():
    images, references = noisy_pair(1, 3, 20, 17, 0.2, 2)
    mirrored = [
        np.pad(as_arrays(x)[0], ((0, 0), (5, 5), (5, 5)), mode="reflect") for x in (images, references)
    ]
    expected = structural_similarity(*mirrored, channel_axis=0, **SSIM_OPTIONS)
    assert ssim(images, references, border="reflect").item() == pytest.approx(expected, abs=1e-9)


def test_ssim_refuses_an_unknown_border():
    with pytest.raises(ValueError, match="'zero'; give 'crop'"):
        ssim(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16), border="zero")


def test_reflected_border_equals_torchmetrics_in_double():
    images, references = (batch.double() for batch in noisy_pair(3, 3, 24, 19, 0.2, 3))
    expected = structural_similarity_index_measure(images, references, data_range=1.0, reduction="none")
    torch.testing.assert_close(ssim(images, references, border="reflect"), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["fid_features", "kernel_inception_distance_std", "inception_score_mean", "recall"]
)
def test_a_recorded_metric_changed_by_two_millionths_is_a_miss(tmp_path, name):
    recording = json.loads(CASE.read_text())
    recording["results"][name] *= 1 + 2e-6
    (tmp_path / "case.json").write_text(json.dumps(recording))
    (tmp_path / "case.safetensors").write_bytes(CASE.with_suffix(".safetensors").read_bytes())
    assert [row.name for row in verify(tmp_path / "case.json") if not row.passed] == [name]


def test_a_recorded_metric_that_nobody_computes_is_named(tmp_path):
    recording = json.loads(CASE.read_text())
    recording["results"]["perceptual_path_length"] = 1.0
    (tmp_path / "case.json").write_text(json.dumps(recording))
    (tmp_path / "case.safetensors").write_bytes(CASE.with_suffix(".safetensors").read_bytes())
    with pytest.raises(CannotBuild, match="no metric 'perceptual_path_length'"):
        verify(tmp_path / "case.json")
