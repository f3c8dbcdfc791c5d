"""Parity of xAR and of KL-16, the autoencoder whose latents it writes.

A run of the sampler replays its recorded random numbers.
"""

import re

import numpy as np
import torch
from torch import Tensor

from ...generate.xar import CLUSTERS, XAR
from ...models.kl16 import KL16
from ...quantizers import DiagonalGaussian
from .case import Case, Outputs

FAMILIES = ("xar",)


def run(case: Case) -> Outputs:
    """vistok's outputs for every recorded tensor, in the order they were made."""
    yield from (_autoencoder if "encoder.conv_in.weight" in case.keys else _generator)(case)


def _autoencoder(case: Case) -> Outputs:
    model = case.build(lambda: KL16.create(**case.config))
    images = (case.array("image") + 1) / 2  # the recipe draws from [-1, 1]
    posterior = DiagonalGaussian(model.moments(images).movedim(1, -1))
    yield "moments_mean", posterior.mode().movedim(-1, 1)
    yield "moments_std", posterior.std.movedim(-1, 1)
    yield "decoded", 2 * model.draw(posterior.mode().movedim(-1, 1)) - 1


# The generator ----------------------------------------------------------------------------------------------


class _Replay:
    """The recorded stream of normal numbers of a run, for all images."""

    def __init__(self, case: Case, batch: int) -> None:
        self.case, self.batch, self.random = case, batch, case.draw(case.input("sampler noise"))

    def normal(self, *shape: int) -> Tensor:
        """The next draws, float64 [B, *shape]."""
        draws = torch.from_numpy(self.random.standard_normal((self.batch, *shape)))
        return draws.to(self.case.device)


def _generator(case: Case) -> Outputs:
    keys = case.data["state_dict"]
    for key in [key for key in keys if key == "mask" or ".attn.rope." in key]:  # constants, not weights
        del keys[key]
    model: XAR = case.build(lambda: XAR.create(**case.config))
    classes = case.array("label")
    grid = case.array("grid")  # [B, C, h, w]
    clusters = model.clusterify(grid.flatten(2).transpose(1, 2))
    yield "clusters", clusters[:, :, ::16]
    error = _map(model, model.unclusterify(clusters)) - grid
    yield "unclusterify_error", error.abs().max().view(1)
    head_dim = model.config.encoder_embed_dim // model.config.encoder_num_heads
    yield "rope_cos", model.rotations(head_dim)[..., 0].repeat_interleave(2, -1)[::16]
    yield from _velocities(case, model, classes)
    steps = _steps(case)
    for name in sorted(case.tensors):
        if match := re.fullmatch(r"sample_cfg(\d+(?:\.\d+)?)", name):
            settings = model.check_settings({"guidance": float(match[1]), "steps": steps[name]})
            latents = model.write(classes, settings, _Replay(case, len(classes)))
            yield name, _map(model, latents)
    yield "train_loss", _loss(case, model, clusters, classes).view(1)


def _map(model: XAR, rows: Tensor) -> Tensor:
    """[B, N, C] → [B, C, h, w]."""
    return rows.transpose(1, 2).unflatten(2, model.grid)


def _velocities(case: Case, model: XAR, classes: Tensor) -> Outputs:
    x, context, batch = case.array("x0"), case.array("prev"), len(classes)
    time = _number(case, "velocity_first", r"t=([\d.]+)")
    later, factor = (
        _number(case, "velocity_second_cached", pattern)
        for pattern in (r"t=[\d.]+\*([\d.]+)", r"([\d.]+)\*x0")
    )
    yield "velocity_first", model.velocity(x, torch.full((batch, 1), time, device=x.device), classes)
    caches = model.caches(batch)
    yield "velocity_second", model.next_velocity(x, time, classes, 1, caches, [context])
    yield "velocity_second_cached", model.next_velocity(factor * x, later * time, classes, 1, caches)


def _loss(case: Case, model: XAR, clusters: Tensor, classes: Tensor) -> Tensor:
    """The loss with the recipe's times and noises, and the class of the first image dropped."""
    batch = len(classes)
    random, shape = case.draw(case.input("loss noise")), (batch, *clusters.shape[2:])
    noise = np.stack([random.standard_normal(shape) for _ in range(CLUSTERS)], 1).astype(np.float32)
    times = case.normal(case.input("loss times"), (CLUSTERS, batch)).sigmoid().T
    if case.input("label drop") != "first sample only":
        raise case.refusal("label drop is another than that of the first sample only")
    classes = classes.clone()
    classes[0] = model.num_classes
    latents = model.unclusterify(clusters)
    return model.loss(latents, classes, times=times, noise=case.place(torch.from_numpy(noise)))


def _steps(case: Case) -> dict[str, int]:
    """The steps per cluster of every recorded run."""
    return {
        name: int(_number(case, name, r"(\d+) solver steps"))
        for name in case.tensors
        if name.startswith("sample_cfg")
    }


def _number(case: Case, name: str, pattern: str) -> float:
    match = re.search(pattern, case.description(name))
    if not match:
        raise case.refusal(f"the description of {name} does not state {pattern}")
    return float(match[1])
