"""Weights files of the evaluation's networks: the published shapes, filled at random, always the same."""

import math
from pathlib import Path
from unittest.mock import patch

import torch
import torchvision
from torch import Tensor, nn

from vistok.eval.metrics import inception, perceptual


def inception_file(folder: Path) -> Path:
    """A file that torch-fidelity takes as its InceptionV3, 95 MB, under the published name."""
    from torch_fidelity import FeatureExtractorInceptionV3 as Extractor
    from torch_fidelity import feature_extractor_inceptionv3 as module

    with (
        torch.device("meta"),
        patch.object(module, "load_state_dict_from_url", lambda *_, **__: {}),
        patch.object(Extractor, "load_state_dict", lambda *_: None),
    ):
        shapes = Extractor("shapes", ["2048"]).state_dict()
    path = folder / inception.NAMES[0]
    torch.save(_filled(shapes), path)
    return path


def backbone_file(net: str, folder: Path) -> Path:
    """The convolutions of torchvision's AlexNet ("alex", 10 MB) or VGG16 ("vgg", 59 MB)."""
    with torch.device("meta"):
        network = {"alex": torchvision.models.alexnet, "vgg": torchvision.models.vgg16}[net]()
    path = folder / perceptual.BACKBONES[net][0].rsplit("/", 1)[1]
    torch.save(_filled(nn.ModuleDict({"features": network.features}).state_dict()), path)
    return path


def _filled(shapes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Kernels that keep the size of what passes through rectifiers, and small shifts."""
    generator = torch.Generator().manual_seed(0)

    def fill(key: str, shape: torch.Size) -> Tensor:
        if key.endswith("num_batches_tracked"):
            return torch.tensor(0)
        if len(shape) > 1:
            return torch.randn(shape, generator=generator) * math.sqrt(2 / math.prod(shape[1:]))
        if key.endswith("running_var") or (key.endswith("weight")):
            return torch.ones(shape)
        return 0.1 * torch.randn(shape, generator=generator)

    return {key: fill(key, value.shape) for key, value in shapes.items()}
