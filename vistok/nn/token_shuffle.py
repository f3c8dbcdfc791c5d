"""Token-Shuffle: a window of image tokens in one position of a language model.

"Token-Shuffle: Towards High-Resolution Image Generation with Autoregressive Models" (Ma et al., 2025, arXiv
2504.17789). No code or weights of it are published; keys and the order within a window are this library's.
"""

from torch import Tensor, nn

from .cpu.linear import linear
from .vit import ViTMLP


def shuffle(tokens: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Join each window of `window` × `window` tokens of a grid of H × W.

    Tokens [B, H·W, C], row by row, → [B, H·W / window², window² · C]: windows row by row, the tokens of a
    window row by row, channels innermost. Raises ValueError for grids that windows do not fill and tokens
    that do not fill the grid.
    """
    height, width = _check_grid(grid, window)
    if tokens.ndim != 3 or tokens.shape[1] != height * width:
        raise ValueError(
            f"tokens have shape {list(tokens.shape)}; a grid of {height} × {width} takes "
            f"[B, {height * width}, C]"
        )
    cells = tokens.unflatten(1, (height // window, window, width // window, window))
    return cells.transpose(2, 3).flatten(3).flatten(1, 2)


def unshuffle(merged: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Undo `shuffle`: [B, H·W / window², window² · C] → [B, H·W, C]. Raises ValueError as `shuffle` does."""
    height, width = _check_grid(grid, window)
    rows, columns, parts = height // window, width // window, window * window
    if merged.ndim != 3 or merged.shape[1] != rows * columns or merged.shape[2] % parts:
        raise ValueError(
            f"merged tokens have shape {list(merged.shape)}; a grid of {height} × {width} in windows of "
            f"{window} × {window} takes [B, {rows * columns}, {parts} · C]"
        )
    cells = merged.unflatten(1, (rows, columns)).unflatten(3, (window, window, -1))  # [B, r, c, p, q, C]
    return cells.transpose(2, 3).flatten(1, 4)


def _check_grid(grid: tuple[int, int], window: int) -> tuple[int, int]:
    height, width = grid
    if window < 1 or height < 1 or width < 1 or height % window or width % window:
        raise ValueError(
            f"a grid of {height} × {width} tokens does not divide into windows of {window} × {window}; both "
            "sides are multiples of the window"
        )
    return height, width


class ResidualMLP(ViTMLP):
    """Adds linear, erf GELU, linear to its input; keys `fc1` and `fc2`."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] → [B, N, D]."""
        return x + super().forward(x)


class TokenShuffle(nn.Module):
    """Both ends of a language model of `width` channels that reads and writes windows of image tokens.

    `merge` makes the embedded tokens narrow and joins those of a window; the language model then runs on
    `window`² times fewer positions; `split` turns each output into the outputs of the tokens of its window.
    Positions of text do not pass through this module. Each end has `blocks` residual MLPs.

    Raises ValueError for a width that is not a multiple of `window`².
    """

    def __init__(self, width: int, window: int = 2, blocks: int = 2) -> None:
        super().__init__()
        parts = window * window
        if window < 1 or width < 1 or width % parts or blocks < 0:
            raise ValueError(
                f"width is {width}, window {window} and blocks {blocks}; the width is a multiple of window², "
                "the window at least 1, and blocks 0 or more"
            )
        self.window = window
        self.compress, self.expand = nn.Linear(width, width // parts), nn.Linear(width // parts, width)
        self.shuffle_blocks = nn.ModuleList(ResidualMLP(width, 4 * width) for _ in range(blocks))
        self.unshuffle_blocks = nn.ModuleList(ResidualMLP(width, 4 * width) for _ in range(blocks))

    def merge(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Embedded tokens [B, H·W, D] of a grid (H, W) → one position per window [B, H·W / window², D]."""
        x = shuffle(linear(tokens, self.compress.weight, self.compress.bias), grid, self.window)
        for block in self.shuffle_blocks:
            x = block(x)
        return x

    def split(self, states: Tensor, grid: tuple[int, int]) -> Tensor:
        """Outputs of the language model [B, H·W / window², D] → those of the tokens [B, H·W, D], which the
        vocabulary's head reads."""
        for block in self.unshuffle_blocks:
            states = block(states)
        return linear(unshuffle(states, grid, self.window), self.expand.weight, self.expand.bias)
