"""A plugin: an Inception that takes no time, and caches without weights."""

import pytest
import torch
from torch import nn

from vistok.eval.engine import instruments
from vistok.eval.metrics import feature_sets

FEATURES, CLASSES = 24, 10


class QuickInception:
    """Random features of coarse pixels: another image, other features."""

    def __init__(self):
        self.network = nn.Linear(3 * 8 * 8, FEATURES + CLASSES).requires_grad_(False)
        generator = torch.Generator().manual_seed(0)  # threads share the global one
        for parameter in self.network.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))

    def __call__(self, images):
        assert images.dtype == torch.uint8
        coarse = nn.functional.adaptive_avg_pool2d(images.float() / 255, 8).flatten(1)
        return self.network(coarse).split([FEATURES, CLASSES], 1)


@pytest.fixture
def quick_inception(monkeypatch):
    monkeypatch.setattr(instruments, "load_inception", lambda *_: QuickInception())
    monkeypatch.setattr(feature_sets, "FEATURES", FEATURES)
    monkeypatch.setattr(feature_sets, "CLASSES", CLASSES)
    return QuickInception()


@pytest.fixture
def no_weights(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no weights"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("HOME", str(tmp_path / "no weights"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no weights"))
