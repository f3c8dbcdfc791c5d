"""Draw assets/mini_successor.png: held-out photographs by vistok-mini, by earlier weights, and by files of
the same size.

`python docs/mini_successor.py EARLIER.safetensors` also prints the means of the metrics over the photographs,
at 64 and at 16 tokens (128 and 32 bytes). Needs the extras `perceptual` and `train`.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

import vistok
from vistok.eval.metrics.metric import metrics
from vistok.eval.tasks.codecs import apply, best_within
from vistok.images import side_by_side, to_pil
from vistok.train.data import photo

ROOT = Path(__file__).parents[1]
PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee")
SIDE, TOKENS, BYTES_PER_TOKEN = 128, (64, 16), 2
MEASURES = ("psnr", "ssim", "stlpips-alex", "stlpips-vgg")
CODECS = ("thumbnail", "WebP")


def columns(earlier: Path, images: Tensor, count: int) -> dict[str, Tensor]:
    """What each way makes of the images [n, 3, H, W] in as many bytes as `count` tokens take."""
    budget = count * BYTES_PER_TOKEN
    pictures = to_pil(images)
    models = {
        "earlier weights": vistok.load(earlier, config={"family": "mini", "config": {}}),
        "vistok-mini": vistok.load("vistok-mini"),
    }
    result = {f"{name}, {budget} bytes": model.reconstruct(images, count) for name, model in models.items()}
    for codec in CODECS:
        (setting,) = best_within(codec, pictures, [budget]) or (None,)
        if setting is not None:
            decoded, sizes = apply(setting, pictures)
            result[f"{codec}, {int(sizes.float().mean())} bytes"] = decoded
    return result


def figures(images: Tensor, decoded: Tensor) -> list[str]:
    """The means of the measures over the images."""
    values = []
    for name in MEASURES:
        measure = metrics()[name].make(None, torch.device("cpu"))
        values.append(f"{float(measure(decoded, images).mean()):.3f}")
    return values


def main() -> None:
    """Draw the picture and print the table."""
    earlier = Path(sys.argv[1])
    images = vistok.to_tensor([photo(name) for name in PHOTOGRAPHS], SIDE)
    print(f"| | {' | '.join(MEASURES)} |\n| --- |{' --- |' * len(MEASURES)}")
    for count in TOKENS:
        made = columns(earlier, images, count)
        for title, decoded in made.items():
            print(f"| {title} | {' | '.join(figures(images, decoded))} |")
        if count == TOKENS[0]:
            stacked = [images, *made.values()]
            rows = [[to_pil(column)[i].resize((256, 256)) for column in stacked] for i in range(len(images))]
            titles = [title.replace(", ", "\n") for title in ("photograph", *made)]
            side_by_side(rows, titles).save(ROOT / "assets" / "mini_successor.png")


if __name__ == "__main__":
    main()
