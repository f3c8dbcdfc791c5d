"""FlexTok: a 256×256 image as 1 to 256 ordered tokens of 64,000 codes, decoded by a rectified flow.

Bachmann et al., "FlexTok: Resampling Images into 1D Token Sequences of Flexible Length", 2025, arXiv
2502.13967. A transformer reads the latents of a VAE into registers, of which each attends only to those
before it; finite scalar quantization makes each an index. Another transformer draws VAE latents from noise,
given any prefix of the tokens: few tokens fix the content of the picture, many its details.

    tokens = tokenizer.encode(images)                        # 256 each; num_tokens=32 costs less
    sweep = Tokens.cat([tokens.prefix(k) for k in (1, 16, 256)])
    pictures = tokenizer.decode(sweep, steps=20, guidance=7.5, generator=torch.Generator().manual_seed(1))

The published weights are not open source: Apple's licence allows research use only.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from ... import hub, registry
from ...adaptive import AdaptiveTokens, encode_to_quality
from ...extras import needs
from ...nn import flow
from ...quantizers import FiniteScalarQuantizer
from ...registry import Entry, register, register_family
from ...tokenizer import Tokenizer, TrainingOutput
from ...tokens import Tokens
from ..image_sizes import (
    Size,
    batches_by_size,
    draw_by_size,
    image_sizes,
    in_order,
    read_size,
    read_sizes,
    rows_by_size,
)
from .config import LICENSE, FlexTokConfig, KeptTokens, header_config
from .network import (
    Conditions,
    FlexTokDecoder,
    FlexTokEncoder,
    Layout,
    Modulations,
    patchify,
    register_mask,
    sincos_table,
    timestep_features,
)
from .vae import FlexTokVAE, load_vae, vae_config

__all__ = [
    "Conditions",
    "FlexTok",
    "FlexTokConfig",
    "Layout",
    "draw_lengths",
    "load_vae",
    "patchify",
    "powers_of_two",
    "register_mask",
    "round_up_to_power",
    "sincos_table",
    "timestep_features",
]

STEPS, GUIDANCE = 20, 7.5  # the authors' recommendation, with normalized guidance


@register_family("flextok")
class FlexTok(Tokenizer):
    """FlexTok in its published sizes and any other; see the module.

    Images need not be square: sides are multiples of `size_multiple` (16 pixels in published models) up to
    `image_size`, which alone was trained. Tokens do not hold a size; `decode(tokens, size=(128, 256))` takes
    it.

    A state dict holds the VAE (`vae.vae.*`), encoder and decoder under the published keys. With
    `config.vae=False` there is no VAE in it: attach one with `attach_vae`.
    """

    config_class = FlexTokConfig
    ordered = True
    stochastic = True
    sized = True
    own_config_wins = True

    def __init__(self, config: FlexTokConfig) -> None:
        super().__init__(config)
        self.image_size, self.num_tokens = config.image_size, config.num_tokens
        self.quantizer = FiniteScalarQuantizer(config.levels)
        if config.vae:
            with needs("diffusers", "diffusers", "FlexTok's VAE"):
                from diffusers import AutoencoderKL  # takes seconds

            autoencoder = AutoencoderKL(**vae_config(config))
            self.vae = FlexTokVAE(autoencoder, config.vae_scaling_factor, config.vae_source)
        self.encoder, self.decoder = FlexTokEncoder(config), FlexTokDecoder(config)
        for side in (self.encoder, self.decoder):
            for name, module in side.named_modules():
                if isinstance(module, nn.Linear):
                    silent = "adaLN_modulation" in name or name.rsplit(".", 1)[0].endswith(
                        ("enc_to_latents", "dec_to_patches")
                    )
                    (nn.init.zeros_ if silent else nn.init.xavier_uniform_)(module.weight)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)

    # Building and loading -----------------------------------------------------------------------------------

    @classmethod
    def create(cls, **config: Any) -> Self:
        """Build with fresh weights from the fields of FlexTokConfig, or from the original's graph of
        modules."""
        return cls(FlexTokConfig.parse(config))

    @classmethod
    def recognise(
        cls, shapes: Mapping[str, torch.Size], config: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Recognised by its registers. Keys do not hold the time scale and the VAE's factor, so that there is
        a ValueError without a config."""
        if "encoder.module_dict.enc_register_module.registers" not in shapes:
            return None
        if not config:
            raise ValueError(
                "these FlexTok weights come without the configuration that has max_timestep and the VAE's "
                "scaling factor, beside them or in the head of their .safetensors file: give "
                "config='path/to/config.json'"
            )
        parsed = FlexTokConfig.parse(config)
        has_vae = any(key.startswith("vae.") for key in shapes)
        return {field.name: getattr(parsed, field.name) for field in fields(parsed)} | {"vae": has_vae}

    @classmethod
    def config_in_file(cls, weights: Path) -> dict[str, Any] | None:
        """The configuration in the head of a published .safetensors file, or None."""
        return header_config(weights)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> Self:
        """As `Tokenizer.from_pretrained`; a published name warns of its licence once."""
        rows = (entry for entry in registry.entries().values() if entry.family == cls.family)
        repo = str(source).removeprefix(hub.PREFIX)
        entry = next((entry for entry in rows if repo in (entry.name, entry.repo)), None)
        if entry is not None:
            warnings.warn(f"{entry.name}: {entry.license}", stacklevel=2)
        return super().from_pretrained(source, **options)

    @classmethod
    def outline(cls, **config: Any) -> Self:
        """Without the VAE, which needs diffusers."""
        return super().outline(**{**config, "vae": False})

    def attach_vae(self, source: nn.Module | str | Path, scaling_factor: float | None = None) -> None:
        """Attach a VAE to weights without one: an AutoencoderKL, its name (flextok-vae-c16), repository or
        path.

        Its latents are multiplied by `scaling_factor`, else by the tokenizer's own configuration's, else by
        the VAE's. ValueError for another kind of model, and for latents of another shape than the
        tokenizer's.
        """
        with needs("diffusers", "diffusers", "FlexTok's VAE"):
            from diffusers import AutoencoderKL

        if self.config.vae:
            raise ValueError(
                f"{self.label} has its VAE in its checkpoint; only weights without one take another"
            )
        autoencoder = copy.deepcopy(source) if isinstance(source, nn.Module) else load_vae(source)
        if not isinstance(autoencoder, AutoencoderKL):
            raise ValueError(
                f"a {type(autoencoder).__name__} was given; FlexTok takes a diffusers AutoencoderKL"
            )
        config = autoencoder.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        channels, scale = self.config.latent_channels, self.image_size // self.config.latent_size
        if (config.latent_channels, factor) != (channels, scale):
            raise ValueError(
                f"this VAE has {config.latent_channels} latent channels at 1/{factor} of the image's side; "
                f"{self.label} takes {channels} channels at 1/{scale}, as flextok-vae-c{channels} has"
            )
        scaling_factor = scaling_factor or self.config.vae_scaling_factor or config.scaling_factor
        self.add_companion("vae", FlexTokVAE(autoencoder, scaling_factor))

    @property
    def autoencoder(self) -> FlexTokVAE:
        """The VAE, of the checkpoint or attached; ValueError if there is none."""
        vae = self.vae if self.config.vae else self.companion("vae")
        if vae is None:
            name = f"flextok-vae-c{self.config.latent_channels}"
            raise ValueError(
                f"these {self.label} weights hold no VAE; attach the one they were trained with: "
                f"tokenizer.attach_vae({name!r}), or give the path of its weights"
            )
        return vae

    # Images → tokens ----------------------------------------------------------------------------------------

    @property
    def size_multiple(self) -> int:
        """Sides of images are multiples of this, in pixels, up to `image_size`."""
        return self.config.size_multiple

    def check_image_size(self, height: int, width: int, fix: str) -> None:
        """Raise ValueError unless the VAE, the patches and the position table take images of this size."""
        multiple, most = self.size_multiple, self.image_size
        if not all(multiple <= side <= most and side % multiple == 0 for side in (height, width)):
            raise ValueError(
                f"images are {height}×{width} pixels; {self.label} takes sides that are multiples of "
                f"{multiple}, from {multiple} to {most}: {fix}"
            )
        if (height, width) != (most, most) and self.name in registry.entries():
            warnings.warn(f"{self.name} was trained on {most}×{most} images only", stacklevel=4)

    def latents(self, images: Tensor, num_tokens: int | None = None) -> Tensor:
        """Images [B, 3, H, W] → the first `num_tokens` (default: all) unquantized latents [B, K, D]."""
        with torch.no_grad():
            encoded = self.autoencoder.encode(2 * images - 1).to(self.dtype)
        return self.encoder(encoded, num_tokens or self.num_tokens)

    @torch.no_grad()
    def encode(
        self,
        images: Tensor | Sequence[Tensor],
        num_tokens: int | None = None,
        *,
        target_psnr: float | None = None,
    ) -> Any:
        """Images [B, 3, H, W] in [0, 1] → their first `num_tokens` tokens; fewer cost less.

        Sides are multiples of `size_multiple` up to `image_size`, not necessarily equal, and `images` may be
        a list of [3, H, W] of several sizes; tokens do not hold the size, which `decode` takes. Any number of
        tokens gives a prefix of the full code. The VAE's posterior is taken at its mean. In bfloat16 some
        indices differ from float32's. `target_psnr` is every ordered tokenizer's option.
        """
        if isinstance(images, list | tuple):
            return self._encode_list(images, num_tokens, target_psnr)
        count, images = self.check_num_tokens(num_tokens), self.check_images(images)
        if target_psnr is not None:
            size = tuple(images.shape[2:])
            return encode_to_quality(self, images, target_psnr, num_tokens=num_tokens, size=size)
        if not len(images):
            return self.as_tokens(torch.zeros(0, count, dtype=torch.int64, device=self.device))
        return self.as_tokens(self.quantizer.encode(self.check_latents(self.latents(images, count))))

    def _encode_list(
        self, images: Sequence[Tensor], num_tokens: int | None, target_psnr: float | None
    ) -> Tokens | AdaptiveTokens:
        """Images [3, H, W] of several sizes → one batch of tokens in their order."""
        if not images:
            return self.encode(torch.empty(0, 3, self.image_size, self.image_size), num_tokens)
        batches, order = batches_by_size(images, self.check_images)
        parts = [self.encode(batch, num_tokens, target_psnr=target_psnr) for batch in batches]
        if target_psnr is None:
            return Tokens.cat(parts)[order]
        tokens = Tokens.cat([part.tokens for part in parts])[order]
        psnr, reached = (
            torch.cat([getattr(part, name) for part in parts])[order.to(self.device)]
            for name in ("psnr", "reached")
        )
        return AdaptiveTokens(tokens, psnr, reached)

    # Tokens → images ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self,
        tokens: Tokens | Tensor,
        *,
        size: int | Size | list[Size] | None = None,
        condition: Any = None,
        steps: int | None = None,
        guidance: flow.Guidance | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        normalized: bool = True,
        noise: Tensor | Sequence[Tensor] | None = None,
    ) -> Any:
        """Tokens (or bare codes [B, K]) of any length → images [B, 3, H, W] in [0, 1].

        `size` is a side or (height, width) in pixels, by default `image_size`; a list with one (height,
        width) per image gives a list of images [3, H, W]. The picture is drawn from noise in `steps` Euler
        steps (20). `guidance` (7.5) is a scale, 1 for none, or a function of the time in [0, 1] that returns
        it; `normalized` guidance is adaptive projected guidance (arXiv 2410.02416), otherwise classifier-free
        guidance.

        One `generator` gives every image the noise it would have alone, so that neither neighbours nor the
        place in the batch matter and prefixes of one image share their noise; a list has one generator per
        image. None is seed 0: the same tokens give the same picture. `noise` [B, C, h, w], or a list of
        [C, h, w] beside a list of sizes, takes the generator's place. ValueError for lengths of 0 or beyond
        the maximum, and for sizes that the model does not take.
        """
        self.check_decoding(condition=condition)
        latents, lengths = self.dequantize(tokens)
        options = {"steps": steps, "guidance": guidance, "normalized": normalized}
        if not isinstance(size, list):
            images = self.pixels(latents, lengths, size=size, generator=generator, noise=noise, **options)
            return images.clamp(0, 1)
        sizes = read_sizes(size, len(latents))
        starts = self._noise_by_size(sizes, generator, noise)
        rows, parts = rows_by_size(sizes), {}
        for each, places in rows.items():
            start = torch.stack([starts[row] for row in places])
            counts = None if lengths is None else lengths[places]
            parts[each] = self.pixels(latents[places], counts, size=each, noise=start, **options).clamp(0, 1)
        return in_order(parts, rows)

    def reconstruct(
        self, images: Tensor | Sequence[Tensor], num_tokens: int | None = None, **options: Any
    ) -> Any:
        """Images → tokens → images of the same sizes, or of another `size`; `options` go to `decode`."""
        tokens = self.encode(images, num_tokens)
        size = tuple(images.shape[2:]) if isinstance(images, Tensor) else image_sizes(images)
        return self.decode(tokens, **{"size": size} | options)

    def pixels(
        self,
        latents: Tensor,
        lengths: Tensor | None = None,
        *,
        size: int | Size | None = None,
        **options: Any,
    ) -> Tensor:
        """Quantized latents [B, K, D] → images [B, 3, H, W], not clamped; `options` are those of `decode`."""
        size = self._checked_size(size)
        sampled = self.sample(latents, lengths, size=size, **options)
        if not len(sampled):
            return sampled.new_zeros(0, 3, *size, dtype=self.dtype)
        return (self.autoencoder.decode(sampled).to(self.dtype) + 1) / 2

    def sample(
        self,
        latents: Tensor,
        lengths: Tensor | None = None,
        *,
        size: int | Size | None = None,
        steps: int | None = None,
        guidance: flow.Guidance | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        normalized: bool = True,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Quantized latents [B, K, D] → VAE latents [B, C, h, w]; see `decode`."""
        steps = STEPS if steps is None else steps
        guidance = GUIDANCE if guidance is None else guidance
        if lengths is not None and bool((lengths < 1).any()):
            raise ValueError(
                f"{self.label} decodes 1 to {self.num_tokens} tokens per image; an image here has none"
            )
        batch = len(latents)
        x = self._noise(batch, self._checked_size(size), generator, noise)
        if not batch:
            return x
        conditional = self._conditions(latents.to(self.dtype), lengths)
        unconditional = [self.decoder.unconditional(len(each.registers)) for each in conditional]
        upcoming: Iterator[Modulations] = iter(())

        def velocity(step: int, x: Tensor, guided: bool) -> tuple[Tensor, Tensor | None]:
            nonlocal upcoming
            modulations = next(upcoming, None)
            if modulations is None:  # some steps at once, so that each layer's weights are read once for all
                ahead = range(step, min(step + 32, steps))
                times = torch.tensor([(steps - each) / steps for each in ahead], device=x.device)
                computed = self.decoder.modulations(times)
                upcoming = (computed.at(index) for index in range(len(ahead)))
                modulations = next(upcoming)
            velocities = self.decoder(x, modulations, conditional + unconditional if guided else conditional)
            count = len(conditional)
            return torch.cat(velocities[:count]), torch.cat(velocities[count:]) if guided else None

        return flow.sample(velocity, x, steps, guidance, normalized=normalized)

    def _checked_size(self, size: int | Size | None) -> Size:
        """Height and width of a decoded image, in pixels."""
        size = read_size(self.image_size if size is None else size)
        self.check_image_size(*size, "give another size")
        return size

    def _conditions(self, latents: Tensor, lengths: Tensor | None) -> list[Conditions]:
        """Conditions of all images together, or of each by itself on a CPU, where the work for a picture then
        depends on its own tokens only."""
        if lengths is None:
            return [self.decoder.conditions(latents)]
        counts = lengths.tolist()
        if len(set(counts)) == 1:
            return [self.decoder.conditions(latents[:, : counts[0]])]
        if latents.device.type != "cpu":
            return [self.decoder.conditions(latents, lengths)]
        rows = zip(latents.split(1), counts, strict=True)
        return [self.decoder.conditions(row[:, :count]) for row, count in rows]

    def _latent_shape(self, size: Size) -> tuple[int, int, int]:
        """Channels, rows and columns of the VAE's latents of an image."""
        factor = self.config.size_multiple // self.config.patch_size
        return self.config.latent_channels, size[0] // factor, size[1] // factor

    def _noise(
        self,
        batch: int,
        size: Size,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        noise: Tensor | None,
    ) -> Tensor:
        """Initial noise [B, C, h, w] in at least float32."""
        shape = self._latent_shape(size)
        dtype = torch.promote_types(self.dtype, torch.float32)
        if noise is not None:
            if not isinstance(noise, Tensor) or generator is not None or noise.shape != (batch, *shape):
                got = f"shape {list(noise.shape)}" if isinstance(noise, Tensor) else type(noise).__name__
                raise ValueError(
                    f"noise of {got} was given; {list((batch, *shape))} is needed, without a generator "
                    "beside it"
                )
            return noise.to(self.device, dtype)
        if generator is None:
            generator = torch.Generator().manual_seed(0)
        shared = isinstance(generator, torch.Generator)
        generators = [generator] if shared else list(generator)
        if not shared:
            self._check_one_each("generators", generators, batch)
        result = torch.empty(batch, *shape, device=self.device, dtype=dtype)
        for image, each in enumerate(generators):
            rows = slice(None) if shared else image
            result[rows] = torch.randn(shape, generator=each, device=each.device).to(result)
        return result

    def _noise_by_size(
        self,
        sizes: Sequence[Size],
        generator: torch.Generator | Sequence[torch.Generator] | None,
        noise: Sequence[Tensor] | None,
    ) -> list[Tensor]:
        """Initial noise [C, h, w] of images of these sizes, each what that image would have alone."""
        for size in sizes:
            self._checked_size(size)
        if noise is not None and generator is not None:
            raise ValueError("noise and a generator were given; give one of them")
        if noise is not None:
            self._check_one_each("noises", noise, len(sizes))
            pairs = zip(sizes, noise, strict=True)
            return [self._noise(1, size, None, each[None])[0] for size, each in pairs]
        if generator is not None and not isinstance(generator, torch.Generator):
            self._check_one_each("generators", generator, len(sizes))
            pairs = zip(sizes, generator, strict=True)
            return [self._noise(1, size, [each], None)[0] for size, each in pairs]
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        by_size = draw_by_size({size: self._latent_shape(size) for size in sizes}, generator)
        return [by_size[size] for size in sizes]

    def _check_one_each(self, what: str, values: Sequence[Any], batch: int) -> None:
        if len(values) != batch:
            raise ValueError(
                f"{len(values)} {what} were given for {batch} images; give one generator, or one of them per "
                "image"
            )

    # Training -----------------------------------------------------------------------------------------------

    def forward(self, images: Tensor, lengths: Tensor | None = None) -> TrainingOutput:
        """One step of flow matching with nested dropout; `lengths` [B] fixes how many tokens each image
        keeps.

        Times, noise, lengths and hidden conditions are drawn as the configuration states. `losses["flow"]` is
        the mean squared error of the velocity, and the whole objective. With encoder and decoder frozen the
        VAE is trained instead, as an autoencoder.
        """
        if not any(p.requires_grad for side in (self.encoder, self.decoder) for p in side.parameters()):
            return self.autoencoder.autoencode(images)
        config, batch, device = self.config, len(images), images.device
        with torch.no_grad():
            clean = self.autoencoder.encode(2 * images - 1, sample=config.sample_posterior).to(self.dtype)
        quantized = self.quantizer(self.encoder(clean, self.num_tokens))
        if lengths is None:
            lengths = draw_lengths(batch, self.num_tokens, config.kept_tokens).to(device)
        if config.times == "mode":
            times = flow.mode_times(torch.rand(batch, device=device), config.mode_scale)
        elif config.times == "stratified":
            times = flow.stratified_times(torch.rand(batch, device=device))
        else:
            times = flow.logit_normal_times(torch.randn(batch, device=device))
        noise = torch.randn_like(clean)
        null = torch.rand(batch, device=device) < config.null_probability
        conditions = self.decoder.conditions(quantized.latents, lengths, null)
        noised = flow.noised(clean, noise, times.to(clean.dtype))
        (velocity,) = self.decoder(noised, self.decoder.modulations(times), [conditions])
        loss = F.mse_loss(velocity.float(), (noise - clean).float())
        return TrainingOutput(None, quantized.codes, quantized.losses | {"flow": loss})


# Nested dropout ---------------------------------------------------------------------------------------------


def powers_of_two(maximum: int) -> Tensor:
    """1, 2, 4, … up to `maximum`, int64."""
    return 2 ** torch.arange(maximum.bit_length())


def round_up_to_power(counts: Tensor, maximum: int) -> Tensor:
    """Numbers of tokens in 1 … maximum → the next power of two, at most `maximum`."""
    powers = powers_of_two(maximum).to(counts.device)
    return powers[torch.searchsorted(powers, counts).clamp(max=len(powers) - 1)].maximum(counts)


def draw_lengths(batch: int, maximum: int, mode: KeptTokens) -> Tensor:
    """How many tokens each image keeps in a training step, int64 [B]."""
    if mode == "pow2":
        powers = powers_of_two(maximum)
        return powers[torch.randint(len(powers), (batch,))]
    counts = torch.randint(1, maximum + 1, (batch,))
    return counts if mode == "uniform" else round_up_to_power(counts, maximum)


# Published names --------------------------------------------------------------------------------------------


def _rows() -> list[Entry]:
    table = [  # name, data, depths of encoder and decoder, M parameters, rFID as the paper is quoted
        ("d12-d12-in1k", "ImageNet-1k", 12, 12, 341.7, 4.20),
        ("d18-d18-in1k", "ImageNet-1k", 18, 18, 949.7, 1.61),
        ("d18-d28-in1k", "ImageNet-1k", 18, 28, 2540.9, 1.45),
        ("d18-d28-dfn", "DFN", 18, 28, 2540.9, None),
    ]
    return [
        Entry(
            name=f"flextok-{name}",
            family="flextok",
            config={
                "encoder_dim": 64 * encoder,
                "encoder_depth": encoder,
                "decoder_dim": 64 * decoder,
                "decoder_depth": decoder,
            },
            repo=f"EPFL-VILAB/flextok_{name.replace('-', '_')}",
            license=LICENSE,
            paper="FlexTok (arXiv 2502.13967)",
            parameters=parameters,
            figures={} if rfid is None else {"rFID": rfid},
            notes=f"any prefix of 256 tokens, stochastic decoder, trained on {data}",
            verified="codes equal, latents 4.8e-6, images 1.2e-5" if name == "d12-d12-in1k" else "",
        )
        for name, data, encoder, decoder, parameters, rfid in table
    ]


register(*_rows())
