"""The report of `vistok eval vlm`: accuracy over visual tokens, tables of accuracy and cost, and pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from ..metrics.answers import scorers
from ..tasks.vlm.evaluation import Result
from ..tasks.vlm.pictures import Example
from ..tasks.vlm.record import Mean, Row, VlmRecord
from .charts import STYLE, Chart, Series, curves
from .page import Card, Gallery, Report, Strip, Table, write_html
from .records import facts_of_run

LOSES = "▼"
SIDE = 320
"""Pixels of the longer side of a picture on the page, at most."""
PICTURES_NOTE = (
    "Tokens that reached the last layer are bright, dropped ones are dimmed (for reducers of the cache: "
    "those that stayed in it). Merged tokens are bright where one of their group was. ✓ right, ✗ wrong."
)


def tables(record: VlmRecord) -> list[Table]:
    """Accuracy and cost of every setting, and the settings that could not run."""
    parts = [accuracy_table(record), cost_table(record)]
    refused = [[row.label, row.refused] for row in record.rows if row.refused is not None]
    if refused:
        parts.append(Table("Settings that could not run", ["setting", "why"], refused))
    return parts


def accuracy_table(record: VlmRecord) -> Table:
    """Score overall and by category, agreement with the full model, and the lost comparisons."""
    full = record.rows[0]
    header = [
        "setting",
        "visual tokens",
        f"{_label(record)} % (95%)",
        "change",
        "same answers %",
        f"{LOSES} loses to",
        *full.categories,
    ]
    rows = [
        [
            _name(row),
            "–" if row.tokens is None else f"{row.tokens:,.1f}",
            _percent(row.score),
            "" if row is full else f"{0 - 100 * row.loss['value']:+.1f}",
            f"{100 * row.agreement:.1f}",
            f"{LOSES} {', '.join(row.loses_to)}" if row.loses_to else "",
            *(f"{100 * row.categories[name]['value']:.0f}" for name in full.categories),
        ]
        for row in record.rows
        if row.refused is None
    ]
    again = [""] * (len(header) - 3)
    if record.noise["difference"] is not None:
        rows.insert(1, ["full model again (noise)", "", _percent(record.noise["second"]), *again])
    return Table(f"{record.model} on {record.data}, n = {record.n:,}", header, rows, _accuracy_note(record))


def _accuracy_note(record: VlmRecord) -> str:
    noise = record.noise["difference"]
    parts = [
        f"{LOSES}: a baseline of the same budget scores higher; downsample and native show a smaller picture",
        "visual tokens: those that enter the language model, per question",
    ]
    if noise is not None:
        parts.insert(
            0,
            f"the full model's score differs by {100 * noise:.1f} points between {record.noise['basis']}: "
            "smaller differences mean nothing",
        )
    return "; ".join([*parts, *record.warnings])


def cost_table(record: VlmRecord) -> Table:
    """Operations, times, memory and cache of every setting, the reducer's own cost included and alone."""
    header = [
        "setting",
        "tokens per layer",
        "prefill GFLOPs",
        "of the reducer",
        "cache MB",
        *("first token ms", "speed-up", "tokens/s", "peak MB", "reducer ms"),
    ]
    timed = any(row.speed for row in record.rows)
    rows = []
    for row in record.rows:
        if row.refused is not None:
            continue
        cells = [
            _name(row),
            "–" if row.tokens_per_layer is None else f"{row.tokens_per_layer:,.1f}",
            f"{row.flops / 1e9:,.3g}",
            f"{row.flops_reducer / 1e9:+,.2g}" if row.flops_reducer else "0",
            "–" if row.cache_bytes is None else f"{row.cache_bytes / 1e6:,.3g}",
        ]
        if timed:
            cells += _times(row)
        rows.append(cells)
    note = "; ".join(
        [
            record.protocol["flops"].rstrip("."),
            "of the reducer: operations outside the language model's layers, less the full model's (negative "
            "where the tower did less)",
            "cache: keys and values per prompt after the prefill",
            f"times: {record.protocol['speed']}",
            *_native_notes(record),
        ]
    )
    return Table("Cost per prompt", header if timed else header[:5], rows, note)


def _times(row: Row) -> list[str]:
    speed = row.speed
    if speed is None:
        return ["–"] * 5
    peak = "–" if speed["peak_bytes"] is None else f"{speed['peak_bytes'] / 2**20:,.1f}"
    return [
        f"{1e3 * speed['first_token_seconds']:,.1f}",
        "" if row.name == "full model" else f"{speed['first_token_speedup']:.2f}×",
        f"{speed['tokens_per_second']:,.1f}",
        peak,
        f"{1e3 * speed['reducer_seconds']:,.2f}",
    ]


def _native_notes(record: VlmRecord) -> list[str]:
    """What each native budget became."""
    notes = []
    for row in record.rows:
        for each in row.native[:3]:
            text = f"{row.label}: {each['setting']} gives {each['tokens']} tokens"
            notes.append(text + ("" if each["fits"] else ", the fewest that it can, above the budget"))
        if len(row.native) > 3:
            notes.append(f"{row.label}: {len(row.native) - 3} more settings for other sizes (see the JSON)")
    return notes


# The page ---------------------------------------------------------------------------------------------------


def write_vlm(path: Path, result: Result) -> None:
    """Write the page. Raises ModuleNotFoundError without matplotlib."""
    record = result.record
    full = record.rows[0]
    cards = [Card("full model", f"{100 * full.score['value']:.1f}%", _ends(full.score))]
    if record.noise["difference"] is not None:
        cards.append(
            Card("its noise", f"{100 * record.noise['difference']:.1f} points", record.noise["basis"])
        )
    cards += _best_cards(record)
    lead = f"n = {record.n:,} · {record.protocol['scorer']} · {record.parameters / 1e6:,.1f}M parameters"
    parts = [*charts(record), *tables(record)]
    if gallery := _gallery(result.examples(), record):
        parts.append(gallery)
    facts = record.protocol | {"seed": record.seed} | facts_of_run()
    parts.append(Table("How it was measured", ["", ""], [[key, str(value)] for key, value in facts.items()]))
    write_html(path, Report(f"{record.model} on {record.data}", f"{lead} · seed {record.seed}", cards, parts))


def _best_cards(record: VlmRecord) -> list[Card]:
    """The best reducer and the best baseline of the smallest budget."""
    rows = [row for row in record.rows[1:] if row.refused is None and row.keep < 1]
    if not rows:
        return []
    keep = min(row.keep for row in rows)
    cards = []
    for title, baseline in (("best reducer", False), ("best baseline", True)):
        same_kind = [row for row in rows if row.keep == keep and row.baseline == baseline]
        if same_kind:
            best = max(same_kind, key=lambda row: row.score["value"])
            value = f"{100 * best.score['value']:.1f}%"
            cards.append(Card(f"{title} at {keep:g}", value, best.name))
    return cards


def charts(record: VlmRecord) -> list[Chart]:
    """The score over visual tokens per layer and over operations: one line per reducer, baselines thin and
    dashed, and the full model as a dashed level."""
    costs: dict[str, Callable[[Row], float | None]] = {
        "visual tokens per layer": lambda row: row.tokens_per_layer,
        "prefill GFLOPs per prompt": lambda row: row.flops / 1e9,
    }
    return [_chart(record, name, cost) for name, cost in costs.items()]


def _chart(record: VlmRecord, name: str, cost: Callable[[Row], float | None]) -> Chart:
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in record.rows[1:]:
        if row.refused is None and cost(row):
            lines.setdefault((row.name, row.positions), []).append(row)
    series = [
        Series(
            name if positions == "keep" else f"{name}, {positions}",
            [cost(row) for row in rows],
            [100 * row.score["value"] for row in rows],
            baseline=rows[0].baseline,
        )
        for (name, positions), rows in lines.items()
    ]
    label = f"{_label(record)} in % (n = {record.n:,})"
    drawing = curves(f"{_label(record)} over {name}", name, label, series)
    full = record.rows[0].score
    _with_level(drawing, "full model", 100 * full["value"], 100 * full["low"], 100 * full["high"])
    return drawing


def _with_level(drawing: Chart, label: str, value: float, low: float, high: float) -> None:
    """Add a dashed level with its interval to a chart, and a legend beside it."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        axes = drawing.figure.axes[0]
        axes.axhspan(low, high, color="#1d2433", alpha=0.06, linewidth=0, zorder=0)
        axes.axhline(value, color="#1d2433", linestyle=(0, (6, 3)), linewidth=1.6, zorder=1, label=label)
        lines = axes.lines
        axes.legend(
            lines,
            [line.get_label() for line in lines],
            fontsize=8,
            loc="center left",
            bbox_to_anchor=(1.01, 0.5),
        )
        drawing.figure.set_size_inches(9.2, max(3.8, 0.24 * len(lines)))


def _gallery(examples: Sequence[Example], record: VlmRecord) -> Gallery | None:
    strips = []
    for example in examples:
        pictures = []
        for view in example.views:
            mark = "✓" if view.score >= 1 else "✗" if view.score == 0 else f"{100 * view.score:.0f}%"
            note = f" ({view.note})" if view.note else ""
            text = f"{view.label}: {view.answer or '(empty)'} {mark}{note}"
            picture = view.picture.copy()
            picture.thumbnail((SIDE, SIDE))
            pictures.append((text, torch.from_numpy(np.array(picture)).permute(2, 0, 1)))
        strips.append(
            Strip(pictures, f"{example.question} Right: {', '.join(dict.fromkeys(example.answers))}")
        )
    return Gallery("What was kept, and the answers", strips, PICTURES_NOTE) if strips else None


def _name(row: Row) -> str:
    name = f"{row.label} (baseline)" if row.baseline else row.label
    return f"{name} {LOSES}" if row.loses_to_downsampling else name


def _label(record: VlmRecord) -> str:
    return scorers()[record.scorer].label


def _percent(mean: Mean) -> str:
    return f"{100 * mean['value']:.1f} ({_ends(mean)})"


def _ends(mean: Mean) -> str:
    return f"{100 * mean['low']:.1f}–{100 * mean['high']:.1f}"
