"""TiTok and TA-TiTok: a 256×256 image as 32 to 256 one-dimensional tokens.

TiTok (Yu et al., "An Image is Worth 32 Tokens for Reconstruction and Generation", 2024, arXiv 2406.07550) and
its text-aware successor (Kim et al., "Democratizing Text-to-Image Masked Generative Models with Compact
Text-Aware One-Dimensional Tokens", 2025, arXiv 2501.07730). Two generations of weights exist: legacy ones,
whose decoder predicts MaskGIT-VQGAN codes that a pixel decoder inside the checkpoint draws, and single-stage
ones that write RGB.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from ..configuration import build
from ..loading import load
from ..nested_config import resolved, section
from ..nn.transformer import Transformer, initialise
from ..quantizers import GaussianQuantizer, Quantizer, VectorQuantizer
from ..registry import Entry, register, register_family
from ..tokenizer import Tokenizer, TrainingOutput
from ..tokens import Tokens
from .maskgit_vqgan import Decoder as PixelDecoder
from .maskgit_vqgan import MaskGITVQGAN, MaskGITVQGANConfig
from .ranges import require_between, require_sizes

SIZES = {"small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}  # width, layers, heads
PROXY_CODES, PROXY_DIM, PROXY_PATCH = 1024, 256, 16  # the MaskGIT-VQGAN codebook, and a code's side


@dataclass(frozen=True)
class TiTokConfig:
    """`model.vq_model` of the original's configuration under its own names, and the crop size."""

    quantize_mode: Literal["vq", "vae"] = "vq"
    codebook_size: int = 4096
    token_size: int = 12
    use_l2_norm: bool = False
    commitment_cost: float = 0.25
    clustering_vq: bool = False
    vit_enc_model_size: str = "base"
    vit_dec_model_size: str = "base"
    vit_enc_patch_size: int = 16
    vit_dec_patch_size: int = 16
    num_latent_tokens: int = 32
    finetune_decoder: bool = True
    is_legacy: bool = True
    text_context_length: int = 77
    text_embed_dim: int = 768
    crop_size: int = 256

    def __post_init__(self) -> None:
        require_sizes(self, "codebook_size", "token_size", "num_latent_tokens", "crop_size")
        require_sizes(self, "vit_enc_patch_size", "vit_dec_patch_size", "text_context_length")
        require_sizes(self, "text_embed_dim")
        require_between(self, ["commitment_cost"], 0, 1e6)
        if self.quantize_mode == "vae" and self.finetune_decoder:
            raise ValueError(
                "quantize_mode='vae' has no second stage; set finetune_decoder=False, is_legacy=False"
            )
        if self.finetune_decoder and not self.is_legacy:
            raise ValueError(
                "finetune_decoder=True is the legacy second stage; set it False with is_legacy=False"
            )
        for side in ("enc", "dec"):
            size, patch = getattr(self, f"vit_{side}_model_size"), getattr(self, f"vit_{side}_patch_size")
            if size not in SIZES:
                raise ValueError(f"vit_{side}_model_size is {size!r}; it is {', '.join(SIZES)}")
            if self.crop_size % patch:
                raise ValueError(
                    f"crop_size {self.crop_size} is not a multiple of vit_{side}_patch_size {patch}"
                )
        if self.is_legacy and self.vit_dec_patch_size != PROXY_PATCH:
            raise ValueError(
                f"vit_dec_patch_size is {self.vit_dec_patch_size}; legacy decoders predict MaskGIT-VQGAN "
                f"codes, each of {PROXY_PATCH} pixels: give {PROXY_PATCH}, or is_legacy=False"
            )

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "TiTokConfig":
        """Read field names, or the original's nested configuration, whose other keys are ignored."""
        if "model" not in values:
            return build(cls, values, "titok")
        model = section(values, "model").get("vq_model")
        if not isinstance(model, Mapping):
            raise ValueError(
                f"the configuration's model has {sorted(values['model'] or ())}; a TiTok one has a mapping "
                "vq_model"
            )
        known = {field.name for field in fields(cls)}
        entries = {name: value for name, value in model.items() if name in known}
        crop = section(section(values, "dataset"), "preprocessing").get("crop_size")
        if crop is not None:
            entries["crop_size"] = crop
        stated = {name: resolved(value, values, name) for name, value in entries.items()}
        return build(cls, stated, "the configuration's vq_model")


class TiTokEncoder(nn.Module):
    """A ViT over patches and latent tokens; only the latent tokens come out."""

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__()
        width, layers, heads = SIZES[config.vit_enc_model_size]
        scale = width**-0.5
        self.patches = (config.crop_size // config.vit_enc_patch_size) ** 2
        self.is_legacy = config.is_legacy
        self.patch_embed = nn.Conv2d(3, width, config.vit_enc_patch_size, config.vit_enc_patch_size)
        self.class_embedding = nn.Parameter(scale * torch.randn(1, width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(self.patches + 1, width))
        self.latent_token_positional_embedding = nn.Parameter(
            scale * torch.randn(config.num_latent_tokens, width)
        )
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)
        channels = config.token_size * (2 if config.quantize_mode == "vae" else 1)
        self.conv_out = nn.Conv2d(width, channels, 1)

    def forward(self, images: Tensor, latent_tokens: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] and the learned tokens [K, W] → [B, K, C]."""
        batch = len(images)
        x = self.patch_embed(images).flatten(2).transpose(1, 2)  # [B, HW/p², W], row by row
        x = torch.cat([self.class_embedding.expand(batch, 1, -1), x], 1) + self.positional_embedding
        latents = (latent_tokens + self.latent_token_positional_embedding).expand(batch, -1, -1)
        x = self.ln_pre(torch.cat([x, latents], 1))
        x = self.ln_post(self.transformer(x, rows=slice(self.patches + 1, None)))  # [B, K, W]
        if self.is_legacy:
            # Parity: the legacy weights read the memory of [K, W] as [W, K], so that every output mixes all
            # tokens.
            x = x.reshape(batch, x.shape[2], x.shape[1]).transpose(1, 2)
        return F.linear(x, self.conv_out.weight.flatten(1), self.conv_out.bias)


class TiTokDecoder(nn.Module):
    """A ViT over one mask token per patch and the latents (and text); only the patches come out.

    Legacy: logits over the proxy codes, [B, 1024, h, w]. Otherwise images, [B, 3, H, W], not clamped.
    """

    def __init__(self, config: TiTokConfig, text: bool) -> None:
        super().__init__()
        width, layers, heads = SIZES[config.vit_dec_model_size]
        scale = width**-0.5
        self.patch_size = config.vit_dec_patch_size
        self.side = config.crop_size // self.patch_size
        self.is_legacy = config.is_legacy
        self.decoder_embed = nn.Linear(config.token_size, width)
        self.class_embedding = nn.Parameter(scale * torch.randn(1, width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(self.side**2 + 1, width))
        self.mask_token = nn.Parameter(scale * torch.randn(1, 1, width))
        self.latent_token_positional_embedding = nn.Parameter(
            scale * torch.randn(config.num_latent_tokens, width)
        )
        if text:
            self.text_guidance_proj = nn.Linear(config.text_embed_dim, width)
            self.text_guidance_positional_embedding = nn.Parameter(
                scale * torch.randn(config.text_context_length, width)
            )
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)
        if config.is_legacy:
            self.ffn = nn.Sequential(
                nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, PROXY_CODES, 1)
            )
        else:
            self.ffn = nn.Sequential(nn.Conv2d(width, 3 * self.patch_size**2, 1))
            self.conv_out = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, latents: Tensor, text: Tensor | None = None) -> Tensor:
        """Latents [B, k, C], the first k of K, and for text-aware weights text states [B, 77, 768]."""
        batch = len(latents)
        patches = (
            torch.cat([self.class_embedding, self.mask_token[0].expand(self.side**2, -1)])
            + self.positional_embedding
        )
        x = [
            patches.expand(batch, -1, -1),
            self.decoder_embed(latents) + self.latent_token_positional_embedding[: latents.shape[1]],
        ]
        if text is not None:
            x.append(self.text_guidance_proj(text) + self.text_guidance_positional_embedding)
        x = self.ln_pre(torch.cat(x, 1))
        x = self.ln_post(self.transformer(x, rows=slice(1, 1 + self.side**2)))  # [B, h·w, W]
        x = x.transpose(1, 2).unflatten(2, (self.side, self.side))
        x = self.ffn(x)
        if self.is_legacy:
            return x
        # Parity: channels are (patch row, patch column, colour) with the colour fastest.
        x = x.unflatten(1, (self.patch_size, self.patch_size, 3)).permute(
            0, 3, 4, 1, 5, 2
        )  # [B, 3, h, p, w, p]
        return self.conv_out(x.flatten(4, 5).flatten(2, 3))


@register_family("titok")
class TiTok(Tokenizer):
    """TiTok in all its published forms; see the module.

    Stage-1 weights (`is_legacy` without `finetune_decoder`) decode to proxy codes; attach the tokenizer that
    draws them with `attach_pixel_tokenizer`.
    """

    config_class = TiTokConfig
    checkpoint_ignores = ("quantize.embed_prob",)
    text_aware = False

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__(config)
        self.image_size, self.num_tokens = config.crop_size, config.num_latent_tokens
        width, _, _ = SIZES[config.vit_enc_model_size]
        self.latent_tokens = nn.Parameter(width**-0.5 * torch.randn(config.num_latent_tokens, width))
        self.encoder = TiTokEncoder(config)
        self.quantize: Quantizer
        if config.quantize_mode == "vae":
            self.quantize = GaussianQuantizer(config.token_size)
        else:
            self.quantize = VectorQuantizer(
                config.codebook_size,
                config.token_size,
                l2_norm=config.use_l2_norm,
                commitment_cost=config.commitment_cost,
                clustering=config.clustering_vq,
            )
        self.decoder = TiTokDecoder(config, text=self.text_aware)
        if config.finetune_decoder:
            self.pixel_quantize = VectorQuantizer(PROXY_CODES, PROXY_DIM)
            self.pixel_decoder = PixelDecoder(MaskGITVQGANConfig())
        for module in [self.encoder, *([] if self.text_aware else [self.decoder])]:
            # The text-aware original replaces its decoder after this pass, so that one keeps PyTorch's own
            # defaults.
            module.apply(initialise)

    @property
    def quantizer(self) -> Quantizer:
        """The bottleneck; its key in checkpoints is `quantize`."""
        return self.quantize

    @classmethod
    def create(cls, **config: Any) -> Self:
        """Build with fresh weights from the fields of TiTokConfig, or from the original's nested
        configuration."""
        return cls(TiTokConfig.parse(config))

    @classmethod
    def recognise(
        cls, shapes: Mapping[str, torch.Size], config: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Everything follows from keys and shapes but `use_l2_norm`, which is that of the published sizes."""
        own = "latent_tokens" in shapes and any(key.startswith("encoder.conv_out.") for key in shapes)
        if not own or ("decoder.text_guidance_proj.weight" in shapes) != cls.text_aware:
            return None
        if config and "model" in config:
            # One-D-Piece has the keys of a legacy TiTok and says so in its configuration.
            return None if section(config, "model").get("type") == "one_d_piece" else config
        return _config_from_shapes(shapes)

    def latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] → [B, K, C], or moments [B, K, 2C] for KL weights."""
        return self.encoder(images, self.latent_tokens)

    def pixels(self, latents: Tensor, lengths: Tensor | None = None, text: Tensor | None = None) -> Tensor:
        """Latents [B, K, C] → images [B, 3, H, W], not clamped (stage-1 weights: as their pixel tokenizer
        draws them)."""
        output = self.decoder(latents, text)
        if not self.config.is_legacy:
            return output
        if self.config.finetune_decoder:
            # Parity: the pixel decoder takes the soft mixture of code vectors, never the likeliest code.
            mixture = (
                output.softmax(1).movedim(1, -1) @ self.pixel_quantize.embedding.weight
            )  # [B, h, w, 256]
            return self.pixel_decoder(mixture.movedim(-1, 1))
        drawer = self.companion("pixel_tokenizer")
        if drawer is None:
            raise ValueError(
                "these stage-1 weights decode to MaskGIT-VQGAN codes, not pixels; attach that tokenizer: "
                "tokenizer.attach_pixel_tokenizer('maskgit-vqgan'), or give the path of its weights"
            )
        return drawer.decode(output.argmax(1).flatten(1))

    def attach_pixel_tokenizer(self, source: Tokenizer | str | Path) -> None:
        """Attach the MaskGIT-VQGAN that decodes the codes of stage-1 weights: itself, its name or a path."""
        if not self.config.is_legacy or self.config.finetune_decoder:
            raise ValueError(
                f"{self.label} decodes to pixels by itself; only stage-1 weights take a pixel tokenizer"
            )
        tokenizer = copy.deepcopy(source) if isinstance(source, Tokenizer) else load(source)
        if not isinstance(tokenizer, MaskGITVQGAN):
            raise ValueError(
                f"{tokenizer.label} is a {tokenizer.family} tokenizer; stage-1 weights need maskgit-vqgan"
            )
        self.add_companion("pixel_tokenizer", tokenizer)

    def forward(self, images: Tensor, text: Tensor | None = None) -> TrainingOutput:
        """Training pass; `images` of the result are proxy-code logits [B, 1024, h, w] for stage-1 weights."""
        quantized = self.quantize(self.latents(images))
        draw = self.decoder if self.config.is_legacy and not self.config.finetune_decoder else self.pixels
        output = draw(quantized.latents) if text is None else draw(quantized.latents, text=text)
        return TrainingOutput(output, quantized.codes, quantized.losses)


@register_family("tatitok")
class TATiTok(TiTok):
    """TiTok whose decoder also reads a caption: `decode(tokens, condition=["A photo of a jay."])`."""

    text_aware = True
    conditions = ("text",)

    @torch.no_grad()
    def decode(
        self,
        tokens: Tokens | Tensor,
        *,
        condition: list[str] | Tensor | None = None,
        text: list[str] | Tensor | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Tokens and one caption per image → images [B, 3, H, W] in [0, 1].

        `condition`, or `text`, which means the same, is a list of B captions or their text states [B, 77,
        768]; None means empty captions, which are encoded like any other (the weights have no null caption).
        """
        self.check_decoding(condition=condition, steps=steps, guidance=guidance)
        if condition is not None and text is not None:
            raise ValueError("condition and text mean the same captions; give one of them")
        text = condition if text is None else text
        latents, _ = self.dequantize(tokens)
        return self.pixels(latents, text=self.text_states(text, len(latents))).clamp(0, 1)

    def text_states(self, text: list[str] | Tensor | None, batch: int) -> Tensor:
        """Captions → [B, 77, 768]; loads the published CLIP text tower on first use."""
        length, dim = self.config.text_context_length, self.config.text_embed_dim
        if isinstance(text, Tensor):
            if text.shape != (batch, length, dim):
                raise ValueError(
                    f"text states have shape {list(text.shape)}; {[batch, length, dim]} is needed"
                )
            return text.to(self.device, self.dtype)
        captions = [""] * batch if text is None else [text] * batch if isinstance(text, str) else list(text)
        if len(captions) != batch:
            raise ValueError(f"{len(captions)} captions were given for {batch} images; give one per image")
        if not captions:
            return torch.empty(0, length, dim, device=self.device, dtype=self.dtype)
        if self.companion("text_encoder") is None:
            self.attach_text_encoder()
        return self.companion("text_encoder")(captions).states.to(self.dtype)

    def attach_text_encoder(
        self, source: "str | Path | nn.Module" = "openai", activation: str = "quickgelu"
    ) -> None:
        """Attach the decoder's CLIP text tower: open_clip's tag, a weights file, or a CLIPTextEncoder."""
        from ..nn.clip_text import CLIPTextEncoder

        if isinstance(source, CLIPTextEncoder):
            encoder = copy.deepcopy(source)
        else:
            encoder = CLIPTextEncoder.load(source, activation)
        self.add_companion("text_encoder", encoder)


def _config_from_shapes(shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    sizes = {width: name for name, (width, _, _) in SIZES.items()}
    tokens, width = shapes["latent_tokens"]
    channels = shapes["encoder.conv_out.weight"][0]
    patch = shapes["encoder.patch_embed.weight"][-1]
    grid = round((shapes["encoder.positional_embedding"][0] - 1) ** 0.5)
    decoded = round((shapes["decoder.positional_embedding"][0] - 1) ** 0.5)
    codebook = shapes.get("quantize.embedding.weight")
    config = {
        "vit_enc_model_size": sizes.get(width),
        "vit_dec_model_size": sizes.get(shapes["decoder.mask_token"][-1]),
        "vit_enc_patch_size": patch,
        "vit_dec_patch_size": grid * patch // decoded,
        "crop_size": grid * patch,
        "num_latent_tokens": tokens,
        "is_legacy": "decoder.ffn.2.weight" in shapes,
        "finetune_decoder": "pixel_decoder.conv_in.weight" in shapes,
    }
    if codebook is None:
        return config | {"quantize_mode": "vae", "token_size": channels // 2}
    size, dim = codebook
    # Shapes do not show whether codes are compared as unit vectors; the published 4096×12 codebooks are.
    return config | {"codebook_size": size, "token_size": dim, "use_l2_norm": dim == 12}


def _rows() -> list[Entry]:
    legacy = {"use_l2_norm": True}
    vq = {"codebook_size": 8192, "token_size": 64, "finetune_decoder": False, "is_legacy": False}
    vae = {"quantize_mode": "vae", "token_size": 16, "finetune_decoder": False, "is_legacy": False}
    titok, tatitok = "TiTok (arXiv 2406.07550)", "TA-TiTok (arXiv 2501.07730)"
    table = [  # name, paper, K, encoder, decoder, further configuration, repository, M parameters, rFID, IS
        ("titok-l32", titok, 32, "large", "large", legacy, "titok_l32_imagenet", 641.1, 2.21),
        ("titok-b64", titok, 64, "base", "base", legacy, "titok_b64_imagenet", 204.8, 1.70),
        ("titok-s128", titok, 128, "small", "small", legacy, "titok_s128_imagenet", 83.7, 1.71),
        ("titok-bl64-vq", titok, 64, "base", "large", vq, "titok_bl64_vq8k_imagenet", 390.0, 2.06),
        ("titok-bl128-vq", titok, 128, "base", "large", vq, "titok_bl128_vq8k_imagenet", 390.2, 1.49),
        ("titok-sl256-vq", titok, 256, "small", "large", vq, "titok_sl256_vq8k_imagenet", 330.3, 1.03),
        ("titok-ll32-vae", titok, 32, "large", "large", vae, "titok_ll32_vae_c16_imagenet", 606.9, 1.61),
        ("titok-bl64-vae", titok, 64, "base", "large", vae, "titok_bl64_vae_c16_imagenet", 389.4, 1.25),
        ("titok-bl128-vae", titok, 128, "base", "large", vae, "titok_bl128_vae_c16_imagenet", 389.6, 0.84),
        ("tatitok-bl32-vq", tatitok, 32, "base", "large", vq, "tatitok_bl32_vq", 390.8, 3.95, 219.6),
        ("tatitok-bl64-vq", tatitok, 64, "base", "large", vq, "tatitok_bl64_vq", 390.9, 2.43, 218.8),
        ("tatitok-bl128-vq", tatitok, 128, "base", "large", vq, "tatitok_bl128_vq", 391.0, 1.53, 222.8),
        ("tatitok-bl32-vae", tatitok, 32, "base", "large", vae, "tatitok_bl32_vae", 390.2, 1.53, 222.0),
        ("tatitok-bl64-vae", tatitok, 64, "base", "large", vae, "tatitok_bl64_vae", 390.3, 1.47, 220.7),
        ("tatitok-sl128-vae", tatitok, 128, "small", "large", vae, "tatitok_sl128_vae", 330.3, 0.90, 227.7),
    ]  # fmt: skip
    verified = {
        "titok-l32": "codes equal, latents 3.4e-6, images 6.0e-5",
        "titok-b64": "stage 1: codes equal, latents 3.6e-6",
        "titok-bl64-vq": "codes equal, latents 3.6e-6, images 5.2e-6",
        "titok-bl64-vae": "latents 3.3e-6, images 5.7e-6",
        "tatitok-bl32-vq": "codes equal, latents 3.3e-6, images 5.4e-6",
        "tatitok-bl32-vae": "latents 4.3e-6, images 7.0e-6",
    }
    return [
        Entry(
            name=name,
            family=name.split("-")[0],
            config={
                "num_latent_tokens": k,
                "vit_enc_model_size": encoder,
                "vit_dec_model_size": decoder,
                **rest,
            },
            repo=f"{'turkeyju' if paper == tatitok else 'yucornetto'}/tokenizer_{repo}",
            license="Apache-2.0",
            paper=paper,
            parameters=parameters,
            figures=dict(zip(("rFID", "IS"), figures, strict=False)),
            notes="trained on ImageNet, described as research-only" if repo.endswith("_imagenet") else "",
            verified=verified.get(name, ""),
        )
        for name, paper, k, encoder, decoder, rest, repo, parameters, *figures in table
    ]


register(*_rows())
