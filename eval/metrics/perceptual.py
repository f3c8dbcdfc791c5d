"""Perceptual distances of every image to its reference: LPIPS by the `lpips` package, and ST-LPIPS."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ... import checkpoint
from ...nn.lpips import build_lpips
from ...nn.stlpips import build_stlpips
from .image import check_pair
from .metric import Metric
from .precision import full_precision
from .weights import WeightsMissing, find, hub_folder

# File and the smallest side whose last feature map is not empty.
BACKBONES = {
    "alex": ("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", 31),
    "vgg": ("https://download.pytorch.org/models/vgg16-397923af.pth", 16),
}
OPTION = "--lpips-weights"


class Lpips:
    """Perceptual distance of images to references, both float [B, 3, H, W] in [0, 1] -> float32 [B].

    Raises ValueError for other shapes or ranges and for images smaller than the network takes, TypeError for
    integer images. "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (2018, arXiv
    1801.03924).
    """

    def __init__(self, network: nn.Module, smallest: int, device: torch.device | str = "cpu") -> None:
        # 1.2 times as fast on CPUs in this memory format
        self.network, self.smallest = network.to(device, memory_format=torch.channels_last), smallest
        self.device = torch.device(device)

    @torch.inference_mode()
    def __call__(self, images: Tensor, references: Tensor) -> Tensor:
        """One distance per image, 0 where both are equal."""
        check_pair(images, references)
        if images.shape[1] != 3 or min(images.shape[-2:]) < self.smallest:
            raise ValueError(
                f"images are {list(images.shape)}; this LPIPS takes [B, 3, H, W] of at least "
                f"{self.smallest}x{self.smallest}: enlarge them or leave LPIPS out"
            )
        pair = (batch.to(self.device).float() for batch in (images, references))
        with full_precision():
            return self.network(*pair, normalize=True).flatten()  # [B, 1, 1, 1] -> [B]


def load_lpips(
    net: Literal["alex", "vgg"] = "alex",
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Lpips:
    """LPIPS on torchvision's AlexNet or VGG16, from a file, a folder that holds it, or torch hub's cache.

    The package contains its linear layers; the backbone is a file of torchvision's. Raises WeightsMissing,
    without any download, where that is absent, and ValueError for another `net` or other weights.
    """
    if net not in BACKBONES:
        raise ValueError(f"LPIPS has the networks {' and '.join(BACKBONES)}; got {net!r}")
    url, smallest = BACKBONES[net]
    name = url.rsplit("/", 1)[1]
    path = find(weights, [name], hub_folder(), metric=f"LPIPS ({net})", url=url, option=OPTION)
    try:
        return Lpips(build_lpips(net, checkpoint.read(path)), smallest, device)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class ShiftTolerantLpips:
    """ST-LPIPS of images and references, both float [B, 3, H, W] in [0, 1] -> float32 [B].

    Raises ValueError for other shapes or ranges and for images smaller than the network takes, TypeError for
    integer images. Its values are not comparable with those of LPIPS.
    """

    def __init__(self, network: nn.Module, device: torch.device | str = "cpu") -> None:
        self.network, self.device = network.to(device), torch.device(device)

    @torch.inference_mode()
    def __call__(self, images: Tensor, references: Tensor) -> Tensor:
        """One distance per image, 0 where both are equal."""
        check_pair(images, references)
        pair = (batch.to(self.device).float() for batch in (images, references))
        with full_precision():
            return self.network(*pair)


def load_stlpips(
    net: Literal["alex", "vgg"] = "alex",
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> ShiftTolerantLpips:
    """ST-LPIPS on AlexNet or VGG16, from a weight file, a folder that holds it, or `stlpips-pytorch`.

    That package contains the weights. Raises WeightsMissing where package or file is absent, and ValueError
    for another `net` or a file that is not the published one.
    """
    try:
        return ShiftTolerantLpips(build_stlpips(net, weights), device)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise WeightsMissing(str(error)) from error


def _file(path: Path | None, net: str) -> Path | None:
    """The path of `--lpips-weights` for one network: a folder is for both, a file for the one in its name."""
    if path is None or not path.is_file():
        return path
    named = [each for each in ("alex", "vgg") if path.name.startswith(each)]
    if not named:
        raise ValueError(
            f"{path} is not known to be alexnet or vgg16: keep the file's published name, or give "
            "the folder that holds both"
        )
    return path if net in named else None


METRICS = (
    Metric(
        "lpips-alex",
        "LPIPS (AlexNet)",
        better="lower",
        needs="torchvision's AlexNet, the lpips package",
        make=lambda files, device: load_lpips("alex", _file(files.lpips, "alex"), device),
        aligned=True,
        card=True,
        rank=3,
    ),
    Metric(
        "lpips-vgg",
        "LPIPS (VGG)",
        better="lower",
        needs="torchvision's VGG16, the lpips package",
        make=lambda files, device: load_lpips("vgg", _file(files.lpips, "vgg"), device),
        aligned=True,
        card=True,
        rank=4,
    ),
    Metric(
        "stlpips-alex",
        "ST-LPIPS (AlexNet)",
        better="lower",
        needs="the stlpips-pytorch package",
        make=lambda files, device: load_stlpips("alex", device=device),
        aligned=True,
        rank=6,
    ),
    Metric(
        "stlpips-vgg",
        "ST-LPIPS (VGG)",
        better="lower",
        needs="the stlpips-pytorch package",
        make=lambda files, device: load_stlpips("vgg", device=device),
        aligned=True,
        rank=7,
    ),
)
