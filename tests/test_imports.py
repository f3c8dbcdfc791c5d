"""No module imports itself in a circle, and the folders depend on each other in one direction."""

import ast
import os
import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from paths import ROOT

FOLDERS = {"vistok": "vistok", "compress": "vistok.compress", "eval": "vistok.eval"}
LEVEL = {"vistok": 0, "vistok.compress": 1, "vistok.eval": 2}
FRONT_DOOR = "vistok.cli"  # the only module that may look upward


def modules() -> dict[str, Path]:
    """Module name → file, of the whole package."""
    names = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            names[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return names


MODULES = modules()


def imports(name: str) -> set[str]:
    """The modules that one names anywhere: in functions and for typing alone, too."""
    named = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                package = name.split(".")
                if MODULES[name].name != "__init__.py":
                    package = package[:-1]
                package = package[: len(package) - node.level + 1]
                source = ".".join([*package, *filter(None, [node.module])])
            named.update(f"{source}.{alias.name}" for alias in node.names)
    known = {target if target in MODULES else target.rpartition(".")[0] for target in named}
    return {target for target in known if target in MODULES and target != name}


def level(name: str) -> int:
    return max(LEVEL[package] for package in LEVEL if name == package or name.startswith(package + "."))


GRAPH = {name: imports(name) for name in MODULES}


def test_the_walk_sees_relative_nested_and_typing_only_imports():
    assert "vistok.tokens" in GRAPH["vistok.tokenizer"]
    assert "vistok.loading" in GRAPH["vistok"]  # under TYPE_CHECKING
    assert "vistok.compress.reducer" in GRAPH["vistok.compress.methods.divprune"]
    assert len(GRAPH) > 150 and sum(map(len, GRAPH.values())) > 500


def test_no_imports_go_in_a_circle():
    try:
        list(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_only_the_front_door_looks_upward():
    upward = {
        f"{name} imports {target}"
        for name, targets in GRAPH.items()
        for target in targets
        if level(target) > level(name) and name != FRONT_DOOR
    }
    assert not upward


def test_a_part_of_another_checkout_is_refused(tmp_path):
    shutil.copytree(ROOT / "vistok", tmp_path / "vistok", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-c", "import vistok.compress"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 1
    assert f"vistok comes from {tmp_path / 'vistok'}, but vistok.compress from" in result.stderr
