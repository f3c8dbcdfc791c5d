"""Keeps what modules took and returned."""

from torch import Tensor, nn


class Recorder:
    """The first argument (`inputs`) and the result (`outputs`) of the last call of each module, in their
    order."""

    def __init__(self, *modules: nn.Module) -> None:
        self.inputs: list[Tensor] = [None] * len(modules)
        self.outputs: list[Tensor] = [None] * len(modules)
        for number, module in enumerate(modules):
            module.register_forward_hook(lambda m, i, out, number=number: self._keep(number, i[0], out))

    def _keep(self, number: int, taken: Tensor, result: Tensor) -> None:
        self.inputs[number], self.outputs[number] = taken, result
