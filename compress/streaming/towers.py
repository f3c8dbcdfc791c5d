"""The vision-language models that take streams: how frames become features, patch by patch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..families import resolve

_PARTS = ("layer_norm1", "self_attn", "layer_norm2", "mlp")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj", "num_heads")


@dataclass(frozen=True)
class _Family:
    """How a family makes features of its tower's states: `connect(core, states [F, T, C])` → [F, n, D], the
    number of tokens per frame from the side of the map of patches, and whether a newline ends a video."""

    connect: Callable[[nn.Module, Tensor], Tensor]
    frame_tokens: Callable[[Any, int], int]
    has_newline: bool


def _onevision(core: nn.Module, states: Tensor) -> Tensor:
    return core.apply_pooling(core.multi_modal_projector(states))


def _next_video(core: nn.Module, states: Tensor) -> Tensor:
    return core.multi_modal_projector(core.vision_resampler(states))


_FAMILIES = {
    "llava_onevision": _Family(_onevision, lambda config, side: (-(-side // 2)) ** 2, has_newline=True),
    "llava_next_video": _Family(
        _next_video, lambda config, side: (side // config.spatial_pool_stride) ** 2, has_newline=False
    ),
}
_MERGING = (
    "its tower packs the patches of two frames into one, so that there are no keys per frame to compare"
)
_REASONS = dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), _MERGING)


@dataclass(frozen=True)
class VideoModel:
    """The parts of a model that a stream runs.

    `layers` are the tower's up to the last one whose output is used, `used` the numbers of the hidden states
    that are projected (0: before the first layer), `drops_class` whether their first token is left out.
    `settings` are the fields of the configuration that the features depend on.
    """

    model: nn.Module
    name: str
    core: nn.Module
    tower: nn.Module
    layers: Sequence[nn.Module]
    used: tuple[int, ...]
    drops_class: bool
    family: _Family
    image_size: int
    frame_tokens: int
    image_token_id: int
    video_token_id: int
    settings: tuple[object, ...]

    def embed(self, pixels: Tensor) -> Tensor:
        """Patches [F, T, C], with a class token where the tower has one, of pixel values [F, 3, H, W]."""
        patches = self.tower.embeddings(pixels)
        norm = getattr(self.tower, "pre_layrnorm", None)  # CLIP's, as transformers spells it
        return patches if norm is None else norm(patches)

    def connect(self, states: list[Tensor]) -> Tensor:
        """Features [F, n, D] of the hidden states [F, T, C] before the first layer and behind each."""
        chosen = [states[number] for number in self.used]
        # A single state without a copy, whose other layout in memory would change the last bits.
        selected = chosen[0] if len(chosen) == 1 else torch.cat(chosen, -1)
        return self.family.connect(self.core, selected[:, 1:] if self.drops_class else selected)

    def ends(self) -> list[Tensor]:
        """What stands behind the last token of a video, [1, D] each."""
        return [self.core.image_newline[None]] if self.family.has_newline else []

    def weights(self) -> dict[str, Tensor]:
        """The weights that the features depend on."""
        names = ("vision_tower", "multi_modal_projector", "vision_resampler")
        return {key: value for key, value in self.core.state_dict().items() if key.partition(".")[0] in names}

    @property
    def weight(self) -> Tensor:
        """A weight of the tower, whose dtype and device the pixel values get."""
        return next(self.tower.parameters())


def video_model(model: nn.Module) -> VideoModel:
    """The parts of a model for streams.

    Raises TypeError, naming the model and the reason, for a family that is not known, a tower with other
    layers than CLIP's and SigLIP's, and weights that are not in memory.
    """
    name, kind = type(model).__name__, getattr(getattr(model, "config", None), "model_type", None)
    if kind not in _FAMILIES:
        reason = _REASONS.get(kind, "how it encodes frames is not known here")
        raise TypeError(
            f"streams do not run on a {name} ({kind}): {reason}; families that take them: "
            f"{', '.join(sorted(_FAMILIES))}"
        )
    host, family = resolve(model), _FAMILIES[kind]
    core, tower, config = host.core, host.tower, host.core.config
    layers = getattr(getattr(tower, "encoder", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not all(map(_is_pre_norm, layers)):
        raise TypeError(
            f"streams do not run on this {name}: its tower {type(tower).__name__} does not have the layers "
            "of CLIP and SigLIP, whose keys, values and outputs are reused"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise TypeError(
            f"some weights of this {name} are not in memory (accelerate loads them as modules run), and a "
            "stream reads parts of layers; load the whole model onto one device"
        )
    chosen, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    numbers = [chosen] if isinstance(chosen, int) else list(chosen)
    used = tuple(number if number >= 0 else len(layers) + 1 + number for number in numbers)
    vision = config.vision_config
    pooling = [getattr(config, name, None) for name in ("spatial_pool_mode", "spatial_pool_stride")]
    return VideoModel(
        model=model,
        name=name,
        core=core,
        tower=tower,
        layers=layers[: max(used)],
        used=used,
        drops_class=strategy == "default",
        family=family,
        image_size=vision.image_size,
        frame_tokens=family.frame_tokens(config, vision.image_size // vision.patch_size),
        image_token_id=host.media_ids["image"],
        video_token_id=host.media_ids["video"],
        settings=(
            *(kind, type(tower).__name__, used, strategy, config.projector_hidden_act, *pooling),
            *(vision.hidden_act, vision.layer_norm_eps, vision.num_attention_heads),
            *(vision.image_size, vision.patch_size),
        ),
    )


def _is_pre_norm(layer: nn.Module) -> bool:
    attention = getattr(layer, "self_attn", None)
    return all(hasattr(layer, part) for part in _PARTS) and all(hasattr(attention, p) for p in _PROJECTIONS)
