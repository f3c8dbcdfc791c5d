"""A measurement as one HTML page: its figures, charts, tables, and pictures side by side.

The page is self-contained: styles, drawings and pictures are inside it, and nothing is fetched.
"""

import base64
import io
import itertools
import re
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ...files import atomic_write
from .charts import Chart

STYLE = """
:root { --ink: #1d2433; --soft: #5b6475; --line: #e3e7ee; --back: #f5f7fa; --strong: #0072b2 }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif }
main { margin: 0 auto; max-width: 76rem; padding: 2rem 1.2rem 4rem }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin: 0 0 .6rem }
.lead, .note, figcaption { color: var(--soft) }
.lead { margin: 0 0 1.6rem }
.note, figcaption { font-size: .88rem }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin-bottom: 1.2rem }
.card, section { background: #fff; border: 1px solid var(--line); border-radius: 8px }
.card { padding: .7rem .9rem; flex: 1 1 8.2rem; max-width: 14rem }
.card b { display: block; font-size: 1.4rem; line-height: 1.3; color: var(--strong) }
.card small { color: var(--soft); font-size: .82rem; display: block }
section { padding: 1.1rem 1.2rem; margin-bottom: 1.2rem }
.charts { display: grid; gap: 1.2rem; margin-bottom: 1.2rem;
  grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)) }
.charts section { margin: 0 }
.charts img { width: 100%; max-width: 44rem; display: block }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { padding: .32rem .8rem .32rem 0; text-align: left; vertical-align: top; overflow-wrap: break-word;
  border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: 600; white-space: nowrap }
td:first-child:not(.number) { min-width: 11rem; max-width: 24rem }
td.number { white-space: nowrap }
td.long { overflow-wrap: anywhere }
td.skipped { color: var(--soft); font-style: italic }
figure { margin: 0 }
figcaption { margin-top: .3rem; overflow-wrap: anywhere }
.strips { display: grid; gap: 1.3rem }
.strips.narrow { grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)) }
.strip { display: grid; gap: .35rem; grid-auto-flow: column; grid-auto-columns: minmax(0, 11rem) }
.strip img { width: 100%; display: block; image-rendering: pixelated; border-radius: 3px }
.strip span { font-size: .78rem; color: var(--soft); display: block; line-height: 1.3;
  overflow-wrap: anywhere }
"""
NUMBER = re.compile(r"[-−±]?[\d.,]+(e[-+]?\d+)?( ?[%×–(-].*)?( dB)?")
LONG = 30
"""Letters of a word that a cell may break anywhere."""
NARROW = 3
"""Pictures in a strip up to which several strips stand beside each other."""


@dataclass(frozen=True)
class Card:
    """One figure that a reader looks for first, and what is to be known of it."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; `note` stands below."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True)
class Strip:
    """Images uint8 [3, H, W] side by side, with what each is."""

    pictures: list[tuple[str, Tensor]]
    caption: str


@dataclass(frozen=True)
class Gallery:
    """Strips under one title; `note` says how to read them."""

    title: str
    strips: list[Strip]
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What a page shows, from the top."""

    title: str
    lead: str
    cards: list[Card] = field(default_factory=list)
    parts: list[Table | Chart | Gallery] = field(default_factory=list)


def write_html(path: Path, report: Report) -> None:
    """Write the page, aside first and then renamed."""
    cards = "".join(
        f'<div class="card"><small>{escape(card.label)}</small><b>{escape(card.value)}</b>'
        f"<small>{escape(card.note)}</small></div>"
        for card in report.cards
    )
    body = [
        f'<h1>{escape(report.title)}</h1><p class="lead">{escape(report.lead)}</p>',
        f'<div class="cards">{cards}</div>' if cards else "",
    ]
    for charts, parts in itertools.groupby(report.parts, lambda part: isinstance(part, Chart)):
        shown = "".join(_section(part) for part in parts)
        body.append(f'<div class="charts">{shown}</div>' if charts else shown)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
    page = f'<!doctype html><html lang="en"><head>{head}<title>{escape(report.title)}</title></head>'
    with atomic_write(path) as aside:
        text = page + f"<body><main>{''.join(body)}</main></body></html>\n"
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")  # of file names that are no UTF-8


def error_map(original: Tensor, reconstruction: Tensor) -> Tensor:
    """Mean absolute error over channels of two uint8 [3, H, W] as grey levels uint8 [3, H, W]: black is none,
    white a quarter of the range or more."""
    error = (original.float() - reconstruction.float()).abs().mean(0)
    return (4 * error).clamp(max=255).to(torch.uint8).expand(3, -1, -1)


def _section(part: Table | Chart | Gallery) -> str:
    if isinstance(part, Chart):
        shown = f'<img alt="{escape(part.title)}" src="{part.svg()}">'
    else:
        shown = _table(part) if isinstance(part, Table) else _strips(part)
        shown += f'<p class="note">{escape(part.note)}</p>' if part.note else ""
    return f"<section><h2>{escape(part.title)}</h2>{shown}</section>"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.header)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(text: str) -> str:
    kind = "skipped" if text == "skipped" else "number" if NUMBER.fullmatch(text) else ""
    if any(len(word) > LONG for word in text.split()):
        kind = "long"
    return f'<td class="{kind}">{escape(text)}</td>' if kind else f"<td>{escape(text)}</td>"


def _strips(gallery: Gallery) -> str:
    narrow = all(len(strip.pictures) <= NARROW for strip in gallery.strips)
    strips = []
    for strip in gallery.strips:
        images = "".join(
            f'<div><img alt="{escape(name)}" src="{_data(pixels)}"><span>{escape(name)}</span></div>'
            for name, pixels in strip.pictures
        )
        caption = f"<figcaption>{escape(strip.caption)}</figcaption>"
        strips.append(f'<figure><div class="strip">{images}</div>{caption}</figure>')
    return f'<div class="strips{" narrow" * narrow}">{"".join(strips)}</div>'


def _data(pixels: Tensor) -> str:
    """An image uint8 [3, H, W] as a data URL."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy()).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
