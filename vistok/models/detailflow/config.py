"""DetailFlow's configuration, and the resolutions of its prefixes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ...configuration import build
from ...nested_config import section
from ...nn.vision_transformer import Sizes
from ..ranges import require_between, require_depths, require_multiple, require_sizes

EPSILON = 1e-6  # of every layer norm
FIXED = {  # what every published configuration has
    "enc_type": "siglip2",
    "dec_type": "siglip2",
    "codebook_l2_norm": True,
    "vq_loss_ratio": 1.0,
    "causal_encoder": True,
    "causal_decoder": False,
}
VISION = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": EPSILON, "num_channels": 3}


@dataclass(frozen=True)
class ResolutionMap:
    """The resolution of each prefix of `num_tokens` tokens of pictures of `max_size` pixels.

    The first `causal_num` tokens are written one by one, the others in groups of `group_size`; resolution
    falls with the power `power` of the number of missing tokens.
    """

    max_size: int
    num_tokens: int
    group_size: int
    causal_num: int
    power: float

    @property
    def lengths(self) -> tuple[int, ...]:
        """Numbers of tokens that decode: 1 to `causal_num`, then multiples of `group_size`."""
        first, group = self.causal_num, self.group_size
        return (*range(1, first + 1), *range(group * (first // group + 1), self.num_tokens + 1, group))

    def resolution(self, length: int) -> int:
        """Side in pixels that a prefix resolves."""
        slope = (self.max_size - 1) / (self.num_tokens - 1) ** self.power
        # Parity: the number is truncated, not rounded, and in this order of operations.
        side = int(self.max_size - slope * (self.num_tokens - length) ** self.power)
        return min(max(side, 1), self.max_size)

    def side(self, length: int, patch: int) -> int:
        """Side in pixels at which a prefix is drawn: its resolution in whole patches."""
        return -(-self.resolution(length) // patch) * patch

    def best_length(self, side: int, patch: int) -> int:
        """The prefix that is nearest to `side` in resolution, of those drawn at that side; the longer on
        ties.

        Raises ValueError for a side at which no prefix is drawn.
        """
        drawn = [length for length in self.lengths if self.side(length, patch) == side]
        if not drawn:
            raise ValueError(f"no prefix is drawn at {side} pixels; sides are those of `side(length, patch)`")
        return min(reversed(drawn), key=lambda length: abs(self.resolution(length) - side))


@dataclass(frozen=True)
class DetailFlowConfig:
    """`model` of the original's configuration under its own names, the power of its resolution map, and the
    sizes of both transformers."""

    image_size: int = 256
    num_latent_tokens: int = 128
    codebook_size: int = 8192
    codebook_embed_dim: int = 8
    commit_loss_beta: float = 0.25
    entropy_loss_ratio: float = 0.0
    enc_patch_size: int = 16
    dec_patch_size: int = 16
    group_size: int = 8
    causal_num: int | None = None
    """Tokens before the first group that is written at once; None: `group_size`."""
    degradation_power: float = 1.5
    correction_training: bool = True
    prefix_probability: float = 0.2
    """The share of training steps that draw a prefix, not the whole picture."""
    num_patches: int = 256
    """Places of both position tables, a square."""
    encoder_width: int = 1152
    encoder_layers: int = 12
    encoder_heads: int = 16
    encoder_mlp: int = 4304
    decoder_width: int = 768
    decoder_layers: int = 12
    decoder_heads: int = 12
    decoder_mlp: int = 3072

    def __post_init__(self) -> None:
        require_sizes(self, "image_size", "codebook_size", "codebook_embed_dim", "enc_patch_size")
        require_sizes(self, "dec_patch_size", "group_size", "num_patches")
        require_between(self, ["num_latent_tokens"], 2, 2**16)
        require_between(self, ["commit_loss_beta", "entropy_loss_ratio"], 0, 1e6)
        require_between(self, ["degradation_power"], 1e-3, 100)
        require_between(self, ["prefix_probability"], 0, 1)
        for side in ("encoder", "decoder"):
            require_sizes(self, f"{side}_width", f"{side}_heads", f"{side}_mlp")
            require_depths(self, f"{side}_layers")
            require_multiple(self, f"{side}_width", f"{side}_heads")
        require_multiple(self, "image_size", "enc_patch_size", "dec_patch_size")
        require_multiple(self, "num_latent_tokens", "group_size")
        if self.causal_num is not None:
            require_between(self, ["causal_num"], 1, self.num_latent_tokens)
        if math.isqrt(self.num_patches) ** 2 != self.num_patches:
            raise ValueError(f"num_patches is {self.num_patches}; position tables are squares, such as 256")

    @property
    def first(self) -> int:
        """Tokens before the first group that is written at once."""
        return self.group_size if self.causal_num is None else self.causal_num

    @property
    def resolutions(self) -> ResolutionMap:
        """The resolution of each prefix."""
        return ResolutionMap(
            self.image_size, self.num_latent_tokens, self.group_size, self.first, self.degradation_power
        )

    def sizes(self, side: str) -> Sizes:
        """Sizes of the transformer of the "encoder" or "decoder"."""
        names = ("width", "layers", "heads", "mlp")
        width, layers, heads, mlp = (getattr(self, f"{side}_{name}") for name in names)
        return Sizes(width, layers, heads, mlp, EPSILON, tanh=True)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "DetailFlowConfig":
        """Read field names, or the original's configuration, nested or its `model` alone.

        Its keys that describe losses are ignored. Raises ValueError for variants of the original that were
        never published, and for networks whose sizes it does not state.
        """
        if "model" not in values and "enc_type" not in values:
            return build(cls, values, "detailflow")
        model = dict(section(values, "model") if "model" in values else values)
        for name, value in FIXED.items():
            if model.get(name, value) != value:
                raise ValueError(f"the configuration's {name} is {model[name]!r}; this version has {value!r}")
        largest = model.get("max_image_size", model.get("image_size"))
        if model.get("image_size", largest) != largest:
            raise ValueError(
                f"image_size is {model['image_size']} and max_image_size {largest}; this version has the "
                "published case, in which they are equal"
            )
        known = {field.name for field in fields(cls)}
        stated = {name: value for name, value in model.items() if name in known}
        for name in ("degradation_power", "dec_patch_size"):
            if name in values:
                stated[name] = values[name]
        for side in ("encoder", "decoder"):
            if side in values:
                sizes = section(values, side)
                stated |= {f"{side}_{name}": value for name, value in sizes.items()}
            elif (name := model.get(f"{side}_model", "siglip2_base")) != "siglip2_base":
                raise ValueError(
                    f"{side}_model is {name!r}; this version knows siglip2_base: state width, layers, heads "
                    f"and mlp under {side}"
                )
        if "vision_config_so400m" in values:
            vision = section(values, "vision_config_so400m")
            for name, value in VISION.items():
                if vision.get(name, value) != value:
                    raise ValueError(f"vision_config_so400m has {name} {vision[name]!r}; it takes {value!r}")
            stated |= {"num_patches": vision["num_patches"]} if "num_patches" in vision else {}
        return build(cls, stated, "the configuration")
