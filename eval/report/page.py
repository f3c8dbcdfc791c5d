"""A measurement as one HTML page: its figures, charts, tables, and pictures side by side.

The page is self-contained: styles, drawings and pictures are inside it, and nothing is fetched.
"""

import base64
import io
import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ...files import atomic_write
from .charts import Chart

NUMBER = re.compile(r"[-−±]?[\d.,]+(e[-+]?\d+)?( ?[%×–(-].*)?( dB)?")
LONG = 30
"""Letters of a word that a cell may break anywhere."""
LONG_STRIP = 8
"""Pictures in a strip above which they wrap over several rows."""
NARROW = 3
"""Pictures in a strip up to which several strips are placed side by side."""


@dataclass(frozen=True)
class Card:
    """One main figure of a report, with its label and a note."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; `note` is shown below."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True)
class Strip:
    """Images uint8 [3, H, W] side by side, each with its name."""

    pictures: list[tuple[str, Tensor]]
    caption: str

    @property
    def long(self) -> bool:
        """Whether there are too many images for one row."""
        return len(self.pictures) > LONG_STRIP


@dataclass(frozen=True)
class Gallery:
    """Strips under one title; `note` explains how to read them."""

    title: str
    strips: list[Strip]
    note: str = ""

    @property
    def narrow(self) -> bool:
        """Whether strips are short enough to be placed side by side."""
        return all(len(strip.pictures) <= NARROW for strip in self.strips)


@dataclass(frozen=True)
class Report:
    """The content of a page, from the top."""

    title: str
    lead: str
    cards: list[Card] = field(default_factory=list)
    parts: list[Table | Chart | Gallery] = field(default_factory=list)


def write_html(path: Path, report: Report) -> None:
    """Write the page as a temporary file that is then renamed."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("vistok.eval.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"kind": _kind, "data_url": _data_url}
    environment.tests |= {
        "chart": lambda part: isinstance(part, Chart),
        "table": lambda part: isinstance(part, Table),
    }
    groups = itertools.groupby(report.parts, lambda part: isinstance(part, Chart))
    page = environment.get_template("page.html").render(
        report=report, groups=[(charts, list(parts)) for charts, parts in groups]
    )
    with atomic_write(path) as aside:
        aside.write_text(page, encoding="utf-8", errors="backslashreplace")  # of names that are not UTF-8


def error_map(original: Tensor, reconstruction: Tensor) -> Tensor:
    """Mean absolute error over channels of two uint8 [3, H, W] as grey levels uint8 [3, H, W]: black is none,
    white a quarter of the range or more."""
    error = (original.float() - reconstruction.float()).abs().mean(0)
    return (4 * error).clamp(max=255).to(torch.uint8).expand(3, -1, -1)


def _kind(text: str) -> str:
    """The class of a table's cell: "long", "number", "skipped" or none."""
    if any(len(word) > LONG for word in text.split()):
        return "long"
    return "skipped" if text == "skipped" else "number" if NUMBER.fullmatch(text) else ""


def _data_url(pixels: Tensor) -> str:
    """An image uint8 [3, H, W] as a data URL."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy()).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
