"""The tables and reports of `vistok eval recon` and `vistok eval fid`."""

import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...commands.console import decibels
from ..engine.record import Record, environment
from ..metrics.metric import described, metrics
from .charts import Chart, bars, histogram
from .page import Card, Gallery, Report, Strip, Table, error_map, write_html

if TYPE_CHECKING:
    from ..tasks.reconstruction import Result

EXAMPLES = 6
"""Best, and worst, reconstructions that a report shows."""
ERROR_NOTE = "Original, reconstruction, and error: black is none, white a quarter of the range or more."
HEADER = ["metric", "value", "95% interval", ""]
PFID_HEADER = ["alpha", "delta", "codes changed", "FID"]


def _row(name: str, metric: dict[str, Any], record: Record) -> list[str]:
    kind = described(name)
    label, unit, style = kind.label, kind.unit, kind.style
    if name == "fid" and record.tokenizer is not None:
        label = "rFID"
    if "skipped" in metric:
        return [label, "skipped", "", ""]
    interval = ""
    if "low" in metric and metric["low"] != metric["high"]:
        interval = f"{metric['low']:{style}} – {metric['high']:{style}}"
    value = f"{metric['value']:{style}} {unit}".strip() if math.isfinite(metric["value"]) else "all exact"
    return [label, value, interval, _remark(name, metric, style)]


def _remark(name: str, metric: dict[str, Any], style: str) -> str:
    """The basis of a number: interval, splits or subsets."""
    if name == "pfid":
        return f"mean of {len(metric['cells'])} settings"
    if name == "is":
        return f"± {metric['std']:{style}} over {metric['splits']} splits"
    if name == "kid":
        return f"± {metric['std']:{style}} over {metric['subsets']} subsets of {metric['subset_size']}"
    if "exact" in metric and math.isfinite(metric["value"]):
        return f"without {metric['exact']} exact reconstructions"
    if len(books := metric.get("codebooks", [])) > 1:
        return ", ".join(f"{each:{style}}" for each in books)
    return ""


def write_reconstruction(path: Path, result: "Result") -> None:
    """The report of `vistok eval recon`: figures, histograms of single images, the best and the worst."""
    record = result.record
    charts: list[Chart] = []
    for name, values in result.values.items():
        kind = metrics().get(f"{name}-per-image") or described(name)
        label, unit = kind.label, kind.unit
        finite = values[np.isfinite(values)]
        if len(finite) and (finite.min() < finite.max() or name == "bits"):
            charts.append(histogram(f"{label}, each image", f"{label} {unit}".strip(), finite))
    parts = [*tables(record), *skipped(record), *charts, *_examples(result), *circumstances(record)]
    write_html(path, Report(title(record), lead(record), cards(record), parts))


def write_fid(path: Path, record: Record) -> None:
    """The report of `vistok eval fid`: figures and tables."""
    parts = [*tables(record), *skipped(record), *circumstances(record)]
    write_html(path, Report(title(record), lead(record), cards(record), parts))


def title(record: Record) -> str:
    """The title: tokenizer and data, or both sets of images."""
    if record.tokenizer is not None:
        return f"{record.tokenizer} on {record.data['source']}"
    return f"{record.data['a']['source']} against {record.data['b']['source']}"


def images(record: Record) -> str:
    """The number of images, on both sides where they differ."""
    sides = {side: record.data.get(side, {}).get("n", record.n) for side in "ab"}
    known = {each for each in sides.values() if each is not None}
    if len(known) == 2:
        return f"n = {sides['a']:,} against {sides['b']:,}"
    return f"n = {known.pop():,}" if known else "n unknown"


def lead(record: Record) -> str:
    """The number of images, and how they were selected."""
    bad = f"{len(record.bad_images):,} unreadable" if record.bad_images else ""
    twice = f"{len(record.duplicates):,} images more than once" if record.duplicates else ""
    others = sum(row["count"] for row in record.left_out)
    facts = [
        images(record),
        bad,
        f"{others:,} files left out" if others else "",
        twice,
        str(record.protocol.get("images", "")),
        f"seed {record.seed}",
    ]
    return " · ".join(each for each in facts if each)


def cards(record: Record) -> list[Card]:
    """The figures that were computed, of those that papers print."""
    large = []
    for name in (each.name for each in metrics().values() if each.card):
        metric = record.metrics.get(name, {})
        if "value" in metric:
            label, value, interval, remark = _row(name, metric, record)
            large.append(Card(label, value, interval or remark))
    return large


def tables(record: Record) -> list[Table]:
    """All metrics, and each setting of pFID's grid."""
    count = images(record)
    rows = [_row(name, metric, record) for name, metric in record.metrics.items()]
    parts = [Table(f"{title(record)}, {count}", HEADER, rows, note="; ".join(record.warnings))]
    if cells := record.metrics.get("pfid", {}).get("cells", []):
        grid = [
            [f"{cell['alpha']:g}", f"{cell['delta']}", f"{cell['changed']:.2%}", f"{cell['value']:.3f}"]
            for cell in cells
        ]
        parts.append(Table(f"pFID of every setting, {count}", PFID_HEADER, grid))
    return parts


def skipped(record: Record) -> list[Table]:
    """Metrics that were not computed and why, one row per reason; empty if all were."""
    reasons: dict[str, list[str]] = {}
    for name, reason in record.skipped.items():
        reasons.setdefault(reason, []).append(described(name).label)
    rows = [[", ".join(names), reason] for reason, names in reasons.items()]
    return [Table("Skipped", ["metric", "why"], rows)] if rows else []


def circumstances(record: Record) -> list[Table | Chart]:
    """Tables of the time per stage, of unreadable images, and of what is needed to repeat the numbers."""
    parts: list[Table | Chart] = []
    if record.bad_images:
        bad = [[row["name"], row["reason"]] for row in record.bad_images]
        parts.append(Table(f"{len(bad):,} unreadable images", ["image", "reason"], bad))
    if record.left_out:
        rows = [[f"{row['count']:,}", row["reason"], ", ".join(row["first"])] for row in record.left_out]
        parts.append(Table("Files left out", ["files", "reason", "the first"], rows))
    if record.duplicates:
        same = [[", ".join(group)] for group in record.duplicates]
        parts.append(Table(f"{len(same):,} images that occur more than once", ["equal pixels"], same))
    parts.append(Table("How it was measured", ["", ""], [list(fact) for fact in _facts(record).items()]))
    if record.seconds:
        parts.append(bars("Where the time went", "seconds", record.seconds))
    return parts


def _facts(record: Record) -> dict[str, str]:
    """The information to read and repeat the numbers."""
    facts = {"images": images(record), "seed": str(record.seed)}
    facts |= {f"protocol: {name}".replace("_", " "): str(value) for name, value in record.protocol.items()}
    if record.rate:
        facts["speed"] = f"{record.rate:.1f} images/s"
    return facts | facts_of_run()


def facts_of_run() -> dict[str, str]:
    """The command, and the versions it ran on."""
    made = environment()
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    return {"command": shlex.join(made["command"]), "versions": versions, "threads": str(made["threads"])}


def _examples(result: "Result") -> list[Gallery]:
    """The best and the worst by PSNR, each image at most once."""
    if "psnr" not in result.values:
        return []
    order = result.values["psnr"].argsort(kind="stable")
    worst = min(EXAMPLES, len(order) // 2)
    best = min(EXAMPLES, len(order) - worst)
    galleries = []
    for name, chosen in (("Best", order[::-1][:best]), ("Worst", order[:worst])):
        strips = []
        for row in chosen.tolist():
            picture = result.picture(row)
            error = error_map(picture.original, picture.reconstruction)
            pictures = [
                ("original", picture.original),
                ("reconstruction", picture.reconstruction),
                ("error", error),
            ]
            strips.append(Strip(pictures, f"{picture.name}, {decibels(picture.psnr)}"))
        galleries.append(Gallery(f"{name} images by PSNR", strips, ERROR_NOTE))
    return [gallery for gallery in galleries if gallery.strips]
