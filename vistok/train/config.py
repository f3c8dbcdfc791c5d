"""A training run as a YAML file: every key is a field below, unknown keys are errors."""

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from .losses import ReconstructionLossConfig

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a warm-up and a cosine or constant schedule; TiTok's values are the defaults."""

    learning_rate: float = 1e-4
    end_learning_rate: float = 1e-5
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: int = 10_000
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-4
    clip_norm: float = 1.0
    scales: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Pattern of parameter names → factor on the learning rate."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run of `vistok train`.

    `tokenizer` is `{name: registry name or family, …fields}` for `vistok.create`; `data` is what
    `vistok.train.data.build` takes. `batch_size` is that of one process and one accumulation step. `teacher`
    names a MaskGIT-VQGAN checkpoint and makes the objective TiTok's stage 1 (proxy codes); without it the
    objective is pixels. `freeze` lists patterns of parameter names that do not train. `nested_dropout` is the
    share of images that keep only a random prefix of their tokens (ordered tokenizers). `warm_start_images`
    fits what the family can fit in closed form to that many images first. `validation` lists shipped
    photographs (`vistok.train.data`) or image files; keep them out of `data`.
    """

    tokenizer: dict[str, Any]
    data: dict[str, Any]
    steps: int
    batch_size: int
    seed: int = 42
    gradient_accumulation: int = 1
    precision: Literal["no", "bf16", "fp16"] = "bf16"
    compile: bool = False
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    loss: ReconstructionLossConfig = dataclasses.field(default_factory=ReconstructionLossConfig)
    discriminator_optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    perceptual_weights: str = "hub"
    ema: float = 0.999
    initial: str | None = None
    teacher: str | None = None
    freeze: tuple[str, ...] = ()
    nested_dropout: float = 0.0
    warm_start_images: int = 0
    validation: tuple[str, ...] = ()
    validation_tokens: tuple[int, ...] = ()
    workers: int = 1
    log_every: int = 50
    validate_every: int = 500
    checkpoint_every: int = 500
    tensorboard: bool = False
    export_dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "gradient_accumulation", "log_every", "validate_every")
        for name in (*counts, "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if "name" not in self.tokenizer:
            raise ValueError("tokenizer needs a name: a registry name or a family (see `vistok list`)")


def read(path: str | Path) -> TrainConfig:
    """The configuration in a YAML file.

    Raises FileNotFoundError, or ValueError that names the file and the key.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no training configuration {path}; give a YAML file such as assets/vistok-mini.yaml"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, Mapping):
        raise ValueError(
            f"{path} holds a {type(values).__name__}; a configuration is a mapping of keys to values"
        )
    return _build(TrainConfig, values, str(path))


def _build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """A dataclass from a mapping, nested dataclasses included, each value of its field's type."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(str(key) for key in set(values) - set(fields)):
        raise ValueError(f"{where}: unknown key {', '.join(unknown)}; accepted are {', '.join(fields)}")
    required = (dataclasses.MISSING, dataclasses.MISSING)
    if missing := [
        n for n, f in fields.items() if (f.default, f.default_factory) == required and n not in values
    ]:
        raise ValueError(f"{where}: {', '.join(missing)} must be given")
    hints = typing.get_type_hints(cls)
    converted = {key: _convert(hints[key], value, f"{where}: {key}") for key, value in values.items()}
    try:
        return cls(**converted)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _convert(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return _build(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list) and (arguments[-1] is ... or len(value) == len(arguments)):
        return tuple(_convert(arguments[0], item, where) for item in value)
    if origin is dict and isinstance(value, dict):
        return value
    if type(None) in arguments:
        return None if value is None else _convert(arguments[0], value, where)
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4, without a point, as text
        except ValueError:
            pass
    elif isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    accepted = (
        " or ".join(map(repr, arguments)) if origin is Literal else getattr(kind, "__name__", str(kind))
    )
    raise ValueError(f"{where} is {value!r}; it takes {accepted}")
