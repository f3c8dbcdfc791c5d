"""Small tokenizers of every family with random weights, and what every test does with one.

A test file that builds them takes the fixture `small_and_quick`.
"""

import functools
import math

import torch
import torch.nn.functional as F

from vistok import create, load
from vistok.models.grid import GridTokenizer
from vistok.registry import families

SIDE, COUNT = 32, 6
FRAMES = 5  # of videos
VIT = {
    "crop_size": SIDE,
    "vit_enc_model_size": "tiny",
    "vit_dec_model_size": "tiny",
    "num_latent_tokens": COUNT,
}
SINGLE = {"finetune_decoder": False, "is_legacy": False, "token_size": 8, "codebook_size": 64}
TEXT = {"text_context_length": 5, "text_embed_dim": 16}
MINI = {
    "image_size": SIDE,
    "patch_size": 8,
    "thumbnail_size": 16,
    "levels": [[3, [4, 4]], [3, [2, 2, 2, 2]]],
    "width": 32,
    "encoder_depth": 1,
    "decoder_depth": 2,
    "heads": 2,
}
XQ = {"image_size": SIDE, "encoder_model": "tiny", "decoder_model": "tiny", "codebook_size": 64}
SOFT = {
    "image_size": SIDE,
    "encoder_model": "tiny",
    "decoder_model": "tiny",
    "enc_patch_size": 8,
    "dec_patch_size": 8,
    "num_latent_tokens": COUNT,
    "codebook_embed_dim": 4,
}
SCALES = {"num_latent_tokens": 9, "v_patch_nums": (1, 2, 3), "share_quant_resi": 2}
KARL = {
    "image_size": SIDE,
    "patch_size": 4,
    "max_grid_tokens": 8,
    "max_latent_tokens": 40,  # places beyond one digit
    "num_tokens": 12,
    "training_tokens": (2, 12, 2),
    "encoder_width": 48,
    "encoder_layers": 2,
    "encoder_heads": 2,
    "decoder_width": 32,
    "decoder_layers": 2,
    "decoder_heads": 2,
    "vq_codebook_size": 64,
    "vq_token_dim": 6,
    "base_hidden_channels": 32,
    "base_channel_mult": (1, 1, 1),
    "base_res_blocks": 1,
    "base_channels": 8,
    "base_codebook_size": 16,
}
SEED = {
    "vit_depth": 2,
    "vit_width": 32,
    "vit_heads": 2,
    "vit_mlp": 64,
    "image_size": SIDE,
    "patch": 8,
    "num_query_token": COUNT,
    "codebook": 64,
    "codebook_dim": 8,
    "qformer_width": 32,
    "qformer_layers": 2,
    "qformer_heads": 2,
    "decode_depth": 1,
}
RAE = {
    "encoder_hidden_size": 32,
    "encoder_num_hidden_layers": 2,
    "encoder_num_attention_heads": 2,
    "encoder_intermediate_size": 64,
    "encoder_patch_size": 8,
    "encoder_input_size": SIDE,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 48,
    "decoder_patch_size": 8,
}
CASES = {
    "mini": ("mini", MINI),
    "mini-refiner": ("mini", {**MINI, "refiner_width": 8}),
    "titok-legacy": ("titok", {**VIT, "use_l2_norm": True}),
    "titok-stage1": ("titok", {**VIT, "use_l2_norm": True, "finetune_decoder": False}),
    "titok-vq": ("titok", {**VIT, **SINGLE}),
    "titok-clustering": ("titok", {**VIT, **SINGLE, "clustering_vq": True}),
    "titok-vae": ("titok", {**VIT, **SINGLE, "quantize_mode": "vae"}),
    "titok-patches": ("titok", {**VIT, **SINGLE, "vit_enc_patch_size": 8}),
    "tatitok-vq": ("tatitok", {**VIT, **SINGLE, **TEXT}),
    "tatitok-vae": ("tatitok", {**VIT, **SINGLE, **TEXT, "quantize_mode": "vae"}),
    "textok-vae": (
        "textok",
        {
            "image_size": SIDE,
            "patch_size": 8,
            "num_latent_tokens": COUNT,
            "token_size": 4,
            "encoder_width": 32,
            "encoder_depth": 1,
            "encoder_heads": 2,
            "decoder_width": 32,
            "decoder_depth": 1,
            "decoder_heads": 2,
            "text_length": 5,
            "text_dim": 16,
        },
    ),
    "one-d-piece": ("one-d-piece", {**VIT, "use_l2_norm": True}),
    "gigatok": (
        "gigatok",
        {
            "image_size": SIDE,
            "encoder_size": "tiny",
            "decoder_size": "tiny",
            "encoder_ch_mult": (1, 1, 2),
            "decoder_ch_mult": (1, 1, 2),
            "hidden_channels": 32,
            "z_channels": 16,
            "num_latent_tokens": 8,
            "codebook_size": 64,
            "distill_depth": 1,
            "out_inner_dim": 16,
        },
    ),
    "xqgan-vq": ("xqgan", {**XQ, "num_latent_tokens": 4, "v_patch_nums": (2,), "codebook_embed_dim": 8}),
    "xqgan-product": (
        "xqgan",
        {**XQ, "num_latent_tokens": 4, "v_patch_nums": (2,), "codebook_embed_dim": 6, "product_quant": 2},
    ),
    "imagefolder": ("xqgan", {**XQ, **SCALES, "codebook_embed_dim": 6, "product_quant": 2}),
    "xqgan-binary": ("xqgan", {**XQ, **SCALES, "codebook_embed_dim": 6, "lfq": True}),
    "kl16-vae": (
        "kl16",
        {
            "embed_dim": 4,
            "ch": 32,
            "ch_mult": (1, 1, 2, 2),
            "num_res_blocks": 1,
            "z_channels": 6,
            "image_size": SIDE,
        },
    ),
    "elm": (
        "elm",
        {
            "nf": 32,
            "res_blocks": 1,
            "codebook_size": 6,
            "emb_dim": 32,
            "ch_mult": (1,) * 5,
            "img_size": SIDE,
            "attn_resolutions": (2,),
            "code_weight": 0.1,
        },
    ),
    "maskgit-vqgan": (
        "maskgit-vqgan",
        {
            "channel_mult": (1,) * 5,
            "hidden_channels": 32,
            "z_channels": 8,
            "embedding_dim": 8,
            "image_size": SIDE,
        },
    ),
    "instella": (
        "instella",
        {
            "encoder_layers": 3,
            "encoder_head_dim": 16,
            "encoder_num_heads": 2,
            "patch_size": 4,
            "num_latent_tkns": COUNT,
            "axes_dims_rope": (4, 6, 6),
            "downsample_idx": (0,),
            "decoder_layers": 2,
            "decoder_head_dim": 16,
            "decoder_num_heads": 3,
            "upsample_idx": (0,),
            "codebook_size": 12,
            "image_size": SIDE,
            "scale": 64,
        },
    ),
    "flextok": (
        "flextok",
        {
            "encoder_dim": 64,
            "encoder_depth": 2,
            "decoder_dim": 96,
            "decoder_depth": 3,
            "head_dim": 32,
            "num_tokens": 8,
            "levels": (4, 5, 3),
            "latent_channels": 4,
            "latent_size": SIDE // 2,
            "vae_block_out_channels": (8, 16),
            "vae_layers_per_block": 1,
            "vae_norm_num_groups": 4,
            "vae_scaling_factor": 0.7,
            "null_probability": 0.5,
        },
    ),
    "seed-1": (
        "seed",
        {**SEED, "variant": "seed1", "reverse_tokens": 5, "reverse_layers": 2, "text_features_dim": 16},
    ),
    "seed-2": ("seed", {**SEED, "image_features_dim": 24, "renderer_text_dim": 16}),
    "slotmllm": (
        "slotmllm",
        {
            "hidden": 32,
            "layers": 2,
            "heads": 2,
            "enc_width": 16,
            "slots": COUNT,
            "vis": 16,
            "image_size": SIDE,
            "patch": 8,
            "cond": 16,
            "blocks": 1,
            "blk_heads": 2,
            "down": (16, 4),
            "rvq": 2,
            "codes": 64,
            "cdim": 8,
            "render_size": SIDE,
        },
    ),
    "dualtoken": (
        "dualtoken",
        {
            "layer_recon": 2,
            "layer_sem": 3,
            "layer_shortcut": 1,
            "vq_pix": {"n_embed": 64, "embed_dim": 8, "depth": 2},
            "vq_sem": {"n_embed": 64, "embed_dim": 8, "depth": 2},
            "vision": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 4,
                "num_attention_heads": 2,
                "image_size": SIDE,
                "patch_size": 8,
            },
            "text": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "vocab_size": 11,
                "max_position_embeddings": 5,
            },
            "ddconfig": {
                "attn_resolutions": (8,),
                "ch": 32,
                "ch_mult": (1, 1, 1),
                "decoder_in_channels": 16,
                "num_res_blocks": 1,
                "resolution": SIDE,
            },
            "decoder_latent_shape": (8, 8),  # the tower's grid has 4×4 cells
        },
    ),
    "detailflow": (
        "detailflow",
        {
            "image_size": SIDE,
            "num_latent_tokens": 8,
            "group_size": 2,
            "causal_num": 6,
            "codebook_size": 64,
            "codebook_embed_dim": 4,
            "enc_patch_size": 8,
            "dec_patch_size": 8,
            "num_patches": 9,
            "encoder_width": 32,
            "encoder_layers": 2,
            "encoder_heads": 2,
            "encoder_mlp": 48,
            "decoder_width": 48,
            "decoder_layers": 2,
            "decoder_heads": 3,
            "decoder_mlp": 64,
        },
    ),
    "rae-dinov2": (
        "rae",
        {
            **RAE,
            "encoder_type": "dinov2",
            "encoder_patch_size": 7,
            "encoder_input_size": 28,
            "encoder_image_size": 35,
            "statistics": True,
        },
    ),
    "rae-siglip2": ("rae", {**RAE, "encoder_type": "siglip2", "encoder_image_size": SIDE}),
    "rae-mae": ("rae", {**RAE, "encoder_type": "mae", "encoder_image_size": 24}),
    "mingtok": (
        "mingtok",
        {
            "low_level_encoder": {
                "img_size": SIDE,
                "patch_size": 8,
                "depth": 2,
                "embed_dim": 64,
                "ffn_layer": "swiglu",
                "out_dim": 8,
            },
            "semantic_decoder": {
                "in_dim": 8,
                "patch_size": 8,
                "embed_dim": 128,
                "decoder_depth": 2,
                "ffn_layer": "swiglu",
            },
            "pixel_decoder": {"patch_size": 4, "decoder_depth": 2, "embed_dim": 64},
            "scaling_factor": 2.5,
            "mean": 0.3,
        },
    ),
    "cvivit": (
        "cvivit",
        {
            "dim": 32,
            "codebook_size": 64,
            "codebook_dim": 8,
            "image_size": SIDE,
            "patch_size": 8,
            "spatial_depth": 1,
            "temporal_depth": 1,
            "dim_head": 16,
            "heads": 2,
            "frames": FRAMES,
        },
    ),
    "softvq": ("softvq", {**SOFT, "codebook_size": 16, "num_codebooks": 2}),
    "maetok": ("softvq", {**SOFT, "quantized": False, "masked": True, "enc_token_drop": 0.4}),
    "karl-vqgan-vq": ("karl", {**KARL, "base": "vqgan", "quantize_latent": True}),
    "karl-vqgan": ("karl", {**KARL, "base": "vqgan", "quantize_latent": False}),
    "karl-vae-vq": ("karl", {**KARL, "base": "vae", "quantize_latent": True}),
    "karl-vae": ("karl", {**KARL, "base": "vae", "quantize_latent": False}),
}


def traits(case):
    """The class of a case's family: its flags say what to expect of it."""
    return families()[CASES[case][0]]


ORDERED = [case for case in CASES if traits(case).ordered]
ADAPTIVE = [case for case in CASES if traits(case).adaptive]
STOCHASTIC = [case for case in CASES if traits(case).stochastic]
FIXED_LENGTH = [  # grids are of any size
    case for case in CASES if case not in ORDERED + ADAPTIVE and not issubclass(traits(case), GridTokenizer)
]


# ---- building ----------------------------------------------------------------------------------------------


def fresh(case, **changes):
    """A tokenizer of that case as it starts training."""
    family, config = CASES[case]
    return create(family, **{**config, **changes}).eval()


def build(case, **changes):
    """The same with every weight at random, none at zero, whose pictures and codes differ."""
    torch.manual_seed(0)
    family, model = CASES[case][0], fresh(case, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=_noise(family, name))
        if family in _LIVELIER:
            _LIVELIER[family](model)
    if case == "titok-stage1":
        model.attach_pixel_tokenizer(shared("maskgit-vqgan"))
    if traits(case).semantic:
        from tiny_renderers import tiny_pipeline  # diffusers takes seconds

        width = model.renderer_options().get("image_width", 0)
        model.attach_renderer(tiny_pipeline(model.renderer_kind, image_width=width), size=SIDE)
    return model


@functools.cache
def shared(case, **changes):
    """The same, built once; who changes it takes a copy."""
    return build(case, **changes)


def _noise(family, name):
    if family == "instella":
        return 0.5 if "token" in name else 0.1
    if family == "flextok":
        return 0.0 if name.startswith("vae.") else 0.1
    return 0.05 if family == "karl" else 0.03


def _spread_codes(model):
    """Codes where the latents are, or all latents share one."""
    if not hasattr(model.quantizer, "embedding"):
        return
    latents, codebook = model.latents(pictures(8, seed=9)), model.quantizer.embedding.weight
    token = torch.arange(len(codebook)) % latents.shape[1]
    codebook.copy_(latents.mean(0)[token] + latents.std(0)[token] * torch.randn_like(codebook))


def _livelier_titok(model):
    """Attend more, or pictures and latents hardly matter."""
    model.encoder.patch_embed.weight.mul_(10)
    model.decoder.decoder_embed.weight.mul_(10)
    for block in [*model.encoder.transformer, *model.decoder.transformer]:
        block.attn.out_proj.weight.mul_(5)
    _spread_codes(model)


def _livelier_gigatok(model):
    """Attend more, so that tokens depend on the picture and pictures on the tokens."""
    model.post_quant_conv.weight.mul_(10)
    for block in [*model.s2to1encoder.transformer, *model.s1to2decoder.transformer]:
        block.multihead_attn.out_proj.weight.mul_(10)
    _spread_codes(model)


def _livelier_xqgan(model):
    """Attend more; the scales of blocks begin near zero."""
    model.encoder.model.patch_embed.proj.weight.mul_(10)
    model.post_quant_conv.weight.mul_(10)
    for block in [*model.encoder.model.blocks, *model.decoder.model.blocks]:
        for scale in (block.ls1, block.ls2):
            scale.gamma.fill_(1)
        block.attn.proj.weight.mul_(10)
    for branch, latents in zip(
        model.branches, model.latents(pictures(8, seed=9)).chunk(len(model.branches), -1), strict=True
    ):
        if hasattr(branch, "embedding"):
            rows = torch.arange(len(branch.embedding.weight)) % latents.shape[1]
            noise = torch.randn_like(branch.embedding.weight)
            branch.embedding.weight.copy_(latents.mean(0)[rows] + latents.std(0)[rows] * noise)


def _livelier_softvq(model):
    """Attend more, and begin with scales that are not near zero."""
    model.encoder.model.patch_embed.proj.weight.mul_(10)
    model.post_quant_conv.weight.mul_(10)
    for block in [*model.encoder.model.blocks, *model.decoder.model.blocks]:
        for scale in (block.ls1, block.ls2) if hasattr(block, "ls1") else ():
            scale.gamma.fill_(1)
        block.attn.proj.weight.mul_(10)
    if model.config.quantized:
        model.quantize.embedding.normal_()


def _livelier_flextok(model):
    """Use all levels."""
    model.encoder.module_dict["enc_to_latents"].proj.weight.mul_(4)
    model.encoder.module_dict["enc_patch_emb"].patch_proj.weight.mul_(4)


def _livelier_karl(model):
    """Halt about a third, by image and target."""
    model.patch_embed.weight.mul_(10)
    model.rec_loss_embeddings.normal_()
    for block in model.encoder.transformer:  # attend more, or tokens hardly depend on the picture
        block.attn.in_proj_weight.mul_(4)
        block.attn.out_proj.weight.mul_(8)
    if model.config.quantize_latent:
        model.quantize.embedding.weight.normal_()
    images = pictures(4, side=model.image_size)

    def logits():
        bins = model.target_bins(0.05, len(images))
        return model.analyse(images, bins, model.num_tokens, model.base.features(images)).halt_logits

    model.halting_mlp[2].bias.zero_()
    model.halting_mlp[2].weight.mul_(3 / logits().std())
    model.halting_mlp[2].bias.fill_(math.log(3) - float(logits().quantile(0.66)))


def _livelier_seed(model):
    """Attend to the picture more, so that tokens depend on it."""
    model.visual_encoder.patch_embed.proj.weight.mul_(10)
    for layer in model.Qformer.bert.encoder.layer:
        if hasattr(layer, "crossattention"):
            layer.crossattention.output.dense.weight.mul_(100)
    _spread_codes(model)


def _livelier_dualtoken(model):
    """Depend on the picture more, with codes where their residuals are."""
    model.vision.embeddings.patch_embedding.weight.mul_(10)
    model.postquant_pix.proj.weight.mul_(5)
    latents = model.both_latents(2 * pictures(8, seed=9) - 1)
    for quantizer, rows in zip(model.product.parts, latents, strict=True):
        rows = rows.flatten(0, 1)
        rows = torch.cat([rows, 0.3 * (rows - rows.roll(1, 0))])
        rows = rows[torch.randperm(len(rows))[: len(quantizer.rows)]]
        for book in quantizer.books():
            book.weight[:-1] = rows


def _livelier_slotmllm(model):
    """Slots that differ and depend on the picture, and codes where their residuals are."""
    from tiny_renderers import tiny_backbone

    model.attach_backbone(tiny_backbone())
    model.image_tokenizer.model.query_tokens.normal_()
    for layer in model.qformer.bert.encoder.layer:
        if hasattr(layer, "crossattention"):
            layer.crossattention.self.value.weight.mul_(10)
            layer.crossattention.output.dense.weight.mul_(20)
    residual = model.quantize.project_in(model.latents(pictures(8, seed=9))).flatten(0, 1)
    rows = torch.cat([residual, 0.3 * (residual - residual.roll(1, 0))])
    rows = rows[torch.randperm(len(rows))[: model.config.codes]]
    for layer in model.quantize.layers:
        layer._codebook.embed[0] = rows


def _livelier_cvivit(model):
    """Depend on the video more, with codes where its latents are."""
    model.to_patch_emb_first_frame[2].weight.mul_(5)
    model.to_patch_emb[2].weight.mul_(5)
    compared = model.vq.compared(model.latents(inputs("cvivit", 8, seed=9))).flatten(0, 1)
    model.vq.rows.copy_(compared[torch.randperm(len(compared))[: len(model.vq.rows)]])


_LIVELIER = {
    "cvivit": _livelier_cvivit,
    "softvq": _livelier_softvq,
    "titok": _livelier_titok,
    "one-d-piece": _livelier_titok,
    "gigatok": _livelier_gigatok,
    "xqgan": _livelier_xqgan,
    "tatitok": _livelier_titok,
    "maskgit-vqgan": _spread_codes,
    "flextok": _livelier_flextok,
    "karl": _livelier_karl,
    "seed": _livelier_seed,
    "slotmllm": _livelier_slotmllm,
    "dualtoken": _livelier_dualtoken,
}


# ---- using -------------------------------------------------------------------------------------------------


def pictures(count, seed=0, side=SIDE):
    """Blocky random pictures [count, 3, side, side]: unlike each other, unlike noise."""
    generator = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.rand(count, 3, 4, 4, generator=generator), side)


def inputs(case, count, seed=0):
    """What a tokenizer of that case takes: pictures, or videos of FRAMES different pictures each."""
    if traits(case).modality == "image":
        return pictures(count, seed)
    return pictures(max(count, 1) * FRAMES, seed).unflatten(0, (-1, FRAMES))[:count]


def text_states(count):
    states = torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(5))
    return states[:count]


def options(case, count):
    """What `decode` is given beside tokens."""
    given = {"condition": text_states(count)} if "text" in traits(case).conditions else {}
    return given | ({"steps": 2} if traits(case).stochastic else {})


def decode(model, case, tokens):
    return model.decode(tokens, **options(case, len(tokens)))


def codes_of(tokens):
    return next(data for data in (tokens.indices, tokens.bits, tokens.latents) if data is not None)


def lengths_of(tokens):
    return [tokens.num_tokens] * len(tokens) if tokens.lengths is None else tokens.lengths.tolist()


def assert_close_tokens(found, expected):
    """As many tokens for every image; the same codes, or latents up to rounding. Padding is no matter."""
    assert lengths_of(found) == lengths_of(expected)
    for ours, theirs, length in zip(codes_of(found), codes_of(expected), lengths_of(found), strict=True):
        if ours.is_floating_point():
            torch.testing.assert_close(ours[:length].double(), theirs[:length].double(), rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(ours[:length], theirs[:length])


def saved_and_loaded(model, folder):
    """`load` of what `save_pretrained` wrote, which is the same model bit for bit."""
    model.save_pretrained(folder)
    loaded = load(folder)
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    return loaded
