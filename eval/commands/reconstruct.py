"""`vistok reconstruct`."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from ...commands.batches import (
    Batch,
    Count,
    Images,
    Skipped,
    Target,
    TargetPSNR,
    encoded,
    load_named,
    quality_options,
    warn_of_unreached,
)
from ...commands.console import DEFAULT_TOKENIZER, Device, Name, Weights, decibels, table
from .shared import check_json_target, write_json


def reconstruct(
    images: Images,
    tokenizer: Name = DEFAULT_TOKENIZER,
    weights: Weights = None,
    tokens: Count = None,
    target: Target = None,
    target_psnr: TargetPSNR = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the pictures and the JSON.")] = Path(
        "reconstructions"
    ),
    batch_size: Batch = 8,
    device: Device = "auto",
) -> None:
    """Encode and decode images: side-by-side PNGs, a table and JSON of PSNR, SSIM and bytes."""
    from ...commands.image_inputs import gather
    from ...commands.picture_names import picture_paths, save_picture
    from ...images import side_by_side, to_pil
    from ..metrics.image import psnr, ssim

    quality = quality_options(target, target_psnr)
    inputs = gather(images)
    stems = [each.path.name for each in inputs]
    pictures = dict(zip(inputs, picture_paths(out, stems, replace_own=True), strict=True))
    check_json_target(out / "reconstructions.json")
    model, bad, records = load_named(tokenizer, device, weights), Skipped(), []
    for batch, pixels, coded, batch_records in encoded(model, inputs, tokens, quality, batch_size, bad):
        decoded = model.decode(coded).cpu()
        measured = {"bytes": (coded.bits_per_image / 8).tolist()}
        measured |= {"psnr": psnr(decoded, pixels).tolist(), "ssim": ssim(decoded, pixels).tolist()}
        if target is not None:
            errors = (decoded.float() - pixels).abs().mean((1, 2, 3))
            measured |= {"error": errors.tolist(), "reached": (errors <= target).tolist()}
        for index, record in enumerate(batch_records):
            record |= {name: values[index] for name, values in measured.items()}
            picture = pictures[batch[index]]
            pair = [to_pil(pixels[index])[0], to_pil(decoded[index])[0]]
            label = f"{record['tokens']} tokens, {record['bytes']:g} bytes, {decibels(record['psnr'])}"
            save_picture(side_by_side([pair], ["original", label]), picture)
            records.append(record | {"picture": str(picture)})
    if records:
        mean = _tabulate(f"{model.label} at {model.image_size}×{model.image_size}", records)
        record = {"tokenizer": model.label} | quality | {"mean": mean, "images": records}
        write_json(out / "reconstructions.json", record)
        warn_of_unreached(records, quality, model)
    bad.finish()


_FIGURES = {
    "tokens": ("tokens", "{:g}"),
    "bytes": ("bytes", "{:g}"),
    "psnr": ("PSNR dB", "{:.2f}"),
    "ssim": ("SSIM", "{:.3f}"),
    "error": ("mean error", "{:.4f}"),
    "reached": ("reached", "{:.0%}"),
}


def _tabulate(title: str, records: list[dict[str, Any]]) -> dict[str, float]:
    """Print one row per image and one of means, and return the means: of PSNR without exact reconstructions,
    which are counted as "exact"."""
    from ..metrics.summary import interval, psnr_text

    columns = [name for name in _FIGURES if name in records[0]]
    mean = {name: sum(record[name] for record in records) / len(records) for name in columns}
    measured = interval([record["psnr"] for record in records])
    mean |= {"psnr": measured["value"]}

    def row(name: str, record: dict[str, Any]) -> list[str]:
        return [name, *(_cell(record[column], _FIGURES[column][1]) for column in columns)]

    rows = [row(record["image"], record) for record in records]
    header = ["image", *(_FIGURES[name][0] for name in columns)]
    averages = row(f"mean of {len(records)}", mean)
    averages[1 + columns.index("psnr")] = psnr_text(measured)
    table(title, header, [*rows, averages])
    return mean | ({"exact": measured["exact"]} if "exact" in measured else {})


def _cell(value: float | bool, style: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "exact" if value == math.inf else style.format(value)
