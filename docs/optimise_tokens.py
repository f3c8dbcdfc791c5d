"""Fill a hole in a photograph by moving its tokens: assets/optimise_tokens.png and the figures beside it.

python docs/optimise_tokens.py
"""

from pathlib import Path

import torch

import vistok
from vistok.images import side_by_side
from vistok.train.data import photo

ROOT = Path(__file__).parents[1]
NAMES, SIDE, TOKENS = ("astronaut", "chelsea", "coffee"), 32, 24


def main() -> None:
    """Draw photograph, hole, the encoder's tokens and the optimised ones; print the PSNR inside the hole."""
    tokenizer = vistok.load("vistok-mini")
    target = vistok.to_tensor([photo(name) for name in NAMES], tokenizer.image_size)
    hole, at = torch.zeros_like(target[:1, :1], dtype=torch.bool), (tokenizer.image_size - SIDE) // 2
    hole[..., at : at + SIDE, at : at + SIDE] = True
    seen = (~hole).float()
    damaged = torch.where(hole, (target * seen).sum((2, 3), keepdim=True) / seen.sum(), target)

    def error(images: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        return ((images - target).square() * where).sum((1, 2, 3)) / where.sum() / 3

    start = tokenizer.reconstruct(damaged, TOKENS)
    result = vistok.optimise_tokens(
        tokenizer, lambda images: error(images, seen), damaged, num_tokens=TOKENS, steps=100
    )
    for name, before, after in zip(
        NAMES, error(start, hole.float()), error(result.images, hole.float()), strict=True
    ):
        print(f"{name}: {-10 * before.log10():.1f} → {-10 * after.log10():.1f} dB inside the hole")
    columns = [vistok.to_pil(images) for images in (target, damaged, start, result.images)]
    side_by_side([list(row) for row in zip(*columns, strict=True)]).save(
        ROOT / "assets" / "optimise_tokens.png"
    )


if __name__ == "__main__":
    main()
