"""Names of tokenizers: family → class, and published checkpoint → configuration, weights and figures."""

from .catalog import Catalog, Entry

__all__ = ["TOKENIZERS", "Entry", "entries", "families", "list_tokenizers", "register", "register_family"]

TOKENIZERS = Catalog("tokenizer", "vistok.models", "`vistok list`", plugins="vistok.tokenizers")
"""The families in `vistok/models`, and those that other packages add by entry points."""

register_family = TOKENIZERS.family
register = TOKENIZERS.register
entries = TOKENIZERS.entries
families = TOKENIZERS.families
unknown_name = TOKENIZERS.unknown_name


def list_tokenizers() -> list[str]:
    """Names that `load` and `create` accept."""
    return list(entries())
