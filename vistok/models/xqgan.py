"""XQ-GAN and its relatives ImageFolder and RobustTok: one ViT tokenizer with interchangeable quantizers.

"XQ-GAN: An Open-source Image Tokenization Framework for Autoregressive Generation" (2024, arXiv 2412.01762);
"ImageFolder: Autoregressive Image Generation with Folded Tokens" (2024, arXiv 2410.01756); "Robust Latent
Matters" (2025, arXiv 2503.08354). A ViT reads the image beside latent tokens; each branch of these has a
quantizer of its own: plain, or residual over scales, with a codebook or binary. A second ViT decodes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from ..configuration import build
from ..nn.cpu.linear import linear
from ..nn.vit import EPSILON, ScaledViTBlock
from ..quantizers import (
    MultiScaleBinaryQuantizer,
    MultiScaleVectorQuantizer,
    ProductQuantizer,
    Quantizer,
    VectorQuantizer,
    perturb,
)
from ..registry import Entry, register, register_family
from ..tokenizer import Tokenizer, TrainingOutput
from .ranges import require_between, require_depths, require_sizes

SIZES = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}  # width, layers, heads
PATCH = 16
TEN_SCALES = (1, 1, 2, 3, 3, 4, 5, 6, 8, 11)


@dataclass(frozen=True)
class XQGANConfig:
    """The fields of the original's configuration that define the network and its quantizers.

    `alpha`, `beta` and `delta` are those of the latent perturbation in training (`quantizers.perturb`), which
    is off while `beta` is 0.
    """

    codebook_size: int = 4096
    codebook_embed_dim: int = 64
    codebook_l2_norm: bool = True
    commit_loss_beta: float = 0.25
    encoder_model: str = "base"
    decoder_model: str = "base"
    abs_pos_embed: bool = True
    product_quant: int = 1
    num_latent_tokens: int = 256
    """Latent tokens per branch."""
    v_patch_nums: tuple[int, ...] = (16,)
    share_quant_resi: int = 4
    codebook_drop: float = 0.0
    start_drop: int = 3
    lfq: bool = False
    image_size: int = 256
    alpha: float = 0.0
    beta: float = 0.0
    delta: int = 1

    def __post_init__(self) -> None:
        require_sizes(self, "codebook_size", "codebook_embed_dim", "num_latent_tokens", "image_size")
        require_depths(self, "product_quant", "v_patch_nums", "start_drop")
        require_between(self, ["commit_loss_beta"], 0, 1e6)
        require_between(self, ["codebook_drop", "alpha", "beta"], 0, 1)
        require_between(self, ["share_quant_resi"], 0, 1024)
        require_between(self, ["delta"], 1, self.codebook_size)
        for name in ("encoder_model", "decoder_model"):
            if getattr(self, name) not in SIZES:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it is {', '.join(SIZES)}")
        if self.image_size % PATCH:
            raise ValueError(f"image_size is {self.image_size}; it is a multiple of {PATCH}, a patch's side")
        if self.v_patch_nums[-1] ** 2 != self.num_latent_tokens:
            raise ValueError(
                f"num_latent_tokens is {self.num_latent_tokens} and v_patch_nums ends with "
                f"{self.v_patch_nums[-1]}; the last scale has all latent tokens of a branch, its side squared"
            )
        if self.lfq and self.codebook_size != 2**self.codebook_embed_dim:
            raise ValueError(
                f"lfq has one bit per channel: codebook_size {self.codebook_size} is not "
                f"2**{self.codebook_embed_dim}"
            )
        if self.beta and (self.product_quant > 1 or len(self.v_patch_nums) > 1):
            raise ValueError("beta is above 0; latents are perturbed with one plain codebook only")

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "XQGANConfig":
        """Read field names, or the original's flat configuration, whose other keys are ignored where they do
        not change the network."""
        if "enc_type" not in values:
            return build(cls, values, "xqgan")
        kinds = (values.get("enc_type"), values.get("dec_type"))
        if kinds != ("dinov2", "dinov2"):
            raise ValueError(
                f"enc_type and dec_type are {' and '.join(map(str, kinds))}; this version has the published "
                "dinov2"
            )
        known = {field.name for field in fields(cls)}
        stated = {name: value for name, value in values.items() if name in known}
        for side in ("encoder_model", "decoder_model"):
            name = str(stated.get(side, "base"))
            stated[side] = next((size for size in SIZES if f"vit_{size}_" in name), name)
        return build(cls, stated, "the configuration")


class ViT(nn.Module):
    """The backbone: class token, position table and blocks; `patch` pixels per side add the embedding of
    patches."""

    def __init__(self, size: str, grid: int, patch: int | None = None) -> None:
        super().__init__()
        width, layers, heads = SIZES[size]
        self.cls_token = nn.Parameter(1e-6 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + grid**2, width))
        if patch is not None:
            self.patch_embed = nn.Module()
            self.patch_embed.proj = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.Sequential(*(ScaledViTBlock(width, heads, 4 * width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, EPSILON)

    def with_class(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Rows [B, N, D] behind the class token, with positions [1, 1 + N, D] added."""
        return torch.cat([self.cls_token.expand(len(rows), -1, -1), rows], 1) + positions

    def positions(self, side: int) -> Tensor:
        """The position table for a grid of `side` cells, [1, 1 + side², D]."""
        whole, grid = self.pos_embed, math.isqrt(self.pos_embed.shape[1] - 1)
        if side == grid:
            return whole
        table = whole[:, 1:].float().transpose(1, 2).unflatten(2, (grid, grid))
        table = F.interpolate(table, (side, side), mode="bicubic", antialias=True)
        return torch.cat([whole[:, :1], table.flatten(2).transpose(1, 2).to(whole.dtype)], 1)


class XQEncoder(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] → latent tokens [B, P K, D]."""

    def __init__(self, config: XQGANConfig) -> None:
        super().__init__()
        width = SIZES[config.encoder_model][0]
        count, branches = config.num_latent_tokens, config.product_quant
        self.side, self.branches = config.v_patch_nums[-1], branches
        self.model = ViT(config.encoder_model, config.image_size // PATCH, PATCH)
        self.latent_tokens = nn.Parameter(0.02 * torch.randn(1, branches * count, width))
        if config.abs_pos_embed:
            levels = [0] * self.model.pos_embed.shape[1]
            levels += [branch + 1 for branch in range(branches) for _ in range(count)]
            self.register_buffer("lvl1LC", torch.tensor([levels]))
            self.lvl_embed = nn.Embedding(1 + branches, width)
        else:
            self.latent_pos_embed = nn.Parameter(0.02 * torch.randn(1, branches * count, width))

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] → [B, P K, D]."""
        model, count = self.model, self.latent_tokens.shape[1]
        patches = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
        if hasattr(self, "lvl_embed"):
            latents = self.latent_tokens + model.positions(self.side)[:, 1:].repeat(1, self.branches, 1)
        else:
            latents = self.latent_tokens + self.latent_pos_embed
        x = model.with_class(patches, model.pos_embed)
        x = torch.cat([x, latents.expand(len(x), -1, -1)], 1)
        if hasattr(self, "lvl_embed"):
            x = x + self.lvl_embed(self.lvl1LC)
        return model.norm(model.blocks(x)[:, -count:])


class XQDecoder(nn.Module):
    """Latent tokens [B, K, D] → images [B, 3, H, W] in about [-1, 1], not clamped."""

    def __init__(self, config: XQGANConfig) -> None:
        super().__init__()
        width, grid = SIZES[config.decoder_model][0], config.image_size // PATCH
        count = config.num_latent_tokens
        self.grid, self.side = grid, config.v_patch_nums[-1]
        self.model = ViT(config.decoder_model, grid)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.to_pixel = nn.Module()
        self.to_pixel.model = nn.Linear(width, 3 * PATCH**2)
        if config.abs_pos_embed:
            self.register_buffer("lvl1LC", torch.tensor([[0] * (1 + grid**2) + [1] * (1 + count)]))
            self.lvl_embed = nn.Embedding(2, width)
        else:
            self.latent_pos_embed = nn.Parameter(0.02 * torch.randn(1, count, width))

    def forward(self, latents: Tensor) -> Tensor:
        """[B, K, D] → [B, 3, H, W]."""
        model, cells = self.model, self.grid**2
        x = model.with_class(self.mask_token.expand(len(latents), cells, -1), model.pos_embed)
        if hasattr(self, "lvl_embed"):
            # Parity: the class token stands before the latents once more.
            x = torch.cat([x, model.with_class(latents, model.positions(self.side))], 1)
            x = x + self.lvl_embed(self.lvl1LC)
        else:
            x = torch.cat([x, latents + self.latent_pos_embed], 1)
        x = model.norm(model.blocks(x)[:, 1 : 1 + cells])
        x = linear(x, self.to_pixel.model.weight, self.to_pixel.model.bias)
        x = x.unflatten(1, (self.grid, self.grid)).unflatten(3, (PATCH, PATCH, 3))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # [B, 3, H, W]


@register_family("xqgan")
class XQGAN(Tokenizer):
    """XQ-GAN, ImageFolder and RobustTok; see the module.

    Codes are [B, K] for one branch and [B, K, P] for P of them, where K counts the codes of all scales.
    """

    config_class = XQGANConfig
    checkpoint_ignores = ("semantic_model.*", "sem_linear.*", "detail_model.*")

    def __init__(self, config: XQGANConfig) -> None:
        super().__init__(config)
        self.image_size = config.image_size
        width = SIZES[config.encoder_model][0]
        self.encoder, self.decoder = XQEncoder(config), XQDecoder(config)
        self.quant_conv = nn.Conv2d(width, config.codebook_embed_dim, 1)
        if config.product_quant == 1:
            self.quantize = _branch(config)
        else:
            self.quantizes = nn.ModuleList(_branch(config) for _ in range(config.product_quant))
            # The same modules as one quantizer, which is not registered: their keys stay the published ones.
            self.__dict__["product"] = ProductQuantizer(list(self.quantizes))
        channels = config.product_quant * config.codebook_embed_dim
        self.post_quant_conv = nn.Conv2d(channels, SIZES[config.decoder_model][0], 1)
        self.num_tokens = sum(side**2 for side in config.v_patch_nums)

    @property
    def quantizer(self) -> Quantizer:
        """The bottleneck: of the only branch, or the product of all."""
        return self.quantize if self.config.product_quant == 1 else self.product

    @property
    def branches(self) -> list[Quantizer]:
        """The quantizer of each branch."""
        return [self.quantize] if self.config.product_quant == 1 else list(self.quantizes)

    @classmethod
    def create(cls, **config: Any) -> Self:
        """Build with fresh weights from the fields of XQGANConfig, or from the original's configuration."""
        return cls(XQGANConfig.parse(config))

    @classmethod
    def recognise(
        cls, shapes: Mapping[str, torch.Size], config: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Everything follows from keys and shapes but what only training uses; codebooks are compared as unit
        vectors, as all published ones."""
        if "encoder.model.blocks.0.attn.qkv.weight" not in shapes or "decoder.mask_token" not in shapes:
            return None
        if len(shapes.get("quant_conv.weight", ())) != 4:  # SoftVQ-VAE has a linear layer
            return None
        return config if config and "enc_type" in config else _config_from_shapes(shapes)

    def latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] → [B, K, P C], the branches side by side."""
        tokens = self.encoder(2 * images - 1)
        tokens = linear(tokens, self.quant_conv.weight.flatten(1), self.quant_conv.bias)
        return torch.cat(tokens.chunk(self.config.product_quant, 1), -1)

    def pixels(self, latents: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Quantized latents [B, K, P C] → images [B, 3, H, W], not clamped."""
        rows = linear(latents, self.post_quant_conv.weight.flatten(1), self.post_quant_conv.bias)
        return (self.decoder(rows) + 1) / 2

    @torch.no_grad()
    def decode_scales(self, codes: Tensor, scales: int) -> Tensor:
        """Codes [B, K] or [B, K, P] → images [B, 3, H, W] in [0, 1] as the first `scales` scales give them.

        Raises ValueError for a model without scales or another number of them.
        """
        sides = self.config.v_patch_nums
        if len(sides) == 1 or not 1 <= scales <= len(sides):
            raise ValueError(
                f"scales is {scales}; {self.label} has {len(sides)}" + ", so use decode" * (len(sides) == 1)
            )
        kept = codes[:, : sum(side**2 for side in sides[:scales])]
        return self.pixels(self.quantizer.decode(kept)).clamp(0, 1)

    def forward(self, images: Tensor) -> TrainingOutput:
        """Training pass: images, codes, and the quantizers' losses; latents are perturbed as configured."""
        config, latents = self.config, self.latents(images)
        if isinstance(self.branches[0], VectorQuantizer):
            quantized = self.quantizer(latents)
        else:
            # All branches of an image drop the same scales.
            depths = self.branches[0].draw_depths(len(latents)).to(latents.device) if self.training else None
            quantized = self.quantizer(latents, depths)
        rows = quantized.latents
        if self.training and config.beta:
            rows = perturb(
                self.quantize, latents, rows, alpha=config.alpha, beta=config.beta, delta=config.delta
            )
        return TrainingOutput(self.pixels(rows), quantized.codes, quantized.losses)


def _branch(config: XQGANConfig) -> Quantizer:
    size, dim, sides = config.codebook_size, config.codebook_embed_dim, config.v_patch_nums
    if len(sides) == 1:
        return VectorQuantizer(
            size,
            dim,
            l2_norm=config.codebook_l2_norm,
            commitment_cost=config.commit_loss_beta,
            hit_statistics=True,
        )
    settings = {
        "commitment_cost": config.commit_loss_beta,
        "shared_convolutions": config.share_quant_resi,
        "dropout": config.codebook_drop,
        "first_dropped": config.start_drop,
    }
    if config.lfq:
        return MultiScaleBinaryQuantizer(dim, sides, normalise=config.codebook_l2_norm, **settings)
    return MultiScaleVectorQuantizer(size, dim, sides, l2_norm=config.codebook_l2_norm, **settings)


def _config_from_shapes(shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    widths = {width: name for name, (width, _, _) in SIZES.items()}
    dim, width = shapes["quant_conv.weight"][:2]
    branches = shapes["post_quant_conv.weight"][1] // dim
    first = "quantize." if branches == 1 else "quantizes.0."
    count = shapes["encoder.latent_tokens"][1] // branches
    hits = shapes[f"{first}ema_vocab_hit_SV"]
    side = math.isqrt(count)
    sides = (side,) if len(hits) == 1 else TEN_SCALES
    if len(hits) == 2 and (hits[0] != len(sides) or sides[-1] != side):
        raise ValueError(
            f"these weights have {hits[0]} scales up to {side}×{side}, and keys do not show their sides; "
            "give config={'family': 'xqgan', 'config': {'v_patch_nums': …}}"
        )
    convolutions = {key for key in shapes if key.startswith(f"{first}quant_resi.") and key.endswith("weight")}
    unshared = len(hits) == 2 and f"{first}quant_resi.0.weight" in convolutions
    return {
        "codebook_size": hits[-1],
        "codebook_embed_dim": dim,
        "encoder_model": widths.get(width),
        "decoder_model": widths.get(shapes["decoder.mask_token"][-1]),
        "abs_pos_embed": "encoder.lvl_embed.weight" in shapes,
        "product_quant": branches,
        "num_latent_tokens": count,
        "v_patch_nums": sides,
        "share_quant_resi": 0 if unshared else max(1, len(convolutions)),
        "lfq": f"{first}scaler" in shapes,
        "image_size": PATCH * math.isqrt(shapes["encoder.model.pos_embed"][1] - 1),
    }


def _rows() -> list[Entry]:
    adobe = "Adobe Research (non-commercial)"
    none = "none stated"
    terms = {
        adobe: "for non-commercial research only, Adobe Research License",
        none: "no licence stated, so all rights are reserved",
    }
    plain = {"codebook_size": 4096, "codebook_embed_dim": 64}
    wide = {"codebook_size": 8192, "codebook_embed_dim": 32}
    perturbed = plain | {"alpha": 1.0, "beta": 0.1, "delta": 100}
    pair = {"codebook_size": 4096, "codebook_embed_dim": 32, "product_quant": 2}
    scales = {"num_latent_tokens": 121, "v_patch_nums": TEN_SCALES}
    robust, xq = "RobustTok (arXiv 2503.08354)", "XQ-GAN (arXiv 2412.01762)"
    tuned = "; decoder trained on generated tokens afterwards"
    folder, post = "ImageFolder (arXiv 2410.01756)", "RobusTok (arXiv 2509.12474)"
    table = [  # name, configuration, repository and file, licence, paper, M parameters, rFID, further notes
        ("xqgan-vq-4096", plain, "RobustTok: XQGAN-4096.pt", adobe, robust, 172.3, 0.91, ""),
        ("xqgan-vq-8192", wide, "RobustTok: XQGAN-8192.pt", adobe, robust, 172.2, 0.81, ""),
        ("robusttok-zero", perturbed, "RobustTok: RobustTok-zero.pt", adobe, robust, 172.3, 1.02, ""),
        ("robustok-main", perturbed, "RobusTok: main-train.pt", none, post, 172.3, None, ""),
        ("robustok-post", perturbed, "RobusTok: post-train.pt", none, post, 172.3, None, tuned),
    ]
    for size, parameters, rfid in ((4096, 172.5, 0.90), (16_384, 173.2, 0.64)):
        config, file = pair | {"codebook_size": size}, f"XQ-GAN: vq-{size}/best_ckpt.pt"
        table.append((f"xqgan-vp2-{size}", config, file, adobe, xq, parameters, rfid, ""))
    for size, parameters, rfid in ((4096, 172.3, 0.80), (8192, 172.6, 0.70), (16_384, 173.1, 0.67)):
        config, file = pair | scales | {"codebook_size": size}, f"XQ-GAN: MSVR10P2-{size}/best_ckpt.pt"
        table.append((f"imagefolder-{size}", config, file, adobe, folder, parameters, rfid, ""))
    for bits, rfid in ((12, 0.86), (14, 0.78)):
        binary = {"codebook_size": 2**bits, "codebook_embed_dim": bits, "lfq": True}
        config, file = pair | scales | binary, f"XQ-GAN: MSBR10P2-{2**bits}/best_ckpt.pt"
        table.append((f"xqgan-msbr10p2-{2**bits}", config, file, adobe, xq, 172.0, rfid, ""))
    for name, file in (("imed", "IMed361M.pt"), ("laion", "laion.pt")):
        data = {"imed": "IMed-361M", "laion": "LAION"}[name]
        file = f"XQ-GAN: {data.split('-')[0]}-MSVR10P2-4096/{file}"
        notes = f"; trained on {data}, not on ImageNet"
        table.append((f"imagefolder-4096-{name}", pair | scales, file, adobe, xq, 172.3, None, notes))
    verified = {
        "xqgan-vq-4096": "codes equal, latents 1.0e-3 and images 2.8e-4 (recorded in float16)",
        "robusttok-zero": "codes equal, latents 1.0e-3 and images 2.8e-4 (recorded in float16)",
        "imagefolder-4096": "codes equal, latents 9.9e-4 and images 2.7e-4 (recorded in float16)",
    }
    return [
        Entry(
            name=name,
            family="xqgan",
            config=config,
            repo=f"qiuk6/{source.split(': ')[0]}",
            file=source.split(": ")[1],
            license=license,
            paper=paper,
            parameters=parameters,
            figures={} if rfid is None else {"rFID": rfid},
            notes=f"{terms[license]}{notes}",
            verified=verified.get(name, ""),
        )
        for name, config, source, license, paper, parameters, rfid, notes in table
    ]


register(*_rows())
