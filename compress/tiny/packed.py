"""Tiny models of families whose towers take patches of pictures of any size, with inputs made by hand."""

from typing import Any

import torch
import transformers as hf

from .common import (
    DEEPSTACK,
    EXPERTS,
    IMAGE,
    INTERLEAVED,
    MARKS,
    MEDIA,
    MROPE,
    PACKED,
    QWEN2,
    TEXT,
    TILES,
    VIDEO,
    VISION_MARKS,
    WINDOWS,
    Made,
    model_of,
    noise,
    packed,
    packed_squares,
)

_PLANES = TEXT | {"head_dim": 16, "rope_parameters": MROPE}
_INTERLEAVED = TEXT | {"head_dim": 16, "rope_parameters": INTERLEAVED}


def _glm(kind: str, configuration: str | None = None, **more: Any) -> Made:
    vision, text = PACKED | {"image_size": 56}, _PLANES | more
    if kind == "Glm46V":
        vision, text = vision | {"model_type": "glm4v_vision"}, text | {"model_type": "glm4v_text"}
    config = getattr(hf, f"{configuration or kind}Config")(vision_config=vision, text_config=text, **MARKS)
    return model_of(kind, config), packed(), [4, 8]


def glm4v() -> Made:
    """Positions in several planes; patches in blocks of four."""
    return _glm("Glm4v")


def glm46v() -> Made:
    """GLM-4.6V, which shares its parts with GLM-4V."""
    return _glm("Glm46V")


def glmga() -> Made:
    """The same parts under another configuration."""
    return _glm("Glm46V", "Glmga")


def glm_ocr() -> Made:
    """GLM-OCR: the parts of GLM-4V with its own tower."""
    return _glm("GlmOcr")


def glm4v_moe() -> Made:
    """GLM-4.5V: experts."""
    return _glm(
        "Glm4vMoe",
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        partial_rotary_factor=1.0,
    )


def ernie4_5_vl_moe() -> Made:
    """Experts of two kinds, for text and for pictures."""
    vision = {name: PACKED[name] for name in ("hidden_size", "intermediate_size", "depth", "num_heads")}
    vision |= dict(patch_size=14, spatial_merge_size=2, temporal_merge_size=2)
    text = TEXT | dict(
        moe_intermediate_size=[32, 32],
        moe_num_experts=4,
        moe_k=2,
        moe_num_shared_experts=1,
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        rope_parameters=MROPE | {"mrope_section": [3, 3, 2]},
    )
    config = hf.Ernie4_5_VLMoeConfig(vision_config=vision, text_config=text, **MARKS)
    return model_of("Ernie4_5_VLMoe", config), packed(frames=1), [4, 8]


def video_llama_3() -> Made:
    """Each picture states by how much its patches are merged."""
    vision = {k: v for k, v in TILES.items() if k != "image_size"}
    config = hf.VideoLlama3Config(
        vision_config=vision,
        text_config=QWEN2,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    inputs = packed(frames=1) | {"image_merge_sizes": torch.tensor([2, 2])}
    return hf.VideoLlama3ForConditionalGeneration(config), inputs, [4, 8]


def paddleocr_vl() -> Made:
    """Patches in raster order, merged behind the tower."""
    config = hf.PaddleOCRVLConfig(
        vision_config=TILES | {"spatial_merge_size": 2},
        text_config=_PLANES,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=102,
        vision_end_token_id=103,
    )
    return hf.PaddleOCRVLForConditionalGeneration(config), packed_squares(), [4, 8]


def gemma4(vision: bool = True) -> Made:
    """Layers of two head widths, the last two of which use the keys of others, and inputs for each layer."""
    tower = dict(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=12,
        patch_size=14,
        pooling_kernel_size=3,
        position_embedding_size=64,
    )
    text = TEXT | dict(
        head_dim=16,
        sliding_window=64,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=128,
        num_kv_shared_layers=2,
        per_layer_config={"01": {"head_dim": 32}, "03": {"head_dim": 32}},
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    config = hf.Gemma4Config(
        vision_config=tower if vision else None, audio_config=None, text_config=text, **MEDIA
    )
    places = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="xy"), -1)
    pixels = noise(2, 36, 3 * 14 * 14)
    inputs = {"pixel_values": pixels, "image_position_ids": places.reshape(1, 36, 2).repeat(2, 1, 1)}
    return hf.Gemma4ForConditionalGeneration(config), inputs if vision else {}, [4, 4]


def _qwen3_5(kind: str, **more: Any) -> Made:
    text = TEXT | more
    text |= dict(
        head_dim=16,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        layer_types=["linear_attention", "full_attention"] * 2,
        rope_parameters=INTERLEAVED | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5},
    )
    vision = PACKED | dict(patch_size=16, num_position_embeddings=64)
    config = getattr(hf, f"{kind}Config")(text_config=text, vision_config=vision, **VISION_MARKS)
    return model_of(kind, config), packed(16), [4, 8]


def qwen3_5() -> Made:
    """Every other layer keeps a running state in place of keys."""
    return _qwen3_5("Qwen3_5")


def qwen3_5_moe() -> Made:
    """The same with experts."""
    return _qwen3_5("Qwen3_5Moe", shared_expert_intermediate_size=32, **EXPERTS)


def qwen3_vl_moe() -> Made:
    """Qwen3-VL with experts."""
    text = _INTERLEAVED | EXPERTS
    config = hf.Qwen3VLMoeConfig(text_config=text, vision_config=PACKED | DEEPSTACK, **VISION_MARKS)
    return model_of("Qwen3VLMoe", config), packed(16), [4, 8]


def _audio(**more: int) -> dict[str, int]:
    layers = dict(encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=32, d_model=32, output_dim=64)
    return layers | more


def qwen2_5_omni_thinker() -> Made:
    """The part of Qwen2.5-Omni that reads text, pictures and sound."""
    config = hf.Qwen2_5OmniThinkerConfig(
        text_config=_PLANES,
        vision_config=PACKED | WINDOWS,
        audio_config=_audio(),
        audio_token_index=110,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_start_token_id=111,
    )
    # The class reads them, and its configuration does not take them.
    config.vision_start_token_id, config.vision_end_token_id = 102, 103
    return model_of("Qwen2_5OmniThinker", config), packed(), [4, 8]


def qwen3_omni_moe_thinker() -> Made:
    """The part of Qwen3-Omni that reads text, pictures and sound."""
    config = hf.Qwen3OmniMoeThinkerConfig(
        text_config=_INTERLEAVED | EXPERTS,
        vision_config=PACKED | DEEPSTACK,
        audio_config=_audio(downsample_hidden_size=16),
        audio_token_id=110,
        audio_start_token_id=111,
        **VISION_MARKS,
    )
    config.vision_start_token_id, config.vision_end_token_id = 102, 103
    return model_of("Qwen3OmniMoeThinker", config), packed(16), [4, 8]


def cosmos3_omni() -> Made:
    """The parts of Qwen3-VL."""
    text = _INTERLEAVED | {"model_type": "qwen3_vl_text"}
    vision = PACKED | DEEPSTACK | {"model_type": "qwen3_vl_vision"}
    config = hf.Cosmos3OmniConfig(text_config=text, vision_config=vision, **VISION_MARKS)
    return model_of("Cosmos3Omni", config), packed(16), [4, 8]


def cosmos3_edge() -> Made:
    """A SigLIP 2 tower on packed patches."""
    vision = {name: value for name, value in TILES.items() if name != "image_size"}
    vision |= dict(num_patches=16, spatial_merge_size=2)
    config = hf.Cosmos3EdgeConfig(
        text_config=_PLANES, vision_config=vision, projector_hidden_size=64, **VISION_MARKS
    )
    return model_of("Cosmos3Edge", config), packed(frames=1), [4, 8]


def exaone4_5() -> Made:
    """Windows in the tower and in the language model."""
    text = TEXT | dict(
        model_type="exaone4",
        sliding_window=64,
        sliding_window_pattern=4,
        layer_types=[*["sliding_attention"] * 3, "full_attention"],
    )
    vision = PACKED | WINDOWS | {"num_key_value_heads": 2}
    config = hf.Exaone4_5_Config(text_config=text, vision_config=vision, **MEDIA)
    return model_of("Exaone4_5_", config), packed(), [4, 8]


def hyperclovax_vision_v2() -> Made:
    """The tower of Qwen2.5-VL before a language model with positions in one plane."""
    vision = PACKED | WINDOWS | {"model_type": "qwen2_5_vl_vision"}
    text = TEXT | {"model_type": "hyperclovax"}
    config = hf.HyperCLOVAXVisionV2Config(text_config=text, vision_config=vision, **MEDIA)
    return model_of("HyperCLOVAXVisionV2", config), packed(), [4, 8]


def minimax_m3_vl() -> Made:
    """Experts."""
    text = TEXT | dict(
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        dense_intermediate_size=96,
        shared_intermediate_size=32,
        intermediate_size=32,
        rotary_dim=8,
        layer_types=["full_attention"] * 4,
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        index_n_heads=2,
        index_head_dim=16,
    )
    config = hf.MiniMaxM3VLConfig(
        text_config=text,
        vision_config=TILES,
        projector_hidden_size=64,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )
    return model_of("MiniMaxM3Sparse", config), packed(), [4, 8]


def kimi_k25() -> Made:
    """Latent attention and experts."""
    text = TEXT | dict(
        model_type="deepseek_v3",
        num_key_value_heads=4,
        moe_intermediate_size=32,
        n_shared_experts=1,
        n_routed_experts=4,
        kv_lora_rank=16,
        q_lora_rank=24,
        qk_rope_head_dim=8,
        v_head_dim=16,
        qk_nope_head_dim=16,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
    )
    vision = {name: value for name, value in TILES.items() if name != "image_size"}
    config = hf.Kimi_K25Config(
        text_config=text,
        vision_config=vision | dict(pos_emb_height=8, pos_emb_width=8),
        projection_hidden_size=48,
        **VISION_MARKS,
    )
    return model_of("Kimi_K25", config), packed_squares(), [4, 8]


def lfm2_vl(layer_types: tuple[str, str] = ("conv", "full_attention")) -> Made:
    """Every other layer is a short convolution; pictures come as batches of patches."""
    text = TEXT | dict(model_type="lfm2", layer_types=list(layer_types) * 2, block_auto_adjust_ff_dim=False)
    vision = {name: value for name, value in TILES.items() if name != "image_size"}
    vision |= dict(model_type="siglip2_vision_model", num_patches=16, vision_use_head=False)
    config = hf.Lfm2VlConfig(
        vision_config=vision, text_config=text, projector_hidden_size=64, image_token_id=IMAGE
    )
    pixels = {
        "pixel_values": noise(2, 16, 3 * 14 * 14),
        "spatial_shapes": torch.tensor([[4, 4], [2, 8]]),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
    }
    return model_of("Lfm2Vl", config), pixels, [4, 4]
