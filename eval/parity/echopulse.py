"""Parity of ECHOPulse's C-ViViT: both encoders, codes, both decoders."""

import torch.nn.functional as F
from torch import Tensor

from ...models.cvivit import CViViT
from .case import Case, Outputs
from .recorder import Recorder

FAMILIES = ("echopulse",)
UNDECIDED = 2e-5  # of two similarities, whose order is a matter of rounding


def run(case: Case) -> Outputs:
    """vistok's outputs for every recorded tensor, in the order they were made."""
    model = case.build(lambda: CViViT.create(**case.config))
    if "post_fill" in case.data:
        codebook = model.vq._codebook
        codebook.embed.copy_(F.normalize(codebook.embed, dim=-1))
    videos = case.array("video").transpose(1, 2)  # the original has channels first
    grid = model.grid_of(videos)
    steps = Recorder(
        model.spatial_rel_pos_bias,
        model.to_patch_emb_first_frame,
        model.enc_spatial_transformer,
        model.enc_temporal_transformer,
        model.dec_temporal_transformer,
    )
    latents = model.latents(videos)
    yield "rel_bias", case.subsample("rel_bias", steps.outputs[0])
    yield "first", case.subsample("first", steps.outputs[1].unflatten(1, grid[1:]).unsqueeze(1))
    yield "enc_spatial", case.subsample("enc_spatial", steps.outputs[2])
    yield "enc_temporal", case.subsample("enc_temporal", steps.outputs[3])
    yield "z", case.subsample("z", model.vq.project_in(latents))
    codes = case.recorded("indices").long().flatten(1)
    yield "indices", _settled(model, latents, codes).unflatten(1, grid)
    recon = model.pixels(model.vq.decode(codes), grid=grid)
    yield "dec_temporal", case.subsample("dec_temporal", steps.outputs[4])
    yield "recon", case.subsample("recon", recon.transpose(1, 2))


def _settled(model: CViViT, latents: Tensor, recorded: Tensor) -> Tensor:
    """The codes of latents [B, K], and the recorded ones where rounding decides between the two."""
    similarities = model.vq.similarities(latents)
    best, codes = similarities.max(-1)
    other = similarities.gather(-1, recorded.clamp(0, similarities.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
    return recorded.where(best - other < UNDECIDED, codes)
