"""A measurement as one HTML page: tables, histograms, and images beside their reconstructions.

The page is self-contained: styles, drawings and pictures are inside it, and nothing is fetched.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..files import written_aside

BINS = 24
WIDTH, HEIGHT, LEFT, BOTTOM = 560, 220, 44, 40
STYLE = """
:root { color-scheme: light dark;
  --ink: #1d2433; --soft: #5b6475; --line: #d9dde5; --paper: #fff; --bar: #3b6fd4 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7eaf0; --soft: #a0a8b8; --line: #363d4a; --paper: #14181f; --bar: #7ba4f5 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin-top: 2.2rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere } th { color: var(--soft); font-weight: 600 }
.note, figcaption { color: var(--soft); font-size: .9rem } figure { margin: 1rem 0 }
.examples { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)) }
.examples figure { margin: 0 } .triple { display: grid; grid-template-columns: repeat(3, 1fr); gap: .3rem }
.triple img { width: 100%; image-rendering: pixelated; border-radius: 3px }
svg { max-width: 100%; height: auto } svg text { fill: var(--soft); font: 12px system-ui, sans-serif }
svg rect { fill: var(--bar) } svg line { stroke: var(--line) }
"""


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; `note` stands below."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A drawing: `svg` and what it shows."""

    title: str
    svg: str


@dataclass(frozen=True)
class Example:
    """An image uint8 [3, H, W] and its reconstruction of the same size."""

    title: str
    original: Tensor
    reconstruction: Tensor
    caption: str


@dataclass(frozen=True)
class Report:
    """What a page shows; `skipped` are metrics that were not computed, with the reason."""

    title: str
    facts: dict[str, str]
    tables: list[Table] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)


def write_html(path: Path, report: Report) -> None:
    """Write the page, aside first and then renamed."""
    first, *others = [_table(table) for table in report.tables] or [""]
    skipped = Table("Skipped", ["metric", "why"], [[f"{k}: skipped", v] for k, v in report.skipped.items()])
    parts = [
        f"<h1>{escape(report.title)}</h1>",
        first,
        _table(skipped) if report.skipped else "",
        *(f"<h2>{escape(figure.title)}</h2><figure>{figure.svg}</figure>" for figure in report.figures),
        _examples(report.examples),
        *others,
        _table(Table("How it was measured", ["", ""], [list(fact) for fact in report.facts.items()])),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
    page = f'<!doctype html><html lang="en"><head>{head}<title>{escape(report.title)}</title></head>'
    with written_aside(path) as aside:
        text = page + f"<body>{''.join(parts)}</body></html>\n"
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")  # of file names that are no UTF-8


def histogram(title: str, label: str, values: Sequence[float] | np.ndarray) -> Figure:
    """How finite values [n] spread, in equal bins from the least to the most."""
    counts, edges = np.histogram(np.asarray(values, np.float64), bins=BINS)
    right, top, floor = WIDTH - 12, 12, HEIGHT - BOTTOM
    step = (right - LEFT) / BINS
    bars = []
    for number, count in enumerate(counts.tolist()):
        height = (floor - top) * count / counts.max()
        told = f"{count} of {len(values)}: {edges[number]:.4g} to {edges[number + 1]:.4g}"
        x, y = LEFT + number * step, floor - height
        box = f'x="{x:.1f}" y="{y:.1f}" width="{step - 1:.1f}" height="{height:.1f}"'
        bars.append(f"<rect {box}><title>{told}</title></rect>")
    ticks = [
        f'<text x="{LEFT + share * (right - LEFT):.1f}" y="{floor + 16}" text-anchor="middle">'
        f"{edges[0] + share * (edges[-1] - edges[0]):.4g}</text>"
        for share in (0, 0.25, 0.5, 0.75, 1)
    ]
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="{escape(title)}">'
        f'<line x1="{LEFT}" y1="{floor}" x2="{right}" y2="{floor}"/>{"".join(bars)}{"".join(ticks)}'
        f'<text x="{LEFT - 6}" y="{top + 6}" text-anchor="end">{counts.max()}</text>'
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(label)}</text></svg>'
    )
    return Figure(title, svg)


def error_map(original: Tensor, reconstruction: Tensor) -> Tensor:
    """Mean absolute error over channels of two uint8 [3, H, W] as grey levels uint8 [3, H, W]: black is none,
    white a quarter of the range or more."""
    error = (original.float() - reconstruction.float()).abs().mean(0)
    return (4 * error).clamp(max=255).to(torch.uint8).expand(3, -1, -1)


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.header)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    grid = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return f"<h2>{escape(table.title)}</h2>{grid}{note}"


def _examples(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    shown = []
    for example in examples:
        error = error_map(example.original, example.reconstruction)
        named = zip(
            ("original", "reconstruction", "error"),
            (example.original, example.reconstruction, error),
            strict=True,
        )
        images = "".join(f'<img alt="{name}" src="{_data(pixels)}">' for name, pixels in named)
        caption = f"<figcaption>{escape(f'{example.title}: {example.caption}')}</figcaption>"
        shown.append(f'<figure><div class="triple">{images}</div>{caption}</figure>')
    told = "Original, reconstruction, and error: black is none, white a quarter of the range or more."
    grid = f'<div class="examples">{"".join(shown)}</div>'
    return f'<h2>Best and worst images</h2><p class="note">{told}</p>{grid}'


def _data(pixels: Tensor) -> str:
    """An image uint8 [3, H, W] as a data URL."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy()).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
