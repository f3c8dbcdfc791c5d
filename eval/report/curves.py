"""The report of `vistok eval tokens`: tables of every setting and at matched bytes, curves, and pictures."""

from pathlib import Path

from ..metrics.metric import described
from ..metrics.summary import psnr_text
from ..tasks.rate_distortion import CurvesRecord, Point, Result
from .charts import Chart, Series, curves
from .page import Card, Gallery, Report, Strip, Table, write_html
from .records import circumstances, lead, skipped

GALLERY_NOTE = "Each picture, then its reconstructions; bytes are those of this picture."


def tables(record: CurvesRecord) -> list[Table]:
    """Tokenizers beside the baselines at their bytes, and every setting."""
    return [matched_table(record), _settings_table(record)]


def matched_table(record: CurvesRecord) -> Table:
    """Every length of the tokenizers, and the best of each baseline that takes no more bytes."""
    baselines = list(dict.fromkeys(point.codec for point in record.points if point.baseline))
    rows = []
    for point in (point for point in record.points if not point.baseline):
        others = [
            "–" if other is None else f"{psnr_text(other.metrics['psnr'])} ({other.bytes:,.0f})"
            for other in record.matched(point).values()
        ]
        own = [f"{point.codec}, {point.setting}", f"{point.bytes:,.1f}", psnr_text(point.metrics["psnr"])]
        rows.append([*own, *others])
    header = ["", "bytes", "PSNR dB", *(f"{name} dB (bytes)" for name in baselines)]
    note = "For each baseline, the setting with the least squared error at no more bytes; – for none."
    return Table(f"PSNR at matched bytes, n = {record.n:,}", header, rows, note if baselines else "")


def _settings_table(record: CurvesRecord) -> Table:
    names = list(record.points[0].metrics)
    rows = [
        [point.codec, point.setting, f"{point.bytes:,.1f}", *(_cell(name, point) for name in names)]
        for point in record.points
    ]
    note = "; ".join(["Brackets are 95% intervals over images", *record.warnings])
    header = ["", "setting", "bytes", *map(_label, names)]
    return Table(f"Every setting, n = {record.n:,}", header, rows, note)


def charts(record: CurvesRecord) -> list[Chart]:
    """One chart per metric, over bytes per image."""
    return [
        chart(record, name)
        for name in record.points[0].metrics
        if any("value" in point.metrics[name] for point in record.points)
    ]


def chart(record: CurvesRecord, metric: str) -> Chart:
    """A metric over bytes per image, one line per tokenizer and codec."""
    series = []
    for codec in dict.fromkeys(point.codec for point in record.points):
        points = [point for point in record.points if point.codec == codec]
        values = [point.metrics[metric] for point in points]
        if all("value" in value for value in values):
            has_interval = not points[0].baseline and all("low" in value for value in values)
            series.append(
                Series(
                    codec,
                    [point.bytes for point in points],
                    [value["value"] for value in values],
                    [value["low"] for value in values] if has_interval else None,
                    [value["high"] for value in values] if has_interval else None,
                    baseline=points[0].baseline,
                )
            )
    kind = described(metric)
    axis = f"{kind.label}, {kind.unit}" if kind.unit else kind.label
    return curves(f"{kind.label} for bytes", "bytes per image", f"{axis} (n = {record.n:,})", series)


def write_curves(path: Path, result: Result) -> None:
    """The report of `vistok eval tokens`."""
    record = result.record
    title = f"Rate and distortion of {record.tokenizer} on {record.data['source']}"
    longest = [point for point in record.points if not point.baseline]
    cards = []
    for codec in dict.fromkeys(point.codec for point in longest):
        best = max((point for point in longest if point.codec == codec), key=lambda point: point.bytes)
        detail = f"{best.setting}, {best.bytes:,.0f} bytes"
        cards.append(Card(f"{codec}: PSNR", _decibels(best), detail))
        if "value" in (fid := best.metrics.get("fid", {})):
            cards.append(Card(f"{codec}: rFID", f"{fid['value']:.3f}", detail))
    strips = [
        Strip([("original", picture.original), *picture.versions], picture.name)
        for picture in result.pictures()
    ]
    matched, settings = tables(record)
    gallery = Gallery("Pictures", strips, GALLERY_NOTE)
    parts = [*charts(record), matched, gallery, settings, *skipped(record), *circumstances(record)]
    write_html(path, Report(title, lead(record), cards, parts))


def _cell(name: str, point: Point) -> str:
    metric, style = point.metrics[name], described(name).style
    if "skipped" in metric:
        return "skipped"
    if "exact" in metric:
        return psnr_text(metric)
    if metric.get("low", metric["value"]) == metric.get("high", metric["value"]):
        return f"{metric['value']:{style}}"
    return f"{metric['value']:{style}} ({metric['low']:{style}}–{metric['high']:{style}})"


def _decibels(point: Point) -> str:
    text = psnr_text(point.metrics["psnr"])
    return text if text.startswith("all") else f"{text} dB"


def _label(name: str) -> str:
    kind = described(name)
    return f"{kind.label} {kind.unit}".strip()
