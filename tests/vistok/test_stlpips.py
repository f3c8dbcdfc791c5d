"""ST-LPIPS equals its package, takes what it documents, and reads no other file than the published one."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vistok.eval.metrics.metric import pair_metrics
from vistok.eval.metrics.perceptual import load_stlpips
from vistok.eval.metrics.weights import WeightsMissing
from vistok.eval.options import WeightFiles
from vistok.nn import stlpips
from vistok.nn.stlpips import FILES, SMALLEST, build_stlpips
from vistok.train.losses import PerceptualLoss, ReconstructionLoss, ReconstructionLossConfig

NETS = sorted(FILES)


def pair(height=48, width=64, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(batch, 3, height, width, generator=generator)
    noise = 0.2 * torch.randn(images.shape, generator=generator)
    return images, (images + noise).clamp(0, 1)


@pytest.fixture(scope="module")
def networks():
    return {net: build_stlpips(net) for net in NETS}


def package_metric(net, monkeypatch):
    """The package's own network; of two packages that it imports it uses neither here."""
    for name, attribute in (("IPython", "embed"), ("torchsummary", "summary")):
        module = ModuleType(name)
        setattr(module, attribute, None)
        monkeypatch.setitem(sys.modules, name, module)
    original = pytest.importorskip("stlpips_pytorch.stlpips")
    return original.LPIPS(net=net, variant="shift_tolerant", verbose=False)


@pytest.mark.parametrize("size", [(64, 64), (45, 70)])
@pytest.mark.parametrize("net", NETS)
def test_distances_equal_the_package(net, size, networks, monkeypatch):
    images, references = pair(*size)
    with torch.no_grad():
        expected = package_metric(net, monkeypatch)(images, references, normalize=True).flatten()
    distances = networks[net](images, references)
    assert expected.min() > 1e-3
    torch.testing.assert_close(distances, expected, rtol=5e-6, atol=0)
    assert networks[net](images, images).abs().max() == 0


@pytest.mark.parametrize("net", NETS)
def test_the_smallest_image_passes_and_a_smaller_one_is_refused(net, networks):
    side = SMALLEST[net]
    assert networks[net](*pair(side, 40)).isfinite().all()
    with pytest.raises(ValueError, match=rf"at least {side}x{side}"):
        networks[net](*pair(40, side - 1))
    with pytest.raises(RuntimeError):  # the limit is what the layers take, not more
        networks[net].features(pair(40, side - 1)[0])


@pytest.mark.parametrize("net", NETS)
def test_the_metric_is_declared_and_compares_each_image_with_its_own_reference(net, networks):
    metric = pair_metrics()[f"stlpips-{net}"]
    distance = metric.make(WeightFiles(), torch.device("cpu"))
    images, references = pair(40, 40, batch=3)
    references[1] = images[1]
    result = distance(images, references)
    assert metric.better == "lower" and result.shape == (3,) and result.dtype == torch.float32
    assert result[1] == 0 and result[[0, 2]].min() > 0
    with pytest.raises(ValueError, match="clamp"):
        distance(images + 1, references)
    with pytest.raises(TypeError):
        distance(images.mul(255).to(torch.uint8), references)


def test_without_the_package_the_metric_is_skipped_in_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsMissing, match=r'stlpips-pytorch.*pip install "vistok\[perceptual\]"') as error:
        load_stlpips("vgg")
    assert "\n" not in str(error.value)


def test_another_file_or_network_is_refused(tmp_path):
    name = FILES["alex"][0]
    with pytest.raises(FileNotFoundError, match=name):
        build_stlpips("alex", tmp_path)
    content = bytearray((stlpips._package_folder() / name).read_bytes())
    content[-1000] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"is not {name} of stlpips-pytorch 0\.0\.2 \(SHA-256"):
        build_stlpips("alex", tmp_path)
    with pytest.raises(ValueError, match="'squeeze'"):
        build_stlpips("squeeze")


# ---- as a loss ---------------------------------------------------------------------------------------------


def test_as_a_loss_it_is_the_mean_distance_and_reaches_only_the_images(networks):
    loss = PerceptualLoss("stlpips-alex")
    images, reconstructions = pair()
    reconstructions.requires_grad_()
    distance = loss(images, reconstructions)
    torch.testing.assert_close(distance, networks["alex"](images, reconstructions).mean())
    distance.backward()
    assert reconstructions.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in loss.parameters())


def test_a_folder_of_weights_is_used_and_no_weights_are_random(tmp_path, networks):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        PerceptualLoss("stlpips-vgg", weights=tmp_path)
    torch.manual_seed(0)
    random = PerceptualLoss("stlpips-vgg", weights=None)
    assert random(*pair()) != pytest.approx(float(networks["vgg"](*pair()).mean()), rel=0.01)


def test_bfloat16_changes_the_distance_by_less_than_one_percent():
    images, reconstructions = pair(64, 64)
    values = []
    for precision in ("float32", "bfloat16"):
        config = ReconstructionLossConfig(
            perceptual="stlpips-alex", perceptual_weight=1.0, perceptual_precision=precision
        )
        parts = ReconstructionLoss(config).generator_losses(images, reconstructions, 0)
        assert parts["perceptual"].dtype == torch.float32
        values.append(float(parts["perceptual"]))
    assert 0 < abs(values[1] / values[0] - 1) < 0.01


def test_the_weight_files_are_those_that_the_digests_name():
    folder = stlpips._package_folder()
    assert {path.name for path in Path(folder).glob("*.pth")} == {name for name, _ in FILES.values()}
