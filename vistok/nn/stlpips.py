"""ST-LPIPS, the shift-tolerant perceptual distance, on the weight files of the `stlpips-pytorch` package.

"Shift-tolerant Perceptual Similarity Metric" (2022, arXiv 2207.13686). Its features, heads and values differ
from those of LPIPS: never compare the two. The package's weight files hold everything, so that nothing is
downloaded. Its code is not imported: it needs IPython and torchsummary, which it does not declare, and parts
of it are for non-commercial use only.
"""

import hashlib
import importlib.util
import re
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checkpoint
from ..extras import missing
from ..files import check_source

FILES = {
    "alex": ("alex_shift_tolerant.pth", "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee"),
    "vgg": ("vgg_shift_tolerant.pth", "44597da68f49c1837c100ff52299050f274d102eb102e5837178c79be6f0e250"),
}
"""Weight file and its SHA-256 per network, those of release 0.0.2 of the package."""

SMALLEST = {"alex": 21, "vgg": 18}
"""Smallest side of images per network, in pixels: below it a map of features is too small for its filter."""

_PACKAGE, _FOLDER = "stlpips_pytorch", ("weights", "vST0.0")


class ReflectBlur(nn.Module):
    """Halve height and width with the filter outer([1, 2, 1]) / 16, the border reflected by two pixels."""

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, H, W], sides of 3 or more → [B, C, ⌈H / 2⌉ + 1, ⌈W / 2⌉ + 1]."""
        padded = F.pad(features, (2, 2, 2, 2), mode="reflect")
        # [1, 2, 1] / 4 is the mean of two neighbours, twice; 1.5 times as fast as a grouped convolution.
        return F.avg_pool2d(F.avg_pool2d(padded, 2, stride=1), 2, stride=2)


def _alex_stages() -> list[nn.Sequential]:
    """AlexNet's convolutions, all at stride 1 with blurs between them."""
    return [
        nn.Sequential(nn.Conv2d(3, 64, 11, padding=2), ReflectBlur(), nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(3, 1), ReflectBlur(), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(3, 1), ReflectBlur(), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    ]


def _vgg_stages() -> list[nn.Sequential]:
    """VGG16's convolutions, with poolings at stride 1 and a blur after each."""
    stages, channels = [], 3
    for width, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        layers: list[nn.Module] = [nn.MaxPool2d(2, 1), ReflectBlur()] if stages else []
        for _ in range(convolutions):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        stages.append(nn.Sequential(*layers))
    return stages


class StLpips(nn.Module):
    """Distance of image pairs: squared differences of unit-length features, weighted, averaged over places.

    Weights are random until a state is loaded; see `build_stlpips`.
    """

    def __init__(self, net: Literal["alex", "vgg"]) -> None:
        super().__init__()
        self.smallest = SMALLEST[net]
        self.stages = nn.ModuleList(_alex_stages() if net == "alex" else _vgg_stages())
        widths = (64, 192, 384, 256, 256) if net == "alex" else (64, 128, 256, 512, 512)
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in widths)
        self.register_buffer("shift", torch.zeros(1, 3, 1, 1))
        self.register_buffer("scale", torch.ones(1, 3, 1, 1))

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Two batches [B, 3, H, W] in [0, 1] → float32 [B], 0 where both are equal.

        Raises ValueError for other shapes and for a side below `smallest`.
        """
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[-2:]) < self.smallest:
            raise ValueError(
                f"images are {list(images.shape)}; this ST-LPIPS takes [B, 3, H, W] of at least "
                f"{self.smallest}x{self.smallest}: enlarge them or leave ST-LPIPS out"
            )
        distance = torch.zeros(len(images), device=images.device)
        pairs = zip(self.features(images), self.features(references), self.heads, strict=True)
        for features, reference_features, head in pairs:
            distance = distance + head((features - reference_features).square()).float().mean((1, 2, 3))
        return distance

    def features(self, images: Tensor) -> list[Tensor]:
        """Images in [0, 1] → what each stage makes of them, unit length over channels, five [B, C, h, w]."""
        x, features = (2 * images - 1 - self.shift) / self.scale, []
        x = x.contiguous(memory_format=torch.channels_last)  # 1.5 times as fast on CPUs
        for stage in self.stages:
            x = stage(x)
            with torch.autocast(x.device.type, enabled=False):  # it would make all that follows float32
                features.append(x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10))
        return features


def build_stlpips(net: Literal["alex", "vgg"], weights: str | Path | None = None) -> StLpips:
    """ST-LPIPS with the package's weights, frozen, in evaluation mode.

    `weights` is a weight file or the folder that holds it; None: the installed package. Raises ImportError
    without the package, FileNotFoundError and ValueError for a file that is absent or not the published one.
    """
    if net not in FILES:
        raise ValueError(f"ST-LPIPS has the networks {' and '.join(FILES)}; got {net!r}")
    name, digest = FILES[net]
    path = _package_folder() if weights is None else Path(weights).expanduser()
    path = check_source(path / name if path.is_dir() else path)
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if actual != digest:
        raise ValueError(
            f"{path} is not {name} of stlpips-pytorch 0.0.2 (SHA-256 {actual}, published {digest}); install "
            "that release again, or give its file"
        )
    network = StLpips(net)
    checkpoint.load_strictly(network, _renamed(checkpoint.read(path), network), source=path)
    return network.requires_grad_(False).eval().to(memory_format=torch.channels_last)


def random_stlpips(net: Literal["alex", "vgg"]) -> StLpips:
    """ST-LPIPS with random weights, whose values mean nothing, for tests."""
    return StLpips(net).requires_grad_(False).eval()


def _package_folder() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise missing("stlpips-pytorch", "perceptual", "ST-LPIPS")
    return Path(spec.submodule_search_locations[0], *_FOLDER)


def _renamed(state: dict[str, Tensor], network: StLpips) -> dict[str, Tensor]:
    """The package's state dict under this module's keys; its blur filters are constants here."""
    convolutions = [key for key in state if key.startswith("net.") and not key.endswith(".filt")]
    own = [key for key in network.state_dict() if key.startswith("stages.")]  # both in order of computation
    renamed = dict(zip(own, (state[key] for key in convolutions), strict=True))
    for key, value in state.items():
        if match := re.fullmatch(r"lin(\d)\.model\.1\.weight", key):
            renamed[f"heads.{match[1]}.weight"] = value
        elif key.startswith("scaling_layer."):
            renamed[key.removeprefix("scaling_layer.")] = value
    return renamed
