"""Names of generators: family → class, and published checkpoint → configuration, weights and figures."""

from ..catalog import Catalog

GENERATORS = Catalog(
    "generator", "vistok.generate", "`vistok.generate.list_generators()`", plugins="vistok.generators"
)
"""The families in `vistok/generate`, and those that other packages add by entry points."""
