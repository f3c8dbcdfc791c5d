"""What the training loop can learn, one file per kind; the class of a run is that of its configuration."""

from typing import Any

from ..objective import Objective
from .tokenizer import TokenizerObjective

OBJECTIVES: tuple[type[Objective], ...] = (TokenizerObjective,)


def objective_class(config: Any) -> type[Objective]:
    """The objective of a run with this configuration. Raises TypeError for other configurations."""
    for kind in OBJECTIVES:
        if type(config) is kind.config_class:
            return kind
    known = ", ".join(kind.config_class.__name__ for kind in OBJECTIVES)
    raise TypeError(f"a {type(config).__name__} is not the configuration of a run; give one of {known}")
