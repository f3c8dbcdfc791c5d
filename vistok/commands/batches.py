"""Images through a tokenizer in batches, as several commands do it."""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import complain, note
from .console import device as named_device

if TYPE_CHECKING:
    import torch

    from ..tokenizer import Tokenizer
    from ..tokens import Tokens
    from .image_inputs import ImageInput

Count = Annotated[
    int | None,
    typer.Option(
        "--tokens", help="Tokens per image or tile, for tokenizers with a choice; with a target, the most."
    ),
]
Target = Annotated[
    float | None,
    typer.Option(
        "--target",
        help="Mean absolute error (0 to 1) to aim at, where the model chooses lengths (KARL: 0.05).",
    ),
]
TargetPSNR = Annotated[
    float | None,
    typer.Option(
        "--target-psnr", help="dB to reach with the fewest tokens, where any prefix decodes (mini, FlexTok)."
    ),
]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="Images or tiles at a time.")]
Images = Annotated[
    list[Path],
    typer.Argument(help="Image files, folders of them, or patterns ('*.png').", show_default=False),
]


class Skipped:
    """Images that could not be used: reported at once, counted, and an exit status of 1 at the end."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, path: Path, error: Exception) -> None:
        """Report and count one image."""
        self.count += 1
        note(f"skipped {path}: {error}")

    def finish(self) -> None:
        """Exit with status 1 if any image was skipped."""
        if self.count:
            complain(f"{count_images(self.count)} skipped")
            raise typer.Exit(1)


def load_named(name: str, device: str, weights: Path | None = None) -> "Tokenizer":
    """The tokenizer of pictures of a registry name, path or hub repository on the device of that name."""
    from ..loading import load

    model = load(name, device=named_device(device), weights=weights)
    model.require_modality("image", "this command works on picture files, so it takes")
    return model


def quality_options(target: float | None, target_psnr: float | None) -> dict[str, float]:
    """The target quality as an option of `encode`."""
    if target is not None and target_psnr is not None:
        raise ValueError(
            "--target (mean absolute error) and --target-psnr (dB) both choose the number of tokens per "
            "image; give one of them"
        )
    options = {"target": target, "target_psnr": target_psnr}
    return {name: value for name, value in options.items() if value is not None}


def check_quality(model: "Tokenizer", quality: dict[str, float]) -> None:
    """Raise ValueError for a target quality that this tokenizer does not take."""
    if model.adaptive:
        takes = "it chooses lengths by --target, a mean absolute error such as 0.05"
    elif model.ordered:
        takes = "any prefix of its tokens decodes, so give --target-psnr, in dB, or --tokens"
    else:
        takes = f"it has exactly {model.num_tokens} tokens per image; `vistok list` shows those with a choice"
    if ("target" in quality and not model.adaptive) or ("target_psnr" in quality and not model.ordered):
        option = next(iter(quality)).replace("_", "-")
        raise ValueError(f"--{option} is not for {model.label}: {takes}")


def encoded(
    model: "Tokenizer",
    inputs: "list[ImageInput]",
    count: int | None,
    quality: dict[str, float],
    batch_size: int,
    bad: Skipped,
) -> "Iterator[tuple[list[ImageInput], torch.Tensor, Tokens, list[dict[str, Any]]]]":
    """Images, pixels, tokens and one record per image, in batches: its tokens, and with `target_psnr` the
    quality."""
    check_quality(model, quality)
    model.check_num_tokens(count)
    for batch, pixels in batches(inputs, model.image_size, batch_size, bad, "encode"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* do not reach")  # reported once, for all batches
            coded = model.encode(pixels, count, **quality)
        measured: dict[str, list[Any]] = {}
        if "target_psnr" in quality:
            measured = {"psnr": coded.psnr.tolist(), "reached": coded.reached.tolist()}
            coded = coded.tokens
        lengths = [coded.num_tokens] * len(coded) if coded.lengths is None else coded.lengths.tolist()
        records = [{"image": str(e.path), "tokens": k} for e, k in zip(batch, lengths, strict=True)]
        for index, record in enumerate(records):
            record |= {name: values[index] for name, values in measured.items()}
        yield batch, pixels, coded, records


def warn_of_unreached(records: list[dict[str, Any]], quality: dict[str, float], model: "Tokenizer") -> None:
    """Warn once, for all images that did not reach the target quality."""
    short = [record for record in records if not record.get("reached", True)]
    if not short:
        return
    which = f"{len(short)} of {count_images(len(records))} did not reach"
    if "target_psnr" in quality:
        worst = min(record["psnr"] for record in short)
        warnings.warn(
            f"{which} {quality['target_psnr']:g} dB (the worst has {worst:.2f}) and kept the best prefix "
            "tried; lower --target-psnr, or raise --tokens where that is below the most",
            stacklevel=2,
        )
    else:
        worst = max(record["error"] for record in short)
        warnings.warn(
            f"{which} a mean error of {quality['target']:g} (the worst has {worst:.4f}); {model.label} "
            "estimates beforehand how many tokens that takes: lower --target where it must be kept",
            stacklevel=2,
        )


def count_images(count: int) -> str:
    """A number of images as text: "1 image", "2 images"."""
    return f"{count} image{'s' * (count != 1)}"


def batches(
    inputs: "list[ImageInput]", size: int, batch_size: int, bad: Skipped, title: str
) -> "Iterator[tuple[list[ImageInput], torch.Tensor]]":
    """Readable images in batches; unreadable ones are reported to `bad`."""
    import torch

    from ..images import to_tensor

    batch: list[ImageInput] = []
    pixels: list[torch.Tensor] = []
    for number, each in enumerate(progress(inputs, title), start=1):
        try:
            pixels.append(to_tensor(each.path, size))
            batch.append(each)
        except (ValueError, OSError) as error:
            bad.add(each.path, error)
        if len(batch) == batch_size or (batch and number == len(inputs)):
            yield batch, torch.cat(pixels)
            batch, pixels = [], []


def encoded_tiles(
    model: "Tokenizer",
    inputs: "list[ImageInput]",
    count: int | None,
    quality: dict[str, float],
    batch_size: int,
    bad: Skipped,
) -> "Iterator[tuple[list[ImageInput], Tokens, list[dict[str, Any]]]]":
    """Images, tokens of their tiles and one record per image, in groups of at least `batch_size` tiles: its
    size, tiles and tokens, and with `target_psnr` the quality."""
    check_quality(model, quality)
    model.check_num_tokens(count)
    for group, pictures in _whole_pictures(inputs, model.image_size, batch_size, bad):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* do not reach")  # reported once, for all groups
            coded = model.encode_tiles(pictures, count, batch_size=batch_size, **quality)
        measured: dict[str, list[Any]] = {}
        if "target_psnr" in quality:
            measured = {"psnr": coded.psnr.tolist(), "reached": coded.reached.tolist()}
            coded = coded.tokens
        records = []
        for index, each in enumerate(group):
            one, (height, width) = coded[index], coded.tiles.sizes[index]
            tokens = one.num_tokens * one.tiles.total if one.lengths is None else int(one.lengths.sum())
            record = {"image": str(each.path), "tokens": tokens, "tiles": one.tiles.total}
            record |= {"width": width, "height": height}
            records.append(record | {name: values[index] for name, values in measured.items()})
        yield group, coded, records


def _whole_pictures(
    inputs: "list[ImageInput]", side: int, batch_size: int, bad: Skipped
) -> "Iterator[tuple[list[ImageInput], list[torch.Tensor]]]":
    """Readable images at their own sizes, in groups of at least `batch_size` tiles; a large one is a group of
    its own or the last of one."""
    from ..images import to_tensor

    group: list[ImageInput] = []
    pictures: list[torch.Tensor] = []
    tiles = 0
    for number, each in enumerate(progress(inputs, "encode"), start=1):
        try:
            picture = to_tensor(each.path, None)[0]
            group.append(each)
            pictures.append(picture)
            tiles += -(-picture.shape[1] // side) * -(-picture.shape[2] // side)
        except (ValueError, OSError) as error:
            bad.add(each.path, error)
        if group and (tiles >= batch_size or number == len(inputs)):
            yield group, pictures
            group, pictures, tiles = [], [], 0


def progress(items: Any, title: str) -> Any:
    """A progress bar that appears only when the work takes more than a second."""
    from tqdm import tqdm

    return tqdm(items, desc=title, delay=1.0, leave=False, disable=not sys.stderr.isatty())
