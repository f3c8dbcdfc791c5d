"""KARL: as many tokens as an image needs for a target error, chosen in one pass.

"Single-pass Adaptive Image Tokenization for Minimum Program Search" (Duggal et al., 2025, arXiv 2507.07995).
A transformer distils the grid of a two-dimensional tokenizer (a VQGAN or a KL autoencoder, which is part of
the checkpoint) into up to T one-dimensional tokens and halts those that it does not need to reach a mean
absolute error; the number of the others estimates the complexity of the image. Decoding takes the active
tokens only.

    tokens = tokenizer.encode(images, target=0.05)  # mean absolute error of a pixel value, images in [0, 1]
    tokens.lengths                                  # tokens per image
    images = tokenizer.decode(tokens)

Any subset of the T tokens can be active, so a token is its code and its place among the T. Quantized models
have indices [B, K, 2], (code, place); continuous ones latents [B, K, D + 2], D values and the two digits of
the place.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from ... import checkpoint
from ...quantizers import Quantized, VectorQuantizer
from ...registry import Entry, register, register_family
from ...tokenizer import Tokenizer, TrainingOutput, require_whole
from ...tokens import Tokens
from ..image_sizes import Size, read_size
from .bases import BASES, VAE, VQGAN
from .config import DEFAULT_TARGET, TARGETS, VARIANTS, KarlConfig
from .network import Analysis, DistillationDecoder, DistillationEncoder, TrainingPass
from .quantizer import PlacedQuantizer


@register_family("karl")
class Karl(Tokenizer):
    """KARL on either base tokenizer, with quantized or continuous tokens; see the module.

    `encode` offers an image `num_tokens` (256 by default; any up to 512, trained at multiples of 16) and
    keeps those that `target` needs. The network's estimate is not a bound: measure where one is needed.

    On the VAE images may also be twice as wide as high, 256×512 as in the original. Tokens do not hold the
    size; `decode(tokens, size=(256, 512))` takes it.
    """

    config_class = KarlConfig
    adaptive = True
    sized = True
    checkpoint_ignores = ("gan_losses.*",)

    def __init__(self, config: KarlConfig) -> None:
        super().__init__(config)
        self.image_size, self.num_tokens = config.image_size, config.num_tokens
        width, decoder_width, table = config.encoder_width, config.decoder_width, config.max_grid_tokens
        self.base_tokenizer = nn.ModuleDict({config.base: BASES[config.base](config)})
        for module in self.base_tokenizer.modules():
            # With one channel per group (32 of 32) a decoder cannot reproduce the brightness of an image.
            if isinstance(module, nn.GroupNorm):
                module.num_groups = config.base_norm_groups

        def normal(*shape: int, width: int = width) -> nn.Parameter:
            return nn.Parameter(width**-0.5 * torch.randn(*shape))

        self.patch_embed = nn.Conv2d(
            3, width - config.base_channels, config.patch_size, stride=config.patch_size
        )
        self.encoder_positional_embedding = normal(width, table, table)
        self.latent_tokens = normal(config.max_latent_tokens, width)
        # The original starts each row as its target repeated, which the norm after it turns into zero, for
        # every target the same. As waves of the level's number the targets differ from the first step on.
        waves = torch.outer(torch.arange(len(TARGETS)), torch.logspace(0, -1.5, -(-width // 2)))
        self.rec_loss_embeddings = nn.Parameter(torch.cat([waves.sin(), waves.cos()], 1)[:, :width])
        self.encoder_ln_pre = nn.LayerNorm(width)
        self.encoder = DistillationEncoder(config)
        self.encoder_ln_post_halt = nn.LayerNorm(width)
        self.halting_mlp = nn.Sequential(nn.Linear(width, 512), nn.Tanh(), nn.Linear(512, 1))
        self.encoder_ln_post = nn.LayerNorm(width)
        self.pre_quantizer_mlp = nn.Linear(width, config.vq_token_dim)
        if config.quantize_latent:
            self.quantize = VectorQuantizer(config.vq_codebook_size, config.vq_token_dim, l2_norm=True)
        self.decoder_embed = nn.Linear(config.vq_token_dim, decoder_width)
        self.decoder_latent_tokens_timestep_embed = normal(
            config.max_latent_tokens, decoder_width, width=decoder_width
        )
        self.decoder_mask_token = normal(1, 1, decoder_width, width=decoder_width)
        self.decoder_positional_embedding = normal(decoder_width, table, table, width=decoder_width)
        self.decoder = DistillationDecoder(config, self.base.outputs)
        for name, module in self.named_modules():
            if not name.startswith("base_tokenizer") and isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=config.initializer_range)
                nn.init.zeros_(module.bias)
        easy = torch.tensor([float(value <= 0.04) for value in TARGETS])
        self.register_buffer("target_probabilities", easy / easy.sum(), persistent=False)

    @classmethod
    def create(cls, **config: Any) -> Self:
        """Build with fresh weights from the fields of KarlConfig.

        `model`, one of the original's names (`karl_small`, …), gives widths, layers and heads.
        """
        name = config.pop("model", None)
        if name is not None:
            if name not in VARIANTS:
                raise ValueError(f"model is {name!r}; it is {', '.join(VARIANTS)}")
            fields = [f"{side}_{size}" for side in ("encoder", "decoder") for size in _SIZES]
            config = {**dict(zip(fields, VARIANTS[name], strict=True)), **config}
        return super().create(**config)

    @property
    def base(self) -> "VQGAN | VAE":
        """The two-dimensional tokenizer inside."""
        return self.base_tokenizer[self.config.base]

    @property
    def quantizer(self) -> PlacedQuantizer:
        """Codes with their places around the codebook, whose key in checkpoints is `quantize`."""
        inner = self.quantize if self.config.quantize_latent else None
        return PlacedQuantizer(inner, self.config.vq_token_dim, self.config.max_latent_tokens)

    # Checkpoints --------------------------------------------------------------------------------------------

    @classmethod
    def recognise(
        cls, shapes: Mapping[str, torch.Size], config: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Recognised by the halting network; everything but the number of heads follows from the shapes, and
        that is the usual one for the size."""
        if "halting_mlp.0.weight" not in shapes:
            return None
        try:
            return _config_from_shapes(shapes)
        except KeyError as error:
            raise ValueError(f"this KARL checkpoint lacks {error}; fetch it again") from error

    @classmethod
    def check_variant(cls, shapes: Mapping[str, torch.Size], config: Mapping[str, Any]) -> None:
        """Refuse the checkpoint of another base tokenizer, of other latents, or of a base tokenizer alone."""
        if "halting_mlp.0.weight" not in shapes:
            alone = _base_of(shapes)
            if alone is None:
                raise ValueError(
                    f"these are not weights of KARL: no halting_mlp among {len(shapes)} keys such as "
                    f"{', '.join(list(shapes)[:3])}"
                )
            raise ValueError(
                f"these are the weights of a {BASES[alone].name} alone, the base tokenizer that KARL uses; "
                "a KARL checkpoint holds it already. To train on it: "
                f"create('karl', base={alone!r}).load_base(path)"
            )
        variant = _variant(shapes)
        expected = {name: config.get(name, getattr(KarlConfig, name)) for name in variant}
        if expected != variant:
            raise ValueError(
                f"this is a KARL checkpoint {_described(variant)}; {_described(expected)} was asked for. "
                f"Load it by its path alone, or by the name that fits: {_names(variant)}"
            )

    def load_base(self, source: str | Path) -> Self:
        """Take the weights of the base tokenizer from a file of its own: MAGE's VQGAN or MAR's autoencoder.

        For training from scratch; published KARL checkpoints hold their base. Raises ValueError for the other
        of the two and for keys that do not fit.
        """
        located = checkpoint.locate(source)
        state = checkpoint.read(located.weights)
        base = _base_of({key: value.shape for key, value in state.items()})
        if base != self.config.base:
            kind = f"a {BASES[base].name}" if base else "neither a VQGAN nor a VAE"
            fix = f"create the model with base={base!r}" if base else "give the base tokenizer's own weights"
            raise ValueError(
                f"{located.weights} is {kind}; this model uses a {self.base.name}: give that, or {fix}"
            )
        checkpoint.load_strictly(
            self.base, state, dtype=self.dtype, ignore=("loss.*",), source=located.weights
        )
        self.base.to(self.device)
        return self

    # Images → tokens ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,
        num_tokens: int | None = None,
        *,
        target: float | Sequence[float] | Tensor = DEFAULT_TARGET,
        halting: bool = True,
        sample_posterior: bool = False,
        generator: torch.Generator | None = None,
        target_psnr: None = None,
    ) -> Tokens:
        """Images [B, 3, H, W] in [0, 1] → tokens; `tokens.lengths` [B] holds the number per image.

        `target` is the mean absolute error of a pixel value to aim at, 0 to 1, one number or one per image:
        the smallest level of `TARGETS` that is not below it is used (the last for more). 0.05 is the
        original's default; 0.03 keeps more detail, 0.07 takes fewer tokens. `num_tokens` is how many an image
        is offered; `halting=False` keeps all of them. `sample_posterior` draws the VAE's grid from its
        posterior, as the original does, instead of taking the mean. Raises ValueError for images, counts and
        targets that the model does not take.
        """
        if target_psnr is not None:
            return super().encode(images, num_tokens, target_psnr=target_psnr)  # raises ValueError
        count = self.check_num_tokens(num_tokens)
        if not count:
            most = self.config.max_latent_tokens
            raise ValueError(f"{self.label} takes 1 to {most} tokens per image; 0 was asked for")
        images = self.check_images(images)
        bins = self.target_bins(target, len(images))
        noise = self._posterior_noise(images, generator) if sample_posterior else None
        analysis = self.analyse(images, bins, count, self.base.features(images, noise))
        self.check_latents(torch.cat([analysis.values, analysis.halt_logits.unsqueeze(-1)], -1))
        places, lengths = _packed(analysis.active if halting else torch.ones_like(analysis.active))
        values = analysis.values.gather(1, places[..., None].expand(-1, -1, analysis.values.shape[-1]))
        tokens = self.as_tokens(self.quantizer.encode(self.quantizer.join(values, places)))
        return dataclasses.replace(tokens, lengths=lengths)

    @torch.no_grad()
    def decode(
        self,
        tokens: Tokens | Tensor,
        *,
        size: int | Size | None = None,
        condition: Any = None,
        steps: int | None = None,
        guidance: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Tokens (or bare codes [B, K]) → images [B, 3, H, W] in [0, 1].

        `size` is a side or (height, width) in pixels, by default `image_size`; on the VAE it may be twice as
        wide as high. ValueError for sizes that the model does not take, and for the other options, which are
        every tokenizer's, as in `Tokenizer.decode`.
        """
        size = self._checked_size(size)
        self.check_decoding(condition=condition, steps=steps, guidance=guidance)
        latents, lengths = self.dequantize(tokens)
        return self.pixels(latents, lengths, size=size).clamp(0, 1)

    def reconstruct(
        self,
        images: Tensor,
        num_tokens: int | None = None,
        *,
        target: float | Sequence[float] | Tensor = DEFAULT_TARGET,
        **options: Any,
    ) -> Tensor:
        """Images → tokens for a target error → images of the same size; `options` go to `decode`."""
        tokens = self.encode(images, num_tokens, target=target)
        return self.decode(tokens, **{"size": tuple(images.shape[2:])} | options)

    def check_image_size(self, height: int, width: int, fix: str) -> None:
        """Raise ValueError unless an image is a square of `image_size` or, on the VAE, two side by side."""
        side = self.image_size
        wide = self.config.base == "vae" and 2 * side // self.config.patch_size <= self.config.max_grid_tokens
        if (height, width) not in ((side, side), (side, 2 * side) if wide else (side, side)):
            also = f" or {side}×{2 * side}" if wide else ""
            raise ValueError(
                f"images are {height}×{width} pixels; {self.label} takes {side}×{side}{also}: {fix}"
            )

    def _checked_size(self, size: int | Size | None) -> Size:
        """Height and width of decoded images, in pixels."""
        size = read_size(self.image_size if size is None else size)
        self.check_image_size(*size, "give another size")
        return size

    def latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] → all T tokens at the default target, with their places: [B, T, D + 2]."""
        bins = self.target_bins(DEFAULT_TARGET, len(images))
        values = self.analyse(images, bins, self.num_tokens, self.base.features(images)).values
        return self.quantizer.join(values, _all_places(values))

    def target_bins(self, target: float | Sequence[float] | Tensor, batch: int) -> Tensor:
        """Target errors, one or one per image → the levels of TARGETS they select, int64 [batch]."""
        accepted = f"a mean absolute error of 0 to 1, one number or one for each of {batch} images"
        try:
            # Compared in float32, or 0.05 would not select 0.05.
            values = torch.as_tensor(target, dtype=torch.float32, device=self.device)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"target is {target!r}; it is {accepted}") from None
        if values.shape not in ((), (batch,)):
            raise ValueError(f"target has shape {list(values.shape)}; it is {accepted}")
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(f"target is {target}; it is {accepted} (0.05 by default)")
        levels = torch.tensor(TARGETS, device=self.device)
        return torch.searchsorted(levels, values.expand(batch).contiguous()).clamp(max=len(TARGETS) - 1)

    def analyse(self, images: Tensor, bins: Tensor, count: int, features: Tensor) -> Analysis:
        """Images [B, 3, H, W] with the base's features [B, E, h, w], levels of error int64 [B] and the number
        of tokens T to offer → which of them are needed, and their values."""
        grid = torch.cat([self.patch_embed(images), features], 1)  # [B, W, h, w]
        grid = grid + _resized(self.encoder_positional_embedding, grid.shape[2:])
        x = torch.cat(
            [
                self.rec_loss_embeddings[bins].unsqueeze(1),
                grid.flatten(2).transpose(1, 2),
                self.latent_tokens[:count].expand(len(images), -1, -1),
            ],
            1,
        )
        hidden = self.encoder.transformer(self.encoder_ln_pre(x), slice(-count, None))  # [B, T, W]
        return Analysis(
            hidden,
            self.halting_mlp(self.encoder_ln_post_halt(hidden)).squeeze(-1),
            self.pre_quantizer_mlp(self.encoder_ln_post(hidden)),
        )

    def _posterior_noise(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        if self.config.base != "vae":
            raise ValueError("sample_posterior is for models on the VAE; this one uses the VQGAN")
        cells = [side // self.config.patch_size for side in images.shape[2:]]
        device = images.device if generator is None else generator.device
        shape = (len(images), self.config.base_channels, *cells)
        return torch.randn(shape, generator=generator, device=device).to(images)

    # Tokens → images ----------------------------------------------------------------------------------------

    def pixels(
        self, latents: Tensor, lengths: Tensor | None = None, *, size: int | Size | None = None
    ) -> Tensor:
        """Latents with their places [B, K, D + 2], of which each image has the first `lengths` [B] → images
        [B, 3, H, W] of `size`, not clamped. The cost follows the lengths."""
        size = self._checked_size(size)
        values, places = self.quantizer.split(latents)
        if lengths is None or not len(lengths):
            return self.render(self.draw(values, places, size=size), size)
        if values.device.type == "cpu" and not torch.is_grad_enabled():
            counts = enumerate(lengths.tolist())
            rows = [(values[i : i + 1, :k], places[i : i + 1, :k]) for i, k in counts]
            return self.render(torch.cat([self.draw(*row, size=size) for row in rows]), size)
        longest = int(lengths.max())
        present = torch.arange(longest, device=values.device) < lengths.unsqueeze(1)
        return self.render(self.draw(values[:, :longest], places[:, :longest], present, size=size), size)

    def draw(
        self, values: Tensor, places: Tensor, present: Tensor | None = None, *, size: Size | None = None
    ) -> Tensor:
        """Values [B, K, D] at places int64 [B, K], all of them or those `present` (bool [B, K]) → the
        decoder's output for every cell of an image of `size`, [B, N, outputs]."""
        position = _resized(self.decoder_positional_embedding, self._cells(size))
        grid = self.decoder_mask_token + position.flatten(1).T
        tokens = self.decoder_embed(values) + self.decoder_latent_tokens_timestep_embed[places]
        return self.decoder(grid.expand(len(values), -1, -1), tokens, present)

    def render(self, output: Tensor, size: Size | None = None) -> Tensor:
        """The decoder's output for every cell [B, N, outputs] → images [B, 3, H, W] of `size`, not
        clamped."""
        return self.base.decoder(self.base.grid(output).transpose(1, 2).unflatten(2, self._cells(size)))

    def _cells(self, size: Size | None) -> tuple[int, int]:
        """Rows and columns of the grid of an image of that size, by default a square of `image_size`."""
        height, width = (self.image_size, self.image_size) if size is None else size
        return height // self.config.patch_size, width // self.config.patch_size

    def check_num_tokens(self, num_tokens: int | None) -> int:
        """The number of tokens per image, checked; by default the model's own."""
        require_whole(num_tokens)
        most = self.config.max_latent_tokens
        if num_tokens is None:
            return self.num_tokens
        # Every token of a batch may be halted, so that none is left to decode.
        if not 0 <= num_tokens <= most:
            raise ValueError(f"{self.label} takes 1 to {most} tokens per image; {num_tokens} was asked for")
        return num_tokens

    # Training -----------------------------------------------------------------------------------------------

    def forward(
        self, images: Tensor, *, num_tokens: int | None = None, target: float | Tensor | None = None
    ) -> TrainingOutput:
        """The two passes of a training step (section 3 of the paper); `num_tokens` and `target` are random
        by default.

        The first offers that many tokens, halts none and measures the error they reach. The second has that
        error as its target with `config.num_tokens` and learns to halt those beyond the first pass's number.
        The frozen weights decide what is trained. With everything but the base tokenizer frozen: that one
        alone, as an autoencoder. With the base tokenizer frozen: the original's first stage, on the base's
        features; the whole objective is in `losses`, and `images` carry no gradient. With nothing frozen:
        pixels; the first pass's mean absolute error is in `losses`, and the second's is left to the caller,
        who has its `images`. `codes` are those of all tokens.
        """
        if not any(p.requires_grad for n, p in self.named_parameters() if not n.startswith("base_tokenizer")):
            return self.base.autoencode(images)
        batch = len(images)
        first, last, step = self.config.training_tokens
        if num_tokens is None:
            num_tokens = first + step * int(torch.randint((last - first) // step + 1, ()))
        if target is None:
            levels = torch.multinomial(self.target_probabilities.float(), batch, replacement=True)
            target = torch.tensor(TARGETS, device=self.device)[levels]
        distil = self.distils
        noise = self._posterior_noise(images, None) if self.config.base == "vae" else None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not distil):
            features = self.base.features(images, noise)
        estimate = self.training_pass(images, features, num_tokens, target)
        self.update_targets(estimate.error)
        needed = min(num_tokens, self.num_tokens)
        tokenize = self.training_pass(images, features, self.num_tokens, estimate.error, needed)
        losses = {f"estimate_{name}": value for name, value in estimate.losses.items()} | tokenize.losses
        if not distil:
            del losses["reconstruction"]
        return TrainingOutput(tokenize.images, tokenize.codes, losses)

    @property
    def distils(self) -> bool:
        """Whether training is the original's first stage: the base tokenizer is frozen."""
        return not any(parameter.requires_grad for parameter in self.base_tokenizer.parameters())

    def training_pass(
        self,
        images: Tensor,
        features: Tensor,
        count: int,
        target: float | Tensor,
        needed: int | None = None,
    ) -> TrainingPass:
        """One pass with `count` tokens: without `needed` none is halted and all learn to be active; with it
        halted ones are left out, the first `needed` learn to be active and the others to be halted.

        Losses, each a mean: `active`, `halted` (weighted binary cross-entropy), those of the codebook, and
        those of the base tokenizer's features or `reconstruction` (mean absolute error).
        """
        bins = self.target_bins(torch.as_tensor(target).clamp(0, 1), len(images))
        analysis = self.analyse(images, bins, count, features)
        logits = analysis.halt_logits.float()
        kept = logits if needed is None else logits[:, :needed]
        weight = self.config.halting_weight
        losses = {"active": weight * F.binary_cross_entropy_with_logits(kept, torch.zeros_like(kept))}
        if needed is not None:
            spare = logits[:, needed:]
            halted = F.binary_cross_entropy_with_logits(spare, torch.ones_like(spare))
            losses["halted"] = weight * halted if spare.numel() else logits.new_zeros(())
        quantized = Quantized(analysis.values, analysis.values)
        if self.config.quantize_latent:
            quantized = self.quantize(analysis.values)
        values, places, present = quantized.latents, _all_places(analysis.values), None
        if needed is not None:
            places, lengths = _packed(analysis.active)
            values = values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))
            present = torch.arange(places.shape[1], device=values.device) < lengths.unsqueeze(1)
        size = tuple(images.shape[2:])
        output = self.draw(values, places, present, size=size)
        losses |= quantized.losses
        distil = self.distils
        with torch.set_grad_enabled(torch.is_grad_enabled() and not distil):
            decoded = self.render(output, size)
        absolute = (decoded.float() - images).abs()
        if distil:
            losses |= self.base.distillation(output, features)
        else:
            losses["reconstruction"] = absolute.mean()
        return TrainingPass(bins, losses, decoded, absolute.detach().mean((1, 2, 3)), quantized.codes)

    @torch.no_grad()
    def update_targets(self, error: Tensor) -> None:
        """Make the targets that a batch already reaches (its smallest error, or more) a little rarer."""
        levels = torch.tensor(TARGETS, device=error.device)
        reached = levels >= error.min()
        probabilities = torch.where(reached, 0.99, 1.0) * self.target_probabilities
        self.target_probabilities.copy_(probabilities / probabilities.sum())


_SIZES = ("width", "layers", "heads")


def _all_places(values: Tensor) -> Tensor:
    """Places 0..K-1 for every image of values [B, K, D]."""
    return torch.arange(values.shape[1], device=values.device).expand(len(values), -1)


def _packed(active: Tensor) -> tuple[Tensor, Tensor]:
    """Active tokens bool [B, T] → their places in order, int64 [B, K], K the most of any image, and their
    numbers [B]; after those the places of halted ones fill up the row."""
    lengths = active.sum(1)
    longest = int(lengths.max()) if len(lengths) else active.shape[1]
    return active.int().argsort(dim=1, descending=True, stable=True)[:, :longest], lengths


def _resized(table: Tensor, size: Sequence[int]) -> Tensor:
    """A table of positions [W, 64, 64] at the grid's size, by its nearest entries: [W, h, w]."""
    return F.interpolate(table.unsqueeze(0), tuple(size), mode="nearest").squeeze(0)


# Recognising checkpoints ------------------------------------------------------------------------------------


def _config_from_shapes(shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    def layers(prefix: str) -> int:
        return len({key[len(prefix) :].split(".")[0] for key in shapes if key.startswith(prefix)})

    variant = _variant(shapes)
    base = variant["base"]
    prefix = f"base_tokenizer.{base}."
    widths = [
        shapes[f"{prefix}encoder.down.{level}.block.0.conv2.weight"][0]
        for level in range(layers(f"{prefix}encoder.down."))
    ]
    hidden = shapes[f"{prefix}encoder.conv_in.weight"][0]
    depths = {side: layers(f"{side}.transformer.") for side in ("encoder", "decoder")}
    patch = shapes["patch_embed.weight"][-1]
    tokens = shapes["latent_tokens"][0]
    config = {
        **variant,
        "encoder_width": shapes["latent_tokens"][1],
        "decoder_width": shapes["decoder_mask_token"][-1],
        "vq_token_dim": shapes["pre_quantizer_mlp.weight"][0],
        "patch_size": patch,
        "max_grid_tokens": shapes["encoder_positional_embedding"][-1],
        "max_latent_tokens": tokens,
        "num_tokens": min(256, tokens),
        "image_size": 16 * patch,
        "base_hidden_channels": hidden,
        "base_channel_mult": tuple(width // hidden for width in widths),
        "base_res_blocks": layers(f"{prefix}encoder.down.0.block."),
        "base_channels": shapes[f"{prefix}decoder.conv_in.weight"][1],
        "training_tokens": (min(16, tokens), min(368, tokens), 16),
    }
    for side, depth in depths.items():
        config[f"{side}_layers"] = depth
        config[f"{side}_heads"] = max(8, depth)  # as in most of VARIANTS; shapes do not show it
    if config["quantize_latent"]:
        config["vq_codebook_size"] = shapes["quantize.embedding.weight"][0]
    if base == "vqgan":
        config["base_codebook_size"] = shapes[f"{prefix}quantize.embedding.weight"][0]
    return config


def _base_of(shapes: Mapping[str, torch.Size]) -> str | None:
    """The kind of base tokenizer in a weights file of its own, or None."""
    if "encoder.conv_in.weight" not in shapes:
        return None
    if "post_quant_conv.weight" in shapes and "quantize.embedding.weight" not in shapes:
        return "vae"
    return "vqgan" if "quantize.embedding.weight" in shapes else None


def _variant(shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """The base tokenizer and the kind of latents of a checkpoint, by its keys."""
    vae = any(key.startswith("base_tokenizer.vae.") for key in shapes)
    return {"base": "vae" if vae else "vqgan", "quantize_latent": "quantize.embedding.weight" in shapes}


def _described(variant: Mapping[str, Any]) -> str:
    latents = "quantized" if variant["quantize_latent"] else "continuous"
    return f"on the {BASES[variant['base']].name} with {latents} latents"


def _names(variant: Mapping[str, Any]) -> str:
    return ", ".join(entry.name for entry in _rows() if entry.config == variant)


def _rows() -> list[Entry]:
    sample = "; the authors' sample picture at target 0.05 has 128 of 256 tokens, error 0.0468"
    table = [  # name, trained on, base, quantized, M parameters, further notes
        ("karl-vqgan-vq", "imagenet", "vqgan", True, 270.9, ""),
        ("karl-vqgan-vq-in100", "imagenet100", "vqgan", True, 270.9, ""),
        ("karl-vqgan-in100", "imagenet100", "vqgan", False, 270.9, ""),
        ("karl-vae-vq-in100", "imagenet100", "vae", True, 281.0, ""),
        ("karl-vae-in100", "imagenet100", "vae", False, 280.9, sample),
    ]
    sets = {"imagenet": "ImageNet", "imagenet100": "ImageNet-100"}
    verified = {
        ("vqgan", True): "codes equal, latents 6.7e-6, images 4.7e-5",
        ("vae", False): "lengths equal, latents 7.6e-6, images 3.2e-5",
    }
    return [
        Entry(
            name=name,
            family="karl",
            config={"base": base, "quantize_latent": quantized},
            repo="https://github.com/ShivamDuggal4/karl",
            file=f"{data}/karl_small_{base}_{'quantized' if quantized else 'continuous'}_latents.pth",
            license="none stated",
            paper="KARL (arXiv 2507.07995)",
            parameters=parameters,
            notes=f"no licence stated, so all rights are reserved; trained on {sets[data]}{notes}",
            verified=verified.get((base, quantized), ""),
        )
        for name, data, base, quantized, parameters, notes in table
    ]


register(*_rows())
