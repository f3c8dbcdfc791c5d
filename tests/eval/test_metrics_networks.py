"""Inception, LPIPS and CLIP give their packages' numbers from files, and never reach for the network."""

import socket
from types import SimpleNamespace

import lpips
import open_clip
import pytest
import torch
import torch_fidelity
import torchvision
from filled_networks import backbone_file, inception_file
from PIL import Image

from vistok.eval.metrics.clip import load_clip
from vistok.eval.metrics.distribution import inception_score, kernel_distance, precision_recall
from vistok.eval.metrics.inception import NAMES, load_inception
from vistok.eval.metrics.perceptual import BACKBONES, load_lpips
from vistok.eval.metrics.statistics import FeatureStatistics, frechet_distance
from vistok.eval.metrics.weights import WeightsMissing
from vistok.images import to_pil, to_tensor


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No cache but empty ones, and no way out."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def refuse(*_):
        raise AssertionError("something reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Filled weights of all three networks under their published names, in one folder."""
    folder = tmp_path_factory.mktemp("weights")
    inception_file(folder)
    for net in BACKBONES:
        backbone_file(net, folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of six small pictures: soft ones, and the same under ever more noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(6, 3, 4, 4, generator=generator)
    soft = torch.nn.functional.interpolate(coarse, size=(40, 36), mode="bicubic").clamp(0, 1)
    noise = torch.linspace(0.02, 0.4, 6)[:, None, None, None] * torch.randn(soft.shape, generator=generator)
    noisy = (soft + noise).clamp(0, 1)
    made = []
    for name, pictures in (("soft", soft), ("noisy", noisy)):
        made.append(tmp_path_factory.mktemp(name))
        for number, picture in enumerate(to_pil(pictures)):
            picture.save(made[-1] / f"{number}.png")
    return made


def pictures_of(folder):
    return [Image.open(path) for path in sorted(folder.iterdir())]


def images_of(folder):
    """uint8 [6, 3, 40, 36]."""
    tensors = [to_tensor(picture, None) for picture in pictures_of(folder)]
    return (torch.cat(tensors) * 255).round().to(torch.uint8)


# ---- Inception ---------------------------------------------------------------------------------------------


def torch_fidelity_says(files, folders, **options):
    """What the tool itself measures of two folders, from the same weights."""
    first, second = map(str, folders)
    quiet = {"cuda": False, "cache": False, "verbose": False, "save_cpu_ram": True}
    weights = {"feature_extractor_weights_path": str(files / NAMES[0])}
    return torch_fidelity.calculate_metrics(
        input1=first, input2=second, feature_extractor="inception-v3-compat", **weights, **quiet, **options
    )


@pytest.mark.slow
def test_two_folders_measure_what_torch_fidelity_measures(files, folders):
    settings = {"kid_subset_size": 4, "kid_subsets": 5, "isc_splits": 2, "prc_neighborhood": 1}
    metrics = {"fid": True, "kid": True, "isc": True, "prc": True, "feature_layer_prc": "2048"}
    theirs = torch_fidelity_says(files, folders, **metrics, **settings)
    inception = load_inception(files)
    (soft, logits), (noisy, _) = (inception(images_of(folder)) for folder in folders)
    assert soft.shape == (6, 2048)
    assert logits.shape == (6, 1008)
    pair = []
    for features in (soft, noisy):
        pair.append(FeatureStatistics(2048))
        for part in features.split(4):
            pair[-1].update(part)
    kid = kernel_distance(soft, noisy, subsets=5, subset_size=4)
    score = inception_score(logits, splits=2)
    found = {
        "frechet_inception_distance": frechet_distance(*pair),
        "kernel_inception_distance_mean": kid.mean,
        "kernel_inception_distance_std": kid.std,
        "inception_score_mean": score.mean,
        "inception_score_std": score.std,
        **vars(precision_recall(soft, noisy, neighborhood=1)),
    }
    # Theirs is KID in float32, where differences of kernels near 1 round; test_metrics_distribution.py
    # compares it in double, to 1e-12.
    for name in ("kernel_inception_distance_mean", "kernel_inception_distance_std"):
        assert found.pop(name) == pytest.approx(theirs.pop(name), abs=1e-6)
    # These weights give all images nearly one score, so its spread is little but rounding.
    name = "inception_score_std"
    assert found.pop(name) == pytest.approx(theirs.pop(name), abs=1e-9)
    assert found == pytest.approx(theirs, rel=1e-6)
    assert 0 < found["recall"] < 1


def test_fid_of_two_folders_in_an_early_layer_equals_torch_fidelity(files, folders):
    theirs = torch_fidelity_says(files, folders, fid=True, feature_layer_fid="64")
    extract = torch_fidelity.FeatureExtractorInceptionV3("early", ["64"], str(files / NAMES[0]))
    pair = []
    for folder in folders:
        pair.append(FeatureStatistics(64))
        for image in images_of(folder):
            pair[-1].update(extract(image[None])[0])
    assert frechet_distance(*pair) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_inception_refuses_what_is_no_8_bit_picture(files):
    inception = load_inception(files / NAMES[0])
    with pytest.raises(TypeError, match=r"uint8 images in 0\.\.255; got torch\.float32"):
        inception(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]; got \[1, 1, 8, 8\]"):
        inception(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))


# ---- LPIPS -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_equals_the_package(net, files, folders, monkeypatch):
    name = {"alex": "alexnet", "vgg": "vgg16"}[net]
    state = torch.load(files / BACKBONES[net][0].rsplit("/", 1)[1])

    def trained(pretrained):
        assert pretrained
        with torch.device("meta"):
            network = getattr(torchvision.models, name)()
        network.features.load_state_dict(
            {key.removeprefix("features."): value for key, value in state.items()}, assign=True
        )
        return SimpleNamespace(features=network.features)

    ours = load_lpips(net, files)
    monkeypatch.setattr(lpips.pretrained_networks, "tv", SimpleNamespace(**{name: trained}))
    package = lpips.LPIPS(net=net, verbose=False)
    images, references = (images_of(folder)[:3].float() / 255 for folder in folders)
    with torch.no_grad():
        expected = package(2 * images - 1, 2 * references - 1).flatten()
    found = ours(images.double(), references)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert found.min() > 0
    assert ours(images, images).abs().max() == 0


@pytest.mark.parametrize(("net", "smallest"), [("alex", 31), ("vgg", 16)])
def test_lpips_takes_images_down_to_its_least_size(net, smallest, files):
    distance = load_lpips(net, files)
    assert distance(torch.rand(1, 3, smallest, 40), torch.rand(1, 3, smallest, 40)).isfinite().all()
    with pytest.raises(ValueError, match=rf"at least {smallest}x{smallest}"):
        distance(torch.rand(1, 3, 40, smallest - 1), torch.rand(1, 3, 40, smallest - 1))
    with pytest.raises(ValueError, match=r"span .* clamp reconstructions"):
        distance(torch.rand(1, 3, 40, 40) + 1, torch.rand(1, 3, 40, 40))


# ---- CLIP --------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_clip(monkeypatch, tmp_path):
    """A small CLIP that open_clip knows by name, with a published tag and a weights file of ours."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config)
    tag = {
        "url": "https://example.org/tiny-weights.pt",
        "hf_hub": "",
        "mean": (0.3, 0.4, 0.5),
        "std": (0.2, 0.3, 0.4),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "quick_gelu": True,
    }
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"ours": tag})
    torch.manual_seed(0)
    model = open_clip.create_model("tiny", force_quick_gelu=True)
    torch.save(model.state_dict(), tmp_path / "tiny.pt")
    return model.eval(), tmp_path / "tiny.pt", tag


@pytest.mark.parametrize(("size", "tolerance"), [((32, 32), 1e-5), ((36, 40), 2e-4)])
def test_clip_similarity_equals_open_clip_on_the_same_pictures(tiny_clip, folders, tmp_path, size, tolerance):
    """Pillow resizes the larger ones in 8 bits, ours in float."""
    model, path, tag = tiny_clip
    cached = tmp_path / ".cache" / "clip" / "tiny-weights.pt"
    cached.parent.mkdir(parents=True)
    path.rename(cached)
    config = {key: tag[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    prepare = open_clip.image_transform(32, is_train=False, **config)
    with torch.no_grad():
        embeddings = [
            model.encode_image(
                torch.stack([prepare(picture.crop((0, 0, *size))) for picture in pictures_of(folder)]),
                normalize=True,
            )
            for folder in folders
        ]
    expected = (embeddings[0] * embeddings[1]).sum(-1)
    similarity = load_clip("tiny", "ours")
    images, references = (images_of(folder)[..., : size[1], : size[0]].float() / 255 for folder in folders)
    found = similarity(images, references)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert found.min() < 0.995
    torch.testing.assert_close(similarity(images, images), torch.ones(6))


def test_clip_weights_by_path_are_those_of_the_tag(tiny_clip, folders):
    model, path, _ = tiny_clip
    images, references = (images_of(folder)[..., :32, :32].float() / 255 for folder in folders)
    similarity = load_clip("tiny", path)
    for name, value in similarity.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    assert similarity(images, references).shape == (6,)


# ---- absent weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "says"),
    [
        (load_inception, ["FID", NAMES[0], NAMES[1], "https://", "hub/checkpoints", "--inception-weights"]),
        (
            lambda: load_lpips("alex"),
            ["LPIPS (alex)", "alexnet-owt-7be5be79.pth", "https://", "hub/checkpoints", "--lpips-weights"],
        ),
        (
            lambda: load_lpips("vgg"),
            ["LPIPS (vgg)", "vgg16-397923af.pth", "https://", "hub/checkpoints", "--lpips-weights"],
        ),
        (load_clip, ["CLIP", "ViT-B-32", "https://huggingface.co/timm", "--clip-weights"]),
        (lambda: load_inception("nowhere/a.pth"), ["no file or folder nowhere/a.pth", NAMES[0], "https://"]),
        (lambda: load_lpips("alex", "nowhere"), ["no file or folder nowhere", "alexnet-owt-7be5be79.pth"]),
        (lambda: load_clip("ViT-B-32", "nowhere/a.pt"), ["no file nowhere/a.pt", "--clip-weights", "openai"]),
    ],
)
def test_absent_weights_say_in_one_line_what_to_put_where(load, says):
    with pytest.raises(WeightsMissing) as caught:
        load()
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in says if part not in message] == []


def test_a_tag_with_a_plain_url_belongs_in_open_clips_cache(tiny_clip):
    with pytest.raises(
        WeightsMissing, match=r"needs tiny-weights\.pt, which is not in .*clip: put https://ex"
    ):
        load_clip("tiny", "ours")


def test_weights_in_torch_hubs_cache_are_found(files, tmp_path):
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "alexnet-owt-7be5be79.pth").symlink_to(files / "alexnet-owt-7be5be79.pth")
    (folder / NAMES[1]).symlink_to(files / NAMES[0])  # torch-fidelity's name for the same file
    load_lpips("alex")
    load_inception()


def test_weights_of_another_network_are_refused(files, tiny_clip, tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    (tmp_path / "words.pth").write_text("words")
    with pytest.raises(ValueError, match=r"other\.pth: these weights are not torch-fidelity's InceptionV3"):
        load_inception(tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"words\.pth.* cannot be read as plain tensors"):
        load_inception(tmp_path / "words.pth")
    with pytest.raises(ValueError, match=r"other\.pth: .*LPIPS 'alex': features\.0\.weight is missing"):
        load_lpips("alex", tmp_path / "other.pth")
    with pytest.raises(ValueError, match="alex and vgg; got 'squeeze'"):
        load_lpips("squeeze", files)
    for name in ("other.pth", "words.pth"):
        with pytest.raises(ValueError, match="does not hold the weights of tiny"):
            load_clip("tiny", tmp_path / name)
    with pytest.raises(ValueError, match="has no model 'huge'"):
        load_clip("huge")
    with pytest.raises(
        ValueError, match="neither a weights file nor a pretrained tag of tiny; its tags are ours"
    ):
        load_clip("tiny", "theirs")
