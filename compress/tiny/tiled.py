"""Tiny models of families whose towers take square pictures, with inputs made by hand."""

import torch
import transformers as hf
from transformers import CONFIG_MAPPING

from .common import IMAGE, LLAMA, QWEN2, SAM, SIGLIP, TEXT, TILES, VIDEO, Made, model_of, noise, tiles


def aya_vision() -> Made:
    """Four patches side by side make one token; windows in the language model."""
    text = TEXT | {"model_type": "cohere2", "sliding_window": 64}
    config = hf.AyaVisionConfig(
        vision_config=SIGLIP, text_config=text, image_token_index=IMAGE, downsample_factor=2
    )
    return hf.AyaVisionForConditionalGeneration(config), {"pixel_values": tiles()}, [4, 4]


def cohere2_vision() -> Made:
    """The same with another projector."""
    text = TEXT | {"model_type": "cohere2", "sliding_window": 64}
    config = hf.Cohere2VisionConfig(
        vision_config=SIGLIP,
        text_config=text,
        image_token_id=IMAGE,
        downsample_factor=2,
        alignment_intermediate_size=64,
    )
    return hf.Cohere2VisionForConditionalGeneration(config), {"pixel_values": tiles()}, [4, 4]


def deepseek_vl() -> Made:
    """Token i is patch i."""
    config = hf.DeepseekVLConfig(vision_config=SIGLIP, text_config=LLAMA, image_token_id=IMAGE)
    return hf.DeepseekVLForConditionalGeneration(config), {"pixel_values": tiles()}, [16, 16]


def video_llava() -> Made:
    """Token i is patch i + 1, behind a class token."""
    config = hf.VideoLlavaConfig(
        vision_config=TILES | {"model_type": "clip_vision_model"},
        text_config=TEXT | {"model_type": "llama"},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_seq_length=16,
        video_seq_length=64,
    )
    return hf.VideoLlavaForConditionalGeneration(config), {"pixel_values_images": tiles()}, [16, 16]


def lighton_ocr() -> Made:
    """A Pixtral tower, of whose patches four make one token."""
    config = hf.LightOnOcrConfig(
        vision_config=TILES | {"model_type": "pixtral", "image_size": 112},
        text_config=TEXT | {"model_type": "qwen3", "head_dim": 16},
        image_token_id=IMAGE,
        spatial_merge_size=2,
    )
    inputs = {"pixel_values": tiles(), "image_sizes": torch.tensor([[56, 56], [56, 56]])}
    return hf.LightOnOcrForConditionalGeneration(config), inputs, [4, 4]


def deepseek_vl_hybrid() -> Made:
    """A second tower for large pictures beside the one for small ones."""
    config = hf.DeepseekVLHybridConfig(
        vision_config=SIGLIP,
        text_config=LLAMA,
        high_res_vision_config=SAM | {"model_type": "sam_vision_model", "image_size": 112},
        image_token_id=IMAGE,
    )
    pixels = {"pixel_values": tiles(), "high_res_pixel_values": tiles(112)}
    return model_of("DeepseekVLHybrid", config), pixels, [16, 16]


def janus() -> Made:
    """The understanding side of Janus; its codebook is for pictures that it writes."""
    codebook = dict(
        embed_dim=8,
        num_embeddings=16,
        latent_channels=32,
        base_channels=32,
        channel_multiplier=(1, 1),
        num_res_blocks=1,
        num_patches=4,
        projection_dim=64,
        image_token_embed_dim=64,
    )
    tower = TILES | dict(mlp_ratio=2.0, projection_dim=64, num_image_tokens=16)
    config = hf.JanusConfig(text_config=LLAMA, vision_config=tower, vq_config=codebook, image_token_id=IMAGE)
    return model_of("Janus", config), {"pixel_values": tiles()}, [16, 16]


def got_ocr2(configuration: str = "GotOcr2") -> Made:
    """Two convolutions behind the tower: a token stands for 4 × 4 patches and some around them."""
    config = getattr(hf, f"{configuration}Config")(
        vision_config=SAM | {"image_size": 224, "window_size": 4},
        text_config=QWEN2,
        image_token_index=IMAGE,
        image_seq_length=16,
    )
    return model_of("GotOcr2", config), {"pixel_values": tiles(224)}, [16, 16]


def pp_chart2table() -> Made:
    """GOT-OCR 2 under another configuration."""
    return got_ocr2("PPChart2Table")


def step3p7() -> Made:
    """Experts, windows, and two convolutions behind the tower."""
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, share_expert_dim=32)
    text = TEXT | experts
    text |= dict(
        head_dim=16,
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        layer_types=["full_attention", "sliding_attention"] * 2,
        sliding_window=64,
        num_sliding_attention_heads=4,
        query_pre_attn_scalar=16,
    )
    tower = TILES | dict(image_size=224, mlp_ratio=1.4, max_position_embeddings=256)
    config = hf.Step3p7Config(text_config=text, vision_config=tower, image_token_id=IMAGE)
    return model_of("Step3p7", config), {"pixel_values": tiles(224)}, [16, 16]


def ovis2() -> Made:
    """Tokens are mixtures of a table of visual words."""
    tower = TILES | dict(hidden_stride=2, num_visual_indicator_tokens=5, vocab_size=64)
    config = hf.Ovis2Config(
        vision_config=tower,
        text_config=QWEN2,
        hidden_size=64,
        image_token_id=IMAGE,
        visual_indicator_token_ids=tuple(range(120, 125)),
    )
    return model_of("Ovis2", config), {"pixel_values": tiles()}, [4, 4]


def qianfan_ocr() -> Made:
    """The parts of InternVL."""
    tower = TILES | {"image_size": (56, 56), "patch_size": (14, 14)}
    config = hf.QianfanOCRConfig(
        vision_config=tower,
        text_config=TEXT | {"model_type": "qwen3", "head_dim": 16},
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    return model_of("QianfanOCR", config), {"pixel_values": tiles()}, [4, 4]


def idefics2() -> Made:
    """Eight latents look at each picture; features come as one item per prompt."""
    resampler = dict(
        hidden_size=64,
        resampler_n_latents=8,
        resampler_depth=2,
        resampler_n_heads=4,
        resampler_head_dim=16,
        num_key_value_heads=2,
    )
    config = hf.Idefics2Config(
        vision_config=TILES,
        text_config=TEXT | {"model_type": "mistral", "sliding_window": 512},
        perceiver_config=resampler,
        image_token_id=IMAGE,
    )
    return model_of("Idefics2", config), {"pixel_values": tiles()[None]}, [8, 8]


def granite_docling() -> Made:
    """Deepstack features; features come as one item per prompt."""
    tower = TILES | dict(out_hidden_size=64, scale_factor=2, deepstack_visual_indexes=[0, 1])
    text = TEXT | {"logits_scaling": 1.0}
    config = hf.GraniteDoclingConfig(vision_config=tower, text_config=text, image_token_id=IMAGE)
    pixels = {"pixel_values": tiles()[None], "pixel_attention_mask": torch.ones(1, 2, dtype=torch.bool)}
    return model_of("GraniteDocling", config), pixels, [4, 4]


def aria() -> Made:
    """Experts, and queries that look at the tower's tokens."""
    config = hf.AriaConfig(
        vision_config=CONFIG_MAPPING["idefics3_vision"](**TILES),
        text_config=CONFIG_MAPPING["aria_text"](
            **TEXT, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1
        ),
        projector_patch_to_query_dict={16: 8},
        image_token_index=IMAGE,
    )
    pixels = {"pixel_values": tiles(), "pixel_mask": torch.ones(2, 56, 56, dtype=torch.bool)}
    return model_of("Aria", config), pixels, [8, 8]


def perception_lm() -> Made:
    """A tower of timm, with pooling behind the projector."""
    settings = dict(
        embed_dim=48,
        depth=3,
        num_heads=4,
        img_size=(56, 56),
        patch_size=14,
        global_pool="",
        use_post_transformer_norm=False,
        ref_feat_shape=(4, 4),
    )
    config = hf.PerceptionLMConfig(
        vision_config=dict(
            model_type="timm_wrapper",
            architecture="vit_pe_core_tiny_patch16_384",
            do_pooling=False,
            num_classes=0,
            model_args=settings,
        ),
        text_config=LLAMA,
        vision_use_cls_token=True,
        projector_pooling_ratio=2,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    config.vision_config.hidden_size = 48
    return model_of("PerceptionLM", config), {"pixel_values": tiles()[:, None]}, [4, 4]


def molmo2() -> Made:
    """Attention pools the patches that `image_token_pooling` lists for each token."""
    heads = dict(num_attention_heads=4, num_key_value_heads=4, head_dim=12)
    layers = dict(hidden_size=48, intermediate_size=64)
    config = hf.Molmo2Config(
        vision_config=heads
        | layers
        | dict(num_hidden_layers=3, image_size=[56, 56], patch_size=14, num_position_embeddings=16),
        adapter_config=heads | layers | dict(vision_feature_layer=[2, 1], text_hidden_size=64),
        text_config=TEXT | dict(head_dim=16, additional_vocab_size=8),
        image_start_token_id=102,
        image_end_token_id=103,
        image_patch_id=IMAGE,
        low_res_image_start_token_id=104,
        frame_start_token_id=105,
        frame_end_token_id=106,
    )
    pooling = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    pixels = {
        "pixel_values": noise(2, 16, 588),
        "image_token_pooling": torch.cat([pooling, pooling + 16]),
        "image_grids": torch.tensor([[2, 2, 0, 0]] * 2),
        "image_num_crops": torch.tensor([1, 1]),
    }
    return model_of("Molmo2", config), pixels, [4, 4]


def gemma3n() -> Made:
    """A convolutional tower of timm, inputs for each layer, and layers that use the keys of others."""
    text = TEXT | dict(
        head_dim=16,
        intermediate_size=[96] * 4,
        sliding_window=1024,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=110,
        num_kv_shared_layers=2,
        laurel_rank=8,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    tower = dict(
        model_type="gemma3n_vision",
        architecture="mobilenetv5_300m_enc",
        model_args={"channel_multiplier": 0.05},
        vocab_size=8,
        vocab_offset=120,
        do_pooling=False,
    )
    sound = dict(
        hidden_size=32, conf_num_attention_heads=4, conf_num_hidden_layers=1, vocab_size=4, vocab_offset=124
    )
    config = hf.Gemma3nConfig(
        text_config=text, vision_config=tower, audio_config=sound, image_token_id=IMAGE, audio_token_id=105
    )
    return model_of("Gemma3n", config), {"pixel_values": tiles(256)}, [256, 256]
