"""PVC: a vision transformer whose last blocks also attend over time, and its compressor to n/16 tokens.

Written anew from the paper: the published repository holds the preprocessing (`algorithms.pvc`) and not the
model, so nothing of this module was compared with the original. What the paper leaves open is chosen here and
marked "Chosen".
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.vit import EPSILON, ViTBlock

WAVES = 256  # features of a frame's time
BLOCK = 4  # side of the square of patches behind one token


@dataclass(frozen=True)
class PVCConfig:
    """The sizes of the encoder: by default InternViT-300M of InternVL2, whose weights its blocks take.

    The last `temporal_blocks` of the `depth` blocks attend over time; the paper does not state how many, so
    there is no default. `out_width` is the language model's, `adaptive_width` that inside the layers for
    scales, offsets and times (Chosen). Each frame attends to itself and the `window - 1` before it; the paper
    trains on up to 96 frames, and the window bounds the memory of longer streams (Chosen).

    Raises ValueError for sizes that do not fit each other.
    """

    temporal_blocks: int
    out_width: int = 4096
    image_size: int = 448
    patch_size: int = 14
    width: int = 1024
    depth: int = 24
    heads: int = 16
    hidden: int = 4096
    adaptive_width: int = 256
    window: int = 96

    def __post_init__(self) -> None:
        if not 0 <= self.temporal_blocks <= self.depth:
            raise ValueError(
                f"temporal_blocks is {self.temporal_blocks}; it takes 0 to all {self.depth} blocks"
            )
        if self.window < 1:
            raise ValueError(f"window is {self.window}; it takes a number of frames from 1")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads")
        if self.image_size % (BLOCK * self.patch_size):
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of {BLOCK} patches of {self.patch_size}"
            )


@dataclass(frozen=True)
class PVCState:
    """What later frames attend to: `keys` and `values` of each temporal block [B · N, heads, frames, d] of up
    to `window - 1` frames, for `batch` streams."""

    batch: int
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def bytes(self) -> int:
        """Memory of the tensors."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def to(self, device: torch.device | str) -> "PVCState":
        """The state on a device."""
        keys, values = (tuple(each.to(device) for each in part) for part in (self.keys, self.values))
        return PVCState(self.batch, keys, values)


def time_waves(times: Tensor) -> Tensor:
    """Times [T] as cosines and then sines of falling frequencies, [T, 256] (base 10000, Chosen)."""
    half = WAVES // 2
    steps = torch.arange(half, device=times.device, dtype=torch.float32)
    angles = times.float()[:, None] * torch.exp(-math.log(10_000) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], 1)


class TimedNorm(nn.Module):
    """γ(z) ⊙ LayerNorm(x) + β(z) for z = x + TE(t), where TE embeds the time of the frame.

    At first γ is 1 and β is 0 (Chosen).
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, EPSILON, elementwise_affine=False)
        self.time = _mlp(WAVES, hidden, width)
        self.gamma, self.beta = _mlp(width, hidden, width), _mlp(width, hidden, width)
        for part, bias in ((self.gamma, 1.0), (self.beta, 0.0)):
            nn.init.zeros_(part[-1].weight)
            nn.init.constant_(part[-1].bias, bias)

    def forward(self, x: Tensor, waves: Tensor) -> Tensor:
        """x [B, N, T, C] at times whose waves are [T, 256] → [B, N, T, C]."""
        z = x + self.time(waves.to(x.dtype))
        return self.gamma(z) * self.norm(x) + self.beta(z)


def _mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, out))


class TemporalAttention(nn.Module):
    """α ⊙ attention of each patch over time, causal, behind a `TimedNorm`; α is 0 at first (Chosen)."""

    def __init__(self, config: PVCConfig) -> None:
        super().__init__()
        self.heads, self.window = config.heads, config.window
        self.norm = TimedNorm(config.width, config.adaptive_width)
        self.qkv, self.proj = nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)
        self.alpha = nn.Parameter(torch.zeros(config.width))

    def forward(
        self, x: Tensor, waves: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [B, N, T, C] and the keys and values before it → the same shape, and those for later frames."""
        rows = self.qkv(self.norm(x, waves)).flatten(0, 1).unflatten(-1, (3, self.heads, -1))
        query, key, value = rows.permute(2, 0, 3, 1, 4)  # [B N, heads, T, d]
        if past is not None:
            key, value = (torch.cat(pair, 2) for pair in zip(past, (key, value), strict=True))
        number = torch.arange(key.shape[2], device=x.device)
        distance = number[-query.shape[2] :, None] - number
        mask = (distance >= 0) & (distance < self.window)
        attended = F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)
        first = max(key.shape[2] - self.window + 1, 0)
        # Copies, which do not hold the frames before them in memory.
        following = (key[:, :, first:].clone(), value[:, :, first:].clone())
        return self.alpha * self.proj(attended).view_as(x), following


class PVCBlock(ViTBlock):
    """A block of InternViT, which scales what it adds (keys ls1, ls2), with attention over time in between
    where `is_temporal`."""

    def __init__(self, config: PVCConfig, *, is_temporal: bool) -> None:
        super().__init__(config.width, config.heads, config.hidden)
        self.ls1, self.ls2 = (nn.Parameter(torch.full((config.width,), 0.1)) for _ in range(2))
        self.temporal = TemporalAttention(config) if is_temporal else None

    def forward(
        self, x: Tensor, waves: Tensor, past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """x [B, T, N, C] → the same shape, and keys and values for later frames."""
        batch, following = len(x), None
        x = x.flatten(0, 1)
        x = x + self.ls1 * self.attn(self.norm1(x))
        if self.temporal is not None:
            by_patch = x.unflatten(0, (batch, -1)).transpose(1, 2)  # [B, N, T, C]
            change, following = self.temporal(by_patch, waves, past)
            x = x + change.transpose(1, 2).flatten(0, 1)
        x = x + self.ls2 * self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))
        return x.unflatten(0, (batch, -1)), following


class PVCEncoder(nn.Module):
    """Frames of a video → n/16 tokens per frame, each frame adding to what earlier ones showed.

    PVC: Progressive Visual Token Compression for Unified Image and Video Processing in Large Vision-Language
    Models (Yang et al., 2024, arXiv 2412.09613), equations of its section 3; see the top of this file for
    what was chosen. Pictures are videos of equal frames (`algorithms.pvc.still_video`). A frame depends on
    the frames before it alone, so a stream in any pieces has the tokens of the whole clip. Embeddings and
    blocks have the keys of InternViT.
    """

    def __init__(self, config: PVCConfig) -> None:
        super().__init__()
        self.config = config
        self.side = config.image_size // config.patch_size
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(0.02 * torch.randn(1, 1, config.width))
        self.embeddings.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)
        places = 0.02 * torch.randn(1, self.side**2 + 1, config.width)
        self.embeddings.position_embedding = nn.Parameter(places)
        first = config.depth - config.temporal_blocks
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            PVCBlock(config, is_temporal=number >= first) for number in range(config.depth)
        )
        width = BLOCK**2 * config.width
        self.norm = TimedNorm(width, config.adaptive_width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, config.out_width),
            nn.GELU(),
            nn.Linear(config.out_width, config.out_width),
        )

    @property
    def num_tokens(self) -> int:
        """Tokens per frame."""
        return (self.side // BLOCK) ** 2

    def forward(
        self, frames: Tensor, times: Tensor, state: PVCState | None = None
    ) -> tuple[Tensor, PVCState]:
        """Encode the next frames of B videos.

        Args:
            frames: [B, T, 3, S, S], normalised as `algorithms.pvc.pvc_tiles` does.
            times: [T], of the same clock for all frames of a stream: numbers of the frames, or seconds.
            state: what the frames before them left; None at the start of a video.

        Returns:
            Tokens [B, T, n/16, D], and the state for the frames that follow.

        Raises:
            ValueError: other shapes, and a state of another number of streams or of another encoder.
        """
        self._check(frames, times, state)
        batch, length = frames.shape[:2]
        patches = self.embeddings.patch_embedding(frames.flatten(0, 1)).flatten(2).transpose(1, 2)
        classes = self.embeddings.class_embedding.expand(len(patches), -1, -1)
        x = torch.cat([classes, patches], 1) + self.embeddings.position_embedding
        x, waves = x.unflatten(0, (batch, length)), time_waves(times)
        keys, values = [], []
        for block in self.encoder.layers:
            past = None
            if state is not None and block.temporal is not None:
                past = state.keys[len(keys)], state.values[len(keys)]
            x, following = block(x, waves, past)
            if following is not None:
                keys.append(following[0])
                values.append(following[1])
        blocks = self._unshuffled(x[:, :, 1:]).transpose(1, 2)  # [B, n/16, T, 16 C]
        tokens = self.mlp(self.norm(blocks, waves)).transpose(1, 2)
        return tokens, PVCState(batch, tuple(keys), tuple(values))

    def _unshuffled(self, x: Tensor) -> Tensor:
        """Patches [B, T, N, C] → squares of 4 × 4 of them side by side, [B, T, N/16, 16 C]."""
        count = self.side // BLOCK
        squares = x.unflatten(2, (count, BLOCK, count, BLOCK)).transpose(3, 4)
        return squares.flatten(4).flatten(2, 3)

    def _check(self, frames: Tensor, times: Tensor, state: PVCState | None) -> None:
        side = self.config.image_size
        if frames.ndim != 5 or tuple(frames.shape[2:]) != (3, side, side) or not frames.shape[1]:
            raise ValueError(
                f"frames have the shape {list(frames.shape)}; this encoder takes [B, T, 3, {side}, {side}] "
                "with at least one frame"
            )
        if tuple(times.shape) != (frames.shape[1],):
            raise ValueError(
                f"times have the shape {list(times.shape)}; they are one number for each of the "
                f"{frames.shape[1]} frames"
            )
        if state is None:
            return
        places, heads = self.side**2 + 1, self.config.heads
        shape = (len(frames) * places, heads, self.config.width // heads)
        own = {(len(each), each.shape[1], each.shape[3]) for each in (*state.keys, *state.values)}
        fits = len(state.keys) == len(state.values) == self.config.temporal_blocks and own <= {shape}
        if state.batch != len(frames) or not fits:
            raise ValueError(
                f"the state is of {state.batch} streams and {len(state.keys)} temporal blocks, and does not "
                f"fit {len(frames)} streams of this encoder with {self.config.temporal_blocks}; start a new "
                "stream with state=None"
            )
