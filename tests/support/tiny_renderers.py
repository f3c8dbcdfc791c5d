"""Tiny companions of semantic tokenizers with random weights, without the network: renderers, a DINOv2."""

import functools

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableUnCLIPImg2ImgPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

LENGTH = 8  # states of an empty prompt


@functools.cache
def tiny_pipeline(kind, text_width=16, image_width=24, side=32):
    """A "text" (Stable Diffusion) or "unclip" pipeline that draws pictures of `side` pixels."""
    torch.manual_seed(3)
    unclip = kind == "unclip"
    labels = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * image_width}
    unet = UNet2DConditionModel(
        sample_size=side // 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=8,
        **(labels if unclip else {}),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    )
    sizes = {"hidden_size": text_width, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    text = CLIPTextConfig(
        vocab_size=3, max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes
    )
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
    parts = {
        "text_encoder": CLIPTextModel(text),
        "tokenizer": CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=LENGTH),
        "unet": unet,
        "vae": vae,
        "scheduler": PNDMScheduler(skip_prk_steps=True, steps_offset=1, beta_schedule="scaled_linear"),
        "feature_extractor": CLIPImageProcessor(),
    }
    if not unclip:
        return StableDiffusionPipeline(**parts, safety_checker=None, requires_safety_checker=False)
    vision = CLIPVisionConfig(image_size=32, patch_size=16, projection_dim=image_width, **sizes)
    normalizer = StableUnCLIPImageNormalizer(image_width)
    with torch.no_grad():
        normalizer.mean.normal_()
        normalizer.std.uniform_(0.5, 2)
    return StableUnCLIPImg2ImgPipeline(
        **parts,
        image_encoder=CLIPVisionModelWithProjection(vision),
        image_normalizer=normalizer,
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    )


@functools.cache
def tiny_backbone(width=16, patch=8, side=32):
    """A DINOv2 of one layer for images of `side` pixels."""
    torch.manual_seed(4)
    sizes = {"hidden_size": width, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = Dinov2Model(Dinov2Config(image_size=side, patch_size=patch, **sizes))
    with torch.no_grad():
        model.embeddings.patch_embeddings.projection.weight.mul_(20)
    return model
