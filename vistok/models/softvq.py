"""SoftVQ-VAE and MAETok: 32 to 128 continuous tokens per image from a ViT, and another ViT back.

"SoftVQ-VAE: Efficient 1-Dimensional Continuous Tokenizer" (Chen et al., 2024, arXiv 2412.10958): a ViT reads
the image beside latent tokens, each of which becomes a mixture of codebook rows. "Masked Autoencoders Are
Effective Tokenizers for Diffusion Models" (Chen et al., 2025, arXiv 2502.03444): no quantizer, but some of
the patches are hidden from the encoder in training; patches have rotary positions, and the decoder's layers
are modulated by the latents. Written from the public code and configurations: no output of the originals was
recorded.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from ..configuration import build
from ..nn.cpu.linear import linear
from ..nn.vision_transformer import Attend, unpatchify
from ..nn.vit import EPSILON, ViTAttention, ViTMLP
from ..quantizers import ContinuousLatents, SoftVectorQuantizer
from ..registry import Entry, register, register_family
from ..tokenizer import Tokenizer, TrainingOutput
from .ranges import require_between, require_multiple, require_sizes
from .xqgan import SIZES, ViT

T = TypeVar("T")
SPREAD = 0.25  # of the share of hidden patches, before it is cut to its range
MODULATED = "decoder.model.blocks.0.adaLN_modulation.1.weight"


@dataclass(frozen=True)
class SoftVQConfig:
    """The fields of the original's configuration that define the networks and the quantizer.

    `masked` is MAETok: rotary positions and a decoder that the latents modulate; `enc_token_drop` and
    `enc_token_drop_max` are the range of the share of patches that are hidden in training. Without
    `quantized` latents stay as they are. Published generators predict (latents - `vq_mean`) / `vq_std`.
    """

    image_size: int = 256
    codebook_size: int = 8192
    codebook_embed_dim: int = 32
    codebook_l2_norm: bool = True
    entropy_loss_ratio: float = 0.01
    tau: float = 0.07
    num_codebooks: int = 4
    encoder_model: str = "large"
    decoder_model: str = "large"
    num_latent_tokens: int = 64
    enc_patch_size: int = 16
    dec_patch_size: int = 16
    quantized: bool = True
    masked: bool = False
    rope_theta: float = 10.0
    enc_token_drop: float = 0.0
    enc_token_drop_max: float = 0.6
    vq_mean: float = 0.0
    vq_std: float = 1.0

    def __post_init__(self) -> None:
        require_sizes(self, "image_size", "codebook_size", "codebook_embed_dim", "num_codebooks")
        require_sizes(self, "num_latent_tokens", "enc_patch_size", "dec_patch_size")
        require_between(self, ["tau", "vq_std"], 1e-6, 1e6)
        require_between(self, ["vq_mean"], -1e6, 1e6)
        require_between(self, ["entropy_loss_ratio"], 0, 1e6)
        require_between(self, ["rope_theta"], 1, 1e9)
        require_between(self, ["enc_token_drop", "enc_token_drop_max"], 0, 1)
        require_multiple(self, "image_size", "enc_patch_size", "dec_patch_size")
        if self.quantized:
            require_multiple(self, "num_latent_tokens", "num_codebooks")
        if self.enc_token_drop > self.enc_token_drop_max:
            raise ValueError(
                f"enc_token_drop is {self.enc_token_drop}; it is enc_token_drop_max, "
                f"{self.enc_token_drop_max}, or less"
            )
        for name in ("encoder_model", "decoder_model"):
            if getattr(self, name) not in SIZES:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it is {', '.join(SIZES)}")

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "SoftVQConfig":
        """Read field names, or the original's flat configuration, whose other keys are ignored where they do
        not change the networks.

        Raises ValueError for variants of the original that were never published.
        """
        if "enc_type" not in values:
            return build(cls, values, "softvq")
        known = {field.name for field in fields(cls)}
        stated = {name: value for name, value in values.items() if name in known}
        masked = "movq" in str(values.get("decoder_model"))
        published = {
            "enc_type": ("vit", "cnn"),
            "dec_type": ("vit", "cnn"),
            "to_pixel": ("linear", "linear"),
            "enc_cls_token": (True, True),
            "dec_cls_token": (not masked, True),
            "use_rope": (masked, False),
            "rope_mixed": (masked, False),
        }
        for name, (accepted, default) in published.items():
            if (value := values.get(name, default)) != accepted:
                raise ValueError(f"the configuration's {name} is {value!r}; this version has {accepted!r}")
        for side in ("encoder_model", "decoder_model"):
            name = str(stated.get(side))
            stated[side] = next((size for size in SIZES if f"vit_{size}_" in name), name)
        return build(cls, {**stated, "masked": masked}, "the configuration")


# Positions --------------------------------------------------------------------------------------------------


class Rotations(nn.Module):
    """Learned frequencies of rows and columns per layer and head, which turn queries and keys of patches
    (Heo et al., "Rotary Position Embedding for Vision Transformer", 2024, arXiv 2403.13298, RoPE-Mixed)."""

    def start(self, size: str, theta: float) -> None:
        """Add the frequencies `freqs` [2, layers, heads · d / 2], whose directions are random and whose
        magnitudes fall with the channel."""
        width, layers, self.heads = SIZES[size]
        dim = width // self.heads
        magnitude = theta ** (-torch.arange(0, dim, 4) / dim)  # [d / 4]
        angle = 2 * torch.pi * torch.rand(layers, self.heads, 1)
        both = torch.cat([angle.expand(-1, -1, dim // 4), angle.expand(-1, -1, dim // 4) + torch.pi / 2], -1)
        waves = torch.stack([both.cos(), both.sin()]) * magnitude.repeat(2)
        self.freqs = nn.Parameter(waves.flatten(2))

    def attends(self, side: int, first: int) -> list[Attend]:
        """Attention of every layer, in which the patches of a grid of `side` cells, from row `first` on, are
        turned."""
        cells = torch.arange(side**2, device=self.freqs.device)
        places = torch.stack([cells % side, cells // side]).float()  # columns, then rows
        angles = torch.einsum("an,alc->lnc", places, self.freqs.float())
        angles = angles.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [layers, h, N, d / 2]
        patches = slice(first, first + side**2)
        return [_turned_attention(*table, patches) for table in zip(angles.cos(), angles.sin(), strict=True)]


def _turned_attention(cos: Tensor, sin: Tensor, patches: slice) -> Attend:
    def turned(x: Tensor) -> Tensor:
        """[B, h, N, d]: neighbouring channels are turned as pairs."""
        rows = x[:, :, patches]
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32)).unflatten(-1, (-1, 2))
        a, b = wide.unbind(-1)
        rows = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)
        return torch.cat([x[:, :, : patches.start], rows, x[:, :, patches.stop :]], 2)

    return lambda query, key, value: F.scaled_dot_product_attention(turned(query), turned(key), value)


# Networks ---------------------------------------------------------------------------------------------------


class SoftVQEncoder(Rotations):
    """Images [B, 3, H, W] in [-1, 1] → latent tokens [B, K, D]."""

    def __init__(self, config: SoftVQConfig) -> None:
        super().__init__()
        width, count = SIZES[config.encoder_model][0], config.num_latent_tokens
        self.side = config.image_size // config.enc_patch_size
        self.model = ViT(config.encoder_model, self.side, config.enc_patch_size)
        self.latent_tokens = nn.Parameter(0.02 * torch.randn(1, count, width))
        self.latent_pos_embed = nn.Parameter(0.02 * torch.randn(1, count, width))
        self.drop = config.enc_token_drop, config.enc_token_drop_max
        if config.enc_token_drop:
            self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.rotary = config.masked
        if config.masked:
            self.start(config.encoder_model, config.rope_theta)

    def forward(self, images: Tensor) -> Tensor:
        """See the class; in training mode some patches are hidden where the configuration has it."""
        model, count = self.model, self.latent_tokens.shape[1]
        patches = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
        if self.training and self.drop[0]:
            patches = torch.where(self.hidden(*patches.shape[:2]).unsqueeze(2), self.mask_token, patches)
        # Parity: the position table is added to patches that have rotary positions, too.
        x = model.with_class(patches, model.pos_embed)
        x = torch.cat([x, (self.latent_tokens + self.latent_pos_embed).expand(len(x), -1, -1)], 1)
        plain = [F.scaled_dot_product_attention] * len(model.blocks)
        attends = self.attends(self.side, 1) if self.rotary else plain
        for block, attend in zip(model.blocks, attends, strict=True):
            x = block(x, attend)
        return model.norm(x[:, -count:])

    def hidden(self, batch: int, count: int) -> Tensor:
        """Which patches are hidden, bool [B, N]: as many for all images, their share normal around the upper
        end of its range and cut to it."""
        low, high = self.drop
        normal = torch.distributions.Normal(high, SPREAD)
        bounds = normal.cdf(torch.tensor([low, high]))
        share = float(normal.icdf(bounds[0] + (bounds[1] - bounds[0]) * torch.rand(())))
        order = torch.rand(batch, count, device=self.mask_token.device).argsort(1)
        return order < math.ceil(count * share)


class SoftVQDecoder(nn.Module):
    """Latent tokens [B, K, D] → images [B, 3, H, W] in about [-1, 1], not clamped."""

    def __init__(self, config: SoftVQConfig) -> None:
        super().__init__()
        width = SIZES[config.decoder_model][0]
        self.side = config.image_size // config.dec_patch_size
        self.model = ViT(config.decoder_model, self.side)
        _add_ends(self, config, width)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """Projected latents [B, K, D] and the latents themselves, which this decoder does not read."""
        model, cells = self.model, self.side**2
        rows = model.with_class(self.mask_token.expand(len(x), cells, -1), model.pos_embed)
        rows = model.blocks(torch.cat([rows, x + self.latent_pos_embed], 1))
        return _drawn(self, model.norm(rows[:, 1 : 1 + cells]))


class ModulatedBlock(nn.Module):
    """A ViT block without weights in its norms, whose latent rows are scaled and shifted by the latents."""

    def __init__(self, width: int, heads: int, channels: int) -> None:
        super().__init__()
        self.attn, self.mlp = ViTAttention(width, heads), ViTMLP(width, 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 4 * width))
        nn.init.zeros_(self.adaLN_modulation[1].weight)
        nn.init.zeros_(self.adaLN_modulation[1].bias)

    def forward(self, x: Tensor, latents: Tensor, attend: Attend) -> Tensor:
        """Rows [B, N, D], of which the last K belong to the latents [B, K, C] → [B, N, D]."""
        parts = self.adaLN_modulation(latents).chunk(4, -1)
        x = x + self.attn(_modulated(x, *parts[:2]), attend)
        return x + self.mlp(_modulated(x, *parts[2:]))


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    count = shift.shape[1]
    x = F.layer_norm(x, x.shape[-1:], eps=EPSILON)
    # Parity: times the scale, not times one more.
    return torch.cat([x[:, :-count], x[:, -count:] * scale + shift], 1)


class ModulatedDecoder(Rotations):
    """The same for MAETok: rotary positions alone, no class token, blocks that the latents modulate."""

    def __init__(self, config: SoftVQConfig) -> None:
        super().__init__()
        width, layers, heads = SIZES[config.decoder_model]
        self.side = config.image_size // config.dec_patch_size
        self.model = nn.Module()
        self.model.blocks = nn.ModuleList(
            ModulatedBlock(width, heads, config.codebook_embed_dim) for _ in range(layers)
        )
        self.start(config.decoder_model, config.rope_theta)
        _add_ends(self, config, width)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """Projected latents [B, K, D] and the latents themselves [B, K, C]."""
        cells = self.side**2
        rows = torch.cat([self.mask_token.expand(len(x), cells, -1), x + self.latent_pos_embed], 1)
        for block, attend in zip(self.model.blocks, self.attends(self.side, 0), strict=True):
            rows = block(rows, latents, attend)
        rows = rows[:, :cells]
        return _drawn(self, F.layer_norm(rows, rows.shape[-1:], eps=EPSILON))


def _add_ends(decoder: nn.Module, config: SoftVQConfig, width: int) -> None:
    """What both decoders have around their blocks."""
    decoder.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
    decoder.latent_pos_embed = nn.Parameter(0.02 * torch.randn(1, config.num_latent_tokens, width))
    decoder.to_pixel = nn.Module()
    decoder.to_pixel.model = nn.Linear(width, 3 * config.dec_patch_size**2)


def _drawn(decoder: nn.Module, rows: Tensor) -> Tensor:
    """Rows of patches [B, N, D] → images."""
    layer = decoder.to_pixel.model
    return unpatchify(linear(rows, layer.weight, layer.bias), decoder.side, decoder.side)


# The tokenizer ----------------------------------------------------------------------------------------------


@register_family("softvq")
class SoftVQ(Tokenizer):
    """SoftVQ-VAE and MAETok; see the module.

    Tokens hold `latents` [B, K, 32], not normalised: `normalised` gives what published generators predict.
    """

    config_class = SoftVQConfig
    own_config_wins = True
    checkpoint_ignores = (
        *("repa_model.*", "projection.*", "de_scale.*", "scale.*", "quantize.codebook_used"),
        *("encoder.mask_token", "encoder.freqs_t_*", "decoder.freqs_t_*", "decoder.model.patch_embed.*"),
        *("decoder_hog.*", "decoder_dino.*", "decoder_clip.*", "decoder_supcls.*"),
        *("post_quant_conv_*", "to_pixel_*", "hog_generator.*", "clip_model.*"),
    )

    def __init__(self, config: SoftVQConfig) -> None:
        super().__init__(config)
        self.image_size, self.num_tokens = config.image_size, config.num_latent_tokens
        channels = config.codebook_embed_dim
        self.encoder = SoftVQEncoder(config)
        self.quant_conv = nn.Linear(SIZES[config.encoder_model][0], channels)
        if config.quantized:
            self.quantize = SoftVectorQuantizer(
                config.codebook_size,
                channels,
                num_codebooks=config.num_codebooks,
                tau=config.tau,
                l2_norm=config.codebook_l2_norm,
                entropy_weight=config.entropy_loss_ratio,
            )
        else:
            self.quantize = ContinuousLatents(channels)
        self.post_quant_conv = nn.Linear(channels, SIZES[config.decoder_model][0])
        self.decoder = (ModulatedDecoder if config.masked else SoftVQDecoder)(config)

    @property
    def quantizer(self) -> ContinuousLatents:
        """The bottleneck; its key in checkpoints is `quantize`."""
        return self.quantize

    @classmethod
    def create(cls, **config: Any) -> Self:
        """Build with fresh weights from the fields of SoftVQConfig, or from the original's configuration."""
        return cls(SoftVQConfig.parse(config))

    @classmethod
    def recognise(
        cls, shapes: Mapping[str, torch.Size], config: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Recognised by latent tokens beside a linear projection. Sizes follow from shapes; a quantizer's
        temperature does not, so that its weights need a configuration."""
        own = ("encoder.latent_tokens", "encoder.model.patch_embed.proj.weight", "decoder.mask_token")
        if not all(key in shapes for key in own) or len(shapes.get("quant_conv.weight", ())) != 2:
            return None
        quantized = "quantize.embedding" in shapes
        if config and "enc_type" in config:
            return {**config, "quantized": quantized}
        if quantized:
            raise ValueError(
                "these SoftVQ weights come without the configuration of their quantizer, whose temperature "
                "tau no shape holds; give their config.json, or load by name: load('softvq-l-64', weights=…)"
            )
        return _config_from_shapes(shapes)

    @classmethod
    def rename_keys(cls, tensors: Mapping[str, T]) -> dict[str, T]:
        """Tensors without what MAETok's decoder has and does not read."""
        if MODULATED not in tensors:
            return dict(tensors)
        unused = ("decoder.model.pos_embed", "decoder.model.cls_token", "decoder.model.norm.")
        return {key: value for key, value in tensors.items() if not key.startswith(unused)}

    def latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] → [B, K, C]."""
        rows = self.encoder(2 * images - 1)
        return linear(rows, self.quant_conv.weight, self.quant_conv.bias)

    def pixels(self, latents: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Latents [B, K, C] → images [B, 3, H, W], not clamped."""
        rows = linear(latents, self.post_quant_conv.weight, self.post_quant_conv.bias)
        return (self.decoder(rows, latents) + 1) / 2

    def normalised(self, latents: Tensor) -> Tensor:
        """Latents of tokens → those that published generators predict."""
        return (latents - self.config.vq_mean) / self.config.vq_std

    def denormalised(self, latents: Tensor) -> Tensor:
        """Latents that published generators predict → those of tokens."""
        return latents * self.config.vq_std + self.config.vq_mean

    def forward(self, images: Tensor) -> TrainingOutput:
        """Training pass: images, codes, and the quantizer's losses."""
        quantized = self.quantize(self.latents(images))
        return TrainingOutput(self.pixels(quantized.latents), quantized.codes, quantized.losses)


def _config_from_shapes(shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    widths = {width: name for name, (width, _, _) in SIZES.items()}
    channels, width = shapes["quant_conv.weight"]
    patch = shapes["encoder.model.patch_embed.proj.weight"][3]
    return {
        "image_size": patch * math.isqrt(shapes["encoder.model.pos_embed"][1] - 1),
        "codebook_embed_dim": channels,
        "encoder_model": widths.get(width),
        "decoder_model": widths.get(shapes["decoder.mask_token"][2]),
        "num_latent_tokens": shapes["encoder.latent_tokens"][1],
        "enc_patch_size": patch,
        "dec_patch_size": math.isqrt(shapes["decoder.to_pixel.model.weight"][0] // 3),
        "quantized": False,
        "masked": MODULATED in shapes,
        "enc_token_drop": 0.4 if "encoder.mask_token" in shapes else 0.0,
    }


def _rows() -> list[Entry]:
    sizes = {"l": ("large", "large"), "bl": ("base", "large"), "b": ("base", "base")}
    soft = "SoftVQ-VAE (arXiv 2412.10958)"
    autoencoder = {
        **{"encoder_model": "base", "decoder_model": "base", "num_latent_tokens": 128},
        **{"quantized": False, "masked": True, "enc_token_drop": 0.4},
    }
    table = [("maetok-b-128", "MAETok/maetok-b-128", autoencoder, "MAETok (arXiv 2502.03444)", 0.48, 173.0)]
    published = {  # rFID and M parameters
        64: ((0.61, 608.1), (0.65, 390.6), (0.88, 173.0)),
        32: ((0.74, 608.0), (0.68, 390.5), (0.89, 172.9)),
    }
    for tokens, numbers in published.items():
        for (size, (encoder, decoder)), (rfid, parameters) in zip(sizes.items(), numbers, strict=True):
            config = {"encoder_model": encoder, "decoder_model": decoder, "num_latent_tokens": tokens}
            name = f"softvq-{size}-{tokens}"
            table.append((name, f"SoftVQVAE/{name}", config, soft, rfid, parameters))
    return [
        Entry(
            name=name,
            family="softvq",
            config=config,
            repo=repo,
            license="Apache-2.0",
            paper=paper,
            parameters=parameters,
            figures={"rFID": rfid},
            notes="licence as the code writes it into model cards, the repository of the code has none; "
            "trained on ImageNet; rFID at 256 px; the config.json of the weights wins over this row",
        )
        for name, repo, config, paper, rfid, parameters in table
    ]


register(*_rows())
