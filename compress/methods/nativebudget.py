"""The processor's own limit of pixels, tiles or tokens per picture, as a reducer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from ..native_budget import BudgetedProcessor, ProcessorSetting, check_native_budget
from ..reducer import Budget, ProcessorReducer
from ..undo import Undo


@dataclass(kw_only=True)
class NativeBudget(ProcessorReducer):
    """Makes the processor prepare pictures with at most a share of their visual tokens, while attached.

        with compress.attach(model, compress.NativeBudget(processor=processor), keep=0.25):
            inputs = processor(text=..., images=..., return_tensors="pt")
            model.generate(**inputs)

    `keep` is a share of the tokens that the pictures of a call have otherwise, or a count per picture. Every
    call of the `processor` chooses, for the sizes of its pictures, the setting with the most tokens within
    that budget, or the one with the fewest where none fits: Qwen-VL's most pixels, the tiles of InternVL and
    LLaVA-NeXT, the longest edge of Idefics3, Gemma 4's tokens. `setting` is the last one: its `text`, the
    `tokens` that the pictures got, and whether they are within the budget (`fits`). Inputs must be made while
    attached and run before those of the next call are made; inputs made before stay as they are. Videos stay
    whole.

    Raises ValueError without a processor or a budget, for a budget that is a function, and for families whose
    processor has no such setting.
    """

    summary: ClassVar = "the processor's own limit of pixels, tiles or tokens"

    processor: Any = None
    setting: ProcessorSetting | None = field(init=False, default=None, compare=False)

    def install(self, model: nn.Module, keep: Callable[[], Budget], undo: Undo) -> None:
        """Let every call of the processor choose a setting, until `undo`."""
        if not hasattr(self.processor, "image_processor"):
            raise ValueError(
                f"processor is a {type(self.processor).__name__}, and NativeBudget acts on the processor of "
                "the model, before the prompt is made; give it: compress.NativeBudget(processor=processor)"
            )
        check_native_budget(model)

        def budget() -> float | int:
            value = keep()
            if value is None or callable(value):
                raise ValueError(
                    f"keep is {value!r}; NativeBudget takes a share in (0, 1] of the visual tokens, or a "
                    "count per picture"
                )
            return value

        def chosen(setting: ProcessorSetting) -> None:
            self.setting = setting

        budget()
        BudgetedProcessor(model, self.processor, budget, chosen).attach(undo)
