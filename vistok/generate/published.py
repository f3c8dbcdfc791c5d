"""Configurations of generators in the nested form that the 1d-tokenizer repository writes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..models.ranges import require_between, require_depths, require_multiple, require_sizes
from ..nested_config import resolved, section


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The fields of `model.generator` that all generators have, the codebook's size, and the name of the
    tokenizer. Raises ValueError for sizes and shares out of range."""

    tokenizer: str | None = None
    codebook_size: int
    image_seq_len: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    condition_num_classes: int = 1000
    dropout: float = 0.1
    attn_drop: float = 0.1
    class_label_dropout: float = 0.1

    def __post_init__(self) -> None:
        require_sizes(self, "codebook_size", "image_seq_len", "hidden_size", "num_attention_heads")
        require_sizes(self, "intermediate_size", "condition_num_classes")
        require_depths(self, "num_hidden_layers")
        require_multiple(self, "hidden_size", "num_attention_heads")
        require_between(self, ["dropout", "attn_drop", "class_label_dropout"], 0, 1)


def generator_fields(config_class: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `config_class` that a nested configuration states; its other keys are left out.

    `model.generator` has them under the same names, but for the codebook's size, which is that of
    `model.vq_model`. Raises ValueError for one without a generator.
    """
    model = section(values, "model")
    generator = model.get("generator")
    if not isinstance(generator, Mapping):
        raise ValueError(
            f"the configuration's model has {sorted(model)}; that of a generator has a mapping generator"
        )
    known = {field.name for field in dataclasses.fields(config_class)}
    fields = {name: value for name, value in generator.items() if name in known}
    if "codebook_size" in (tokenizer := section(model, "vq_model")):
        fields["codebook_size"] = tokenizer["codebook_size"]
    return {name: resolved(value, values, name) for name, value in fields.items()}


def require_settings(config: Any, *names: str) -> None:
    """Raise ValueError unless each named setting that the configuration states is 0 or more."""
    require_between(config, [name for name in names if getattr(config, name) is not None], 0, 1e6)
