"""`vistok encode` and `vistok decode`."""

from pathlib import Path
from typing import Annotated

import typer

from .batches import (
    Batch,
    Count,
    Images,
    Skipped,
    Target,
    TargetPSNR,
    count_images,
    encoded,
    load_named,
    progress,
    quality_options,
    warn_of_unreached,
)
from .console import DEFAULT_TOKENIZER, Device, Name, Weights, decibels, say


def encode(
    images: Images,
    output: Annotated[Path, typer.Option("-o", "--output", help="Token file to write.", show_default=False)],
    tokenizer: Name = DEFAULT_TOKENIZER,
    weights: Weights = None,
    tokens: Count = None,
    target: Target = None,
    target_psnr: TargetPSNR = None,
    batch_size: Batch = 8,
    device: Device = "auto",
) -> None:
    """Encode images to one token file; with a target, each image gets as many tokens as it needs."""
    from dataclasses import replace

    from ..tokens import Tokens
    from .image_inputs import gather

    quality = quality_options(target, target_psnr)
    _check_token_target(output)
    inputs = gather(images)
    model, bad, parts, records, names = load_named(tokenizer, device, weights), Skipped(), [], [], []
    for batch, _, coded, batch_records in encoded(model, inputs, tokens, quality, batch_size, bad):
        parts.append(coded.to("cpu"))
        records += batch_records
        names += [each.name for each in batch]
    if parts:
        coded = replace(Tokens.cat(parts), names=tuple(names))
        coded.save(output)
        lengths = [record["tokens"] for record in records]
        least, most, mean = min(lengths), max(lengths), sum(lengths) / len(lengths)
        span = str(most) if least == most else f"{least} to {most} (mean {mean:.1f})"
        say(f"{output}: {count_images(len(coded))}, {span} tokens per image")
        payload = int(coded.bits_per_image.sum()) / 8
        print(f"{output.stat().st_size} bytes, {payload:g} of them tokens")
        for index, record in enumerate(records):
            length = f"{record['tokens']:4d} tokens  " if coded.lengths is not None else ""
            quality_text = f"{decibels(record['psnr'])}  " if "psnr" in record else ""
            short = "" if record.get("reached", True) else "  not reached"
            say(f"  {index:5d}  {length}{quality_text}{record['image']}{short}")
        warn_of_unreached(records, quality, model)
    bad.finish()


def decode(
    source: Annotated[Path, typer.Argument(help="Token file of `vistok encode`.", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the PNGs.")] = Path("decoded"),
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="Needed where the file names none, or none of the registry."),
    ] = None,
    weights: Weights = None,
    batch_size: Batch = 8,
    device: Device = "auto",
) -> None:
    """Decode a token file to PNGs, named like the images it was made from, or numbered."""
    from ..files import check_target
    from ..images import to_pil
    from ..registry import entries
    from ..tokens import Tokens
    from .picture_names import picture_paths, save_picture

    check_target(out, folder=True)
    coded = Tokens.load(source)
    name = tokenizer or coded.tokenizer
    if name is None:
        raise ValueError(f"{source} does not name the tokenizer that wrote it; give --tokenizer")
    if tokenizer is None and name not in entries():
        raise ValueError(
            f"{source} names the tokenizer {name!r}, which is not a registry name; if you trust the file, "
            "give --tokenizer with that folder, weights file or hub repository"
        )
    names = coded.names or [f"{number:05d}.png" for number in range(len(coded))]
    paths = iter(picture_paths(out, names))
    model = load_named(name, device, weights)
    for start in progress(range(0, len(coded), batch_size), "decode"):
        for picture in to_pil(model.decode(coded[start : start + batch_size]).cpu()):
            save_picture(picture, next(paths))
    say(f"{count_images(len(coded))} in {out}")


def _check_token_target(path: Path) -> None:
    """Raise OSError unless a token file can be written there; only token files are written over."""
    from ..files import check_target
    from ..packing import MAGIC

    check_target(path)
    if path.exists():
        with path.open("rb") as file:
            if file.read(len(MAGIC)) not in (MAGIC, b""):
                raise FileExistsError(
                    f"{path} is there already and is not a token file; name another with -o"
                )
