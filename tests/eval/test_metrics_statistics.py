"""Streamed feature statistics equal NumPy's over all features at once; Fréchet distances torch-fidelity's."""

import dataclasses
import io
import math
import re
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from vistok.eval.metrics import statistics as statistics_module
from vistok.eval.metrics.statistics import PANEL, FeatureStatistics, Gaussian, frechet_distance
from vistok.eval.speed import fid_statistics

SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) >= 2)


def random_features(images, dim, seed=0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator)
    return torch.randn(images, dim, generator=generator) @ mixing + offset


def streamed(*batches):
    statistics = FeatureStatistics(batches[0].shape[1])
    for batch in batches:
        statistics.update(batch)
    return statistics


def assert_same(statistics, mean, covariance, rtol=1e-12):
    scale = float(covariance.abs().max())
    assert torch.allclose(statistics.mean, mean, rtol=rtol, atol=rtol * scale**0.5)
    assert torch.allclose(statistics.covariance, covariance, rtol=rtol, atol=rtol * scale)


@settings(deadline=None, max_examples=40)
@given(SIZES, st.integers(1, 6), st.sampled_from([0.0, 10.0, -300.0]), st.integers(0, 999))
def test_any_split_into_batches_gives_numpys_mean_and_covariance(sizes, dim, offset, seed):
    features = random_features(sum(sizes), dim, seed, offset)
    array = features.double().numpy()
    covariance = torch.from_numpy(np.cov(array, rowvar=False).reshape(dim, dim))
    statistics = streamed(*features.split(sizes))
    assert statistics.count == sum(sizes)
    assert_same(statistics, torch.from_numpy(array.mean(0)), covariance, rtol=1e-11)


@settings(deadline=None, max_examples=40)
@given(SIZES, st.integers(1, 6), st.randoms(use_true_random=False), st.integers(0, 999))
def test_shards_merged_in_any_order_equal_one_pass(sizes, dim, random, seed):
    features = random_features(sum(sizes), dim, seed, offset=3.0)
    shards = [streamed(shard) for shard in features.split(sizes)]
    random.shuffle(shards)
    merged = FeatureStatistics(dim)
    for shard in shards:
        merged.merge(shard)
    once = streamed(features)
    assert merged.count == once.count
    assert_same(merged, once.mean, once.covariance)


def test_features_wider_than_a_panel_are_covered():
    features = random_features(50, 2 * PANEL + 7)
    halves = streamed(features[:20]), streamed(features[20:])
    halves[0].merge(halves[1])
    assert_same(
        halves[0],
        features.double().mean(0),
        torch.from_numpy(np.cov(features.double().numpy().T)),
        rtol=1e-11,
    )


def test_a_large_common_offset_costs_no_digits():
    features = random_features(400, 8).double()
    shifted = streamed(*(features + 1e6).split(32))
    expected = streamed(features).covariance
    torch.testing.assert_close(shifted.covariance, expected, rtol=1e-9, atol=1e-9)


def test_a_state_goes_on_to_the_bit():
    features = random_features(40, 5)
    once = streamed(*features.split(10))
    first = streamed(*features[:20].split(10))
    second = FeatureStatistics(5)
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    for batch in features[20:].split(10):
        second.update(batch)
    assert second.count == 40
    assert torch.equal(second.mean, once.mean)
    assert torch.equal(second.covariance, once.covariance)


def test_a_state_of_other_features_is_refused():
    with pytest.raises(ValueError, match=r"statistics of 4 features have .*\[4, 4\]"):
        FeatureStatistics(4).load_state_dict(FeatureStatistics(5).state_dict())
    with pytest.raises(ValueError, match="cannot merge statistics of 5 features into those of 4"):
        FeatureStatistics(4).merge(FeatureStatistics(5))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused_and_leave_no_trace(bad):
    statistics = streamed(random_features(8, 3))
    before = statistics.covariance
    features = random_features(6, 3)
    features[4, 1] = bad
    with pytest.raises(ValueError, match=r"rows \[4\] of the batch are not finite"):
        statistics.update(features)
    assert statistics.count == 8
    assert torch.equal(statistics.covariance, before)


@pytest.mark.parametrize(
    "features", [torch.zeros(3), torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.int64)]
)
def test_what_is_no_batch_of_features_is_refused(features):
    with pytest.raises(ValueError, match=r"take floats \[B, 3\]"):
        FeatureStatistics(3).update(features)


def test_too_few_images_say_how_many_there_were():
    statistics = FeatureStatistics(3)
    with pytest.raises(ValueError, match=r"a mean .* at least 1 image; these statistics saw 0"):
        _ = statistics.mean
    statistics.update(torch.zeros(0, 3))
    statistics.update(torch.ones(1, 3))
    assert statistics.mean.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match=r"a covariance .* at least 2 images; these statistics saw 1"):
        frechet_distance(statistics, statistics)


# ---- distance ----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 60), st.integers(2, 60), st.integers(2, 24), st.integers(0, 999))
def test_distances_equal_torch_fidelity_with_more_and_fewer_images_than_features(images, others, dim, seed):
    pair = random_features(images, dim, seed).double(), random_features(others, dim, seed + 1, 0.5).double()
    reference = fid_statistics_to_metric(*map(fid_features_to_statistics, pair), verbose=False)
    ours = frechet_distance(*map(streamed, pair))
    assert ours == pytest.approx(reference["frechet_inception_distance"], rel=1e-6)


@pytest.mark.parametrize("images", [PANEL + 90, 60])
def test_distances_of_features_wider_than_a_panel_equal_torch_fidelity(images):
    dim = PANEL + 30
    pair = [random_features(images, dim, seed).double() for seed in (0, 1)]
    reference = fid_statistics_to_metric(*map(fid_features_to_statistics, pair), verbose=False)
    ours = frechet_distance(*map(streamed, pair))
    assert ours == pytest.approx(reference["frechet_inception_distance"], rel=1e-6)


def test_gaussians_without_correlation_have_the_distance_of_their_deviations():
    def gaussian(mean, deviations):
        values = torch.tensor(deviations, dtype=torch.float64)
        return Gaussian(torch.full((3,), mean, dtype=torch.float64), values.square().diag())

    found = frechet_distance(gaussian(1.0, [1.0, 2.0, 0.0]), gaussian(3.0, [4.0, 2.5, 0.5]))
    assert found == pytest.approx(3 * 2.0**2 + 3.0**2 + 0.5**2 + 0.5**2, rel=1e-12)


def test_the_distance_of_a_set_to_itself_is_nothing_and_order_does_not_matter():
    few, many = streamed(random_features(5, 16)), streamed(random_features(200, 16, 1))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(few, many) == pytest.approx(frechet_distance(many, few), rel=1e-9)


def test_features_of_two_networks_are_not_compared():
    with pytest.raises(ValueError, match="5 and 4 features cannot be compared"):
        frechet_distance(streamed(random_features(9, 5)), streamed(random_features(9, 4)))


# ---- files -------------------------------------------------------------------------------------------------


def test_saved_statistics_load_as_they_were(tmp_path):
    statistics = streamed(random_features(30, 4))
    statistics.save(tmp_path / "new" / "a.npz")
    loaded = Gaussian.load(tmp_path / "new" / "a.npz")
    assert loaded.count == 30
    assert torch.equal(loaded.mean, statistics.mean)
    assert torch.equal(loaded.covariance, statistics.covariance)
    assert frechet_distance(loaded, streamed(random_features(30, 4, 1))) > 0


def test_the_reference_file_of_adm_is_read_without_its_samples(tmp_path):
    features = random_features(30, 4).double().numpy()
    np.savez(
        tmp_path / "adm.npz",
        arr_0=np.zeros((2, 8, 8, 3), np.uint8),
        mu=features.mean(0).astype(np.float32),
        sigma=np.cov(features.T),
        mu_s=np.zeros(7),
        sigma_s=np.eye(7),
    )
    loaded = Gaussian.load(tmp_path / "adm.npz")
    assert loaded.count is None
    assert loaded.mean.dtype == torch.float64
    assert frechet_distance(loaded, streamed(torch.from_numpy(features))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"arr_0": np.zeros((2, 4, 4, 3))}, "has no mu and sigma .*write them out as images"),
        ({"pool_3": np.zeros((2, 4))}, "has no mu and sigma .*save their mean and covariance"),
        ({"mu": np.zeros(4)}, r"has no mu and sigma \(it holds mu\)"),
        ({"mu": np.zeros(4), "sigma": np.eye(3)}, r"mu is \[4\] and sigma \[3, 3\]"),
        ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "not finite"),
        ({"mu": np.zeros(2), "sigma": np.array([[1, 0.5], [0, 1]])}, "not symmetric"),
    ],
)
def test_files_without_statistics_say_what_they_hold(tmp_path, arrays, says):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=says):
        Gaussian.load(tmp_path / "a.npz")


def test_files_that_are_no_npz_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*a\.npz"):
        Gaussian.load(tmp_path / "a.npz")
    streamed(random_features(9, 4)).save(tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    for content in (b"", b"words", whole[: len(whole) // 2]):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.npz is not a \.npz file, or a broken one"):
            Gaussian.load(tmp_path / "a.npz")
    middle = whole.index(b"sigma.npy") + 200
    (tmp_path / "a.npz").write_bytes(whole[:middle] + b"\xff" + whole[middle + 1 :])
    with pytest.raises(ValueError, match=r"a\.npz is damaged"):
        Gaussian.load(tmp_path / "a.npz")


# ---- speed -------------------------------------------------------------------------------------------------


def test_the_benchmark_prints_every_ratio_of_one_run(capsys):
    fid_statistics.main(["--dim", "64", "--batch-size", "16", "--repeats", "2"])
    printed = capsys.readouterr().out
    assert re.search(r"^\d+ threads", printed)
    assert len(re.findall(r"ratio of clock time \d+\.\d", printed)) == 5  # one, and two of each distance
    differences = [float(number) for number in re.findall(r"relative difference +(\S+)", printed)]
    assert len(differences) == 2
    assert max(differences) < 1e-8


# ---- what cannot be a covariance ---------------------------------------------------------------------------


def gaussian(covariance):
    return Gaussian(torch.zeros(len(covariance), dtype=torch.float64), covariance.double())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda sigma: sigma - 2 * torch.eye(8), r"sigma has the eigenvalue -\d"),
        (lambda sigma: sigma + torch.ones(8, 8).triu(1), "sigma is not symmetric"),
        (lambda sigma: sigma * math.nan, "not finite"),
    ],
)
def test_what_is_no_covariance_is_refused_and_not_at_distance_zero(tmp_path, spoil, message):
    good = gaussian(torch.eye(8))
    bad = gaussian(spoil(good.covariance))
    for sides, name in (((bad, good), "first"), ((good, bad), "second")):
        with pytest.raises(ValueError, match=f"the {name} side: .*{message}"):
            frechet_distance(*sides)
    bad.save(tmp_path / "bad.npz")
    with pytest.raises(ValueError, match=rf"bad\.npz: .*{message}.*compute the statistics again"):
        Gaussian.load(tmp_path / "bad.npz")


def test_rounding_in_single_precision_is_no_fault(tmp_path):
    """Fewer images than features, stored as floats: tiny negative eigenvalues."""
    known = streamed(random_features(20, 64)).gaussian()
    rounded = gaussian(known.covariance.float())
    assert torch.linalg.eigvalsh(rounded.covariance)[0] < 0
    rounded.save(tmp_path / "a.npz")
    assert frechet_distance(Gaussian.load(tmp_path / "a.npz"), gaussian(known.covariance)) < 1e-3


def test_arrays_that_declare_another_size_are_not_believed(tmp_path):
    path = tmp_path / "a.npz"
    header = io.BytesIO()
    fields = {"descr": "<f8", "fortran_order": False, "shape": (10**9, 10**9)}
    np.lib.format.write_array_header_1_0(header, fields)
    mean = io.BytesIO()
    np.save(mean, np.zeros(3))
    for sigma, message in (
        (header.getvalue(), "sigma is not an array of numbers .*another size"),
        (b"words", "sigma is not an array of numbers"),
        (b"", "sigma is not an array of numbers"),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("mu.npy", mean.getvalue())
            archive.writestr("sigma.npy", sigma)
        with pytest.raises(ValueError, match=message) as error:
            Gaussian.load(path)
        assert "\n" not in str(error.value)
    for bad in (np.array(["a", "b"]), np.array([{}], dtype=object), np.zeros(0)):
        np.savez(path, mu=bad, sigma=np.eye(3))
        with pytest.raises(ValueError, match=r"a\.npz"):
            Gaussian.load(path)
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3), count=-4)
    with pytest.raises(ValueError, match="count is not the number of images"):
        Gaussian.load(path)


# ---- roots that are kept -----------------------------------------------------------------------------------


def two_sides(seed=0, dim=24):
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for count in (500, 200):
        statistics = FeatureStatistics(dim)
        statistics.update(torch.randn(count, dim, generator=generator) * torch.rand(dim, generator=generator))
        sides.append(statistics.gaussian())
    return sides


@pytest.mark.parametrize("count", [500, 10])  # with 10 images the covariance has no full rank
def test_a_root_of_either_side_gives_the_distance_of_scipy(count):
    real, fake = two_sides()
    few = FeatureStatistics(24)
    few.update(torch.randn(count, 24, generator=torch.Generator().manual_seed(3)))
    fake = few.gaussian()
    product = real.covariance.numpy() @ fake.covariance.numpy()
    trace = np.sqrt(np.linalg.eigvals(product).astype(complex)).real.sum()
    shift = float((real.mean - fake.mean).square().sum())
    expected = shift + float(real.covariance.trace() + fake.covariance.trace()) - 2 * trace
    for known in (None, real, fake):
        sides = [dataclasses.replace(real), dataclasses.replace(fake)]
        if known is not None:
            sides[known is fake].root  # noqa: B018
        assert frechet_distance(*sides) == pytest.approx(expected, rel=1e-6)
    root = real.root
    torch.testing.assert_close(root @ root.T, real.covariance)


def test_the_root_of_a_file_is_kept_beside_it_and_checked(tmp_path, monkeypatch):
    real, fake = two_sides()
    real.save(tmp_path / "real.npz")
    first = Gaussian.load(tmp_path / "real.npz")
    expected = frechet_distance(first, fake)
    first.root  # noqa: B018
    kept = tmp_path / "real.npz.root.npy"
    assert kept.is_file()
    again = Gaussian.load(tmp_path / "real.npz")
    monkeypatch.setattr(statistics_module, "_root", lambda covariance: pytest.fail("it was made again"))
    assert torch.equal(again.root, first.root)
    assert frechet_distance(again, fake) == pytest.approx(expected, rel=1e-9)
    monkeypatch.undo()
    other, _ = two_sides(seed=9)
    whole = kept.read_bytes()
    other.save(tmp_path / "real.npz")  # other statistics under the name
    changed = Gaussian.load(tmp_path / "real.npz")
    torch.testing.assert_close(changed.root @ changed.root.T, other.covariance)
    for damage in (whole[:200], b"", b"PK", np.array([[None]], dtype=object).tobytes()):
        kept.write_bytes(damage)
        mended = Gaussian.load(tmp_path / "real.npz")
        torch.testing.assert_close(mended.root @ mended.root.T, other.covariance)
        assert len(kept.read_bytes()) == len(whole)


def test_a_folder_that_cannot_be_written_to_keeps_no_root(tmp_path, monkeypatch):
    real, fake = two_sides()
    real.save(tmp_path / "real.npz")
    loaded = Gaussian.load(tmp_path / "real.npz")

    def refuse(path):
        raise PermissionError(path)

    monkeypatch.setattr(statistics_module, "atomic_write", refuse)
    assert frechet_distance(loaded, fake) == pytest.approx(frechet_distance(real, fake), rel=1e-9)
    loaded.root  # noqa: B018
    assert [path.name for path in tmp_path.iterdir()] == ["real.npz"]
