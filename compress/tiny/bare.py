"""Tiny models of families with inputs made by hand: two pictures in one prompt, no processor."""

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import transformers as hf

from . import packed, tiled
from .common import IMAGE, Made

BARE: dict[str, Callable[[], Made]] = {
    function.__name__: function
    for function in (
        tiled.aria,
        tiled.aya_vision,
        tiled.cohere2_vision,
        tiled.deepseek_vl,
        tiled.deepseek_vl_hybrid,
        tiled.gemma3n,
        tiled.got_ocr2,
        tiled.granite_docling,
        tiled.idefics2,
        tiled.janus,
        tiled.lighton_ocr,
        tiled.molmo2,
        tiled.ovis2,
        tiled.perception_lm,
        tiled.pp_chart2table,
        tiled.qianfan_ocr,
        tiled.step3p7,
        tiled.video_llava,
        packed.cosmos3_edge,
        packed.cosmos3_omni,
        packed.ernie4_5_vl_moe,
        packed.exaone4_5,
        packed.gemma4,
        packed.glm46v,
        packed.glm4v,
        packed.glm4v_moe,
        packed.glm_ocr,
        packed.glmga,
        packed.hyperclovax_vision_v2,
        packed.kimi_k25,
        packed.lfm2_vl,
        packed.minimax_m3_vl,
        packed.paddleocr_vl,
        packed.qwen2_5_omni_thinker,
        packed.qwen3_5,
        packed.qwen3_5_moe,
        packed.qwen3_omni_moe_thinker,
        packed.qwen3_vl_moe,
        packed.video_llama_3,
    )
}
VARIANTS: dict[str, Callable[[], Made]] = {
    "gemma4_text": partial(packed.gemma4, vision=False),
    "lfm2_vl_attention": partial(packed.lfm2_vl, ("full_attention", "full_attention")),
}


@cache
def bare_vlm(name: str, attention: str = "sdpa") -> tuple[hf.PreTrainedModel, dict[str, Any]]:
    """A model of `BARE` or `VARIANTS` and the inputs of one prompt with two pictures."""
    torch.manual_seed(7)
    model, extra, counts = {**BARE, **VARIANTS}[name]()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=random)
            parameter.copy_(
                noise * 1.5 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else parameter + 0.05 * noise
            )
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    # Towers of timm have kernels of their own.
    timm = any(isinstance(module, hf.TimmWrapperModel) for module in model.modules())
    kernels = {"text_config": attention, "vision_config": "eager"} if timm else attention
    model.eval().set_attn_implementation(kernels)
    first, second = ([102, *[IMAGE] * count, 103] for count in counts)
    ids = torch.tensor([[1, 5, *first, 7, 8, *second, 9, 10, 11]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **extra}
    names = inspect.signature(model.forward).parameters
    types = {k: (ids == IMAGE).long() for k in ("mm_token_type_ids", "moe_mm_token_type_ids") if k in names}
    return model, inputs | types
