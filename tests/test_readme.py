"""What the README shows runs as shown."""

import re
import subprocess
import sys

from paths import ROOT
from tiny_vlms import tiny_vlm

import vistok
from vistok import compress

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_examples_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 4
    model, _, inputs = tiny_vlm("llava")
    names: dict[str, object] = {"model": model, "inputs": inputs(2)}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "cat-from-32-bytes.png").is_file() and (tmp_path / "cat.vtok").is_file()
    assert names["latents"].shape == (2, 32, 12)


def test_every_registered_family_is_in_the_table():
    assert all(family in README for family in ("TiTok", "TA-TiTok", "MaskGIT-VQGAN", "vistok-mini"))


def test_every_reducer_is_in_the_table():
    assert all(f"`{name}`" in README for name in compress.list_reducers())


def test_files_the_readme_points_to_exist():
    for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_importing_vistok_imports_nothing_heavy():
    heavy = ("torch", "open_clip", "transformers", "diffusers", "accelerate", "lpips", "PIL")
    code = f"import sys, vistok; print([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_loading_a_tokenizer_imports_no_text_tower():
    code = (
        "import sys, vistok; vistok.load('vistok-mini')\n"
        "print([name for name in ('open_clip', 'transformers', 'diffusers', 'lpips') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_public_face_is_what_the_package_says():
    assert set(vistok.__all__) <= set(dir(vistok))
    assert all(getattr(vistok, name) is not None for name in vistok.__all__)
