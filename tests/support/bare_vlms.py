"""Tiny models of further families, with inputs made by hand: two pictures in one prompt, no processor."""

import inspect
from functools import cache
from typing import Any

import torch
import transformers as hf

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
    max_position_embeddings=512,
)
TILES = dict(
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=56,
    patch_size=14,
)
SIGLIP = TILES | {"model_type": "siglip_vision_model", "vision_use_head": False}
MROPE = {"rope_type": "default", "rope_theta": 10000.0}
MARKS = dict(
    image_token_id=100,
    video_token_id=101,
    image_start_token_id=102,
    image_end_token_id=103,
    video_start_token_id=104,
    video_end_token_id=105,
)


def _tiles() -> torch.Tensor:
    return torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(5))


def _packed(channels: int) -> dict[str, torch.Tensor]:
    """Patches of a square picture and one twice as wide."""
    patches = torch.randn(48, channels, generator=torch.Generator().manual_seed(5))
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 8]])}


def _aya_vision() -> tuple[Any, dict[str, Any], list[int]]:
    text = TEXT | {"model_type": "cohere2", "sliding_window": 64}
    config = hf.AyaVisionConfig(
        vision_config=SIGLIP, text_config=text, image_token_index=100, downsample_factor=2
    )
    return hf.AyaVisionForConditionalGeneration(config), {"pixel_values": _tiles()}, [4, 4]


def _cohere2_vision() -> tuple[Any, dict[str, Any], list[int]]:
    text = TEXT | {"model_type": "cohere2", "sliding_window": 64}
    config = hf.Cohere2VisionConfig(
        vision_config=SIGLIP,
        text_config=text,
        image_token_id=100,
        downsample_factor=2,
        alignment_intermediate_size=64,
    )
    return hf.Cohere2VisionForConditionalGeneration(config), {"pixel_values": _tiles()}, [4, 4]


def _deepseek_vl() -> tuple[Any, dict[str, Any], list[int]]:
    config = hf.DeepseekVLConfig(
        vision_config=SIGLIP, text_config=TEXT | {"model_type": "llama"}, image_token_id=100
    )
    return hf.DeepseekVLForConditionalGeneration(config), {"pixel_values": _tiles()}, [16, 16]


def _video_llava() -> tuple[Any, dict[str, Any], list[int]]:
    config = hf.VideoLlavaConfig(
        vision_config=TILES | {"model_type": "clip_vision_model"},
        text_config=TEXT | {"model_type": "llama"},
        image_token_index=100,
        video_token_index=101,
        image_seq_length=16,
        video_seq_length=64,
    )
    return hf.VideoLlavaForConditionalGeneration(config), {"pixel_values_images": _tiles()}, [16, 16]


def _lighton_ocr() -> tuple[Any, dict[str, Any], list[int]]:
    config = hf.LightOnOcrConfig(
        vision_config=TILES | {"model_type": "pixtral", "image_size": 112},
        text_config=TEXT | {"model_type": "qwen3", "head_dim": 16},
        image_token_id=100,
        spatial_merge_size=2,
    )
    inputs = {"pixel_values": _tiles(), "image_sizes": torch.tensor([[56, 56], [56, 56]])}
    return hf.LightOnOcrForConditionalGeneration(config), inputs, [4, 4]


def _glm4v(kind: str) -> tuple[Any, dict[str, Any], list[int]]:
    vision = dict(
        hidden_size=48,
        intermediate_size=64,
        out_hidden_size=64,
        depth=3,
        num_heads=4,
        image_size=56,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
    )
    text = TEXT | {"head_dim": 16, "rope_parameters": MROPE | {"mrope_section": [2, 3, 3]}}
    if kind == "Glm4vMoe":
        text |= dict(
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            n_shared_experts=1,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            partial_rotary_factor=1.0,
        )
    config = getattr(hf, f"{kind}Config")(vision_config=vision, text_config=text, **MARKS)
    model = getattr(hf, f"{kind}ForConditionalGeneration")(config)
    return model, _packed(3 * 2 * 14 * 14), [4, 8]


def _ernie() -> tuple[Any, dict[str, Any], list[int]]:
    vision = dict(
        hidden_size=48,
        intermediate_size=64,
        depth=3,
        num_heads=4,
        patch_size=14,
        spatial_merge_size=2,
        temporal_merge_size=2,
    )
    text = TEXT | dict(
        moe_intermediate_size=[32, 32],
        moe_num_experts=4,
        moe_k=2,
        moe_num_shared_experts=1,
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        rope_parameters=MROPE | {"mrope_section": [3, 3, 2]},
    )
    config = hf.Ernie4_5_VLMoeConfig(vision_config=vision, text_config=text, **MARKS)
    return hf.Ernie4_5_VLMoeForConditionalGeneration(config), _packed(3 * 14 * 14), [4, 8]


def _video_llama_3() -> tuple[Any, dict[str, Any], list[int]]:
    vision = {k: v for k, v in TILES.items() if k != "image_size"}
    config = hf.VideoLlama3Config(
        vision_config=vision,
        text_config=TEXT | {"model_type": "qwen2"},
        image_token_id=100,
        video_token_id=101,
    )
    inputs = _packed(3 * 14 * 14) | {"image_merge_sizes": torch.tensor([2, 2])}
    return hf.VideoLlama3ForConditionalGeneration(config), inputs, [4, 8]


def _paddleocr_vl() -> tuple[Any, dict[str, Any], list[int]]:
    config = hf.PaddleOCRVLConfig(
        vision_config=TILES | {"spatial_merge_size": 2},
        text_config=TEXT | {"head_dim": 16, "rope_parameters": MROPE | {"mrope_section": [2, 3, 3]}},
        image_token_id=100,
        video_token_id=101,
        vision_start_token_id=102,
        vision_end_token_id=103,
    )
    inputs = _packed(3 * 14 * 14)
    inputs["pixel_values"] = inputs["pixel_values"].view(-1, 3, 14, 14)
    return hf.PaddleOCRVLForConditionalGeneration(config), inputs, [4, 8]


def _gemma4(vision: bool) -> tuple[Any, dict[str, Any], list[int]]:
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
        vision_config=tower if vision else None, audio_config=None, text_config=text, image_token_id=100
    )
    places = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="xy"), -1)
    pixels = torch.rand(2, 36, 3 * 14 * 14, generator=torch.Generator().manual_seed(5))
    inputs = {"pixel_values": pixels, "image_position_ids": places.reshape(1, 36, 2).repeat(2, 1, 1)}
    return hf.Gemma4ForConditionalGeneration(config), inputs if vision else {}, [4, 4]


BARE = {
    "aya_vision": _aya_vision,
    "cohere2_vision": _cohere2_vision,
    "deepseek_vl": _deepseek_vl,
    "video_llava": _video_llava,
    "lighton_ocr": _lighton_ocr,
    "glm4v": lambda: _glm4v("Glm4v"),
    "glm4v_moe": lambda: _glm4v("Glm4vMoe"),
    "ernie4_5_vl_moe": _ernie,
    "video_llama_3": _video_llama_3,
    "paddleocr_vl": _paddleocr_vl,
    "gemma4": lambda: _gemma4(True),
    "gemma4_text": lambda: _gemma4(False),
}


@cache
def bare_vlm(name: str, attention: str = "sdpa") -> tuple[hf.PreTrainedModel, dict[str, Any]]:
    """A model and the inputs of one prompt with two pictures."""
    torch.manual_seed(7)
    model, extra, counts = BARE[name]()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=random)
            parameter.copy_(
                noise * 1.5 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else parameter + 0.05 * noise
            )
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    model.eval().set_attn_implementation(attention)
    first, second = ([102, *[100] * count, 103] for count in counts)
    ids = torch.tensor([[1, 5, *first, 7, 8, *second, 9, 10, 11]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **extra}
    names = inspect.signature(model.forward).parameters
    types = {k: (ids == 100).long() for k in ("mm_token_type_ids", "moe_mm_token_type_ids") if k in names}
    return model, inputs | types
