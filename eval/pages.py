"""What `vistok eval recon` and `vistok eval fid` show of a record: the table, and the report around it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .record import Record, environment
from .report import Example, Figure, Report, Table, histogram, write_html

if TYPE_CHECKING:
    from .reconstruction import Result

EXAMPLES = 6
"""Best, and worst, reconstructions that a report shows."""

HEADER = ["metric", "value", "95% interval", ""]
PFID_HEADER = ["alpha", "delta", "codes changed", "FID"]
# By name in a record: label, unit, and how its numbers are written.
FORMATS: dict[str, tuple[str, str, str]] = {
    "psnr": ("PSNR", "dB", ".2f"),
    "ssim": ("SSIM", "", ".4f"),
    "lpips-alex": ("LPIPS (AlexNet)", "", ".4f"),
    "lpips-vgg": ("LPIPS (VGG)", "", ".4f"),
    "clip": ("CLIP similarity", "", ".4f"),
    "fid": ("FID", "", ".3f"),
    "is": ("Inception score", "", ".2f"),
    "kid": ("KID", "", ".3e"),
    "precision": ("precision", "", ".4f"),
    "recall": ("recall", "", ".4f"),
    "pfid": ("pFID", "", ".3f"),
    "tokens-per-image": ("tokens an image", "", ".4g"),
    "bits-per-image": ("bits an image", "", ",.1f"),
    "bits-per-pixel": ("bits a pixel", "", ".4g"),
    "codebook-usage": ("codebook entries used", "", ".2%"),
    "perplexity": ("perplexity", "", ",.1f"),
    "bit-entropy": ("entropy of a bit", "", ".4f"),
    "lowest-bit-entropy": ("lowest entropy of a bit", "", ".4f"),
    "bit-correlation": ("correlation of bits", "", ".4f"),
}


def rows(record: Record) -> list[list[str]]:
    """A row under HEADER for each metric; what was not computed says "skipped"."""
    return [_row(name, metric, record) for name, metric in record.metrics.items()]


def pfid_rows(record: Record) -> list[list[str]]:
    """A row under PFID_HEADER for each setting of pFID's grid."""
    cells = record.metrics.get("pfid", {}).get("cells", [])
    return [
        [f"{cell['alpha']:g}", f"{cell['delta']}", f"{cell['changed']:.2%}", f"{cell['value']:.3f}"]
        for cell in cells
    ]


def _row(name: str, metric: dict[str, Any], record: Record) -> list[str]:
    label, unit, style = FORMATS.get(name, (name, "", ".4g"))
    if name == "fid" and record.tokenizer is not None:
        label = "rFID"
    if "skipped" in metric:
        return [label, "skipped", "", ""]
    interval = ""
    if "low" in metric and metric["low"] != metric["high"]:
        interval = f"{metric['low']:{style}} – {metric['high']:{style}}"
    value = f"{metric['value']:{style}}"
    return [label, f"{value} {unit}".strip(), interval, _remark(name, metric, style)]


def _remark(name: str, metric: dict[str, Any], style: str) -> str:
    """What a number is of."""
    if name == "pfid":
        return f"mean of {len(metric['cells'])} settings"
    if name == "is":
        return f"± {metric['std']:{style}} over {metric['splits']} splits"
    if name == "kid":
        return f"± {metric['std']:{style}} over {metric['subsets']} subsets of {metric['subset_size']}"
    if len(books := metric.get("codebooks", [])) > 1:
        return ", ".join(f"{each:{style}}" for each in books)
    return ""


def write_reconstruction(path: Path, result: "Result") -> None:
    """The report of `vistok eval recon`: tables, histograms of single images, the best and the worst."""
    record = result.record
    title = f"{record.tokenizer} on {record.data['source']}"
    figures = []
    for name, values in result.values.items():
        label, unit, _ = FORMATS.get(f"{name}-per-image", FORMATS.get(name, (name, "", "")))
        finite = values[np.isfinite(values)]
        if len(finite) and finite.min() < finite.max():
            figures.append(histogram(f"{label} of single images", f"{label} {unit}".strip(), finite))
    write_html(path, _report(title, record, figures, _examples(result)))


def write_fid(path: Path, record: Record) -> None:
    """The report of `vistok eval fid`: tables."""
    title = f"{record.data['a']['source']} against {record.data['b']['source']}"
    write_html(path, _report(title, record, [], []))


def _report(title: str, record: Record, figures: list[Figure], examples: list[Example]) -> Report:
    tables = [Table("Metrics", HEADER, rows(record), note=" ".join(record.warnings))]
    if cells := pfid_rows(record):
        tables.append(Table("pFID of every setting", PFID_HEADER, cells))
    total = sum(record.seconds.values())
    spent = sorted(record.seconds.items(), key=lambda stage: -stage[1])
    shares = [[stage, f"{seconds:.1f}", f"{seconds / total:.1%}"] for stage, seconds in spent]
    tables.append(Table("Where the time went", ["stage", "seconds", "share"], shares))
    if record.bad_images:
        bad = [[row["name"], row["reason"]] for row in record.bad_images]
        tables.append(Table(f"{len(bad)} unreadable images", ["image", "reason"], bad))
    if record.duplicates:
        same = [[", ".join(group)] for group in record.duplicates]
        tables.append(Table("Images that occur more than once", ["equal pixels"], same))
    return Report(title, _facts(record), tables, record.skipped, figures, examples)


def _facts(record: Record) -> dict[str, str]:
    """What is needed to read and repeat the numbers."""
    made = environment()
    facts = {"images": "unknown" if record.n is None else f"{record.n:,}", "seed": str(record.seed)}
    facts |= {name.replace("_", " "): str(value) for name, value in record.protocol.items()}
    if record.rate:
        facts["speed"] = f"{record.rate:.1f} images/s"
    facts["command"] = " ".join(made["command"])
    facts["versions"] = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    return facts


def _examples(result: "Result") -> list[Example]:
    """The best and the worst by PSNR, no image twice."""
    if "psnr" not in result.values:
        return []
    order = result.values["psnr"].argsort(kind="stable")
    count = min(EXAMPLES, len(order) // 2)
    chosen = [("best", row) for row in order[::-1][:count]] + [("worst", row) for row in order[:count]]
    examples = []
    for title, row in chosen:
        picture = result.picture(int(row))
        caption = f"{picture.name}, {picture.psnr:.2f} dB"
        examples.append(Example(title, picture.original, picture.reconstruction, caption))
    return examples
