"""Parity of Token-Shuffle: the order of tokens in windows, and both ends around an identity."""

import torch

from ...nn.token_shuffle import TokenShuffle, shuffle
from .case import Case, Outputs
from .fields import check_size, whole

FAMILIES = ("paper",)


def run(case: Case) -> Outputs:
    """vistok's outputs for every recorded tensor, in the order they were made."""
    if "compress.weight" not in case.keys:
        raise case.refusal("its state_dict has no compress.weight; of this family, Token-Shuffle is verified")
    for number, sizes in enumerate(_mappings(case, "cases")):
        batch, height, width, window, channels = (
            _size(case, sizes, name) for name in ("B", "H", "W", "s", "C")
        )
        shape = (batch, height * width, channels)
        check_size(case.path.name, f"shuffled_{number}", shape)
        values = torch.arange(batch * height * width * channels, dtype=torch.float32).view(shape)
        yield f"shuffled_{number}", shuffle(case.place(values), (height, width), window)
        positions = torch.arange(height * width).view(1, -1, 1)
        yield f"order_{number}", shuffle(positions, (height, width), window)[0]
    (sizes,) = _mappings(case, "composed", single=True)
    grid = _size(case, sizes, "H"), _size(case, sizes, "W")
    width, window = _size(case, sizes, "d"), _size(case, sizes, "s")
    blocks = sum(key.startswith("shuffle_blocks.") and key.endswith("fc1.weight") for key in case.keys)
    model = case.build(lambda: TokenShuffle(width, window, blocks))
    merged = model.merge(case.array("x (composition)"), grid)
    yield "composed_in", merged
    yield "composed_out", model.split(merged, grid)


def _mappings(case: Case, name: str, single: bool = False) -> list[dict]:
    """The sizes that the configuration lists under a name, or with `single` has there."""
    value = case.config.get(name)
    values = [value] if single else value
    if not isinstance(values, list) or not all(isinstance(sizes, dict) for sizes in values):
        raise case.refusal(f"config has {name} as {value!r}; it takes sizes by name")
    return values


def _size(case: Case, sizes: dict, name: str) -> int:
    return whole(case.path.name, sizes, name, 1, 2**16)
