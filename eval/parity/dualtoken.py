"""Parity of DualToken: both branches, their codes, the features and the pixels."""

from typing import Any

import torch
import torch.nn.functional as F

from ...models.dualtoken import DualToken, DualTokenConfig
from .case import Case, Outputs

FAMILIES = ("dualtoken",)


def run(case: Case) -> Outputs:
    """vistok's outputs for every recorded tensor, in the order they were made."""
    config = DualTokenConfig.parse(_full_tower(case))
    model = case.build(lambda: DualToken(config))
    images = case.array("image")
    (states,) = model.states(images, config.layer_recon)
    yield "hidden_after_recon_layer", case.subsample("hidden_after_recon_layer", states)
    latents = dict(zip(("pix", "sem"), model.both_latents(images), strict=True))
    side = config.vision.side
    commitments = []
    for name, quantizer in (("pix", model.quantizer_pix), ("sem", model.quantizer_sem)):
        yield f"latent_{name}", case.subsample(f"latent_{name}", latents[name])
        quantized = quantizer(latents[name])
        yield f"codes_{name}", quantized.codes.unflatten(1, (side, side))
        commitments.append(quantized.losses["commitment"])
    yield "loss", torch.stack(commitments)
    codes = {name: case.recorded(f"codes_{name}").long().flatten(1, 2) for name in latents}
    pixel = model.quantizer_pix.decode(codes["pix"]).to(case.dtype)
    yield "zq_pix", case.subsample("zq_pix", pixel)
    embedded = model.quantizer_pix.decode_by_depth(codes["pix"]).unflatten(1, (side, side))
    yield "emb_pix", case.subsample("emb_pix", embedded, "[:, ::2]")
    yield "recon", case.subsample("recon", model.draw(pixel))
    semantic = model.semantic_states(model.quantizer_sem.decode(codes["sem"]).to(case.dtype))
    yield "zq_sem_post", case.subsample("zq_sem_post", semantic)
    pooled = model.pooled(semantic)
    yield "pooled", case.subsample("pooled", pooled)
    yield "image_features", case.subsample("image_features", F.normalize(pooled, dim=-1))
    yield "text_features", model.text_features(case.array("text"))


def _full_tower(case: Case) -> dict[str, Any]:
    """The configuration; a small tower is stated in full, and then no name of a published one counts."""
    config = {"layer_shortcut": None, **case.config}
    if "vision" in config:
        config.pop("pretrained_model", None)
    return config
