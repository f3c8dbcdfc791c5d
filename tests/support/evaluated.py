"""What tests of evaluations share: folders of pictures, and the records that come out."""

import json

import torch

from vistok import to_pil
from vistok.train.scenes import scene


def scenes(count, side=128):
    """Procedural pictures [count, 3, side, side], which a trained tokenizer gives back."""
    drawn = [torch.from_numpy(scene(3, index, side)) for index in range(count)]
    return torch.stack(drawn).permute(0, 3, 1, 2).float() / 255


def save(images, folder):
    """Floats [N, 3, H, W] as 00.png, 01.png, …; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(to_pil(images)):
        picture.save(folder / f"{number:02d}.png")
    return folder


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))
