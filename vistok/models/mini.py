"""vistok-mini: the shipped default, a small ordered tokenizer composed of the library's own parts.

128×128 pixels → up to 64 tokens of 16 bits, of which any prefix decodes. A ViT with latent tokens reads the
image, finite scalar quantization makes each latent an index, a transformer decodes straight to pixels (the 1D
layout of TiTok, arXiv 2406.07550; FSQ, arXiv 2309.15505; ordered by nested dropout, Rippel et al. 2014, arXiv
1402.0915). Beside both transformers runs a linear path over a thumbnail of the image: alone it is a transform
code, and with it the transformers only learn what a linear code cannot do. `fit_linear_path` starts it from
principal components.
"""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.transformer import Transformer
from ..quantizers import FiniteScalarQuantizer, Quantized
from ..registry import Entry, register, register_family
from ..tokenizer import Tokenizer, TrainingOutput
from ..tokens import Tokens

FIRST_WEIGHTS = "f781327d"
"""Start of the SHA-256 of the only vistok-mini that wrote tokens without a mark of its weights."""


@dataclass(frozen=True)
class MiniConfig:
    """Sizes of an ordered FSQ tokenizer; the defaults are vistok-mini."""

    image_size: int = 128
    patch_size: int = 16
    thumbnail_size: int = 32
    levels: tuple[tuple[int, tuple[int, ...]], ...] = (
        (4, (64, 32, 32)),
        (12, (16, 16, 16, 16)),
        (16, (16, 8, 8, 8, 8)),
        (12, (8, 8, 8, 8, 4, 4)),
        (20, (4, 4, 4, 4, 4, 4, 4, 4)),
    )
    """(tokens, levels of each channel) from the first tokens to the last; early tokens carry fewer, finer
    numbers."""
    width: int = 256
    encoder_depth: int = 3
    decoder_depth: int = 3
    heads: int = 4
    refiner_width: int = 0
    """Channels of the convolutions that redraw the decoded picture; 0: none."""

    @property
    def num_tokens(self) -> int:
        """Tokens at full length."""
        return sum(count for count, _ in self.levels)

    def level_table(self) -> list[list[int]]:
        """Levels [K, D] for the quantizer, unused channels filled with 1."""
        channels = max(len(row) for _, row in self.levels)
        return [[*row, *[1] * (channels - len(row))] for count, row in self.levels for _ in range(count)]

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple((count, tuple(row)) for count, row in self.levels))
        for name in ("image_size", "patch_size", "thumbnail_size", "width", "heads"):
            if not 1 <= getattr(self, name) <= 2**16:
                raise ValueError(f"{name} is {getattr(self, name)}; it is 1 to {2**16}")
        if not 0 <= self.refiner_width <= 2**16:
            raise ValueError(f"refiner_width is {self.refiner_width}; it is 0 to {2**16} channels")
        for name in ("encoder_depth", "decoder_depth"):
            if not 0 <= getattr(self, name) <= 1000:
                raise ValueError(f"{name} is {getattr(self, name)}; it is 0 to 1000 blocks")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if not self.levels or not all(
            1 <= count <= 2**16 and 1 <= len(row) <= 64 for count, row in self.levels
        ):
            raise ValueError(
                f"levels are {self.levels}; they are rows of 1 to {2**16} tokens of 1 to 64 channels"
            )
        for name in ("patch_size", "thumbnail_size"):
            if self.image_size % getattr(self, name):
                raise ValueError(
                    f"image_size {self.image_size} is not a multiple of {name} {getattr(self, name)}"
                )


class MiniEncoder(nn.Module):
    """Images [B, 3, H, W] → latents [B, K, D]: a ViT over patches and K latent tokens, plus the linear
    path."""

    def __init__(self, config: MiniConfig, used: Tensor) -> None:
        super().__init__()
        width, channels = config.width, used.shape[1]
        grid = (config.image_size // config.patch_size) ** 2
        self.thumbnail_size = config.thumbnail_size
        self.patch_embed = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.position = nn.Parameter(0.02 * torch.randn(grid + config.num_tokens, width))
        self.transformer = Transformer(width, config.encoder_depth, config.heads)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, channels)
        self.linear_path = nn.Linear(3 * config.thumbnail_size**2, int(used.sum()))
        self.register_buffer("used", used.flatten().nonzero().flatten(), persistent=False)
        self.num_tokens = config.num_tokens

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] → [B, K, D]."""
        images = images - 0.5
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)  # [B, HW/p², width]
        x = F.pad(patches, (0, 0, 0, self.num_tokens)) + self.position
        x = self.transformer(x, rows=slice(-self.num_tokens, None))
        thumbnail = F.adaptive_avg_pool2d(images, self.thumbnail_size).flatten(1)
        x = self.head(self.norm(x))  # [B, K, D]
        return x.flatten(1).index_add(1, self.used, self.linear_path(thumbnail).to(x.dtype)).view_as(x)


class Refiner(nn.Module):
    """The correction of a decoded picture: residual convolutions at full resolution, which know no position
    and so cannot draw a pattern that is aligned with patches."""

    def __init__(self, width: int, dilations: tuple[int, ...] = (1, 2, 4, 8)) -> None:
        super().__init__()
        self.enter = _conv(3, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(_conv(width, width, dilation), nn.GELU(), _conv(width, width))
            for dilation in dilations
        )
        self.leave = _conv(width, 3)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] around 0 → [B, 3, H, W] to add."""
        x = self.enter(images)
        for block in self.blocks:
            x = x + block(F.gelu(x))
        return self.leave(F.gelu(x))


def _conv(inputs: int, outputs: int, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation, padding_mode="replicate")


class MiniDecoder(nn.Module):
    """Latents [B, K, D] → images: a transformer over latents and a query per patch, plus the linear path."""

    def __init__(self, config: MiniConfig, used: Tensor) -> None:
        super().__init__()
        width, channels = config.width, used.shape[1]
        self.patch_size, self.side = config.patch_size, config.image_size // config.patch_size
        self.thumbnail_size, self.image_size = config.thumbnail_size, config.image_size
        self.embed = nn.Linear(channels, width)
        self.absent = nn.Parameter(0.02 * torch.randn(width))
        self.position = nn.Parameter(0.02 * torch.randn(self.side**2 + config.num_tokens, width))
        self.transformer = Transformer(width, config.decoder_depth, config.heads)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3 * config.patch_size**2)
        self.linear_path = nn.Linear(int(used.sum()), 3 * config.thumbnail_size**2)
        self.register_buffer("used", used.flatten().nonzero().flatten(), persistent=False)
        self.refiner = Refiner(config.refiner_width) if config.refiner_width else None

    def forward(self, latents: Tensor, present: Tensor) -> Tensor:
        """Latents [B, K, D] and which of them are there, bool [B, K] → [B, 3, H, W], not clamped."""
        present = present.unsqueeze(-1)
        x = torch.where(present, self.embed(latents), self.absent.to(latents.dtype))
        x = F.pad(x, (0, 0, self.side**2, 0)) + self.position  # [B, patches + K, width]
        x = self.head(self.norm(self.transformer(x, rows=slice(self.side**2))))
        x = x.unflatten(1, (self.side, self.side)).unflatten(3, (3, self.patch_size, self.patch_size))
        detail = x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # [B, 3, H, W]
        coarse = self.linear_path((latents * present).flatten(1)[:, self.used]).unflatten(
            1, (3, self.thumbnail_size, -1)
        )
        coarse = F.interpolate(coarse, self.image_size, mode="bilinear", antialias=False)
        picture = coarse + detail
        if self.refiner is not None:
            share = present.float().mean((1, 2), keepdim=True).unsqueeze(-1).to(picture.dtype)  # [B, 1, 1, 1]
            picture = picture + share.sqrt() * self.refiner(picture)
        return 0.5 + picture


@register_family("mini")
class MiniTokenizer(Tokenizer):
    """Ordered FSQ tokenizer; see the module."""

    config_class = MiniConfig
    ordered = True

    def __init__(self, config: MiniConfig) -> None:
        super().__init__(config)
        self.image_size, self.num_tokens = config.image_size, config.num_tokens
        self.quantizer = FiniteScalarQuantizer(config.level_table())
        self.encoder = MiniEncoder(config, self.quantizer.used)
        self.decoder = MiniDecoder(config, self.quantizer.used)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        # The transformers start with zero output, so that training begins at the linear code.
        nn.init.zeros_(self.encoder.head.weight)
        nn.init.zeros_(self.decoder.head.weight)

    def latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] → [B, K, D]."""
        return self.encoder(images)

    def pixels(self, latents: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Latents [B, k, D] with k up to K, of which each image has the first `lengths` [B] → [B, 3, H,
        W]."""
        batch, count, _ = latents.shape
        if lengths is None:
            lengths = torch.full((batch,), count, device=latents.device)
        present = torch.arange(self.num_tokens, device=latents.device) < lengths.unsqueeze(1)
        values = self.quantizer.expand(latents)
        return self.decoder(F.pad(values, (0, 0, 0, self.num_tokens - count)), present)

    def as_tokens(self, codes: Tensor) -> Tokens:
        """Wrap codes [B, K] with the name of this tokenizer and the mark of its weights."""
        tokens = super().as_tokens(codes)
        return dataclasses.replace(tokens, weights=self.weights_digest) if self.name else tokens

    def dequantize(self, tokens: Tokens | Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens (or bare codes) → latents [B, K, D] and lengths; tokens of other weights are refused."""
        if isinstance(tokens, Tokens) and self.name and tokens.tokenizer == self.name:
            self._check_weights(tokens.weights)
        return super().dequantize(tokens)

    def _check_weights(self, weights: str | None) -> None:
        if self.weights_digest not in (weights, weights or FIRST_WEIGHTS):
            raise ValueError(
                f"these tokens were written by {self.name} with {_marked(weights)}, and {self.name} has "
                f"{_marked(self.weights_digest)} here, which would decode them to other pictures: encode the "
                "pictures again, or decode the tokens with the release of vistok that wrote them"
            )

    def forward(self, images: Tensor, lengths: Tensor | None = None) -> TrainingOutput:
        """Training pass; `lengths` [B] keeps only the first tokens of each image (nested dropout)."""
        quantized: Quantized = self.quantizer(self.latents(images))
        return TrainingOutput(self.pixels(quantized.latents, lengths), quantized.codes, quantized.losses)

    @torch.no_grad()
    def fit_linear_path(self, images: Tensor) -> None:
        """Start the linear path as the principal-component code of `images` [N, 3, H, W] in [0, 1].

        Components go to tokens in order of variance, each scaled to lose least in its channel's quantization;
        the way back is ridge regression from the quantized codes. With the transformers at zero this alone is
        an ordered transform code. N should be several times the number of channels (372 by default).
        """
        encoder, decoder = self.encoder, self.decoder
        thumbnails = F.adaptive_avg_pool2d(images, encoder.thumbnail_size).flatten(1) - 0.5
        mean = thumbnails.mean(0)
        centred = thumbnails - mean
        components = torch.linalg.eigh(centred.T @ centred / len(centred)).eigenvectors
        components = components.flip(1)[:, : len(encoder.used)]
        scores = centred @ components
        scores /= (deviations := scores.std(0).clamp_min(1e-4))
        scale = self._best_scale(scores) / deviations
        encoder.linear_path.weight.copy_((components * scale).T)
        encoder.linear_path.bias.copy_(-(mean @ components) * scale)
        codes = self._coded(scores, scale * deviations)
        centre = codes.mean(0)
        gram = (codes - centre).T @ (codes - centre)
        gram.diagonal().add_(1e-3 * len(codes))
        weight = torch.linalg.solve(gram, (codes - centre).T @ centred).T
        decoder.linear_path.weight.copy_(weight)
        decoder.linear_path.bias.copy_(mean - weight @ centre)

    def _best_scale(self, scores: Tensor) -> Tensor:
        """For unit-variance scores [N, used] the factor per channel at which its codes predict them best,
        [used]."""
        candidates = torch.linspace(0.2, 1.6, 29)
        informative = []
        for factor in candidates:
            codes = self._coded(scores, factor)
            codes = codes - codes.mean(0)
            informative.append((codes * scores).mean(0).square() / codes.square().mean(0).clamp_min(1e-8))
        return candidates.to(scores)[torch.stack(informative).argmax(0)]

    def _coded(self, scores: Tensor, scale: Tensor) -> Tensor:
        """Unit-variance scores [N, used], times `scale`, through the quantizer."""
        used = self.encoder.used
        latents = scores.new_zeros(len(scores), self.quantizer.used.numel())
        latents[:, used] = scores * scale
        latents = latents.view(len(scores), self.num_tokens, -1)
        return self.quantizer.expand(self.quantizer(latents).latents).flatten(1)[:, used]


def _marked(weights: str | None) -> str:
    return f"weights {weights}" if weights else f"weights without a mark (the first ones, {FIRST_WEIGHTS})"


register(
    Entry(
        name="vistok-mini",
        family="mini",
        config={"refiner_width": 24},
        repo=None,
        file="vistok-mini.safetensors",
        license="Apache-2.0",
        paper="vistok (recipe and log in vistok/assets)",
        parameters=7.5,
        sha256="0fb19743af362d0473dbd5f14d76e3daeea51207996546ce5e1c1e08c3c51656",
        notes="128×128, any prefix of 64 tokens of 16 bits; trained on drawn scenes and 311 photographs",
    )
)
