"""The contract between the training loop and every kind of model that it trains."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from .config import OptimizerConfig, RunConfig


class Objective:
    """A model, its data and its losses.

    The loop owns steps, precision, processes, optimisers, averages, checkpoints and the log; everything that
    depends on what is learned is here. `loss` returns named scalars, and the loop minimises their sum with
    the `weights` of the same names; scalars without a weight are only logged.

    A subclass sets in `__init__`, which gets the run's configuration: `model`, whose parameters with
    `requires_grad` train; `weights`; and, where a second network trains against the first, `adversary`, the
    step `adversary_start` from which it does, and its `adversary_optimizer`. The loop replaces `model` and
    `adversary` by their wrappers for several processes before the first step.
    """

    config_class: ClassVar[type[RunConfig]]
    """The configuration of a run (a `RunConfig`) with this objective."""

    loaded_by: ClassVar[str] = ""
    """The call that loads what `export` wrote, with {} for the folder, to show when a run ends."""

    model: nn.Module
    weights: Mapping[str, float]
    adversary: nn.Module | None = None
    adversary_start: int = 0
    adversary_optimizer: OptimizerConfig | None = None

    @classmethod
    def check(cls, config: Any) -> None:
        """Raise ValueError for settings that would fail late in a run, or have no effect on it."""

    @classmethod
    def without_effect(cls, values: Mapping[str, Any], config: Any) -> Iterator[str]:
        """Yield one sentence per setting in a file's `values` that does not change the run."""
        return iter(())

    def batches(self, start: int, rank: int, world_size: int) -> Iterator[Any]:
        """Endless batches of one process from the `start`-th on, each a function of its number alone.

        They are tensors or mappings of names to tensors, which the loop moves to the device; the iterator is
        closed when the run ends.
        """
        raise NotImplementedError

    def prepare(self) -> None:
        """Do once, before the first step of a new run, what needs no gradients (fits in closed form)."""

    def loss(self, batch: Any, step: int) -> dict[str, Tensor]:
        """Named scalars of one batch at a step (from 0), with gradients where they have a weight."""
        raise NotImplementedError

    def adversary_loss(self, batch: Any) -> Tensor:
        """The loss of the adversary on the batch of the last `loss`, a scalar."""
        raise NotImplementedError(f"{type(self).__name__} has an adversary and no adversary_loss")

    def extra_figures(self, batch: Any) -> dict[str, Tensor]:
        """Further scalars for the log, computed only at steps that are logged, without gradients."""
        return {}

    def fresh(self) -> nn.Module:
        """A model of the same shape, to be filled with averaged weights."""
        return copy.deepcopy(self.model)

    def validate(self, model: nn.Module, picture: Path) -> dict[str, float]:
        """Figures of the averaged `model` in eval mode on data that does not train, for the log; may write a
        sheet of samples to `picture`."""
        return {}

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write the finished model, averaged and in eval mode, as its users load it."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint must hold beside model and optimisers."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned; an error of any kind where it does not fit."""
        if state:
            raise ValueError(f"the checkpoint holds {', '.join(state)}, which this objective does not have")
