"""The report of `vistok eval speed`: tables, and images/s and memory against batch sizes."""

from collections.abc import Callable
from pathlib import Path
from statistics import median

from ..speed.tokenizers import HEADER, Speed, Variant
from .charts import Chart, Series, bars, curves
from .page import Card, Report, Table, write_html
from .records import facts_of_run

NOTE = "Medians of paired runs, with minimum and maximum; peak memory does not include the model."
MEASURES: dict[str, tuple[str, Callable[[Variant], float | None]]] = {
    "encoding": ("images/s", lambda variant: _median(variant.encode_rates)),
    "decoding": ("images/s", lambda variant: _median(variant.decode_rates)),
    "peak memory": ("MB above the model", lambda variant: _megabytes(variant.peak_bytes)),
}


def write_speed(path: Path, speeds: list[Speed], repeats: int) -> None:
    """Write the page."""
    names = list(dict.fromkeys(speed.tokenizer for speed in speeds))
    cards, charts = [], []
    for name in names:
        own = [speed for speed in speeds if speed.tokenizer == name]
        cards.append(Card(f"{name}: parameters", f"{own[0].parameters / 1e6:,.1f} M"))
        cards += _ratios(max(own, key=lambda speed: speed.batch_size))
        charts += _charts(name, own)
    tables = [Table(speed.title, HEADER, speed.table(), NOTE) for speed in speeds]
    facts = Table("How it was measured", ["", ""], [list(fact) for fact in facts_of_run().items()])
    lead = f"{speeds[0].place} · n = {repeats} paired runs after a warm-up · fresh weights"
    parts = [*charts, *tables, facts]
    write_html(path, Report(f"Speed of {', '.join(names)}", lead, cards, parts))


def _ratios(speed: Speed) -> list[Card]:
    """The first variants that are compared with another."""
    compared = [variant for variant in speed.variants if variant.baseline][:3]
    note = "times {}, batch {}"
    return [
        Card(
            f"{speed.tokenizer}: {variant.name}",
            f"{median(variant.ratios):.2f}×",
            note.format(variant.baseline.name, speed.batch_size),
        )
        for variant in compared
    ]


def _charts(name: str, speeds: list[Speed]) -> list[Chart]:
    """Over batch sizes if there are several, a bar for each variant otherwise."""
    charts = []
    for what, (unit, value) in MEASURES.items():
        if len(speeds) == 1:
            values = {variant.name: value(variant) for variant in speeds[0].variants}
            kept = {variant: number for variant, number in values.items() if number is not None}
            title = f"{name}: {what}, batch {speeds[0].batch_size}"
            charts += [bars(title, unit, kept)] if kept else []
            continue
        lines: dict[str, Series] = {}
        for speed in speeds:
            for variant in speed.variants:
                if (number := value(variant)) is not None:
                    plain = Series(variant.name, [], [], baseline=variant.baseline is None)
                    line = lines.setdefault(variant.name, plain)
                    line.x.append(speed.batch_size)
                    line.y.append(number)
        if lines:
            charts.append(curves(f"{name}: {what}", "batch size", unit, list(lines.values()), from_zero=True))
    return charts


def _median(values: list[float]) -> float | None:
    return median(values) if values else None


def _megabytes(count: int | None) -> float | None:
    return None if count is None else count / 2**20
