"""Vision transformers on their own: timm models and Hugging Face towers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ..reducer import Budget, Reducer, Stage, VisionReducer
from ..report.accounting import vit_block_macs
from ..report.counts import ImageReport, Report
from ..undo import Undo
from . import tower
from .merging import VisionMerging


@dataclass
class Standalone:
    """Merging in a vision transformer without a language model."""

    model: nn.Module
    merging: VisionMerging

    def report(self, reducers: list[str]) -> Report:
        """Patches after each block, and operations of the blocks. Raises RuntimeError before an image."""
        trace = self.merging.trace
        if trace is None:
            raise RuntimeError("no images have run in this session yet")
        left = [count - trace.prefix for count in trace.tokens]
        images = [ImageReport(row, 0, trace.num_tokens - trace.prefix, left) for row in range(trace.batch)]
        config = getattr(self.model, "config", None)
        width = config.hidden_size if config is not None else self.model.embed_dim
        entering = [trace.num_tokens, *trace.tokens[:-1]]
        return Report(
            reducers,
            images,
            flops=2 * trace.batch * sum(vit_block_macs(n, width) for n in entering),
            flops_full=2 * trace.batch * len(entering) * vit_block_macs(trace.num_tokens, width),
        )


def attach(
    model: nn.Module, stages: dict[Stage, Reducer], keep: Callable[[], Budget], undo: Undo
) -> Standalone | None:
    """Merge inside a vision transformer of timm or a tower of transformers; None for any other model.

    Merged tokens leave the model merged. Raises TypeError for reducers of other stages.
    """
    install = _installer(model)
    if install is None:
        return None
    others = [type(reducer).__name__ for stage, reducer in stages.items() if stage is not Stage.VISION]
    if others:
        raise TypeError(
            f"{type(model).__name__} is a vision transformer without a language model; "
            f"{' and '.join(others)} acts elsewhere. Attach ToMe, PiToMe or ZeroTPrune"
        )
    return Standalone(model, install(model, stages[Stage.VISION], keep(), undo))


def _installer(model: nn.Module) -> Callable[[nn.Module, VisionReducer, Budget, Undo], VisionMerging] | None:
    if type(model).__name__ in tower.TOWERS:
        return lambda model, reducer, keep, undo: tower.install(
            model, reducer, undo, keep=keep, unmerge=False
        )
    if type(model).__module__.startswith("timm."):
        from . import timm

        return lambda model, reducer, keep, undo: timm.install(model, reducer, undo, keep=keep)
    return None
