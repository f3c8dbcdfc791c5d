"""`vistok encode` and `vistok decode`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    encoded_tiles,
    load_named,
    progress,
    quality_options,
    warn_of_unreached,
)
from .console import DEFAULT_TOKENIZER, Device, Name, Weights, decibels, say

if TYPE_CHECKING:
    from torch import Tensor

    from ..tokenizer import Tokenizer
    from ..tokens import Tokens


def encode(
    images: Images,
    output: Annotated[Path, typer.Option("-o", "--output", help="Token file to write.", show_default=False)],
    tokenizer: Name = DEFAULT_TOKENIZER,
    weights: Weights = None,
    tokens: Count = None,
    target: Target = None,
    target_psnr: TargetPSNR = None,
    resize: Annotated[
        bool,
        typer.Option("--resize", help="Resize and crop images to the tokenizer's size: one tile per image."),
    ] = False,
    batch_size: Batch = 8,
    device: Device = "auto",
) -> None:
    """Encode images to one token file, at their own sizes in tiles; with a target, each tile gets as many
    tokens as it needs."""
    from dataclasses import replace

    from ..tokens import Tokens
    from .image_inputs import gather

    quality = quality_options(target, target_psnr)
    _check_token_target(output)
    inputs = gather(images)
    model, bad, parts, records, names = load_named(tokenizer, device, weights), Skipped(), [], [], []
    code = _encoded_resized if resize else encoded_tiles
    for batch, coded, batch_records in code(model, inputs, tokens, quality, batch_size, bad):
        parts.append(coded.to("cpu"))
        records += batch_records
        names += [each.name for each in batch]
    if parts:
        coded = replace(Tokens.cat(parts), names=tuple(names))
        if coded.tiles is not None and set(coded.tiles.sizes) == {(model.image_size, model.image_size)}:
            coded = replace(coded, tiles=None, grid=None)  # every image is one tile and needs no joining
        coded.save(output)
        say(f"{output}: {_summary(coded, model.image_size, resize)}")
        payload = int(coded.bits_per_image.sum()) / 8
        print(f"{output.stat().st_size} bytes, {payload:g} of them tokens")
        for index, record in enumerate(records):
            say(f"  {index:5d}  {_line(record, coded)}")
        warn_of_unreached(records, quality, model)
    bad.finish()


def _encoded_resized(*arguments: Any) -> Iterator[tuple[list[Any], "Tokens", list[dict[str, Any]]]]:
    """Images, tokens and records of `encoded`, without pixels."""
    for batch, _, coded, records in encoded(*arguments):
        yield batch, coded, records


def _summary(coded: "Tokens", side: int, resized: bool) -> str:
    """How many images a token file holds, how they were coded, and how many tokens that took."""
    lengths = [coded.num_tokens] if coded.lengths is None else coded.lengths.tolist()
    least, most, mean = min(lengths), max(lengths), sum(lengths) / len(lengths)
    span = str(most) if least == most else f"{least} to {most} (mean {mean:.1f})"
    images = count_images(len(coded))
    if coded.tiles is None:
        return f"{images}{f' resized to {side}×{side}' * resized}, {span} tokens per image"
    tiles = f"{coded.tiles.total} tile{'s' * (coded.tiles.total != 1)} of {side}×{side}"
    return f"{images} in {tiles}, {span} tokens per tile"


def _line(record: dict[str, Any], coded: "Tokens") -> str:
    """What one image took: its size and tiles, its tokens where images may differ, and measured quality."""
    parts = []
    if coded.tiles is not None:
        tiles = f"{record['tiles']} tile{'s' * (record['tiles'] != 1)}"
        parts += [f"{record['width']}×{record['height']}", tiles]
    if coded.lengths is not None or coded.tiles is not None:
        parts.append(f"{record['tokens']:4d} tokens")
    if "psnr" in record:
        parts.append(decibels(record["psnr"]))
    parts.append(record["image"])
    return "  ".join(parts + ["not reached"] * (not record.get("reached", True)))


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
    """Decode a token file to PNGs at the images' own sizes, named like them, or numbered."""
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
    for picture in _decoded(model, coded, batch_size):
        save_picture(to_pil(picture)[0], next(paths))
    say(f"{count_images(len(coded))} in {out}")


def _decoded(model: "Tokenizer", coded: "Tokens", batch_size: int) -> Iterator["Tensor"]:
    """The pictures of a token file on the CPU, [3, H, W], one by one."""
    from ..tiles import decode_tiles

    if coded.tiles is not None:
        for number in progress(range(len(coded)), "decode"):
            yield decode_tiles(model, coded[number], batch_size=batch_size)[0].cpu()
        return
    for start in progress(range(0, len(coded), batch_size), "decode"):
        yield from model.decode(coded[start : start + batch_size]).cpu()


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
