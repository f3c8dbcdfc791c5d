"""The configuration of MingTok and of its three stages."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

from ...configuration import build
from ...nested_config import section
from ..ranges import require_between, require_depths, require_multiple, require_sizes

HEAD = 64  # channels per attention head, in all stages
Feedforward = Literal["mlp", "swiglu", "swiglufused"]
C = TypeVar("C")


@dataclass(frozen=True)
class EncoderConfig:
    """The first stage: images to latents of `out_dim` channels."""

    img_size: int = 512
    """Side in pixels of the images that the position table was trained for."""
    patch_size: int = 32
    depth: int = 12
    embed_dim: int = 768
    ffn_layer: Feedforward = "mlp"
    out_dim: int = 32

    def __post_init__(self) -> None:
        require_sizes(self, "img_size", "patch_size", "embed_dim", "out_dim")
        require_depths(self, "depth")
        require_multiple(self, "img_size", "patch_size")
        require_multiple(self, "embed_dim", "out_dim")
        _require_heads(self)

    @property
    def side(self) -> int:
        """Cells per side of the position table."""
        return self.img_size // self.patch_size


@dataclass(frozen=True)
class SemanticConfig:
    """The second stage: latents to features."""

    in_dim: int = 32
    patch_size: int = 32
    embed_dim: int = 1024
    decoder_depth: int = 24
    ffn_layer: Feedforward = "mlp"

    def __post_init__(self) -> None:
        require_sizes(self, "in_dim", "patch_size", "embed_dim")
        require_depths(self, "decoder_depth")
        require_multiple(self, "embed_dim", "in_dim")
        _require_heads(self)


@dataclass(frozen=True)
class PixelConfig:
    """The third stage: features to pixels; its feed-forward layers are plain MLPs, whatever is published."""

    patch_size: int = 16
    decoder_depth: int = 24
    embed_dim: int = 1024

    def __post_init__(self) -> None:
        require_sizes(self, "patch_size", "embed_dim")
        require_depths(self, "decoder_depth")
        _require_heads(self)


@dataclass(frozen=True)
class MingTokConfig:
    """The original's configuration.

    Latents are (encoder output - `mean`) / `scaling_factor`. `model_dtype` is the precision of the first two
    stages on a GPU where the weights are float32; the third then stays in float32.
    """

    low_level_encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(ffn_layer="swiglufused"))
    semantic_decoder: SemanticConfig = field(default_factory=lambda: SemanticConfig(ffn_layer="swiglufused"))
    pixel_decoder: PixelConfig = field(default_factory=PixelConfig)
    scaling_factor: float = 8.09449291
    mean: float = 1.46817409
    model_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"

    def __post_init__(self) -> None:
        require_between(self, ["scaling_factor"], 1e-6, 1e6)
        require_between(self, ["mean"], -1e6, 1e6)
        encoder, semantic, pixel = self.low_level_encoder, self.semantic_decoder, self.pixel_decoder
        if semantic.in_dim != encoder.out_dim:
            raise ValueError(
                f"the semantic decoder's in_dim is {semantic.in_dim}; it is the encoder's out_dim, "
                f"{encoder.out_dim}"
            )
        if semantic.patch_size != encoder.patch_size:
            raise ValueError(
                f"the semantic decoder's patch_size is {semantic.patch_size}; it is the encoder's, "
                f"{encoder.patch_size}"
            )
        if encoder.patch_size % pixel.patch_size:
            raise ValueError(
                f"the pixel decoder's patch_size is {pixel.patch_size}; it divides the encoder's, "
                f"{encoder.patch_size}"
            )

    @property
    def split(self) -> int:
        """Rows and columns of finer tokens that each feature becomes."""
        return self.low_level_encoder.patch_size // self.pixel_decoder.patch_size

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "MingTokConfig":
        """Read the original's configuration, whose other keys are ignored, or fields of this class.

        Raises ValueError for values out of range, and for a configuration that has stages but not the two
        constants of the latents, which no one can guess.
        """
        stages = {
            "low_level_encoder": EncoderConfig,
            "semantic_decoder": SemanticConfig,
            "pixel_decoder": PixelConfig,
        }
        if not any(name in values for name in stages):
            return build(cls, values, "mingtok")
        if missing := [name for name in ("scaling_factor", "mean") if name not in values]:
            raise ValueError(
                f"the configuration has no {' and '.join(missing)}; latents are (encoder output - mean) / "
                "scaling_factor, so state both (1.46817409 and 8.09449291 in the published model)"
            )
        stated = {name: values[name] for name in _names(cls) if name in values and name not in stages}
        for name, kind in stages.items():
            stated[name] = values.get(name)
            if not isinstance(stated[name], kind):
                stated[name] = _stage(kind, values, name)
        return build(cls, stated, "the configuration")


@dataclass(frozen=True)
class FlowHeadConfig:
    """Sizes of the flow head, under the original's names; `z_channels` is the width of the condition."""

    target_channels: int = 32
    z_channels: int = 3072
    depth: int = 12
    width: int = 3072
    num_sampling_steps: int = 16
    mlp_mult: float = 4.0

    def __post_init__(self) -> None:
        require_sizes(self, "target_channels", "z_channels", "width", "num_sampling_steps")
        require_depths(self, "depth")
        require_between(self, ["mlp_mult"], 0.1, 64)


def hidden_width(width: int, ratio: float = 4.0) -> int:
    """The inner width of a gated feed-forward layer: two thirds of `ratio` times the width, rounded up to a
    multiple of 8."""
    return (int(ratio * width * 2 / 3) + 7) // 8 * 8


def _require_heads(stage: Any) -> None:
    if stage.embed_dim % HEAD:
        raise ValueError(f"embed_dim is {stage.embed_dim}; it is a multiple of {HEAD}, the width of a head")


def _names(cls: type[Any]) -> set[str]:
    return {each.name for each in fields(cls)}


def _stage(kind: type[C], values: Mapping[str, Any], name: str) -> C:
    """The configuration of a stage, without the keys that it does not have."""
    stated = section(values, name)
    known = {key: value for key, value in stated.items() if key in _names(kind)}
    return build(kind, known, f"the configuration's {name}")
