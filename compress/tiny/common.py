"""Configurations of small text models and towers, and pixels, for tiny models with inputs made by hand."""

from typing import Any

import torch
import transformers as hf

Made = tuple[hf.PreTrainedModel, dict[str, Any], list[int]]  # model, pixels and sizes, tokens of each picture

IMAGE, VIDEO = 100, 101
TEXT = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    max_position_embeddings=2048,
)
LLAMA, QWEN2 = TEXT | {"model_type": "llama"}, TEXT | {"model_type": "qwen2"}
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
TILES = dict(
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=56,
    patch_size=14,
)
SIGLIP = TILES | {"model_type": "siglip_vision_model", "vision_use_head": False}
SAM = dict(
    hidden_size=48,
    output_channels=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    patch_size=14,
    window_size=2,
    global_attn_indexes=(1,),
    mlp_dim=64,
)
PACKED = dict(
    depth=3,
    hidden_size=48,
    intermediate_size=64,
    num_heads=4,
    patch_size=14,
    spatial_merge_size=2,
    temporal_patch_size=2,
    out_hidden_size=64,
)
WINDOWS = dict(window_size=56, fullatt_block_indexes=[1])
DEEPSTACK = dict(patch_size=16, num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
INTERLEAVED = MROPE | {"mrope_interleaved": True}
MEDIA = dict(image_token_id=IMAGE, video_token_id=VIDEO)
VISION_MARKS = MEDIA | dict(vision_start_token_id=102, vision_end_token_id=103)
MARKS = MEDIA | dict(
    image_start_token_id=102,
    image_end_token_id=103,
    video_start_token_id=104,
    video_end_token_id=105,
)


def model_of(kind: str, config: hf.PretrainedConfig) -> hf.PreTrainedModel:
    """A random model of the class `kind`ForConditionalGeneration."""
    return getattr(hf, f"{kind}ForConditionalGeneration")(config)


def noise(*shape: int) -> torch.Tensor:
    """The same normal noise of a shape each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def tiles(side: int = 56) -> torch.Tensor:
    """Two square pictures [2, 3, side, side]."""
    return noise(2, 3, side, side)


def packed(side: int = 14, frames: int = 2) -> dict[str, torch.Tensor]:
    """Patches [48, 3 · frames · side²] of a square picture and one twice as wide, one after the other; the
    `frames` of a patch are equal, as those of a still picture are."""
    patches = noise(48, 3, 1, side * side).expand(-1, -1, frames, -1).flatten(1)
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 8]])}


def packed_squares() -> dict[str, torch.Tensor]:
    """The same with patches of [3, 14, 14]."""
    inputs = packed(frames=1)
    return inputs | {"pixel_values": inputs["pixel_values"].view(-1, 3, 14, 14)}
