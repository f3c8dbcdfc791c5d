"""Hooks of mkdocs: what the pages need from outside docs/."""

import tempfile
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_OUTSIDE = {"contributing.md": ROOT / "CONTRIBUTING.md", "changelog.md": ROOT / "CHANGELOG.md"}
_FOLDER = tempfile.TemporaryDirectory()


@event_priority(100)
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Have the API reference read the three folders as the one package that they install as."""
    package = Path(_FOLDER.name, "vistok")
    if not package.exists():
        package.mkdir()
        parts = {path.name: path for path in (ROOT / "vistok").iterdir()}
        parts |= {name: ROOT / name for name in ("compress", "eval")}
        for name, path in parts.items():
            (package / name).symlink_to(path)
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [_FOLDER.name]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures of assets/, CONTRIBUTING.md and CHANGELOG.md to the site."""
    outside = {f"assets/{path.name}": path for path in (ROOT / "assets").glob("*.png")} | _OUTSIDE
    for uri, path in outside.items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links that hold in the repository to their places on the site."""
    for repository, site in (
        ("(../assets/", "(assets/"),
        ("(../CONTRIBUTING.md", "(contributing.md"),
        ("(../CHANGELOG.md", "(changelog.md"),
        ("(docs/", "("),
    ):
        markdown = markdown.replace(repository, site)
    return markdown
