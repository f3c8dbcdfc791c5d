"""Changes to a model that can be undone, whenever an interrupt comes."""

from collections.abc import Callable
from typing import Any

from torch import nn

_MISSING = object()


class Undo:
    """The steps that restore a model. Each is noted before the change it undoes, so an
    exception between the two leaves nothing behind; steps do nothing where their change is not there."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], Any]] = []

    def step(self, action: Callable[[], Any]) -> None:
        """Make `run` call `action`, the latest first."""
        self._steps.append(action)

    def attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Give `module` an instance attribute; `run` restores what was there, unless someone has set
        another value since."""
        attributes = vars(module)
        before = attributes.get(name, _MISSING)

        def restore() -> None:
            if attributes.get(name, _MISSING) is value:
                if before is _MISSING:
                    del attributes[name]
                else:
                    attributes[name] = before

        self.step(restore)
        attributes[name] = value

    def pre_hook(
        self, module: nn.Module, hook: Callable[..., Any], *, with_kwargs: bool = True, prepend: bool = False
    ) -> None:
        """Register a forward pre-hook."""
        kinds = (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
        self.step(lambda: _remove(kinds, hook))
        module.register_forward_pre_hook(hook, with_kwargs=with_kwargs, prepend=prepend)

    def hook(
        self, module: nn.Module, hook: Callable[..., Any], *, with_kwargs: bool = True, always: bool = False
    ) -> None:
        """Register a forward hook; `always`: it also runs when the forward fails."""
        kinds = (
            module._forward_hooks,
            module._forward_hooks_with_kwargs,
            module._forward_hooks_always_called,
        )
        self.step(lambda: _remove(kinds, hook))
        module.register_forward_hook(hook, with_kwargs=with_kwargs, always_call=always)

    def run(self) -> None:
        """Undo all changes. A second call does nothing."""
        while self._steps:
            self._steps[-1]()  # noted until it is done
            self._steps.pop()


def _remove(kinds: tuple[dict[int, Any], ...], hook: Callable[..., Any]) -> None:
    for number in [number for number, registered in kinds[0].items() if registered == hook]:
        for kind in reversed(kinds):  # the first of each kind decides what is left to do
            kind.pop(number, None)


class InModel:
    """Part of a session that a model refers to, so that the model can be neither copied nor pickled: the
    copy could not be detached."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a model with reducers attached cannot be pickled or saved whole: detach first, or save "
            "model.state_dict()"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise TypeError(
            "a model with reducers attached cannot be copied: the copy could not be detached; detach, copy, "
            "and attach again"
        )
