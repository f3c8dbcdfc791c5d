"""Vision transformers on their own: timm models and Hugging Face towers."""

from collections.abc import Callable
from typing import Any

from torch import nn

from ..reducer import Budget, Reducer, Stage, VisionReducer
from .merging import VisionMerging


def attach(model: nn.Module, stages: dict[Stage, Reducer], keep: Callable[[], Budget]) -> VisionMerging | None:
    """Merge inside a timm VisionTransformer, a CLIP or a SigLIP tower; None for any other model.

    Merged tokens leave the tower merged. Raises TypeError for reducers of other stages.
    """
    install = _installer(model)
    if install is None:
        return None
    others = [type(reducer).__name__ for stage, reducer in stages.items() if stage is not Stage.VISION]
    if others:
        raise TypeError(
            f"{type(model).__name__} is a vision transformer without a language model; {' and '.join(others)} acts "
            "elsewhere. Attach ToMe or PiToMe"
        )
    reducer = stages[Stage.VISION]
    return install(model, reducer, keep())


def _installer(model: nn.Module) -> Callable[[nn.Module, VisionReducer, Any], VisionMerging] | None:
    from .tower import TOWERS

    if type(model).__name__ in TOWERS:
        from .tower import install as tower_install

        return lambda model, reducer, keep: tower_install(model, reducer, keep=keep, unmerge=False)
    if type(model).__module__.startswith("timm."):
        from .timm import install as timm_install

        return lambda model, reducer, keep: timm_install(model, reducer, keep=keep)
    return None
