"""DetailFlow: ordered tokens whose first ones hold a small picture, each further group a larger one.

"DetailFlow: 1D Coarse-to-Fine Autoregressive Image Generation via Next-Detail Prediction" (Liu et al., 2025,
arXiv 2505.21473). A SigLIP2 transformer reads patches and latent tokens, where a latent token sees the
patches and the latent tokens up to the end of its group; each becomes a code (VQ). A second transformer draws
a prefix of the codes at the resolution that belongs to its length.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from ...nn.cpu.linear import linear
from ...nn.transformer import initialise
from ...quantizers import VectorQuantizer
from ...registry import Entry, register, register_family
from ...tokenizer import Tokenizer, TrainingOutput
from .config import DetailFlowConfig
from .network import DetailFlowDecoder, DetailFlowEncoder

CANDIDATES = 50  # nearest codes from which a sampling error is drawn
USAGE_WINDOW = 65_536  # codes whose usage training reports
ENTROPY_OFFSET = 1e-5
HEADS = {768: 12, 1152: 16}  # by width, of the published models


@register_family("detailflow")
class DetailFlow(Tokenizer):
    """DetailFlow's tokenizer; see the module. Its teacher, which only training uses, is not part of it.

    Prefixes of `prefix_lengths` decode: 1 to `causal_num` tokens one by one, then whole groups. A prefix is
    drawn at its own resolution (`config.resolutions`) and enlarged to `image_size`; `draw` gives other sides.
    """

    config_class = DetailFlowConfig
    ordered = True
    checkpoint_ignores = ("quantize.codebook_used", "repa_model.*", "global_token_proj.*", "projection.*")

    def __init__(self, config: DetailFlowConfig) -> None:
        super().__init__(config)
        self.image_size, self.num_tokens = config.image_size, config.num_latent_tokens
        self.encoder, self.decoder = DetailFlowEncoder(config), DetailFlowDecoder(config)
        channels = config.codebook_embed_dim
        self.quant_conv = nn.Linear(config.encoder_width, channels)
        self.post_quant_conv = nn.Linear(channels, config.decoder_width)
        self.refine_conv = nn.Linear(channels, config.encoder_width)
        self.quantize = VectorQuantizer(
            config.codebook_size,
            channels,
            l2_norm=True,
            commitment_cost=config.commit_loss_beta,
            entropy_weight=config.entropy_loss_ratio,
            entropy_offset=ENTROPY_OFFSET,
            usage_window=USAGE_WINDOW,
        )
        self.apply(initialise)
        for side in (self.encoder, self.decoder):
            nn.init.trunc_normal_(side.visual_model.embeddings.position_embedding.weight, std=0.02)

    @property
    def quantizer(self) -> VectorQuantizer:
        """The bottleneck; its key in checkpoints is `quantize`."""
        return self.quantize

    @property
    def prefix_lengths(self) -> tuple[int, ...]:
        """Numbers of tokens of which an image may have the first: 1 to `causal_num`, then whole groups."""
        return self.config.resolutions.lengths

    @classmethod
    def create(cls, **config: Any) -> Self:
        """Build with fresh weights from the fields of DetailFlowConfig, or from the original's
        configuration."""
        return cls(DetailFlowConfig.parse(config))

    @classmethod
    def recognise(
        cls, shapes: Mapping[str, torch.Size], config: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Recognised by its refined tokens. Heads, groups and resolutions do not follow from shapes: without
        a configuration they are the published ones, for the published sizes alone."""
        if "encoder.refined_tokens" not in shapes or "decoder.mask_token" not in shapes:
            return None
        if config and ("model" in config or "enc_type" in config):
            return config
        return _config_from_shapes(shapes)

    # Images → tokens ----------------------------------------------------------------------------------------

    def latents(self, images: Tensor, count: int | None = None, prefix: Tensor | None = None) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] → the first `count` (default: all) latents [B, K, C].

        `prefix` [B, k, C] are quantized vectors of the first k tokens: the pass that corrects the others.
        """
        if prefix is not None:
            prefix = linear(prefix, self.refine_conv.weight, self.refine_conv.bias)
        rows = self.encoder(2 * images - 1, self.num_tokens if count is None else count, prefix)
        return linear(rows, self.quant_conv.weight, self.quant_conv.bias)

    @torch.no_grad()
    def corrected_codes(
        self,
        images: Tensor,
        start: int,
        *,
        ranks: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Codes that train a generator to repair sampling errors: int64 [B, K, 3], (clean, input, label).

        From `start` on, one token (before `causal_num`) or a group has errors: each of its codes is one of
        the 50 nearest, by `ranks` int64 [B, K] (0: the nearest) or drawn by `generator` on the CPU. The
        tokens behind are encoded again with the errors in view. Inputs hold the errors, labels the clean
        codes there.

        Raises:
            ValueError: images that `encode` refuses; a start that is neither below `causal_num` nor a
                multiple of `group_size`; ranks of another shape or beyond the candidates.
        """
        images = self.check_images(images)
        latents = self.check_latents(self.latents(images))
        clean = self.quantize.encode(latents)
        drawn = self._near_codes(latents, ranks, generator)
        end = self.error_end(start)
        prefix = torch.cat([clean[:, :start], drawn[:, start:end]], 1)
        later = self.latents(images, prefix=self.quantize.decode(prefix).to(self.dtype))
        later = self.quantize.encode(self.check_latents(later))[:, end:]
        inputs, labels = torch.cat([prefix, later], 1), torch.cat([clean[:, :end], later], 1)
        return torch.stack([clean, inputs, labels], -1)

    def error_end(self, start: int) -> int:
        """The end of the sampling errors that begin at token `start`; ValueError where none can begin."""
        first, group = self.config.first, self.config.group_size
        whole = isinstance(start, int) and not isinstance(start, bool)
        if not whole or not 0 <= start < self.num_tokens or (start >= first and start % group):
            raise ValueError(
                f"start is {start!r}; errors of {self.label} begin at a token of 0 to {first - 1}, or at a "
                f"multiple of {group} below {self.num_tokens}"
            )
        return start + (1 if start < first else group)

    def _near_codes(
        self, latents: Tensor, ranks: Tensor | None, generator: torch.Generator | None = None
    ) -> Tensor:
        """One of the nearest codes of each latent [B, K, C], by its rank [B, K]: int64 [B, K]."""
        most = min(CANDIDATES, self.config.codebook_size)
        if ranks is None:
            ranks = torch.randint(most, latents.shape[:2], generator=generator)
        if ranks.shape != latents.shape[:2] or (ranks.numel() and not 0 <= ranks.min() <= ranks.max() < most):
            raise ValueError(
                f"ranks have shape {list(ranks.shape)}; they are whole numbers below {most}, one per token: "
                f"{list(latents.shape[:2])}"
            )
        near = self.quantize.distances(latents).topk(most, largest=False).indices  # [B, K, 50]
        return near.gather(2, ranks.to(near).unsqueeze(2)).squeeze(2)

    # Tokens → images ----------------------------------------------------------------------------------------

    def draw(self, latents: Tensor, side: int | None = None) -> Tensor:
        """Quantized latents [B, t, C] of a prefix → images [B, 3, side, side], not clamped.

        `side` is a multiple of the decoder's patch, by default that of the prefix's resolution, the only one
        that it was trained for. ValueError for another side, and for a length that is not of
        `prefix_lengths`.
        """
        count, patch = self.check_num_tokens(latents.shape[1]), self.config.dec_patch_size
        side = self.config.resolutions.side(count, patch) if side is None else side
        if side < patch or side % patch:
            raise ValueError(f"side is {side}; {self.label} draws sides that are multiples of {patch} pixels")
        rows = linear(latents, self.post_quant_conv.weight, self.post_quant_conv.bias)
        return (self.decoder(rows, side) + 1) / 2

    def pixels(self, latents: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Latents [B, k, C], of which each image has the first `lengths` [B] → images [B, 3, H, W], drawn at
        the resolution of their length and enlarged (bicubic), not clamped."""
        if lengths is None or not len(lengths):
            return self._enlarged(self.draw(latents))
        pieces, rows = [], []
        for length in lengths.unique().tolist():
            which = (lengths == length).nonzero().flatten()
            rows.append(which)
            pieces.append(self._enlarged(self.draw(latents[which, :length])))
        return torch.cat(pieces)[torch.cat(rows).argsort()]

    def _enlarged(self, images: Tensor) -> Tensor:
        if images.shape[2] == self.image_size:
            return images
        exact = images.to(torch.promote_types(images.dtype, torch.float32))
        return F.interpolate(exact, (self.image_size, self.image_size), mode="bicubic").to(images.dtype)

    # Training -----------------------------------------------------------------------------------------------

    def prefix_target(self, images: Tensor, length: int) -> Tensor:
        """Images [B, 3, H, W] as a prefix of that length should draw them, [B, 3, side, side]: reduced to its
        resolution by area, then enlarged to whole patches."""
        resolution = self.config.resolutions.resolution(length)
        side = self.config.resolutions.side(length, self.config.dec_patch_size)
        if resolution < images.shape[2]:
            images = F.interpolate(images, (resolution, resolution), mode="area")
        return images if side == resolution else F.interpolate(images, (side, side), mode="bicubic")

    def forward(self, images: Tensor, lengths: Tensor | None = None) -> TrainingOutput:
        """Training pass; `lengths` [B] keeps only the first tokens of each image.

        In training mode without `lengths` a share of the calls (`prefix_probability`) draws a prefix of one
        length for the whole batch, whose `targets` are smaller than the images. With `correction_training`
        errors are drawn into the tokens, and `losses["correction"]` is the squared error of the picture from
        the corrected tokens; perceptual and adversarial losses see the picture from the clean ones alone.
        Random numbers come from the CPU generator.
        """
        if not self.training or lengths is not None:
            quantized = self.quantize(self.latents(images))
            decoded = self.pixels(quantized.latents, lengths)
            count, targets = self.num_tokens, images
        else:
            count = self._training_length()
            quantized = self.quantize(self.latents(images, count))
            decoded, targets = self.draw(quantized.latents), self.prefix_target(images, count)
        output = TrainingOutput(decoded, quantized.codes, quantized.losses)
        if targets.shape[2:] != images.shape[2:]:
            output.targets = targets
        if self.training and self.config.correction_training:
            start = self._training_start(count)
            if start is not None:
                corrected = self._corrected(images, quantized.latents, start)
                output.losses["correction"] = F.mse_loss(self.draw(corrected), targets)
        return output

    def _training_length(self) -> int:
        """The number of tokens of a step: all, or those of a random prefix."""
        group, first, count = self.config.group_size, self.config.first, self.num_tokens
        if count < group + first or torch.rand(()) >= self.config.prefix_probability:
            return count
        length = int(torch.randint(1, count - group + 1, ()))
        return length if length <= first else -(-length // group) * group

    def _training_start(self, count: int) -> int | None:
        """The token at which the errors of a step begin, or None where there are too few tokens."""
        group, first = self.config.group_size, self.config.first
        most = count - group if count > first else count
        if count == 1 or most < 1:
            return None
        start = int(torch.randint(most, ()))
        return start if start < first else start // group * group

    def _corrected(self, images: Tensor, quantized: Tensor, start: int) -> Tensor:
        """Quantized latents [B, t, C] with errors from `start` on and later tokens encoded in their view."""
        end = self.error_end(start)
        drawn = self._near_codes(quantized.detach(), None)[:, start:end]
        wrong = self.quantize.decode(drawn).detach().to(quantized.dtype)
        prefix = torch.cat([quantized[:, :start], wrong], 1)
        later = self.quantize(self.latents(images, quantized.shape[1], prefix)).latents
        return torch.cat([prefix, later[:, end:]], 1)


def _config_from_shapes(shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    def sizes(side: str) -> dict[str, int | None]:
        prefix = f"{side}.visual_model.encoder.layers."
        width = shapes[f"{side}.latent_pos_embed"][2]
        return {
            f"{side}_width": width,
            f"{side}_layers": len(
                {key[len(prefix) :].split(".")[0] for key in shapes if key.startswith(prefix)}
            ),
            f"{side}_heads": HEADS.get(width),
            f"{side}_mlp": shapes[f"{prefix}0.mlp.fc1.weight"][0],
        }

    config = {
        "num_latent_tokens": shapes["encoder.latent_tokens"][1],
        "codebook_size": shapes["quantize.embedding.weight"][0],
        "codebook_embed_dim": shapes["quantize.embedding.weight"][1],
        "num_patches": shapes["encoder.visual_model.embeddings.position_embedding.weight"][0],
        **sizes("encoder"),
        **sizes("decoder"),
    }
    standard = DetailFlowConfig()
    others = [name for name, value in config.items() if value != getattr(standard, name)]
    if config["num_latent_tokens"] in (256, 512):
        others.remove("num_latent_tokens")
    if others:
        raise ValueError(
            f"these DetailFlow weights are not of a published size ({others[0]} is {config[others[0]]}), and "
            "keys do not hold heads, group_size, causal_num and degradation_power: give config={'family': "
            "'detailflow', 'config': {…}}"
        )
    return config


register(
    *(
        Entry(
            name=f"detailflow-{letter}",
            family="detailflow",
            config={"num_latent_tokens": count},
            repo=f"ByteFlow-AI/DetailFlow-{letter}",
            file=f"checkpoints/{count}.pt",
            license="Apache-2.0",
            paper="DetailFlow (arXiv 2505.21473)",
            parameters=parameters,
            figures={"rFID": rfid},
            notes="prefixes of 1–8 tokens, then of whole groups of 8; trained on ImageNet; ImageNet-1k "
            "validation images at 256 px",
            verified=verified,
        )
        for letter, count, parameters, rfid, verified in (
            ("16", 128, 270.5, 1.13, "codes equal, latents 3.8e-6, images 3.2e-6"),
            ("32", 256, 271.1, 0.80, ""),
            ("64", 512, 272.2, 0.52, ""),
        )
    )
)
