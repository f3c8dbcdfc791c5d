"""What a base install does by itself, and the hint where an extra is missing or too old."""

import re
import subprocess
import sys

import pytest
from paths import GOLDEN, ROOT

from vistok import extras

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.slow

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
IMPORT_NAMES = {
    "accelerate": "accelerate",
    "av": "av",
    "datasets": "datasets",
    "diffusers": "diffusers",
    "lpips": "lpips",
    "matplotlib": "matplotlib",
    "open_clip_torch": "open_clip",
    "scikit-image": "skimage",
    "scikit-learn": "sklearn",
    "scipy": "scipy",
    "stlpips-pytorch": "stlpips_pytorch",
    "tensorboard": "tensorboard",
    "timm": "timm",
    "torch-fidelity": "torch_fidelity",
}
WITHOUT = """
import sys
blocked = sys.argv.pop(1).split(",")
class Filtered:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in blocked else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Filtered, sys.meta_path)
"""
HINTS = [
    ("accelerate", "train", "import vistok.train.loop"),
    ("accelerate", "eval", "from vistok.eval.engine.passes import join; join(torch.device('cpu'))"),
    ("av", "video", "from vistok.video_files import read_frames; read_frames('pyproject.toml')"),
    ("diffusers", "diffusers", "import vistok; vistok.create('flextok-d12-d12-in1k')"),
    ("lpips", "lpips", "from vistok.nn.lpips import build_lpips; build_lpips('alex', None)"),
    ("matplotlib", "eval", "from vistok.eval.report.charts import require; require()"),
    ("open_clip", "clip", "from vistok.nn.clip_text import CLIPTextEncoder; CLIPTextEncoder()"),
    ("open_clip", "clip", "from vistok.eval.metrics.clip import load_clip; load_clip()"),
    ("scikit-image", "train", "from vistok.train.data import photo_names; photo_names()"),
    ("stlpips-pytorch", "perceptual", "from vistok.nn.stlpips import build_stlpips; build_stlpips('alex')"),
    ("torch_fidelity", "eval", "from vistok.eval.metrics.inception import Inception; Inception({})"),
]


def without(packages, code, *arguments):
    """Run `code` in a process that cannot import the packages."""
    command = [sys.executable, "-c", WITHOUT + code, ",".join(packages), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def declared(extra):
    """The requirements of an extra by the package's name."""
    lines = PROJECT["optional-dependencies"][extra]
    return {re.match(r"[\w.-]+", line)[0]: line for line in lines}


def test_every_package_of_the_corners_is_blocked_by_these_tests():
    corners = set(PROJECT["optional-dependencies"]) - {"all", "docs", "test"}
    assert set(IMPORT_NAMES) == {package for extra in corners for package in declared(extra)}
    assert set(re.findall(r"\w+", declared("all")["vistok"].partition("[")[2])) == corners


def test_code_names_extras_that_hold_the_package():
    calls = []
    for folder in ("vistok", "compress", "eval"):
        for path in (ROOT / folder).rglob("*.py"):
            calls += re.findall(
                r'\b(?:needs|missing)\("([\w.-]+)", "(\w+)"', path.read_text(encoding="utf-8")
            )
    assert len(calls) > 10
    assert not [(package, extra) for package, extra in calls if package not in declared(extra)]


def test_a_missing_extra_is_named_where_it_is_needed():
    code = """
import torch
for line in sys.argv[1:]:
    try:
        exec(line)
    except ModuleNotFoundError as error:
        print(error)
"""
    done = without(IMPORT_NAMES.values(), code, *(code for _, _, code in HINTS))
    assert done.returncode == 0, done.stderr
    for (package, extra, code), line in zip(HINTS, done.stdout.splitlines(), strict=True):
        hint = f' needs {package}, which is not installed: pip install "vistok[{extra}]"'
        assert line.endswith(hint), (code, line)


def test_a_base_install_does_everything_but_the_corners(tmp_path):
    """Every package of every extra is out of reach here."""
    code = """
import vistok.cli, vistok.compress
folder, case = sys.argv[1:]
for name in vistok.compress.list_reducers():
    vistok.compress.registry.reducer_by_name(name)
def run(*arguments):
    sys.argv[1:] = arguments
    try:
        vistok.cli.main()
    except SystemExit as error:
        assert error.code == 0, arguments
run("demo", "--out", f"{folder}/demo.png")
run("encode", f"{folder}/demo.png", "-o", f"{folder}/demo.vtok")
run("decode", f"{folder}/demo.vtok", "-o", f"{folder}/decoded")
run("info", "titok-l32")
run("list")
run("verify", case)
"""
    done = without(IMPORT_NAMES.values(), code, tmp_path, GOLDEN / "flextok_components.json")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "demo.png").is_file() and any((tmp_path / "decoded").iterdir())
    assert "flextok-d12-d12-in1k" in done.stdout


def test_a_command_that_lacks_an_extra_ends_in_one_line(tmp_path):
    code = "import vistok.cli; vistok.cli.main()"
    arguments = [
        "eval",
        "recon",
        "--tokenizer",
        "vistok-mini",
        "--data",
        ROOT / "assets",
        "--out",
        tmp_path,
        "--no-html",
    ]
    done = without(["accelerate"], code, *arguments)
    line = 'vistok: evaluation needs accelerate, which is not installed: pip install "vistok[eval]"\n'
    assert done.returncode == 1 and done.stderr == line


@pytest.mark.parametrize("version", ["0.0.1", "0.1.3.dev0"])
def test_a_release_older_than_declared_is_refused(monkeypatch, version):
    monkeypatch.setattr(extras.metadata, "version", lambda package: version)
    with (
        pytest.raises(
            ImportError, match=rf'LPIPS needs lpips >=.*{re.escape(version)} is .*--upgrade "vistok\[lpips\]"'
        ),
        extras.needs("lpips", "lpips", "LPIPS"),
    ):
        pytest.fail("nothing may be imported")


def test_a_package_that_every_install_has_is_named_without_an_extra(monkeypatch):
    monkeypatch.setattr(extras.metadata, "version", lambda package: "4.57.0")
    with (
        pytest.raises(ImportError, match=r"attaching needs transformers >=.* 4\.57\.0 .*--upgrade vistok$"),
        extras.needs("transformers", None, "attaching"),
    ):
        pytest.fail("nothing may be imported")


def test_other_errors_of_an_import_stay_what_they_are():
    with pytest.raises(ZeroDivisionError), extras.needs("lpips", "lpips", "LPIPS"):
        raise ZeroDivisionError
