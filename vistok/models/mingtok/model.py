"""MingTok: continuous tokens that a causal transformer expands to features, from which a third one paints.

"Ming-UniVision: Joint Image Understanding and Generation with a Unified Continuous Tokenizer" (Huang et al.,
2025, arXiv 2510.06590). A ViT turns an image into one latent per patch, which is all that a generator
predicts; a causal transformer expands latents to the features that a language model reads, and a third
transformer paints pixels from these features.
"""

import contextlib
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ...nn.cpu.linear import linear
from ...nn.transformer import initialise
from ...nn.vision_transformer import unpatchify
from ...quantizers import ContinuousLatents
from ...registry import Entry, register, register_family
from ...tokenizer import TrainingOutput
from ..grid import GridTokenizer
from .config import EncoderConfig, MingTokConfig, PixelConfig, SemanticConfig
from .network import FeatureStream, LowLevelEncoder, PixelDecoder, SemanticDecoder, split_tokens

T = TypeVar("T")
PREFIX = "vision."  # of the tokenizer's keys in the language model's checkpoint
TEACHER = "target_backbone."  # of the frozen teacher's keys in a training checkpoint
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@register_family("mingtok")
class MingTok(GridTokenizer):
    """MingTok; see the module.

    Tokens hold normalised `latents` [B, N, 32], one per patch, row by row of their `grid`. Sides of images
    are multiples of 32 pixels at the published sizes, not necessarily equal: 512 is what the published model
    draws, 1024 what its language model reads.
    """

    config_class = MingTokConfig
    has_features = True

    def __init__(self, config: MingTokConfig) -> None:
        super().__init__(config)
        encoder = config.low_level_encoder
        self.image_size, self.factor = encoder.img_size, encoder.patch_size
        self.num_tokens = encoder.side**2
        self.quantizer = ContinuousLatents(encoder.out_dim)
        self.low_level_encoder = LowLevelEncoder(encoder)
        self.semantic_decoder = SemanticDecoder(config.semantic_decoder)
        width = config.pixel_decoder.embed_dim
        self.sem_to_pix = nn.Linear(config.semantic_decoder.embed_dim, width * config.split**2)
        self.pixel_decoder = PixelDecoder(config)
        self.apply(initialise)

    @classmethod
    def create(cls, **config: Any) -> Self:
        """Build with fresh weights from the original's configuration, whose other keys are ignored."""
        return cls(MingTokConfig.parse(config))

    @classmethod
    def recognise(
        cls, shapes: Mapping[str, torch.Size], config: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Recognised by the keys of the encoder, also inside a language model's checkpoint.

        Sizes follow from shapes. The two constants of the latents do not: without a configuration that states
        them, only weights of the published sizes load, with the published constants.
        """
        own = select_tokenizer(shapes)
        if "low_level_encoder.pos_embed" not in own or "sem_to_pix.weight" not in own:
            return None
        if config and "low_level_encoder" in config:
            return config
        sizes = _config_from_shapes(own)
        if sizes != _stages(MingTokConfig()):
            raise ValueError(
                "these MingTok weights come without the constants of their latents, (encoder output - mean) "
                "/ scaling_factor; give config={'family': 'mingtok', 'config': {'scaling_factor': …, "
                "'mean': …, 'low_level_encoder': {…}, 'semantic_decoder': {…}, 'pixel_decoder': {…}}}"
            )
        return {}

    @classmethod
    def rename_keys(cls, tensors: Mapping[str, T]) -> dict[str, T]:
        """The tokenizer's tensors alone: without the teacher of a training checkpoint, and of a language
        model's checkpoint those of its copy."""
        return select_tokenizer(tensors)

    # Images → latents → features → images -------------------------------------------------------------------

    def latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] → normalised latents [B, N, C]."""
        return self.normalised(self.raw_latents(images)[:, :-1])

    def raw_latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] → latents as the encoder gives them [B, N + 1, C], the class token's
        last."""
        with self._precision():
            return self.low_level_encoder(2 * images - 1)

    def normalised(self, raw: Tensor) -> Tensor:
        """The encoder's latents → latents of about unit variance, as tokens hold and generators predict
        them."""
        return (raw - self.config.mean) / self.config.scaling_factor

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] → the features [B, N, D] that a language model reads, row by row.

        ValueError for images that `encode` refuses.
        """
        return self.expand(self.latents(self.check_images(images)))

    def expand(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, N, C] → features [B, N, D], each from the latents up to its own."""
        with self._precision():
            raw = latents * self.config.scaling_factor + self.config.mean
            return self.semantic_decoder(raw).to(latents.dtype)

    def stream(self) -> FeatureStream:
        """An object that expands latents as they come: `stream(latents [B, n, C])` → features [B, n, D]."""
        return FeatureStream(self.semantic_decoder, self.config.scaling_factor, self.config.mean)

    def paint(self, features: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Features [B, N, D] of a `grid` of h × w (by default square) → images [B, 3, H, W] in [0, 1], not
        clamped.

        ValueError for a number of features that is not that of the grid.
        """
        rows, columns = grid or (math.isqrt(features.shape[1]),) * 2
        if rows * columns != features.shape[1]:
            raise ValueError(
                f"{features.shape[1]} features do not fill a grid of {rows}×{columns}; give their grid"
            )
        split = self.config.split
        x = linear(features, self.sem_to_pix.weight, self.sem_to_pix.bias)
        patches = self.pixel_decoder(split_tokens(x, rows, columns, split))
        return (unpatchify(patches, rows * split, columns * split) + 1) / 2

    def pixels(
        self, latents: Tensor, lengths: Tensor | None = None, *, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """Normalised latents of a `grid` of h × w (by default square) [B, N, C] → images, not clamped."""
        return self.paint(self.expand(latents), grid)

    def forward(self, images: Tensor) -> TrainingOutput:
        """Training pass through all three stages; there is no loss of the latents."""
        latents = self.latents(images)
        return TrainingOutput(self.pixels(latents, grid=self.grid_of(images)), latents, {})

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast of the first two stages, where the configuration has it and a GPU runs them in float32."""
        dtype = DTYPES.get(self.config.model_dtype)
        if dtype is None or self.device.type != "cuda" or self.dtype != torch.float32:
            return contextlib.nullcontext()
        return torch.autocast("cuda", dtype)


def select_tokenizer(tensors: Mapping[str, T]) -> dict[str, T]:
    """The tokenizer's entries of a checkpoint, under its own keys."""
    if f"{PREFIX}low_level_encoder.pos_embed" in tensors:
        tensors = {
            key.removeprefix(PREFIX): value for key, value in tensors.items() if key.startswith(PREFIX)
        }
    return {key: value for key, value in tensors.items() if not key.startswith(TEACHER)}


def _stages(config: MingTokConfig) -> list[Any]:
    return [config.low_level_encoder, config.semantic_decoder, config.pixel_decoder]


def _config_from_shapes(shapes: Mapping[str, torch.Size]) -> list[Any]:
    """The three stages' configurations."""

    def depth(stage: str) -> int:
        prefix = f"{stage}.blocks.0."
        return len({key[len(prefix) :].split(".")[0] for key in shapes if key.startswith(prefix)})

    def feedforward(stage: str) -> str:
        return "swiglufused" if f"{stage}.blocks.0.0.mlp.w12.weight" in shapes else "mlp"

    _, places, width = shapes["low_level_encoder.pos_embed"]
    patch = shapes["low_level_encoder.patch_embed.proj.weight"][3]
    channels = shapes["low_level_encoder.out_proj.weight"][0]
    features = shapes["semantic_decoder.in_proj.weight"][0]
    head, painted = shapes["pixel_decoder.head.weight"]
    return [
        EncoderConfig(
            img_size=patch * math.isqrt(places - 1),
            patch_size=patch,
            depth=depth("low_level_encoder"),
            embed_dim=width,
            ffn_layer=feedforward("low_level_encoder"),
            out_dim=channels,
        ),
        SemanticConfig(
            in_dim=channels,
            patch_size=patch,
            embed_dim=features,
            decoder_depth=depth("semantic_decoder"),
            ffn_layer=feedforward("semantic_decoder"),
        ),
        PixelConfig(
            patch_size=math.isqrt(head // 3), decoder_depth=depth("pixel_decoder"), embed_dim=painted
        ),
    ]


_SHARED = {
    "family": "mingtok",
    "config": {},
    "license": "MIT",
    "paper": "Ming-UniVision (arXiv 2510.06590)",
    "parameters": 697.7,
    "verified": "latents 7.8e-7, features and images within float16's tolerance",
}
_PROTOCOL = "256 tokens of 32 channels; ImageNet-1k validation, 50,000 images at 512 px"

register(
    Entry(
        name="mingtok-vision",
        repo="inclusionAI/MingTok-Vision",
        figures={"rFID": 0.54, "PSNR": 30.77, "SSIM": 0.62, "LPIPS": 0.14},
        notes=_PROTOCOL,
        **_SHARED,
    ),
    Entry(
        name="mingtok-univision",
        repo="inclusionAI/Ming-UniVision-16B-A3B",
        file="model.safetensors.index.json",
        figures={"rFID": 0.38, "PSNR": 31.09, "SSIM": 0.64, "LPIPS": 0.12},
        notes=f"the copy inside the language model's checkpoint, all of which is read; {_PROTOCOL}, with the "
        "semantic decoder of the joint training",
        **_SHARED,
    ),
)
