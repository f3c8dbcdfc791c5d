"""Optimisers of a run: AdamW, or Muon for the matrices of hidden layers beside AdamW for the rest."""

import dataclasses
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

from .config import OptimizerConfig
from .schedule import constant_schedule, cosine_schedule, no_weight_decay, wsd_schedule


def build_optimizers(
    named: Sequence[tuple[str, nn.Parameter]], config: OptimizerConfig
) -> list[torch.optim.Optimizer]:
    """The optimisers that together update the named parameters, each of them in one.

    Groups hold "scale", their factor on the learning rate.

    Raises:
        ValueError: Muon is asked for and no parameter is a matrix of a hidden layer.
        ImportError: Muon is asked for and this PyTorch is older than 2.9.
    """
    if config.kind == "adamw":
        return [torch.optim.AdamW(_groups(named, config), lr=config.learning_rate, betas=config.betas)]
    if not hasattr(torch.optim, "Muon"):
        raise ImportError(
            f"optimizer.kind is muon, which PyTorch has from 2.9 on, and {torch.__version__} is installed; "
            "upgrade it, or use kind: adamw"
        )
    matrices, others = [], []
    for name, parameter in named:
        is_matrix = parameter.ndim == 2 and not any(fnmatch(name, pattern) for pattern in config.adamw)
        (matrices if is_matrix else others).append((name, parameter))
    if not matrices:
        raise ValueError(
            "optimizer.kind is muon, but no parameter that trains is a matrix outside optimizer.adamw; use "
            "kind: adamw"
        )
    muon = torch.optim.Muon(
        _groups(matrices, config), lr=config.learning_rate, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, *build_optimizers(others, dataclasses.replace(config, kind="adamw"))]


def _groups(named: Sequence[tuple[str, nn.Parameter]], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameter groups, one per (weight decay, learning-rate scale)."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        decay = 0.0 if no_weight_decay(name, parameter, config.undecayed) else config.weight_decay
        scale = next((float(s) for pattern, s in config.scales.items() if fnmatch(name, pattern)), 1.0)
        groups.setdefault((decay, scale), []).append(parameter)
    return [{"params": p, "weight_decay": decay, "scale": scale} for (decay, scale), p in groups.items()]


def take_step(
    optimizers: Sequence[torch.optim.Optimizer], config: OptimizerConfig, step: int, total: int
) -> None:
    """Set the learning rates of step `step` of `total`, take the step, and clear the gradients."""
    rate, end = config.learning_rate, config.end_learning_rate
    if config.schedule == "constant":
        rate = constant_schedule(step, rate, config.warmup)
    elif config.schedule == "wsd":
        rate = wsd_schedule(step, rate, end, config.warmup, config.decay, total)
    else:
        rate = cosine_schedule(step, rate, end, config.warmup, total)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        optimizer.step()
        optimizer.zero_grad()


def load_optimizers(optimizers: Sequence[torch.optim.Optimizer], states: Sequence[dict[str, Any]]) -> None:
    """Restore what `state_dict` of each returned. Raises ValueError where they do not fit."""
    if len(states) != len(optimizers):
        raise ValueError(f"{len(states)} optimisers are stored and {len(optimizers)} are needed")
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(state)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                moments = optimizer.state.get(parameter, {})
                names = [name for name in moments if name.startswith(("exp_avg", "momentum"))]
                if any(moments[name].shape != parameter.shape for name in names):
                    raise ValueError(f"a moment does not have the shape {list(parameter.shape)}")
