"""The configuration of DualToken, of its towers, codes and CNN."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...configuration import build
from ...nested_config import section
from ..ranges import require_between, require_depths, require_multiple, require_sizes

TOWERS = {  # image_size and patch_size of the encoders that the original names, of the owner google
    "siglip2-so400m-patch16-256": (256, 16),
    "siglip2-so400m-patch14-384": (384, 14),
}
FIXED = {  # what every published configuration has
    "ddconfig": {"double_z": False, "dropout": 0.0, "in_channels": 3, "out_ch": 3},
    "vq_pix": {"shared_codebook": True},
    "vq_sem": {"shared_codebook": True},
}


@dataclass(frozen=True)
class TowerConfig:
    """The image encoder of SigLIP2 So400m; field names are transformers'."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    image_size: int = 256
    patch_size: int = 16

    def __post_init__(self) -> None:
        require_sizes(self, "hidden_size", "intermediate_size", "num_attention_heads", "patch_size")
        require_between(self, ["image_size"], 1, 2**14)
        require_depths(self, "num_hidden_layers")
        require_multiple(self, "hidden_size", "num_attention_heads")

    @property
    def side(self) -> int:
        """Cells per side of the grid; pixels beyond the last whole patch are not read."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class TextConfig:
    """The text encoder of SigLIP2 So400m; field names are transformers'."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    vocab_size: int = 256_000
    max_position_embeddings: int = 64

    def __post_init__(self) -> None:
        require_sizes(self, "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
        require_sizes(self, "max_position_embeddings")
        require_depths(self, "num_hidden_layers")
        require_multiple(self, "hidden_size", "num_attention_heads")


@dataclass(frozen=True)
class CodesConfig:
    """A residual quantizer: `depth` codes per place from one codebook."""

    n_embed: int = 16_384
    embed_dim: int = 32
    depth: int = 4
    decay: float = 0.99
    restart_unused_codes: bool = True

    def __post_init__(self) -> None:
        require_sizes(self, "n_embed", "embed_dim")
        require_depths(self, "depth")
        require_between(self, ["decay"], 0, 1)


@dataclass(frozen=True)
class DrawConfig:
    """The CNN that draws; `attn_resolutions` are compared with `resolution` halved per level, whatever the
    real grid."""

    attn_resolutions: tuple[int, ...] = (16,)
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 4, 4, 8)
    decoder_in_channels: int = 1024
    num_res_blocks: int = 2
    resolution: int = 256

    def __post_init__(self) -> None:
        require_sizes(self, "attn_resolutions", "ch", "decoder_in_channels", "resolution")
        require_depths(self, "ch_mult", "num_res_blocks")
        if len(self.ch_mult) > 10:
            raise ValueError(f"ch_mult has {len(self.ch_mult)} levels; it takes up to 10")


@dataclass(frozen=True)
class DualTokenConfig:
    """The original's configuration; "after layer k" is the state after k of the tower's layers."""

    layer_recon: int = 6
    layer_sem: int = 26
    layer_shortcut: int | None = 4
    """Layer whose states are added to the pixels' latents, times `weight_shortcut`; None: none."""
    weight_shortcut: float = 0.6
    vq_pix: CodesConfig = field(default_factory=CodesConfig)
    vq_sem: CodesConfig = field(default_factory=CodesConfig)
    vision: TowerConfig = field(default_factory=TowerConfig)
    text: TextConfig = field(default_factory=TextConfig)
    ddconfig: DrawConfig = field(default_factory=DrawConfig)
    decoder_latent_shape: tuple[int, int] = (16, 16)
    """Rows and columns of the grid that the CNN draws from."""

    def __post_init__(self) -> None:
        require_depths(self, "layer_recon", "layer_sem")
        require_between(self, ["weight_shortcut"], -1e6, 1e6)
        require_between(self, ["decoder_latent_shape"], 1, 2**12)
        depth, width = self.vision.num_hidden_layers, self.vision.hidden_size
        layers = {"layer_recon": self.layer_recon, "layer_sem": self.layer_sem}
        if self.layer_shortcut is not None:
            require_depths(self, "layer_shortcut")
            layers["layer_shortcut"] = self.layer_shortcut
        for name, layer in layers.items():
            if layer > depth:
                raise ValueError(f"{name} is {layer}; the tower has {depth} layers")
        if self.vq_pix.embed_dim != self.vq_sem.embed_dim:
            raise ValueError(
                f"codes of pixels have {self.vq_pix.embed_dim} channels and semantic ones "
                f"{self.vq_sem.embed_dim}; they have as many"
            )
        if width % self.vq_pix.embed_dim:
            raise ValueError(f"hidden_size {width} is not a multiple of embed_dim, {self.vq_pix.embed_dim}")
        if self.text.hidden_size != width:
            raise ValueError(
                f"the text tower's hidden_size is {self.text.hidden_size}; it is the image tower's, {width}"
            )
        if self.vision.side < 1:
            raise ValueError(
                f"image_size is {self.vision.image_size}; it is patch_size, {self.vision.patch_size}, or more"
            )
        factor = 2 ** (len(self.ddconfig.ch_mult) - 1)
        if any(side * factor != self.vision.image_size for side in self.decoder_latent_shape):
            raise ValueError(
                f"decoder_latent_shape is {self.decoder_latent_shape}, which becomes {factor} times as many "
                f"pixels; the image has {self.vision.image_size} per side"
            )

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "DualTokenConfig":
        """Read field names, or the original's configuration.

        Raises ValueError for variants of the original that were never published.
        """
        values = {
            name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()
        }
        for part, fixed in FIXED.items():
            entries = section(values, part)
            for name, value in fixed.items():
                if entries.pop(name, value) != value:
                    raise ValueError(f"the configuration's {part} has another {name} than {value}")
        for part in ("vq_pix", "vq_sem"):
            entries = section(values, part)
            shape, latent = entries.pop("code_shape", None), entries.pop("latent_shape", None)
            # In "rq" and in "rq_ema" statistics are kept in the dtype of the weights here.
            if (kind := entries.pop("bottleneck_type", "rq")) not in ("rq", "rq_ema"):
                raise ValueError(f"the configuration's bottleneck_type is {kind!r}; it is rq or rq_ema")
            if shape is not None:
                _check_grid(part, shape, latent)
                entries.setdefault("depth", shape[-1])
        tower = values.pop("pretrained_model", None)
        if tower is not None and "vision" not in values:
            name = str(tower).rstrip("/").rsplit("/", 1)[-1]
            if name not in TOWERS:
                raise ValueError(f"pretrained_model is {tower!r}; it is {', '.join(TOWERS)}")
            values["vision"] = dict(zip(("image_size", "patch_size"), TOWERS[name], strict=True))
        if tower is not None:  # the original's configuration, in which an absent shortcut is none
            values.setdefault("layer_shortcut", None)
        width = values.pop("hidden_size", None)
        config = build(cls, values, "dualtoken")
        if width not in (None, config.vision.hidden_size):
            raise ValueError(f"hidden_size is {width}; the tower's is {config.vision.hidden_size}")
        return config


def _check_grid(part: str, shape: Any, latent: Any) -> None:
    """Raise ValueError unless a code_shape is (rows, columns, depth) and fits its latent_shape."""
    if not isinstance(shape, list | tuple) or len(shape) != 3 or shape[0] != shape[1]:
        raise ValueError(f"the configuration's {part} has code_shape {shape}; it is [side, side, depth]")
    if latent is not None and list(latent[:2]) != list(shape[:2]):
        raise ValueError(f"the configuration's {part} has code_shape {shape} and latent_shape {latent}")
