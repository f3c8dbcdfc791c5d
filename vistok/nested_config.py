"""Read the nested configuration of the 1d-tokenizer repository: `model.vq_model`, `model.generator`, …"""

from collections.abc import Mapping
from typing import Any

from .configuration import shorten


def section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of a nested configuration, empty where it is missing; ValueError if it is not a mapping."""
    part = values.get(name) or {}
    if not isinstance(part, Mapping):
        raise ValueError(f"the configuration's {name} is {shorten(part)}; it takes a mapping")
    return part


def resolved(value: Any, root: Mapping[str, Any], name: str) -> Any:
    """The value that an interpolation "${model.vq_model.num_latent_tokens}" points to; others as they are.

    Raises ValueError, naming `name`, for one that leads nowhere or to itself.
    """
    references = set()
    while isinstance(value, str) and value.startswith("${") and value.endswith("}"):
        node: Any = root
        for part in value[2:-1].split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        if node is None or value in references:
            raise ValueError(
                f"{name} is {value!r}, which does not lead to a value in this configuration; write the value"
            )
        references.add(value)
        value = node
    return value
