"""Fixtures of more than one file."""

import pytest
import torch

from vistok.models import titok


@pytest.fixture(scope="module")
def small_and_quick():
    """One more ViT size beside the published three, and one thread: tiny kernels wait for a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(titok.SIZES, "tiny", (64, 2, 2))
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """The hub out of reach and nothing cached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
