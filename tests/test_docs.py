"""The examples of the guides run, and the commands, links, names and versions in the texts exist."""

import re
import shlex
from importlib import import_module

import pytest
import torch
import typer.main
from paths import ROOT
from tiny_vlms import tiny_vlm

from vistok.cli import app
from vistok.compress import hosts
from vistok.compress.families import FAMILIES
from vistok.generate.registry import GENERATORS
from vistok.registry import TOKENIZERS
from vistok.train import objectives
from vistok.train.config import OptimizerConfig
from vistok.train.loop import train

PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
TEXTS = PAGES | {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")}
WITH_PYTHON = [name for name, text in PAGES.items() if "```python" in text]


def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def command_lines(text):
    """The `vistok …` commands of indented blocks and of inline code, as the shell splits them."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    indented = [line.strip() for line in prose.splitlines() if line.startswith("    ")]
    inline = re.findall(r"`([^`\n]+)`", "\n".join(line for line in prose.splitlines() if line[:4] != "    "))
    for line in (*indented, *inline):
        for part in line.split("&&"):
            part = re.sub(r".*-m vistok\.cli ", "vistok ", part.strip())
            if part.startswith("vistok ") and not part.startswith("vistok train/"):
                yield part


@pytest.fixture
def unregistered(monkeypatch):
    """Take the examples' names out of the registries again."""
    for catalog in (TOKENIZERS, GENERATORS):
        catalog.entries()
        monkeypatch.setattr(catalog, "_families", dict(catalog._families))
        monkeypatch.setattr(catalog, "_entries", dict(catalog._entries))
    families = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(families)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder with the pictures in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    return tmp_path


def executed(name):
    """Run the Python examples of a page in order; `model` and `inputs` are a VLM and its processor's."""
    model, _, inputs = tiny_vlm("llava")
    names = {"model": model, "inputs": inputs(2), "__name__": "example"}
    for block in python_blocks(PAGES[name]):
        exec(compile(block, name, "exec"), names)
    return names


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_the_python_examples_of_a_page_run_in_order(name, folder, unregistered):
    executed(name)


def test_the_example_of_an_objective_trains_in_the_loop(folder, unregistered, monkeypatch):
    names = executed("extending.md")
    monkeypatch.setattr(objectives, "objectives", lambda: {"line": names["Line"]})
    optimizer = OptimizerConfig(schedule="constant", warmup=0, learning_rate=0.1)
    config = names["LineConfig"](steps=60, batch_size=8, precision="no", ema=0.0, optimizer=optimizer)
    exported = train(config, folder / "runs" / "line", progress=False)
    weights = torch.load(exported / "line.pt")
    assert abs(float(weights["weight"]) - 2) < 0.5


COMMANDS = sorted({line for text in TEXTS.values() for line in command_lines(text)})


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_line_parses(line):
    words = shlex.split(line)[1:]
    command, context = typer.main.get_command(app), None
    while hasattr(command, "commands"):
        if not words:
            return  # a group by its name, such as `vistok eval`
        assert words[0] in command.commands, f"vistok has no command {words[0]!r}"
        context = command.context_class(command, parent=context, info_name=words[0])
        command, words = command.commands[words[0]], words[1:]
    if words:  # else only the name of the command, in a sentence
        command.make_context(command.name, words, parent=context)


def test_commands_are_found_in_all_guides_that_have_some():
    assert len(COMMANDS) > 25
    assert {"vistok demo", "vistok list --families", "vistok eval reducers"} <= set(COMMANDS)


@pytest.fixture
def tables(monkeypatch):
    """The script that writes the tables."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    return import_module("tables")


def test_the_tables_are_what_the_registries_give(tables, capsys):
    assert tables.main(["--check"]) == 0, f"{capsys.readouterr().err}run python docs/tables.py"


def test_a_stale_table_is_noticed_and_written_anew(tables, tmp_path, monkeypatch):
    page, text = tmp_path / "page.md", PAGES["generators.md"]
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "FILES", (page,))
    page.write_text(text.replace("| `rar-b` |", "| `rar-c` |"), encoding="utf-8")
    assert tables.main(["--check"]) == 1
    assert "`rar-c`" in page.read_text(encoding="utf-8")
    assert tables.main([]) == 0
    assert page.read_text(encoding="utf-8") == text


def test_a_table_without_a_registry_is_refused(tables):
    with pytest.raises(ValueError, match="no table 'tokenisers'"):
        tables.updated("<!-- table: tokenisers -->\n<!-- end of table -->")


def test_the_tokenizers_recommended_for_bits_and_rfid_are_the_best(tables):
    rows = tables._tokenizers()
    bits = {
        row["name"]: int(row["bits per image"].replace(",", ""))
        for row in rows
        if row["bits per image"] != "–"
    }
    with_weights = {name for name, entry in TOKENIZERS.entries().items() if entry.file}
    rfid = {
        row["name"]: row["figures"]["rFID"]
        for row in rows
        if "rFID" in row["figures"] and row["name"] in with_weights and row["name"] in bits  # of codes
    }
    advice = " ".join(TEXTS["README.md"].split())
    assert f"`{min(bits, key=bits.get)}` for the fewest bits" in advice
    assert f"`{min(rfid, key=rfid.get)}` for the lowest rFID of codes" in advice


@pytest.mark.parametrize("name", re.findall(r"^::: (\S+)", PAGES["api.md"], re.MULTILINE))
def test_names_of_the_api_reference_exist(name):
    options = PAGES["api.md"].split(f"::: {name}\n", 1)[1].split(":::", 1)[0]
    members = re.search(r"members: \[(.*)\]", options)
    try:
        value = import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        value = getattr(import_module(module), attribute)
    for member in members[1].split(", ") if members else ():
        assert hasattr(value, member), f"{name}.{member}"


def test_versions_are_those_that_are_declared():
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for package, version in re.findall(
        r"(torch|torchvision|numpy|pillow|transformers|timm) ([\d.]+\d)", PAGES["index.md"]
    ):
        assert f'"{package}>={version}"' in declared, package
    assert f"transformers {hosts.TESTED}." in PAGES["compress.md"]
    python = re.search(r'requires-python = ">=([\d.]+)"', declared)[1]
    torch_version = re.search(r'"torch>=([\d.]+)"', declared)[1]
    assert f"Python {python} and newer, PyTorch {torch_version} and newer" in TEXTS["README.md"]


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_to_files_and_headings(name):
    start = ROOT if name in ("README.md", "CONTRIBUTING.md") else ROOT / "docs"
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if target.startswith("http"):
            continue
        path, _, heading = target.partition("#")
        file = start / path if path else start / name
        assert file.is_file(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", text.lower()).strip().replace(" ", "-") for text in headings]
            assert heading in slugs, target
