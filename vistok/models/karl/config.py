"""Sizes of KARL, its variants, and the errors that it is conditioned on."""

import math
from dataclasses import dataclass
from typing import Literal

from ..ranges import require_between, require_depths, require_multiple, require_sizes

TARGETS = (
    *(0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.09, 0.1),
    *(0.12, 0.14, 0.16, 0.18, 0.2, 0.24, 0.28, 0.32, 0.38),
)
"""The errors that the model is conditioned on; a target selects the smallest that is not below it."""
DEFAULT_TARGET = 0.05
HALTED = 0.75  # probability above which a token is halted
VAE_SCALE = 0.2325
BASE_CHANNELS = {"vqgan": 256, "vae": 16}  # of the grid
PLACE_DIGIT = 32  # places are two digits of this base: exact in every floating dtype
VARIANTS = {  # width, layers, heads of the encoder, then of the decoder
    "karl_tiny": (512, 8, 8, 512, 8, 8),
    "karl_tiny_semilarge_decoder": (512, 8, 8, 1024, 8, 8),
    "karl_small": (1024, 8, 8, 1024, 8, 8),
    "karl_small_decoder_semilarge": (1024, 8, 8, 1024, 16, 16),
    "karl_small_decoder_semilarge_opposite_heads": (1024, 8, 16, 1024, 16, 8),
    "karl_small_decoder_semilarge_small_heads": (1024, 8, 8, 1024, 16, 8),
    "karl_small_decoder_semilarge_semilarge_heads": (1024, 8, 16, 1024, 16, 16),
    "karl_small_decoder_base": (1024, 8, 8, 768, 12, 12),
    "karl_small_decoder_base_semilarge_feat": (1024, 8, 8, 1024, 12, 16),
    "karl_small_decoder_small": (1024, 8, 8, 512, 8, 8),
    "karl_base": (768, 12, 12, 768, 12, 12),
    "karl_base_decoder_small_semilarge_feat": (1024, 12, 16, 1024, 8, 8),
    "karl_semilarge": (1024, 16, 16, 1024, 16, 16),
    "karl_semilarge_decoder_small": (1024, 16, 16, 1024, 8, 8),
}


@dataclass(frozen=True)
class KarlConfig:
    """One model; the defaults are `karl_small` on the VQGAN with quantized latents.

    `base` with the `base_*` fields is the two-dimensional tokenizer; `num_tokens` is T, the tokens offered
    per image by default, of `max_latent_tokens` that exist. `training_tokens` are the first, the last and the
    step of the numbers of tokens drawn in training, `halting_weight` that of the halting losses there,
    `initializer_range` the deviation of fresh weights (narrow models need more).
    """

    base: Literal["vqgan", "vae"] = "vqgan"
    quantize_latent: bool = True
    encoder_width: int = 1024
    encoder_layers: int = 8
    encoder_heads: int = 8
    decoder_width: int = 1024
    decoder_layers: int = 8
    decoder_heads: int = 8
    vq_codebook_size: int = 4096
    vq_token_dim: int = 12
    patch_size: int = 16
    max_grid_tokens: int = 64
    max_latent_tokens: int = 512
    num_tokens: int = 256
    image_size: int = 256
    base_hidden_channels: int = 128
    base_channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    base_res_blocks: int = 2
    base_norm_groups: int = 32
    base_channels: int | None = None
    base_codebook_size: int = 1024
    training_tokens: tuple[int, int, int] = (16, 368, 16)
    halting_weight: float = 1.0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.base_channels is None:
            object.__setattr__(self, "base_channels", BASE_CHANNELS[self.base])
        require_sizes(
            self, "encoder_width", "decoder_width", "vq_codebook_size", "vq_token_dim", "patch_size"
        )
        require_sizes(self, "max_grid_tokens", "image_size", "base_hidden_channels", "base_norm_groups")
        require_sizes(self, "base_channels", "base_codebook_size", "encoder_heads", "decoder_heads")
        require_depths(self, "encoder_layers", "decoder_layers", "base_res_blocks", "base_channel_mult")
        require_multiple(self, "encoder_width", "encoder_heads")
        require_multiple(self, "decoder_width", "decoder_heads")
        require_between(self, ["halting_weight"], 0, 1e6)
        require_between(self, ["initializer_range"], 1e-9, 1e3)
        groups = 32 if self.base == "vqgan" else 1  # its blocks are MaskGIT's, which have 32
        if self.base_hidden_channels % math.lcm(self.base_norm_groups, groups):
            raise ValueError(
                f"base_hidden_channels {self.base_hidden_channels} is not a multiple of base_norm_groups "
                f"{self.base_norm_groups}" + " and of 32, the groups of a VQGAN" * (groups > 1)
            )
        factor = 2 ** (len(self.base_channel_mult) - 1)
        if self.patch_size != factor:
            raise ValueError(
                f"patch_size {self.patch_size} does not lie on the grid of the base tokenizer, whose "
                f"{len(self.base_channel_mult)} levels make cells of {factor} pixels; they must be equal"
            )
        side, rest = divmod(self.image_size, self.patch_size)
        if rest or not 1 <= side <= self.max_grid_tokens:
            raise ValueError(
                f"image_size {self.image_size} is not 1 to {self.max_grid_tokens} patches of "
                f"{self.patch_size}"
            )
        if self.base_channels >= self.encoder_width:
            raise ValueError(
                f"encoder_width {self.encoder_width} must exceed the {self.base_channels} channels of the "
                "base tokenizer"
            )
        if not 1 <= self.num_tokens <= self.max_latent_tokens <= PLACE_DIGIT**2:
            raise ValueError(
                f"num_tokens {self.num_tokens} must be 1 to max_latent_tokens {self.max_latent_tokens}, and "
                f"that at most {PLACE_DIGIT**2}"
            )
        first, last, step = self.training_tokens
        if not (1 <= first <= last <= self.max_latent_tokens and step >= 1):
            raise ValueError(
                f"training_tokens {self.training_tokens} are first, last and step of a range in "
                f"1 to {self.max_latent_tokens}"
            )

    @property
    def base_widths(self) -> list[int]:
        """Channels of every level of the base tokenizer, from the image's side inwards."""
        return [self.base_hidden_channels * multiplier for multiplier in self.base_channel_mult]
