"""Packages of others add reducers, tokenizers and metrics; a broken one is left out by name."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

MODULE = '''
from dataclasses import dataclass

import torch

from vistok.compress.reducer import FeatureReducer
from vistok.eval.metrics.metric import Metric
from vistok.models.mini import MiniTokenizer
from vistok.registry import Entry, register, register_family


@dataclass(kw_only=True)
class Longest(FeatureReducer):
    """Keeps the longest tokens."""

    summary = "the longest tokens"

    def select(self, features, grid, count, scores=None):
        order = features.norm(dim=1).argsort(descending=True)
        return torch.zeros(len(features), dtype=torch.bool).index_fill(0, order[:count], True)


@register_family("theirs")
class Theirs(MiniTokenizer):
    """A family of another package."""


register(
    Entry("their-tokenizer", "theirs", {}, repo="they/theirs", license="MIT", paper="", parameters=1)
)


def _error(files, device):
    return lambda images, references: (images - references).abs().mean((1, 2, 3))


ERROR = Metric("their-error", "their error", better="lower", make=_error)
'''
POINTS = """
[vistok.reducers]
longest = their_package:Longest
divprune = their_package:Longest
nonsense = their_package:ERROR
absent = their_package.not_there:Reducer

[vistok.tokenizers]
theirs = their_package

[vistok.metrics]
their-error = their_package:ERROR
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder on the import path that holds a package with entry points, as pip leaves it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "their_package.py").write_text(MODULE)
    information = folder / "their_package-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(POINTS)
    return folder


def run(folder, *arguments):
    environment = os.environ | {"PYTHONPATH": str(folder)}
    result = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=folder
    )
    assert result.returncode == 0, result.stderr
    return result


def test_reducers_of_others_are_listed_and_broken_ones_are_left_out_by_name(installed):
    result = run(installed, "-m", "vistok.cli", "list", "--reducers", "--json")
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert rows["longest"]["what it does"] == "the longest tokens" and rows["longest"]["stage"] == "features"
    assert rows["divprune"]["what it does"] == "farthest-first subset" and "absent" not in rows
    lines = [line for line in result.stderr.splitlines() if "plug-in" in line]
    assert len(lines) == 3
    assert "'absent' of vistok.reducers is left out: importing it from their-package failed" in lines[0]
    assert "'divprune' of vistok.reducers is left out: another reducer has this name" in result.stderr
    assert "'nonsense' of vistok.reducers is left out" in result.stderr


def test_a_reducer_of_others_is_attached_by_its_name(installed):
    code = """
import warnings; warnings.simplefilter("ignore")
from vistok import compress
from vistok.compress.registry import reducer_by_name
assert type(reducer_by_name("longest")).__module__ == "their_package"
assert compress.Longest is type(reducer_by_name("longest")) and "Longest" in dir(compress)
"""
    run(installed, "-c", code)


def test_tokenizers_and_metrics_of_others_are_listed(installed):
    names = run(installed, "-m", "vistok.cli", "list", "--json").stdout
    assert "their-tokenizer" in {row["name"] for row in json.loads(names)}
    rows = json.loads(run(installed, "-m", "vistok.cli", "list", "--metrics", "--json").stdout)
    assert rows[-1]["name"] == "their-error" and rows[-1]["option"] == "--metrics their-error"


def test_a_metric_of_others_is_measured(installed, tmp_path):
    from vistok.eval import commands  # noqa: F401  (the evaluation imports without their package)

    picture = tmp_path / "photo.png"
    run(
        installed, "-c", f"from PIL import Image; Image.new('RGB', (160, 160), 'teal').save({str(picture)!r})"
    )
    arguments = ["eval", "recon", "--tokenizer", "vistok-mini", "--data", str(tmp_path)]
    arguments += [
        "--metrics",
        "psnr,their-error",
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "0",
        "--no-html",
    ]
    run(installed, "-m", "vistok.cli", *arguments)
    record = json.loads((tmp_path / "out" / "reconstruction.json").read_text())
    assert 0 < record["metrics"]["their-error"]["value"] < 0.2
