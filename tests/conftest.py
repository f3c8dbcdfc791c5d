"""Fixtures of more than one file, and one thread per worker."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: of workers and of the programs they start

import pytest
import torch

from vistok import cli
from vistok.models import gigatok, titok, xqgan


@pytest.fixture(scope="module")
def small_and_quick():
    """One more ViT size beside the published three, and one thread: tiny kernels wait for a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for family in (titok, gigatok, xqgan):
            patch.setitem(family.SIZES, "tiny", (64, 2, 2))
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """The hub out of reach and nothing cached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def old_transformers():
    """The installed release where it is older than 5.18, which makes features inside the forward alone."""
    hf = sys.modules.get("transformers")
    if hf is None or hasattr(hf.GenerationMixin, "_supports_mm_encoder_outputs"):
        return None
    return hf.__version__


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skip a test where vistok refuses an old release in a sentence that names it."""
    try:
        return (yield)
    except NotImplementedError as error:
        if old_transformers() and f"transformers {old_transformers()}" in str(error):
            pytest.skip(str(error))
        raise


def pytest_collection_modifyitems(items):
    """A rename that transformers announces in a warning is one to be followed before it comes."""
    announced = "error:.*is deprecated and will be removed:FutureWarning"
    for item in () if old_transformers() else items:
        item.add_marker(pytest.mark.filterwarnings(announced))


@pytest.fixture(autouse=True)
def no_deprecations(caplog):
    """So is one that it announces in its log."""
    yield
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("transformers")]
    deprecated = [line for line in lines if "deprecated" in line or "will be removed" in line]
    assert not deprecated or old_transformers(), deprecated


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """`run("list")` → (exit status, stdout, stderr), in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vistok", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
            sys.exit(0)
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return stop.value.code or 0, out, err

    return call
