"""`vistok demo`."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...commands.batches import load_named
from ...commands.console import DEFAULT_TOKENIZER, Device, say, table

if TYPE_CHECKING:
    from PIL import Image


def demo(
    image: Annotated[Path | None, typer.Argument(help="Image file; a shipped photograph by default.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Output picture file.")] = Path("vistok-demo.png"),
    device: Device = "auto",
) -> None:
    """Turn a photograph into tokens and back with the shipped tokenizer, offline, and show what it cost."""
    from importlib.resources import files

    from ...commands.picture_names import check_picture_target, save_picture
    from ...images import load_image, side_by_side, to_pil, to_tensor
    from ..metrics.image import psnr, ssim

    check_picture_target(out, replace_own=True)
    tokenizer = load_named(DEFAULT_TOKENIZER, device)
    photo = load_image(image or Path(str(files("vistok.assets") / "coffee.jpg")))
    pixels = to_tensor(photo, tokenizer.image_size)
    tokens, encode_time = _timed(lambda: tokenizer.encode(pixels))
    columns, labels, rows = to_pil(pixels), [f"original, {pixels[0].numel():,} bytes"], []
    for count in (1, 4, 16, tokenizer.num_tokens):
        prefix = tokens.prefix(count)
        decoded, decode_time = _timed(lambda prefix=prefix: tokenizer.decode(prefix).cpu())
        payload = int(prefix.bits_per_image[0]) / 8
        quality = float(psnr(decoded, pixels)[0])
        columns += to_pil(decoded)
        labels.append(f"{count} token{'s' * (count > 1)}, {payload:g} bytes")
        rows.append(
            [
                str(count),
                f"{payload:g}",
                f"1 : {pixels.numel() / payload:,.0f}",
                f"{quality:.2f}",
                f"{float(ssim(decoded, pixels)[0]):.3f}",
                f"{decode_time * 1e3:.0f}",
            ]
        )
    sheet = side_by_side([[_enlarged(column, 256) for column in columns]], labels)
    save_picture(sheet, out)
    size = tokenizer.image_size
    title = f"{image or 'coffee.jpg'} at {size}×{size} through {DEFAULT_TOKENIZER}"
    table(title, ["tokens", "bytes", "smaller than pixels", "PSNR dB", "SSIM", "decode ms"], rows)
    parameters = sum(p.numel() for p in tokenizer.parameters()) / 1e6
    print(f"{parameters:.1f} M parameters on {tokenizer.device}; encoding took {encode_time * 1e3:.0f} ms")
    say(f"picture: {out}")


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def _enlarged(picture: "Image.Image", side: int) -> "Image.Image":
    from PIL import Image

    return picture.resize(
        (side, side), Image.Resampling.NEAREST if picture.width < side else Image.Resampling.BICUBIC
    )
