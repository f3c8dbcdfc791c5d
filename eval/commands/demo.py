"""`vistok demo`."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...commands.batches import load_named
from ...commands.console import DEFAULT_TOKENIZER, Device, say, table
from ...commands.console import device as named_device

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ...tokenizer import Tokenizer

SIDE = 256  # pixels per picture
MODEL = "scenes-vlm"
SCENE = 12
"""Number of the question of the test set that is asked."""
REDUCERS = ("divprune", "visionzip", "random")
KEEP = 0.1
LABEL = 34  # characters per line of a caption


def demo(
    image: Annotated[Path | None, typer.Argument(help="Image file; a shipped photograph by default.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Output picture file.")] = Path("vistok-demo.png"),
    device: Device = "auto",
) -> None:
    """Turn a photograph into tokens and back, and ask a question about a scene with all and with a tenth of
    its visual tokens; with shipped models, offline."""
    from importlib.resources import files

    from ...commands.picture_names import check_picture_target, save_picture
    from ...images import load_image, side_by_side

    check_picture_target(out, replace_own=True)
    tokenizer = load_named(DEFAULT_TOKENIZER, device)
    photo = load_image(image or Path(str(files("vistok.assets") / "coffee.jpg")))
    size = tokenizer.image_size
    title = f"{image or 'coffee.jpg'} at {size}×{size} through {DEFAULT_TOKENIZER}"
    halves = [_reconstructions(tokenizer, photo, title), _answers(named_device(device))]
    save_picture(side_by_side([[half] for half in halves]), out)
    say(f"picture: {out}")


def _reconstructions(tokenizer: "Tokenizer", photo: "Image.Image", title: str) -> "Image.Image":
    """The photograph from a few numbers of tokens, side by side; prints what each costs."""
    from ...images import side_by_side, to_pil, to_tensor
    from ..metrics.image import psnr, ssim

    pixels = to_tensor(photo, tokenizer.image_size)
    tokens, encode_time = _timed(lambda: tokenizer.encode(pixels))
    columns, labels, rows = to_pil(pixels), [f"original, {pixels[0].numel():,} bytes"], []
    for count in (1, 4, 16, tokenizer.num_tokens):
        prefix = tokens.prefix(count)
        decoded, decode_time = _timed(lambda prefix=prefix: tokenizer.decode(prefix).cpu())
        payload = int(prefix.bits_per_image[0]) / 8
        columns += to_pil(decoded)
        labels.append(f"{count} token{'s' * (count > 1)}, {payload:g} bytes")
        rows.append(
            [
                str(count),
                f"{payload:g}",
                f"1 : {pixels.numel() / payload:,.0f}",
                f"{float(psnr(decoded, pixels)[0]):.2f}",
                f"{float(ssim(decoded, pixels)[0]):.3f}",
                f"{decode_time * 1e3:.0f}",
            ]
        )
    table(title, ["tokens", "bytes", "smaller than pixels", "PSNR dB", "SSIM", "decode ms"], rows)
    parameters = sum(p.numel() for p in tokenizer.parameters()) / 1e6
    print(f"{parameters:.1f} M parameters on {tokenizer.device}; encoding took {encode_time * 1e3:.0f} ms")
    return side_by_side([[_enlarged(column) for column in columns]], labels)


def _answers(device: "torch.device") -> "Image.Image":
    """A scene with the answers to a question from all and from a tenth of its visual tokens; prints them."""
    from itertools import islice
    from textwrap import fill

    from ...compress import attach
    from ...images import side_by_side
    from ..data.questions import open_questions
    from ..tasks.vlm.model import load

    vlm = load(MODEL, device=device)
    question = next(islice(open_questions("scenes", count=SCENE + 1).questions, SCENE, None))
    batch = vlm.batch([question])
    (picture,) = batch.pictures[0]
    total = int(vlm.visual_tokens(batch.inputs)[0])

    def answer() -> tuple[str, str]:
        text = vlm.texts(vlm.answer(batch.inputs).ids)[0]
        return text, "correct" if text in question.answers else "incorrect"

    text, verdict = answer()
    columns = [picture, picture]
    labels = [fill(question.text, LABEL), f"all {total} tokens:\n“{text}”, {verdict}"]
    rows = [["none", str(total), text, verdict]]
    for name in REDUCERS:
        with attach(vlm.model, name, keep=KEEP) as session:
            text, verdict = answer()
            kept = len(session.explain()[0].tokens)
            columns.append(session.overlay(picture))
        labels.append(f"{kept} tokens of {name}:\n“{text}”, {verdict}")
        rows.append([name, str(kept), text, verdict])
    table(f"{question.text} ({MODEL})", ["reducer", "visual tokens", "answer", ""], rows)
    return side_by_side([[_enlarged(column) for column in columns]], labels)


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def _enlarged(picture: "Image.Image") -> "Image.Image":
    from PIL import Image

    resampling = Image.Resampling.NEAREST if picture.width < SIDE else Image.Resampling.BICUBIC
    return picture.resize((SIDE, SIDE), resampling)
