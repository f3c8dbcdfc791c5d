"""The objectives of the training loop, one file per kind of model, and those of other packages."""

from functools import cache

from ...plugins import modules_of, plugins, skip_plugin
from ..config import RunConfig
from ..objective import Objective


@cache
def objectives() -> dict[str, type[Objective]]:
    """Name → class: a file of this folder, or an entry point of the group `vistok.objectives`."""
    classes = {}
    for module in modules_of(__name__):
        for value in vars(module).values():
            if (
                isinstance(value, type)
                and value.__module__ == module.__name__
                and issubclass(value, Objective)
            ):
                classes[module.__name__.rpartition(".")[2]] = value
    for name, value in plugins("vistok.objectives").items():
        if not (isinstance(value, type) and issubclass(value, Objective)) or name in classes:
            skip_plugin("vistok.objectives", name, f"{value!r} is not a new subclass of Objective")
        else:
            classes[name] = value
    return classes


def objective_class(config: RunConfig) -> type[Objective]:
    """The objective of a run with this configuration. Raises TypeError for other configurations."""
    kinds = {kind.config_class: kind for kind in objectives().values()}
    if type(config) not in kinds:
        known = ", ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"a {type(config).__name__} is not the configuration of a run; give one of {known}")
    return kinds[type(config)]
