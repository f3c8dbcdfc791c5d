"""TexTok: captions on both sides, so that tokens hold what the caption does not say.

"Language-Guided Image Tokenization for Generation" (Zha et al., CVPR 2025, arXiv 2412.05796). Neither code
nor weights were published: this is a re-implementation from the paper, whose sizes are fields of the
configuration. A caption is part of the code: tokens without theirs decode to another picture, and its bytes
count where rates are compared.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.text_features import T5TextEncoder, TextFeatures, WordTextEncoder
from ..nn.transformer import Transformer, initialise
from ..quantizers import GaussianQuantizer
from ..registry import register_family
from ..tokenizer import Tokenizer, TrainingOutput
from ..tokens import Tokens
from .ranges import require_between, require_depths, require_multiple, require_sizes

WORDS = "words"
"""The text encoder that knows the configuration's own words and has no weights."""
Captions = str | Sequence[str] | TextFeatures | Tensor


@dataclass(frozen=True)
class TexTokConfig:
    """Sizes; the defaults are the paper's as far as it is public, ViT-B on both sides with 32 tokens.

    `text_encoder` is the folder or hub name of a T5 model, "words" for a fixed vector per word of `words`, or
    None for the tokenizer without text. `text_dropout` is the share of training images that go without their
    caption.
    """

    image_size: int = 256
    patch_size: int = 8
    num_latent_tokens: int = 32
    token_size: int = 8
    encoder_width: int = 768
    encoder_depth: int = 12
    encoder_heads: int = 12
    decoder_width: int = 768
    decoder_depth: int = 12
    decoder_heads: int = 12
    text_encoder: str | None = "google/t5-v1_1-xl"
    text_length: int = 32
    text_dim: int = 2048
    words: tuple[str, ...] = ()
    text_dropout: float = 0.1

    def __post_init__(self) -> None:
        require_sizes(
            self,
            *("image_size", "patch_size", "num_latent_tokens", "token_size", "text_length", "text_dim"),
            *("encoder_width", "encoder_heads", "decoder_width", "decoder_heads"),
        )
        require_depths(self, "encoder_depth", "decoder_depth")
        require_multiple(self, "image_size", "patch_size")
        for side in ("encoder", "decoder"):
            require_multiple(self, f"{side}_width", f"{side}_heads")
        require_between(self, ("text_dropout",), 0, 1)
        if (self.text_encoder == WORDS) != bool(self.words):
            raise ValueError(
                f"text_encoder is {self.text_encoder!r} with {len(self.words)} words; words belong to "
                f'text_encoder: "{WORDS}", which needs them'
            )

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2


class Side(nn.Module):
    """A transformer over queries, content and text, in that order, of which the queries are kept.

    `content` is what is read (patches, or latents), `kept` counts the learned queries. Text at padded places
    is not attended to. Without text (`text_dim` None) there is no `text_proj`.
    """

    def __init__(
        self, width: int, depth: int, heads: int, kept: int, content: int, text_dim: int | None
    ) -> None:
        super().__init__()
        self.queries = nn.Parameter(0.02 * torch.randn(kept, width))
        self.positions = nn.Parameter(0.02 * torch.randn(content, width))
        if text_dim is not None:
            self.text_proj = nn.Linear(text_dim, width)
        self.norm_pre = nn.LayerNorm(width)
        self.blocks = Transformer(width, depth, heads)
        self.norm_post = nn.LayerNorm(width)

    def forward(self, content: Tensor, text: TextFeatures | None) -> Tensor:
        """Content [B, M, D] and text → the queries' states [B, kept, D]."""
        parts, mask = [self.queries.expand(len(content), -1, -1), content + self.positions], None
        if text is not None:
            parts.append(self.text_proj(text.states))
            image = text.mask.new_ones(len(content), parts[0].shape[1] + parts[1].shape[1])
            mask = torch.cat([image, text.mask], 1)[:, None, None]
        kept = slice(0, len(self.queries))
        return self.norm_post(self.blocks(self.norm_pre(torch.cat(parts, 1)), kept, mask))


@register_family("textok")
class TexTok(Tokenizer):
    """TexTok: continuous tokens (KL), with a caption for `encode` and `decode`.

    `condition` is one caption per image, one for all, or text features: `TextFeatures` with a mask, or states
    [B, T, D] that are all real. Without it the picture is coded as one without a caption, which training with
    `text_dropout` makes possible. `attach_text_encoder` sets what turns captions into features.
    """

    config_class = TexTokConfig
    conditions = ("text",)
    encodes_conditions = True

    def __init__(self, config: TexTokConfig) -> None:
        super().__init__(config)
        self.image_size, self.num_tokens = config.image_size, config.num_latent_tokens
        self.quantizer = GaussianQuantizer(config.token_size)
        text, pixels = (config.text_dim if config.text_encoder else None), 3 * config.patch_size**2
        self.patch_embed = nn.Linear(pixels, config.encoder_width)
        self.encoder = Side(
            *(config.encoder_width, config.encoder_depth, config.encoder_heads),
            *(config.num_latent_tokens, config.patches, text),
        )
        self.to_moments = nn.Linear(config.encoder_width, 2 * config.token_size)
        self.from_latents = nn.Linear(config.token_size, config.decoder_width)
        self.decoder = Side(
            *(config.decoder_width, config.decoder_depth, config.decoder_heads),
            *(config.patches, config.num_latent_tokens, text),
        )
        self.to_pixels = nn.Linear(config.decoder_width, pixels)
        self.apply(initialise)

    # Text ---------------------------------------------------------------------------------------------------

    def attach_text_encoder(
        self, source: str | Path | nn.Module | Callable[[Sequence[str]], TextFeatures] | None = None
    ) -> None:
        """Attach what turns captions into text features: the folder or name of a T5 model (by default the
        configuration's), or any callable from captions to `TextFeatures`.

        Raises:
            ValueError: a model without text.
            FileNotFoundError: there is no such T5 model.
        """
        if self.config.text_encoder is None:
            raise ValueError(f"{self.label} was built without text (text_encoder: null)")
        source, config = self.config.text_encoder if source is None else source, self.config
        if source == WORDS:
            source = WordTextEncoder(config.words, config.text_dim, config.text_length)
        if isinstance(source, str | Path):
            source = T5TextEncoder.load(source, config.text_length)
        self.add_companion("text_encoder", source if isinstance(source, nn.Module) else _Called(source))

    def text_features(self, condition: Captions | None, batch: int) -> TextFeatures | None:
        """The features [B, T, D] of a condition; None for a model without text.

        Raises:
            ValueError: a condition for a model without text, another number of captions than images, or
                features of another width.
        """
        if self.config.text_encoder is None:
            if condition is not None:
                raise ValueError(f"{self.label} was built without text; leave condition out")
            return None
        length, dim = self.config.text_length, self.config.text_dim
        if condition is None:
            states = torch.zeros(batch, length, dim)
            features = TextFeatures(states, torch.zeros(batch, length, dtype=torch.bool))
        elif isinstance(condition, TextFeatures):
            features = condition
        elif isinstance(condition, Tensor):
            features = TextFeatures(condition, torch.ones(condition.shape[:2], dtype=torch.bool))
        else:
            captions = [condition] * batch if isinstance(condition, str) else list(condition)
            if len(captions) != batch:
                raise ValueError(f"{len(captions)} captions were given for {batch} images; give one each")
            if self.companion("text_encoder") is None:
                self.attach_text_encoder()
            with torch.no_grad():
                features = self.companion("text_encoder")(captions)
        if features.states.shape != (batch, *features.mask.shape[1:], dim):
            raise ValueError(
                f"text features have shape {list(features.states.shape)} with a mask of "
                f"{list(features.mask.shape)}; {batch} images need [{batch}, T, {dim}] and [{batch}, T]"
            )
        states, mask = features.states.to(self.device, self.dtype), features.mask.to(self.device)
        # What stands at padded places must not matter, be it infinite.
        return TextFeatures(states.masked_fill(~mask[..., None], 0), mask)

    # Images ↔ tokens ----------------------------------------------------------------------------------------

    def latents(self, images: Tensor, text: Captions | None = None) -> Tensor:
        """Images [B, 3, H, W] and captions → moments [B, K, 2C]."""
        patch = self.config.patch_size
        x = 2 * images - 1
        x = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # [B, 3, h, p, w, p]
        x = self.patch_embed(x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
        return self.to_moments(self.encoder(x, self.text_features(text, len(images))))

    def pixels(self, latents: Tensor, lengths: Tensor | None = None, text: Captions | None = None) -> Tensor:
        """Latents [B, K, C] and captions → images [B, 3, H, W], not clamped."""
        patch, side = self.config.patch_size, self.image_size // self.config.patch_size
        x = self.decoder(self.from_latents(latents), self.text_features(text, len(latents)))
        x = self.to_pixels(x).unflatten(2, (patch, patch, 3)).unflatten(1, (side, side))
        return (x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3) + 1) / 2

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,
        num_tokens: int | None = None,
        *,
        condition: Captions | None = None,
        target_psnr: float | None = None,
    ) -> Tokens:
        """Images [B, 3, H, W] in [0, 1] and their captions → tokens (the means). Raises ValueError as
        `Tokenizer.encode` and `text_features`."""
        if target_psnr is not None:
            return super().encode(images, num_tokens, target_psnr=target_psnr)
        self.check_num_tokens(num_tokens)
        moments = self.check_latents(self.latents(self.check_images(images), condition))
        return self.as_tokens(self.quantizer.encode(moments))

    @torch.no_grad()
    def decode(
        self,
        tokens: Tokens | Tensor,
        *,
        condition: Captions | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Tokens and the captions that they were encoded with → images [B, 3, H, W] in [0, 1]."""
        self.check_decoding(condition=condition, steps=steps, guidance=guidance)
        latents, _ = self.dequantize(tokens)
        return self.pixels(latents, text=condition).clamp(0, 1)

    def reconstruct(
        self,
        images: Tensor,
        num_tokens: int | None = None,
        *,
        condition: Captions | None = None,
        **options: Any,
    ) -> Tensor:
        """Images and captions → tokens → images."""
        tokens = self.encode(images, num_tokens, condition=condition)
        return self.decode(tokens, condition=condition, **options)

    def forward(self, images: Tensor, text: Captions | None = None) -> TrainingOutput:
        """A training pass with sampled latents; in training mode a share `text_dropout` of the images goes
        without its caption, on both sides."""
        features = self.text_features(text, len(images))
        if features is not None and self.training:
            kept = torch.rand(len(images), device=features.mask.device) >= self.config.text_dropout
            features = TextFeatures(features.states, features.mask & kept[:, None])
        quantized = self.quantizer(self.latents(images, features))
        decoded = self.pixels(quantized.latents, text=features)
        return TrainingOutput(decoded, quantized.codes, quantized.losses)


class _Called(nn.Module):
    """A callable as a companion."""

    def __init__(self, function: Callable[[Sequence[str]], TextFeatures]) -> None:
        super().__init__()
        self.function = function

    def forward(self, captions: Sequence[str]) -> TextFeatures:
        return self.function(captions)
