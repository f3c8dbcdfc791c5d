"""The examples and commands of the README run, and it stays short."""

import re
import shlex
import subprocess
import sys

import pytest
from paths import ROOT
from tiny_vlms import tiny_vlm

import vistok

README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^    .*?(vistok .*)$", README, re.MULTILINE)
LARGEST = 8192  # bytes


def test_the_readme_is_short():
    assert len(README.encode()) <= LARGEST, "move what is longer into docs/"


def test_it_starts_with_the_two_commands():
    lines = [line[4:] for line in README.splitlines() if line.startswith("    ")]
    assert lines[:2] == ["pip install -e . && vistok demo", 'pip install -e ".[test]" && pytest']


def test_each_example_has_at_most_five_lines_of_code():
    assert len(EXAMPLES) == 3
    for example in EXAMPLES:
        assert len([line for line in example.splitlines() if line.strip()]) <= 5, example


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder with the pictures in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    return tmp_path


def test_the_python_examples_run_in_order(folder, capsys):
    model, _, inputs = tiny_vlm("llava")
    names: dict[str, object] = {"model": model, "inputs": inputs(2)}
    for block in EXAMPLES:
        exec(compile(block, "README.md", "exec"), names)
    assert (folder / "cat-from-32-bytes.png").is_file() and (folder / "kept.png").is_file()
    printed = capsys.readouterr().out
    assert "DivPrune: 4.0 visual tokens" in printed
    quality = [
        float(line.split()[1]) for line in printed.splitlines() if re.match(r"\d+ [\d.]+ [\d.]+$", line)
    ]
    assert len(quality) == 4 and quality == sorted(quality)  # dB at 1, 4, 16 and 64 tokens


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_run(command, folder, run):
    name, *arguments = shlex.split(command)
    status, _, errors = run(*arguments)
    assert (name, status) == ("vistok", 0), errors


def test_all_commands_are_run():
    assert len(COMMANDS) == 3 and COMMANDS[0] == "vistok demo"


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
