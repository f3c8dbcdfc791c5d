"""The layouts in which RAE's weights are published, and what their keys and shapes hold."""

import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from .config import KINDS

T = TypeVar("T")
ENCODER_HEADS = {384: 6, 768: 12, 1024: 16}  # by width, of published models
DECODER_HEADS = {768: 12, 1024: 16, 1152: 16}
_DIFFUSERS = {  # diffusers' names of attention in the decoder → the original's
    ".attention.to_q.": ".attention.attention.query.",
    ".attention.to_k.": ".attention.attention.key.",
    ".attention.to_v.": ".attention.attention.value.",
    ".attention.to_out.0.": ".attention.output.dense.",
}
_NEWER = {  # names in newer releases of transformers → those that the original's checkpoints have
    ".attention.q_proj.": ".attention.attention.query.",
    ".attention.k_proj.": ".attention.attention.key.",
    ".attention.v_proj.": ".attention.attention.value.",
    ".attention.o_proj.": ".attention.output.dense.",
}
_NEWER_MAE = {".mlp.fc1.": ".intermediate.dense.", ".mlp.fc2.": ".output.dense."}
ENCODER_PREFIXES = ("vision_model.", "vit.", "dinov2_with_registers.")


def _kind_of(keys: Mapping[str, Any]) -> str:
    """The type of the encoder with these keys; ValueError if there is none."""
    encoder = [key for key in keys if key.startswith("encoder.")]
    if any("layer_scale1" in key for key in encoder):
        return "dinov2"
    if any("position_embedding.weight" in key for key in encoder):
        return "siglip2"
    if any("embeddings.cls_token" in key for key in encoder):
        return "mae"
    raise ValueError(
        "these RAE weights hold no encoder of DINOv2, SigLIP2 or MAE; join the files with RAE.from_parts"
    )


def _check_pixels(key: str, value: Any, kind: str) -> None:
    """Raise ValueError for a mean or deviation of pixels that is not the published one of the encoder."""
    published = KINDS[kind].norm[key == "encoder_std"]
    if not isinstance(value, torch.Tensor):  # only its shape is known yet
        return
    values = value.flatten().tolist()
    if len(values) != 3 or any(abs(a - b) > 1e-4 for a, b in zip(values, published, strict=True)):
        raise ValueError(
            f"{key} of these RAE weights is {values}; this version has {list(published)} for {kind}: take "
            "the key out, and state image_mean and image_std in the configuration"
        )


def _encoder_key(key: str, kind: str) -> str:
    """The key of an encoder's tensor below the encoder, in the layout of the original's checkpoints."""
    key = re.sub(r"^encoder\.", "", key)
    key = re.sub(r"^(model\.|encoder\.(?=encoder\.|embeddings\.|layernorm\.))", "", key)
    key = re.sub(r"^(vision_model|vit)\.", "", key)
    if kind == "siglip2":
        return key
    key = re.sub(r"^layers\.", "encoder.layer.", key)
    for new, old in (_NEWER | _NEWER_MAE if kind == "mae" else _NEWER).items():
        key = key.replace(new, old)
    return key


def select_part(tensors: Mapping[str, T], prefixes: tuple[str, ...]) -> dict[str, T]:
    """The tensors under the first of these prefixes that occurs, without it; all where none does."""
    for prefix in prefixes:
        part = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if part:
            return part
    return dict(tensors)


def canonical_keys(tensors: Mapping[str, T]) -> dict[str, T]:
    """Tensors (or shapes) of a whole RAE under the original's keys, from that layout or diffusers', whose
    encoder has the names of any release of transformers."""
    kind = _kind_of(tensors)
    renamed = {}
    for key, value in tensors.items():
        if key in ("encoder_mean", "encoder_std"):  # of pixels: part of the configuration
            _check_pixels(key, value, kind)
        elif key in ("_latents_mean", "_latents_std"):
            if len(getattr(value, "shape", value)) == 3:  # a single number stands for no statistics
                renamed[key.removeprefix("_")] = value
        elif key.startswith("encoder."):
            renamed[f"encoder.{KINDS[kind].attribute}.{_encoder_key(key, kind)}"] = value
        else:
            for new, old in _DIFFUSERS.items():
                key = key.replace(new, old)
            renamed[key] = value
    return renamed


def config_from_shapes(shapes: Mapping[str, torch.Size], config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that shapes hold; `config` is diffusers', which has input size and the decoder's heads."""

    def count(prefix: str) -> int:
        return len({key[len(prefix) :].split(".")[0] for key in shapes if key.startswith(prefix)})

    kind = _kind_of(shapes)
    base = f"encoder.{KINDS[kind].attribute}."
    if kind == "siglip2":
        layers, patch = f"{base}encoder.layers.", shapes[f"{base}embeddings.patch_embedding.weight"][3]
        table = shapes[f"{base}embeddings.position_embedding.weight"][0]
    else:
        layers = f"{base}encoder.layer."
        patch = shapes[f"{base}embeddings.patch_embeddings.projection.weight"][3]
        table = shapes[f"{base}embeddings.position_embeddings"][1] - 1
    first = f"{layers}0.{'intermediate.dense' if kind == 'mae' else 'mlp.fc1'}.weight"
    mlp, width = shapes[first]
    drawn = shapes["decoder.decoder_embed.weight"][0]
    positions, statistics = shapes.get("decoder.decoder_pos_embed"), shapes.get("latents_mean")
    grid = None
    if statistics is not None:
        grid = statistics[1]
    elif positions is not None:
        grid = math.isqrt(positions[1] - 1)
    fields = {
        "encoder_type": kind,
        "encoder_hidden_size": width,
        "encoder_num_hidden_layers": count(layers),
        "encoder_num_attention_heads": ENCODER_HEADS.get(width),
        "encoder_intermediate_size": mlp,
        "encoder_patch_size": patch,
        "encoder_image_size": patch * math.isqrt(table),
        "num_register_tokens": shapes.get(f"{base}embeddings.register_tokens", (1, 0))[1],
        "encoder_input_size": config.get("encoder_input_size", grid and grid * patch),
        "decoder_hidden_size": drawn,
        "decoder_num_hidden_layers": count("decoder.decoder_layers."),
        "decoder_num_attention_heads": config.get("decoder_num_attention_heads", DECODER_HEADS.get(drawn)),
        "decoder_intermediate_size": shapes["decoder.decoder_layers.0.intermediate.dense.weight"][0],
        "decoder_patch_size": math.isqrt(shapes["decoder.decoder_pred.weight"][0] // 3),
        "statistics": statistics is not None,
    }
    if unknown := [name for name, value in fields.items() if value is None]:
        raise ValueError(
            f"keys and shapes of these RAE weights do not hold {', '.join(unknown)}; give config={{'family': "
            "'rae', 'config': {…}}"
        )
    for name, field in (("noise_tau", "noise_tau"), ("encoder_norm_mean", "image_mean"),
                        ("encoder_norm_std", "image_std")):  # fmt: skip
        if config.get(name) is not None:
            fields[field] = config[name]
    return fields
