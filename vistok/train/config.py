"""A training run as a YAML file: every key is a field below, unknown keys are errors."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from ..configuration import shorten
from .losses import ReconstructionLossConfig
from .schedule import NO_DECAY_NAMES

MOST_WORKERS = 257


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon for matrices, with a warm-up and a schedule; TiTok's values are the defaults.

    `kind: muon` updates the matrices of hidden layers by Muon (Jordan et al., 2024), scaled so that AdamW's
    learning rate and weight decay fit; vectors and the parameters that `adamw` names stay with AdamW.
    `schedule` is cosine, constant, or wsd: constant, then linear to `end_learning_rate` over the last `decay`
    steps.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    adamw: tuple[str, ...] = ("*embed*", "*head*")
    """Patterns of parameter names that Muon leaves to AdamW: embeddings and output layers."""
    learning_rate: float = 1e-4
    end_learning_rate: float = 1e-5
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    warmup: int = 10_000
    decay: int = 0
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-4
    clip_norm: float = 1.0
    scales: dict[str, float] = dataclasses.field(default_factory=dict)
    """Pattern of parameter names → factor on the learning rate."""
    undecayed: tuple[str, ...] = NO_DECAY_NAMES
    """Parts of the names of parameters that do not decay, beside all vectors; TiTok's by default."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            learning_rate=(0, math.inf),
            end_learning_rate=(0, math.inf),
            warmup=(0, math.inf),
            decay=(0, math.inf),
            betas=(0, 1),
            weight_decay=(0, math.inf),
            clip_norm=(0, math.inf),
            scales=(0, math.inf),
        )
        if (self.decay > 0) != (self.schedule == "wsd"):
            raise ValueError(
                f"schedule is {self.schedule} and decay is {self.decay}; give decay, in steps, with "
                "schedule: wsd and with no other"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of every run of the training loop.

    `batch_size` is that of one process and one accumulation step.
    """

    steps: int
    batch_size: int
    seed: int = 42
    gradient_accumulation: int = 1
    precision: Literal["no", "bf16", "fp16"] = "bf16"
    compile: bool = False
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    ema: float = 0.999
    workers: int = 1
    log_every: int = 50
    validate_every: int = 500
    checkpoint_every: int = 500
    tensorboard: bool = False
    export_dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        check_ranges(
            self,
            steps=(1, math.inf),
            batch_size=(1, math.inf),
            gradient_accumulation=(1, math.inf),
            log_every=(1, math.inf),
            validate_every=(1, math.inf),
            checkpoint_every=(1, math.inf),
            seed=(0, math.inf),
            ema=(0, 1),
            workers=(0, MOST_WORKERS),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """A run that trains a tokenizer.

    `tokenizer` is `{name: registry name or family, …fields}` for `vistok.create`; `data` is what
    `vistok.train.data.build` takes. `teacher` names a MaskGIT-VQGAN checkpoint and makes the objective
    TiTok's stage 1 (proxy codes); without it the objective is pixels. `initial` names the tokenizer that
    training starts from, by name or path; fields of `tokenizer` may then add parts to it. `freeze` lists
    patterns of parameter names that do not train. `nested_dropout` is the share of images that keep only a
    random prefix of their tokens (ordered tokenizers). `warm_start_images` fits what the family can fit in
    closed form to that many images first. `validation` lists shipped photographs (`vistok.train.data`) or
    image files; keep them out of `data`.
    """

    tokenizer: dict[str, Any]
    data: dict[str, Any]
    loss: ReconstructionLossConfig = dataclasses.field(default_factory=ReconstructionLossConfig)
    discriminator_optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    perceptual_weights: str = "hub"
    initial: str | None = None
    teacher: str | None = None
    freeze: tuple[str, ...] = ()
    nested_dropout: float = 0.0
    warm_start_images: int = 0
    validation: tuple[str, ...] = ()
    validation_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, warm_start_images=(0, math.inf), validation_tokens=(1, math.inf))
        if not 0 <= self.nested_dropout <= 1:
            raise ValueError(f"nested_dropout is {self.nested_dropout}; it is a share of images, 0 to 1")
        if not isinstance(self.tokenizer.get("name", ""), str):
            name = shorten(self.tokenizer["name"])
            raise ValueError(f"tokenizer: name is {name}; give a registry name or a family as text")
        if "name" not in self.tokenizer:
            raise ValueError("tokenizer needs a name: a registry name or a family (see `vistok list`)")


def check_schedule(name: str, optimizer: OptimizerConfig, steps: int) -> None:
    """Raise ValueError for a schedule that cannot be followed in `steps` steps, before they begin."""
    if optimizer.schedule == "cosine" and steps <= optimizer.warmup:
        raise ValueError(
            f"{name}.warmup is {optimizer.warmup}, but only {steps} steps follow its start; give a shorter "
            "warm-up, more steps, or schedule: constant"
        )
    if optimizer.warmup + optimizer.decay > steps and optimizer.schedule == "wsd":
        raise ValueError(
            f"{name}.warmup is {optimizer.warmup} and {name}.decay {optimizer.decay}, together more than the "
            f"{steps} steps that follow its start; shorten them, or give more steps"
        )


def check_ranges(config: Any, **ranges: tuple[float, float]) -> None:
    """Raise ValueError for fields outside [low, high); those that are tuples or mappings hold such values."""
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        parts = value.values() if isinstance(value, Mapping) else value
        values = parts if isinstance(value, Mapping | tuple) else [value]
        if not all(low <= each < high for each in values):
            upper = "" if high == math.inf else f" and below {high:g}"
            raise ValueError(f"{name} is {shorten(value)}; it must be {low:g} or more{upper}")
