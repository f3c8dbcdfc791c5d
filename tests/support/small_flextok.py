"""A small FlexTok with every weight at random, none at zero."""

import torch

from vistok import create


def build_flextok(**fields):
    """A FlexTok of these fields that uses all levels."""
    torch.manual_seed(0)
    model = create("flextok", **fields).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("vae."):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.encoder.module_dict["enc_to_latents"].proj.weight.mul_(4)
        model.encoder.module_dict["enc_patch_emb"].patch_proj.weight.mul_(4)
    return model
