"""KID, Inception score, precision and recall have torch-fidelity's digits and its random draws."""

import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from vistok.eval.metrics.distribution import inception_score, kernel_distance, precision_recall


def features(images, dim=16, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, dim, generator=generator) + shift


@pytest.mark.parametrize("seed", [2020, 7])
def test_kid_equals_torch_fidelity_in_double(seed):
    pair = features(60), features(70, seed=1, shift=0.3)
    expected = kid_features_to_metric(
        *(side.double() for side in pair), kid_subsets=5, kid_subset_size=40, rng_seed=seed, verbose=False
    )
    found = kernel_distance(*pair, subsets=5, subset_size=40, seed=seed)
    assert found.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-12)
    assert found.std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-12)
    assert (found.subsets, found.subset_size) == (5, 40)


@pytest.mark.parametrize(("images", "splits", "seed"), [(101, 10, 2020), (9, 3, 5), (10, 10, 2020)])
def test_inception_score_equals_torch_fidelity(images, splits, seed):
    logits = 3 * features(images)
    expected = isc_features_to_metric(logits, splits=splits, rng_seed=seed)
    found = inception_score(logits, splits=splits, seed=seed)
    assert found.mean == pytest.approx(expected["inception_score_mean"], rel=1e-12)
    assert found.std == pytest.approx(expected["inception_score_std"], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("neighborhood", [1, 3])
def test_precision_and_recall_equal_torch_fidelity(neighborhood):
    pair = features(80, 6), features(90, 6, seed=1, shift=0.6)
    expected = prc_features_to_metric(*pair, prc_neighborhood=neighborhood, verbose=False)
    assert vars(precision_recall(*pair, neighborhood=neighborhood)) == pytest.approx(expected)


def test_generated_copies_of_half_the_real_images_are_precise_and_recall_less():
    real = features(60)
    found = precision_recall(real[:30], real)
    assert found.precision == 1
    assert found.recall < 1


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        (lambda x: kernel_distance(x, x), "subsets of 2 to 5 images here.*subset_size=1000"),
        (lambda x: inception_score(x), "of 5 images cannot be split 10 ways"),
        (lambda x: precision_recall(x, x[:3]), "more than 3 images; got 5 and 3"),
    ],
)
def test_too_few_images_are_an_error_with_advice(metric, says):
    with pytest.raises(ValueError, match=says):
        metric(features(5))


@pytest.mark.parametrize(
    "metric", [lambda x: kernel_distance(x, x), inception_score, lambda x: precision_recall(x, x)]
)
def test_values_that_are_not_finite_are_refused(metric):
    bad = features(1500, 4)
    bad[1200, 2] = torch.nan
    with pytest.raises(ValueError, match=r"images 1000\.\.1999 hold values that are not finite"):
        metric(bad)


def test_features_of_two_networks_are_not_compared():
    with pytest.raises(ValueError, match=r"\[9, 4\] and \[9, 5\]"):
        precision_recall(features(9, 4), features(9, 5))
