"""RAE: the patch features of a frozen vision encoder as continuous tokens, and a decoder that draws from
them.

"Diffusion Transformers with Representation Autoencoders" (Zheng et al., 2025, arXiv 2510.11690). The encoder
is DINOv2 with registers, SigLIP2 or a masked autoencoder; its last norm loses weight and bias. Only the
decoder, a ViT in the layout of ViT-MAE's decoder, is trained, on features with noise.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from ... import checkpoint, pretrained
from ...nn.transformer import initialise
from ...quantizers import ContinuousLatents
from ...registry import Entry, entries, register, register_family
from ...tokenizer import Tokenizer, TrainingOutput
from .config import VARIANCE_OFFSET, RAEConfig
from .keys import ENCODER_PREFIXES, canonical_keys, config_from_shapes, select_part
from .network import RAEDecoder, RAEEncoder

T = TypeVar("T")


@register_family("rae")
class RAE(Tokenizer):
    """RAE with any of its three encoders; see the module.

    Tokens are `latents` [B, N, C], row by row of the grid: the features themselves, normalised by the
    statistics of a data set where `config.statistics` is set, as the published generators expect. Latents
    with and without statistics must not be mixed.

    The encoder is frozen: it never has gradients, so a recipe has `freeze: ["encoder.*"]`. `from_parts` joins
    the files of encoder, decoder and statistics as the authors publish them.
    """

    config_class = RAEConfig
    has_features = True
    checkpoint_ignores = (
        "decoder.decoder_pos_embed",
        "encoder.*.embeddings.mask_token",
        "encoder.*.layernorm.*",
        "encoder.*.post_layernorm.*",
        "encoder.*.head.*",
    )

    def __init__(self, config: RAEConfig) -> None:
        super().__init__(config)
        self.image_size = config.grid * config.decoder_patch_size
        self.num_tokens = config.grid**2
        self.quantizer = ContinuousLatents(config.encoder_hidden_size)
        self.encoder, self.decoder = RAEEncoder(config), RAEDecoder(config)
        for name in ("image_mean", "image_std"):
            values = torch.tensor(getattr(config, name)).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)
        if config.statistics:
            shape = (config.encoder_hidden_size, config.grid, config.grid)
            self.register_buffer("latents_mean", torch.zeros(shape))
            self.register_buffer("latents_std", torch.ones(shape))
        self.apply(initialise)

    # Building and loading -----------------------------------------------------------------------------------

    @classmethod
    def create(cls, **config: Any) -> Self:
        """Build with fresh weights from the fields of RAEConfig, or from the original's nested
        configuration."""
        return cls(RAEConfig.parse(config))

    @classmethod
    def recognise(
        cls, shapes: Mapping[str, torch.Size], config: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Recognised by the decoder's class token. Heads are the published ones of the width.

        Raises ValueError for the decoder alone, and for sizes that keys, shapes and `config` do not hold.
        """
        if "trainable_cls_token" in shapes:
            raise ValueError(
                "these are the weights of RAE's decoder alone; give the encoder and the statistics with it: "
                "vistok.models.rae.RAE.from_parts('rae-dinov2-b', encoder=…, decoder=…, statistics=…)"
            )
        if "decoder.trainable_cls_token" not in shapes:
            return None
        if config and "encoder" in config and "decoder" in config:
            return config
        return config_from_shapes(canonical_keys(shapes), config or {})

    @classmethod
    def rename_keys(cls, tensors: Mapping[str, T]) -> dict[str, T]:
        """Tensors under the original's keys, from the layout of diffusers' AutoencoderRAE, whose encoder has
        the names of any release of transformers."""
        return canonical_keys(tensors) if "decoder.trainable_cls_token" in tensors else dict(tensors)

    @classmethod
    def from_parts(
        cls,
        source: str | Mapping[str, Any],
        *,
        encoder: str | Path,
        decoder: str | Path,
        statistics: str | Path | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> Self:
        """Load from the published files of encoder, decoder and statistics, in eval mode.

        `source` is a published name or a configuration. `encoder` is the weights file of the encoder's own
        repository, `decoder` a decoder or a training file of the original, `statistics` its stat.pt (mean and
        variance, [C, g, g] each); without it latents are not normalised, and the model has no name.

        Raises:
            FileNotFoundError: a file that is not there.
            ValueError: an unknown name; keys, shapes and values that do not fit.
        """
        if isinstance(source, str):
            entry = entries().get(source)
            if entry is None or entry.family != cls.family:
                names = [name for name, each in entries().items() if each.family == cls.family]
                raise ValueError(f"{source!r} is not a published RAE; they are {', '.join(names)}")
            source = entry.config
        else:
            entry = None
        model = cls.create(**{**source, "statistics": False})
        own = select_part(checkpoint.read(checkpoint.locate(encoder).weights), ENCODER_PREFIXES)
        drawn = select_part(checkpoint.read(checkpoint.locate(decoder).weights), ("decoder.",))
        state = {f"encoder.{key}": value for key, value in own.items()}
        state |= {f"decoder.{key}": value for key, value in drawn.items()}
        kind = torch.float32 if dtype is None else pretrained.as_dtype(dtype)
        checkpoint.load_strictly(
            model,
            cls.rename_keys(state),
            dtype=kind,
            ignore=cls.checkpoint_ignores,
            source=f"{encoder} with {decoder}",
        )
        if statistics is not None:
            numbers = checkpoint.read(checkpoint.locate(statistics).weights)
            if missing := {"mean", "var"} - numbers.keys():
                raise ValueError(f"{statistics} has no {' and '.join(sorted(missing))}; give stat.pt")
            model.set_statistics(numbers["mean"], numbers["var"])
            model.name = entry.name if entry else None
        return model.to(device=pretrained.as_device(device), dtype=kind).eval()

    def set_statistics(self, mean: Tensor, variance: Tensor) -> None:
        """Normalise latents from now on, by their mean and variance [C, g, g] over a data set.

        Raises ValueError for other shapes, and for numbers that are not finite or a variance below zero.
        """
        shape = (self.config.encoder_hidden_size, self.config.grid, self.config.grid)
        for name, value in (("mean", mean), ("variance", variance)):
            if value.shape != shape:
                raise ValueError(
                    f"the {name} has shape {list(value.shape)}; {self.label} takes {list(shape)}: channels, "
                    "rows and columns"
                )
            if not bool(value.isfinite().all()) or (name == "variance" and bool((value < 0).any())):
                raise ValueError(
                    f"the {name} of the latents holds numbers that are not finite, or below zero"
                )
        self.register_buffer("latents_mean", mean.to(self.device, self.dtype))
        self.register_buffer("latents_std", (variance + VARIANCE_OFFSET).sqrt().to(self.device, self.dtype))
        self.config = dataclasses.replace(self.config, statistics=True)

    # Images → tokens → images -------------------------------------------------------------------------------

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] → the encoder's features of the patches [B, N, C], not normalised by
        statistics. ValueError for images that `encode` refuses."""
        return self.patch_features(self.check_images(images))

    @torch.no_grad()
    def patch_features(self, images: Tensor) -> Tensor:
        """As `features`, of images of any size: they are resized (bicubic, without antialias and regardless
        of their aspect ratio) to the side that the encoder takes."""
        side = self.config.encoder_input_size
        if images.shape[2:] != (side, side):
            exact = images.to(torch.promote_types(images.dtype, torch.float32))
            images = F.interpolate(exact, (side, side), mode="bicubic").to(images.dtype)
        return self.encoder((images - self.image_mean) / self.image_std)

    def normalised(self, features: Tensor) -> Tensor:
        """Features [B, N, C] as latents: normalised by the statistics, where there are any."""
        if not self.config.statistics:
            return features
        return (features - self._rows(self.latents_mean)) / self._rows(self.latents_std)

    @staticmethod
    def _rows(statistic: Tensor) -> Tensor:
        return statistic.flatten(1).T  # [C, g, g] → [N, C]

    def latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] → [B, N, C], without gradient."""
        return self.normalised(self.patch_features(images))

    def pixels(self, latents: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Latents [B, N, C] → images [B, 3, H, W], not clamped.

        Without statistics the latents may be of another square grid; the images have the same size.
        ValueError for another number of latents where there are statistics, which have a place each.
        """
        if self.config.statistics:
            if latents.shape[1] != self.num_tokens:
                raise ValueError(
                    f"{latents.shape[1]} latents were given; the statistics of {self.label} are for "
                    f"{self.num_tokens}"
                )
            latents = latents * self._rows(self.latents_std) + self._rows(self.latents_mean)
        return self.decoder(latents) * self.image_std + self.image_mean

    # Training -----------------------------------------------------------------------------------------------

    def noised(self, features: Tensor, level: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Features [B, N, C] with noise: features + noise_tau · level · noise.

        `level` [B, 1, 1] is uniform on 0..1 per image and `noise` [B, N, C] normal where they are not given.
        """
        if level is None:
            level = torch.rand(len(features), 1, 1, device=features.device, dtype=features.dtype)
        noise = torch.randn_like(features) if noise is None else noise
        return features + self.config.noise_tau * level * noise

    def forward(self, images: Tensor) -> TrainingOutput:
        """Training pass of the decoder: in training mode from features with noise."""
        features = self.patch_features(images)
        if self.training and self.config.noise_tau:
            features = self.noised(features)
        quantized = self.quantizer(self.normalised(features))
        return TrainingOutput(self.pixels(quantized.latents), quantized.codes, quantized.losses)


def _rows() -> list[Entry]:
    small = {"encoder_hidden_size": 384, "encoder_num_attention_heads": 6, "encoder_intermediate_size": 1536}
    large = {
        "encoder_hidden_size": 1024,
        "encoder_num_hidden_layers": 24,
        "encoder_num_attention_heads": 16,
        "encoder_intermediate_size": 4096,
    }
    dino, siglip = "facebook/dinov2-with-registers", "google/siglip2-base-patch16-256"
    table = [  # name, repository, configuration, M parameters, encoder
        ("dinov2-b", "dinov2-wReg-base", {}, 502.3, f"{dino}-base"),
        ("dinov2-b-512", "dinov2-wReg-base", {"encoder_input_size": 448}, 504.4, f"{dino}-base"),
        ("dinov2-s", "dinov2-wReg-small", small, 437.2, f"{dino}-small"),
        ("dinov2-l", "dinov2-wReg-large", large, 720.5, f"{dino}-large"),
        ("siglip2-b", "siglip2-base-p16-i256", {"encoder_type": "siglip2"}, 501.6, siglip),
        ("mae-b", "mae-base-p16", {"encoder_type": "mae"}, 501.5, "facebook/vit-mae-base"),
    ]
    figures = {"dinov2-b": {"rFID": 0.57}}
    verified = {"dinov2-b": "latents 3.8e-6, images 8.3e-7"}
    return [
        Entry(
            name=f"rae-{name}",
            family="rae",
            config={**config, "statistics": True},
            repo=f"nyu-visionx/RAE-{repo}-ViTXL-n08{'-i512' if name.endswith('-512') else ''}",
            file="diffusion_pytorch_model.safetensors",
            license=f"none seen; the encoder has the terms of {encoder}",
            paper="RAE (arXiv 2510.11690)",
            parameters=parameters,
            figures=figures.get(name, {}),
            notes="features of a frozen encoder; decoder trained on ImageNet with noise of up to 0.8; "
            "rFID against ImageNet-1k validation images centre-cropped to 256 px",
            verified=verified.get(name, ""),
        )
        for name, repo, config, parameters, encoder in table
    ]


register(*_rows())
