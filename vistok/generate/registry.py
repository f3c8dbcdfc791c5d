"""Names of generators: family → class, and published checkpoint → configuration, weights and figures."""

from ..catalog import Catalog

# One module per family; `vistok.generate.<module>` registers its class and rows when imported. The first
# whose `recognise` knows a checkpoint's keys has it.
FAMILY_MODULES = ("maskgit", "rar")

GENERATORS = Catalog("generator", "vistok.generate", FAMILY_MODULES, "`vistok.generate.list_generators()`")
