"""Parity of the generators of the TiTok family: MaskGIT with both networks, and RAR.

A run of the sampler replays its recorded random numbers. In half precision one wrong token changes all that
follow, so each step there starts from the recorded state.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...configuration import shorten
from ...generate import create
from ...generate.maskgit import MaskGIT
from ...generate.noise import gumbel
from ...generate.rar import RAR
from ...train.losses import autoregressive_token_loss
from .case import Case, Outputs
from .fields import check_size, whole

SYSTEMS = {"ImageBert": "maskgit", "UViTBert": "maskgit-uvit", "RAR": "rar"}
"""`system` of a case → family of the generator."""
_MARKS = {
    "model.embeddings.word_embeddings.weight": "ImageBert",
    "mid_block.attn.qkv.weight": "UViTBert",
    "target_aware_pos_embed": "RAR",
}
SETTINGS = {
    "randomize_temperature": "temperature",
    "guidance_scale": "guidance",
    "num_sample_steps": "steps",
    "guidance_decay": "guidance_decay",
    "guidance_scale_pow": "guidance_power",
    "softmax_temperature_annealing": "annealing",
}
"""Keys of a recorded run → arguments of `sample`."""
_NOT_SETTINGS = {
    "noise_seed",
    "B",
    "min_margin",
    "min_top2_margin",
    "masked_count_entering_each_step",
    "teacher_forced_mismatches",
}
"""Keys that describe how the random numbers of a run were drawn, and what was observed in it."""


def system_of(case: Case) -> str | None:
    """The generator that a case pins, by its `system` or its keys; None for cases of something else."""
    system = case.data.get("system")
    if system:
        return system if system in SYSTEMS else None
    return next((name for key, name in _MARKS.items() if key in case.keys), None)


def run(case: Case) -> Outputs:
    """vistok's outputs for every recorded tensor, in the order they were made."""
    system = system_of(case)
    model = case.build(lambda: create(SYSTEMS[system], **case.config))
    yield from (_rar if system == "RAR" else _maskgit)(case, model)


def _logits(case: Case, name: str, logits: Tensor, slices: str) -> Outputs:
    """The recorded parts of logits [B, rows, V]: a slice, their normaliser, and the likeliest code."""
    yield f"logits_{name}", case.subsample(f"logits_{name}", logits, slices)
    yield f"lse_{name}", logits.logsumexp(-1)
    yield f"argmax_{name}", logits.argmax(-1)


def _runs(case: Case) -> Mapping[str, Any]:
    """The recorded runs of the sampler by name."""
    runs = case.data.get("sampling", {})
    if not isinstance(runs, dict) or not all(isinstance(run, dict) for run in runs.values()):
        raise case.refusal(f"sampling is {shorten(runs)}; it maps names of runs to their settings")
    for name, run in runs.items():
        if unknown := sorted(set(run) - set(SETTINGS) - _NOT_SETTINGS):
            raise case.refusal(
                f"the run {name} has the settings {', '.join(unknown)}; known are {', '.join(SETTINGS)}"
            )
    return runs


def _random(case: Case, run: Mapping[str, Any]) -> np.random.RandomState:
    return np.random.RandomState(whole(case.path.name, run, "noise_seed", 0, 2**32 - 1))


class _Replay:
    """The recorded stream of a run for all images: uniform numbers for MaskGIT, Gumbel ones for RAR."""

    def __init__(self, case: Case, run: Mapping[str, Any], batch: int, uniform: bool) -> None:
        self.case, self.batch, self.uniform = case, batch, uniform
        self.random = _random(case, run)

    def gumbel(self, *shape: int) -> Tensor:
        """The next draws, float32 [B, *shape]."""
        shape = (self.batch, *shape)
        check_size(self.case.path.name, "noise", shape)
        draws = self.random.random_sample(shape) if self.uniform else self.random.gumbel(size=shape)
        draws = torch.from_numpy(draws.astype(np.float32)).to(self.case.device)
        return gumbel(draws) if self.uniform else draws


def _settings(model: Any, run: Mapping[str, Any]) -> Any:
    return model.check_settings({SETTINGS[key]: value for key, value in run.items() if key in SETTINGS})


# MaskGIT ----------------------------------------------------------------------------------------------------


def _maskgit(case: Case, model: MaskGIT) -> Outputs:
    classes = case.recorded("condition").long()
    if case.records("input_ids"):
        indices = case.recorded("input_ids").long()
        no_class = torch.full_like(classes, model.num_classes)
        yield from _logits(case, "cond", model.logits(indices, classes), "[:, :, ::16]")
        yield from _logits(case, "uncond", model.logits(indices, no_class), "[:, :, ::16]")
    for name, run in _runs(case).items():
        batch = whole(case.path.name, run, "B", 1, len(classes)) if "B" in run else len(classes)
        settings, noise = _settings(model, run), _Replay(case, run, batch, uniform=True)
        if case.dtype.itemsize < 4 and f"steps_{name}" in case.tensors:
            states = _each_step(case, model, f"steps_{name}", classes[:batch], settings, noise)
        else:
            states = torch.stack(list(model.states(classes[:batch], settings, noise)))
        yield f"steps_{name}", states
        yield f"sample_{name}", states[-1]


def _each_step(
    case: Case, model: MaskGIT, name: str, classes: Tensor, settings: Any, noise: _Replay
) -> Tensor:
    """The states [S+1, B, N] that follow from the recorded ones, each from the one before."""
    recorded = case.recorded(name).long()
    states = [torch.full_like(recorded[0], model.codebook_size)]
    for step, indices in enumerate(recorded[:-1]):
        logits = model.guided_logits(step, indices, classes, settings)
        states.append(model.next_state(step, indices, logits, settings, noise))
    return torch.stack(states)


# RAR --------------------------------------------------------------------------------------------------------


def _rar(case: Case, model: RAR) -> Outputs:
    classes = case.recorded("class").long()
    if case.records("input_ids"):
        indices = case.recorded("input_ids").long()
        no_class = torch.full_like(classes, model.num_classes)
        yield from _logits(case, "raster", model.logits(indices, classes), "[:, ::4, ::16]")
        yield from _logits(case, "uncond", model.logits(indices, no_class), "[:, ::8, ::16]")
        if case.records("orders"):
            orders = case.recorded("orders").long()
            labels = indices.gather(1, orders)
            yield "labels_permuted", labels
            logits = model.logits(labels, classes, orders)
            yield from _logits(case, "permuted", logits, "[:, ::4, ::16]")
            yield "ar_loss_permuted", autoregressive_token_loss(logits[:, :-1], labels)[0]
    for name, run in _runs(case).items():
        batch = whole(case.path.name, run, "B", 1, len(classes)) if "B" in run else len(classes)
        settings, noise = _settings(model, run), _Replay(case, run, batch, uniform=False)
        recorded = case.tensors.get(f"sample_{name}") if case.dtype.itemsize < 4 else None
        forced = None if recorded is None else recorded.long().to(case.device)
        yield f"sample_{name}", model.write(classes[:batch], settings, noise, forced)
