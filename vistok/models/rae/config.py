"""RAE's configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ...configuration import build
from ...nested_config import section
from ..ranges import require_between, require_depths, require_multiple, require_sizes

VARIANCE_OFFSET = 1e-5  # added to the variance of latents
DECODER_EPSILON = 1e-12  # of the decoder's layer norms
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Kind(NamedTuple):
    """What the published encoders of one kind share: sides in pixels, and where the original keeps the
    encoder."""

    patch: int
    table: int
    """Side of the images that the position table was trained for."""
    input: int
    registers: int
    epsilon: float
    activation: str
    norm: tuple[tuple[float, ...], tuple[float, ...]]
    attribute: str


KINDS = {
    "dinov2": Kind(14, 518, 224, 4, 1e-6, "gelu", IMAGENET, "encoder"),
    "siglip2": Kind(16, 256, 256, 0, 1e-6, "gelu_pytorch_tanh", HALVES, "model"),
    "mae": Kind(16, 224, 256, 0, 1e-12, "gelu", IMAGENET, "model"),
}
TRAINING = (  # fields of encoders that do not change what is encoded
    *("mask_ratio", "layerscale_value", "initializer_range", "drop_path_rate"),
    *("attention_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob"),
)
FIXED = {"qkv_bias": True, "use_swiglu_ffn": False, "num_channels": 3}
_ENCODER_NAMES = {
    "hidden_size": "encoder_hidden_size",
    "num_hidden_layers": "encoder_num_hidden_layers",
    "num_attention_heads": "encoder_num_attention_heads",
    "intermediate_size": "encoder_intermediate_size",
    "patch_size": "encoder_patch_size",
    "image_size": "encoder_image_size",
    "num_register_tokens": "num_register_tokens",
}


@dataclass(frozen=True)
class RAEConfig:
    """Sizes of encoder and decoder under the names of their published configurations; None is what the
    published encoders of that type have."""

    encoder_type: Literal["dinov2", "siglip2", "mae"] = "dinov2"
    encoder_hidden_size: int = 768
    encoder_num_hidden_layers: int = 12
    encoder_num_attention_heads: int = 12
    encoder_intermediate_size: int = 3072
    encoder_patch_size: int | None = None
    encoder_image_size: int | None = None
    """Side in pixels of the images that the encoder's position table was trained for."""
    num_register_tokens: int | None = None
    encoder_input_size: int | None = None
    """Side in pixels to which images are resized for the encoder."""
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[float, float, float] | None = None
    decoder_hidden_size: int = 1152
    decoder_num_hidden_layers: int = 28
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = 4096
    decoder_patch_size: int = 16
    noise_tau: float = 0.8
    """The largest standard deviation of the noise on latents in training."""
    statistics: bool = False
    """Whether latents are normalised by a mean and deviation per channel and place."""

    def __post_init__(self) -> None:
        kind = KINDS[self.encoder_type]
        published = {
            "encoder_patch_size": kind.patch,
            "encoder_image_size": kind.table,
            "num_register_tokens": kind.registers,
            "encoder_input_size": kind.input,
            "image_mean": kind.norm[0],
            "image_std": kind.norm[1],
        }
        for name, value in published.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for side in ("encoder", "decoder"):
            require_sizes(self, f"{side}_hidden_size", f"{side}_num_attention_heads")
            require_sizes(self, f"{side}_intermediate_size", f"{side}_patch_size")
            require_depths(self, f"{side}_num_hidden_layers")
            require_multiple(self, f"{side}_hidden_size", f"{side}_num_attention_heads")
        require_sizes(self, "encoder_image_size", "encoder_input_size")
        require_multiple(self, "encoder_image_size", "encoder_patch_size")
        require_multiple(self, "encoder_input_size", "encoder_patch_size")
        require_between(self, ["noise_tau", "num_register_tokens"], 0, 1024)
        require_between(self, ["image_std"], 1e-6, 1e6)
        require_between(self, ["image_mean"], -1e6, 1e6)
        if self.num_register_tokens and self.encoder_type != "dinov2":
            raise ValueError(f"num_register_tokens is {self.num_register_tokens}; only dinov2 has registers")
        if self.decoder_hidden_size % 4:
            raise ValueError(
                f"decoder_hidden_size is {self.decoder_hidden_size}; sines and cosines of two axes take a "
                "multiple of 4"
            )

    @property
    def grid(self) -> int:
        """Tokens per side."""
        return self.encoder_input_size // self.encoder_patch_size

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "RAEConfig":
        """Read field names, or the original's nested configuration: `encoder` and `decoder` as transformers
        describes them, beside fields of this class.

        Raises ValueError for variants that were never published.
        """
        if "encoder" not in values and "decoder" not in values:
            return build(cls, values, "rae")
        encoder, decoder = dict(section(values, "encoder")), dict(section(values, "decoder"))
        outer = {name: value for name, value in values.items() if name not in ("encoder", "decoder", "eps")}
        kind = KINDS.get(values.get("encoder_type"))
        if kind is None:
            raise ValueError(f"encoder_type is {values.get('encoder_type')!r}; it is {', '.join(KINDS)}")
        if values.get("eps", VARIANCE_OFFSET) != VARIANCE_OFFSET:
            raise ValueError(f"eps is {values['eps']!r}; this version has the published {VARIANCE_OFFSET}")
        shared = {"layer_norm_eps": kind.epsilon, "hidden_act": kind.activation}
        own = {"layer_norm_eps": DECODER_EPSILON, "hidden_act": "gelu"}
        for part, stated, published in (("encoder", encoder, shared), ("decoder", decoder, own)):
            for name, value in (FIXED | published).items():
                if (given := stated.pop(name, value)) != value:
                    raise ValueError(f"the {part}'s {name} is {given!r}; this version has {value!r}")
        if (ratio := encoder.pop("mlp_ratio", None)) is not None:
            encoder.setdefault("intermediate_size", int(encoder.get("hidden_size", 768) * ratio))
        for name in TRAINING:
            encoder.pop(name, None)
        renamed = {_ENCODER_NAMES.get(name, f"encoder.{name}"): value for name, value in encoder.items()}
        return build(cls, {**outer, **renamed, **decoder}, "the configuration")
