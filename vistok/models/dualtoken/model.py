"""DualToken: one SigLIP2 tower, whose shallow layers give codes for pixels and whose deep ones for meaning.

"DualToken: Towards Unifying Visual Understanding and Generation with Dual Visual Vocabularies" (Song et al.,
2025, arXiv 2503.14324). The states after a few layers become residual codes that a CNN decodes to pixels; the
states near the end become residual codes of another vocabulary, which stand for the picture in a language
model and go on through the tower to its pooled feature.

    tokens = tokenizer.encode(images)             # codes [B, K, Q], those of pixels first
    parts = tokenizer.split(tokens)               # {"pixel": Tokens, "semantic": Tokens}
    images = tokenizer.decode(parts["pixel"])     # as of all tokens
    states = tokenizer.features_of(tokens)        # [B, K, D] for a language model

No weights are published.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from ...nn.vision_transformer import SiglipTransformer, run_layers
from ...quantizers import ProductQuantizer
from ...registry import Entry, register, register_family
from ...tokenizer import Tokenizer, TrainingOutput
from ...tokens import Tokens
from .config import DualTokenConfig
from .network import (
    BeforeDrawing,
    DualQuantizer,
    DualTokenDecoder,
    PoolingHead,
    Projection,
    TextTower,
    sizes_of,
)

LOSS_WEIGHTS = {"commitment": 5.0, "states": 5.0, "pooled": 1.0}


@register_family("dualtoken")
class DualToken(Tokenizer):
    """DualToken in both published configurations and any other; see the module.

    Codes are [B, K, Q]: first those of pixels, then the semantic ones (`codebooks`). `features` are the
    semantic tokens as the tower's later layers take them, [B, K, D].
    """

    config_class = DualTokenConfig
    has_features = True

    def __init__(self, config: DualTokenConfig) -> None:
        super().__init__(config)
        tower, width, dim = config.vision, config.vision.hidden_size, config.vq_pix.embed_dim
        self.image_size, self.num_tokens = tower.image_size, tower.side**2
        patches = nn.Conv2d(3, width, tower.patch_size, tower.patch_size)
        self.siglip_model = nn.Module()
        self.siglip_model.vision_model = SiglipTransformer(sizes_of(tower), self.num_tokens, patches)
        self.siglip_model.vision_model.head = PoolingHead(tower)
        self.siglip_model.text_model = TextTower(config.text)
        self.siglip_model.logit_scale, self.siglip_model.logit_bias = (
            nn.Parameter(torch.zeros(1)) for _ in range(2)
        )
        heads = width // dim
        self.prequant_pix, self.prequant_sem = (Projection(width, dim, heads, causal=False) for _ in range(2))
        if config.layer_shortcut is not None:
            self.prequant_shortcut = Projection(width, dim, heads, causal=False)
        self.quantizer_pix, self.quantizer_sem = DualQuantizer(config.vq_pix), DualQuantizer(config.vq_sem)
        # The same modules as one quantizer, which is not registered: their keys stay the published ones.
        self.__dict__["product"] = ProductQuantizer([self.quantizer_pix, self.quantizer_sem])
        self.postquant_pix, self.postquant_sem = (
            Projection(dim, width, heads, causal=True) for _ in range(2)
        )
        self.post_quant_conv = BeforeDrawing(width, config.ddconfig.decoder_in_channels)
        self.decoder = DualTokenDecoder(config.ddconfig)

    @property
    def quantizer(self) -> ProductQuantizer:
        """Both residual quantizers side by side."""
        return self.product

    @property
    def vision(self) -> SiglipTransformer:
        """The image tower; its key in checkpoints is `siglip_model.vision_model`."""
        return self.siglip_model.vision_model

    @property
    def codebooks(self) -> dict[str, slice]:
        """Which of the Q codes per token are "pixel" and which "semantic"."""
        pixel, semantic = self.config.vq_pix.depth, self.config.vq_sem.depth
        return {"pixel": slice(0, pixel), "semantic": slice(pixel, pixel + semantic)}

    @classmethod
    def create(cls, **config: Any) -> Self:
        """Build with fresh weights from the fields of DualTokenConfig, or from the original's
        configuration."""
        return cls(DualTokenConfig.parse(config))

    @classmethod
    def recognise(
        cls, shapes: Mapping[str, torch.Size], config: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Recognised by its projections. Layers, weights and sizes of images are not in the keys, so that
        there is a ValueError without the original's configuration."""
        if "prequant_pix.attn.zero_k_bias" not in shapes:
            return None
        if not config or "layer_recon" not in config:
            raise ValueError(
                "these DualToken weights come without the configuration that has layer_recon and layer_sem: "
                "give config='path/to/config.json'"
            )
        return config

    # Images → codes -----------------------------------------------------------------------------------------

    def states(self, images: Tensor, *layers: int) -> list[Tensor]:
        """Images [B, 3, H, W] in [-1, 1] → the tower's states [B, K, D] after each of these numbers of
        layers."""
        tower = self.vision
        x = tower.embeddings.patch_embedding(images).flatten(2).transpose(1, 2) + tower.table
        kept = {0: x}
        for number in range(max(layers)):
            x = kept[number + 1] = tower.encoder.layers[number](x)
            if number not in layers:
                del kept[number]
        return [kept[layer] for layer in layers]

    def latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] → [B, K, 2 C]: latents of pixels, then semantic ones."""
        return torch.cat(self.both_latents(2 * images - 1), -1)

    def both_latents(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] in [-1, 1] → latents [B, K, C] of pixels, and semantic ones."""
        config = self.config
        shortcut = () if config.layer_shortcut is None else (config.layer_shortcut,)
        shallow, deep, *rest = self.states(images, config.layer_recon, config.layer_sem, *shortcut)
        pixel = self.prequant_pix(shallow)
        for states in rest:
            pixel = pixel + config.weight_shortcut * self.prequant_shortcut(states)
        return pixel, self.prequant_sem(deep)

    def features(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] → their quantized semantic tokens [B, K, D].

        Raises ValueError for images that `encode` refuses.
        """
        return self.features_of(self.encode(images))

    # Codes → features ---------------------------------------------------------------------------------------

    def split(self, tokens: Tokens) -> dict[str, Tokens]:
        """The "pixel" and the "semantic" codes of tokens, [B, K, Q] each; `decode` takes the former alone.

        Raises ValueError for tokens of other codebooks.
        """
        sizes = self.quantizer.codebook_sizes
        if tokens.indices is None or tokens.codebook_sizes != sizes:
            raise ValueError(f"tokens have codebook sizes {tokens.codebook_sizes}; {self.label} has {sizes}")
        parts = {}
        for name, columns in self.codebooks.items():
            # Both may have the same sizes, so the name keeps semantic codes from being drawn as pixels.
            owner = self.name if name == "pixel" else self._semantic_name
            codes = tokens.indices[..., columns]
            parts[name] = dataclasses.replace(
                tokens, indices=codes, codebook_sizes=sizes[columns], tokenizer=owner
            )
        return parts

    @property
    def _semantic_name(self) -> str:
        return f"{self.label} (semantic)"

    @torch.no_grad()
    def features_of(self, tokens: Tokens | Tensor) -> Tensor:
        """Tokens, or codes [B, K, Q], all or the semantic ones alone → features [B, K, D].

        Raises ValueError for codes of another tokenizer or codebook.
        """
        return self.semantic_states(self.quantizer_sem.decode(self._semantic(tokens)).to(self.dtype))

    def _semantic(self, tokens: Tokens | Tensor) -> Tensor:
        """The semantic codes [B, K, Q] of tokens, checked."""
        columns = self.codebooks["semantic"]
        codes = tokens.indices if isinstance(tokens, Tokens) else tokens
        alone = isinstance(codes, Tensor) and codes.ndim == 3 and codes.shape[-1] == self.config.vq_sem.depth
        if alone and (not isinstance(tokens, Tokens) or tokens.tokenizer == self._semantic_name):
            empty = codes.new_zeros(*codes.shape[:2], columns.start)
            tokens = self.as_tokens(torch.cat([empty, codes], -1))
        self.dequantize(tokens)  # its checks
        codes = tokens.indices if isinstance(tokens, Tokens) else tokens
        if codes.shape[-1] != columns.stop:
            raise ValueError(f"these tokens hold {codes.shape[-1]} codes per place, of pixels alone")
        return codes[..., columns].to(self.device)

    def semantic_states(self, quantized: Tensor) -> Tensor:
        """Quantized semantic latents [B, K, C] → the states [B, K, D] that the tower's last layers take."""
        return self.postquant_sem(quantized)

    @torch.no_grad()
    def pooled_features(self, tokens: Tokens | Tensor) -> Tensor:
        """Tokens, or codes as of `features_of` → the pooled feature of each picture [B, D], a unit vector."""
        return F.normalize(self.pooled(self.features_of(tokens)), dim=-1)

    def pooled(self, states: Tensor) -> Tensor:
        """States [B, K, D] after `layer_sem` layers → through the rest of the tower, pooled: [B, D]."""
        tower = self.vision
        x = run_layers(tower.encoder.layers[self.config.layer_sem :], states)
        return tower.head(tower.post_layernorm(x))

    @torch.no_grad()
    def text_features(self, ids: Tensor) -> Tensor:
        """Token ids int64 [B, L] of SigLIP2's text tokenizer → features [B, D] of unit length.

        Raises ValueError for another shape or type, more ids than places, and ids outside the vocabulary.
        """
        config = self.config.text
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype != torch.int64:
            form = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"text is {form}; give token ids as int64 [B, L]")
        if not 1 <= ids.shape[1] <= config.max_position_embeddings:
            raise ValueError(f"texts have {ids.shape[1]} tokens; give 1 to {config.max_position_embeddings}")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < config.vocab_size:
            span = f"{int(ids.min())}..{int(ids.max())}"
            raise ValueError(f"token ids span {span}; the vocabulary has {config.vocab_size}")
        return F.normalize(self.siglip_model.text_model(ids.to(self.device)), dim=-1)

    # Codes → pixels -----------------------------------------------------------------------------------------

    def dequantize(self, tokens: Tokens | Tensor) -> tuple[Tensor, Tensor | None]:
        """As `Tokenizer.dequantize`; codes of pixels alone get semantic ones that nothing draws from."""
        codes = tokens.indices if isinstance(tokens, Tokens) else tokens
        depth = self.config.vq_pix.depth
        if isinstance(codes, Tensor) and codes.ndim == 3 and codes.shape[-1] == depth:
            filled = F.pad(codes, (0, self.config.vq_sem.depth))
            if not isinstance(tokens, Tokens):
                tokens = filled
            elif tokens.tokenizer == self._semantic_name:
                raise ValueError(
                    "these tokens are semantic codes alone, which hold no pixels; features_of takes them"
                )
            elif tokens.codebook_sizes == self.quantizer_pix.codebook_sizes:
                sizes = self.quantizer.codebook_sizes
                tokens = dataclasses.replace(tokens, indices=filled, codebook_sizes=sizes)
        return super().dequantize(tokens)

    def pixels(self, latents: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Quantized latents [B, K, 2 C], or those of pixels [B, K, C] → images [B, 3, H, W], not clamped."""
        return (self.draw(latents[..., : self.config.vq_pix.embed_dim]) + 1) / 2

    def draw(self, quantized: Tensor) -> Tensor:
        """Quantized latents of pixels [B, K, C] → images [B, 3, H, W] in about [-1, 1]."""
        rows = self.postquant_pix(quantized)
        side = math.isqrt(rows.shape[1])
        grid = rows.transpose(1, 2).unflatten(2, (side, side))
        if tuple(self.config.decoder_latent_shape) != (side, side):
            grid = F.interpolate(grid, self.config.decoder_latent_shape, mode="bilinear", align_corners=False)
        return self.decoder(self.post_quant_conv(grid))

    # Training -----------------------------------------------------------------------------------------------

    def forward(self, images: Tensor, teacher: tuple[Tensor, Tensor] | None = None) -> TrainingOutput:
        """Training pass: images, codes and losses.

        `teacher` are states [B, K, D] after `layer_sem` layers and the pooled feature [B, D] of a frozen
        tower for the same images. Losses, with the original's weights: `commitment` of both quantizers, and
        with a teacher `states` and `pooled` (squared error minus cosine).
        """
        pixel, semantic = self.both_latents(2 * images - 1)
        pixel, semantic = self.quantizer_pix(pixel), self.quantizer_sem(semantic)
        commitment = pixel.losses["commitment"] + semantic.losses["commitment"]
        losses = {"commitment": LOSS_WEIGHTS["commitment"] * commitment}
        if teacher is not None:
            states = self.semantic_states(semantic.latents)
            for name, own, other in zip(
                ("states", "pooled"), (states, self.pooled(states)), teacher, strict=True
            ):
                if other.shape != own.shape:
                    raise ValueError(
                        f"the teacher's {name} have shape {list(other.shape)}; these images give "
                        f"{list(own.shape)}"
                    )
                cosine = F.cosine_similarity(own, other, dim=-1).mean()
                losses[name] = LOSS_WEIGHTS[name] * (F.mse_loss(own, other) - cosine)
        codes = torch.cat([pixel.codes, semantic.codes], -1)
        return TrainingOutput(self.pixels(pixel.latents), codes, losses)


def _rows() -> list[Entry]:
    large = {
        "vision": {"image_size": 384, "patch_size": 14},
        "vq_pix": {"depth": 8},
        "vq_sem": {"depth": 8},
        "ddconfig": {"resolution": 384, "attn_resolutions": (24,)},
        "decoder_latent_shape": (24, 24),
    }
    notes = (
        "features for understanding; no weights are published; licence of the code; trained on CC12M; {} "
        "codes of pixels and as many semantic ones per place"
    )
    table = [  # name, configuration, M numbers, figures, codes per place
        ("256", {}, 1355.5, {}, 4),
        ("384", large, 1364.3, {"rFID": 0.25, "PSNR": 28.69, "SSIM": 0.744}, 8),
    ]
    return [
        Entry(
            name=f"dualtoken-{name}",
            family="dualtoken",
            config=config,
            repo="https://github.com/songweii/DualToken",
            file="",
            license="MIT",
            paper="DualToken (arXiv 2503.14324)",
            parameters=parameters,
            figures=figures,
            notes=notes.format(depth),
        )
        for name, config, parameters, figures, depth in table
    ]


register(*_rows())
