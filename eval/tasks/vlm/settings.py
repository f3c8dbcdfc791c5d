"""The settings that are compared: the full model, reducers at budgets, and the baselines."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from ....compress.reducer import LayerReducer, Reducer, Stage
from ....compress.registry import comparable_reducers, reducer_class, reducers

POSITIONS = ("keep", "compact", "paper")
BASELINES = ("random", "uniformgrid", "downsample")
"""Reducers that are always among the settings."""
DOWNSAMPLING = ("downsample", "native")
"""Settings whose tokens show a smaller picture."""


@dataclass(frozen=True)
class Setting:
    """One way to answer: "full" is the stock model, "native" the processor's own budget, and "reducers" has
    names with their budgets, shares of the visual tokens in (0, 1] or None for the method's own number.

    `keep` is the budget of "native", and the smallest of several reducers'. `layers` is the number of layers
    that published schedules are fitted to, where the model has too few for them; None: they stay.
    """

    kind: Literal["full", "native", "reducers"]
    keep: float = 1.0
    reducers: tuple[tuple[str, float | None], ...] = ()
    positions: str = "keep"
    layers: int | None = None

    @property
    def name(self) -> str:
        """The name without its budget, where it has one budget."""
        if self.kind == "full":
            return "full model"
        if self.kind == "native":
            return "native"
        if len(self.reducers) == 1:
            return self.reducers[0][0]
        return " + ".join(name if keep is None else f"{name} {keep:g}" for name, keep in self.reducers)

    @property
    def label(self) -> str:
        """A name that no other setting has."""
        if self.kind == "full":
            return self.name
        budget = "" if len(self.reducers) > 1 else f" {self.keep:g}"
        return f"{self.name}{budget}" + (f", {self.positions}" if self.positions != "keep" else "")

    @property
    def baseline(self) -> bool:
        """Whether it is one of the baselines."""
        return self.kind == "native" or (len(self.reducers) == 1 and self.reducers[0][0] in BASELINES)

    @property
    def python(self) -> str:
        """The line that attaches the reducers; empty for other kinds."""
        if self.kind != "reducers":
            return ""
        positions = "" if self.positions == "keep" else f', positions="{self.positions}"'
        written = [_written(each) for each in self._instances]
        if len(written) > 1:
            return f"compress.attach(model, [{', '.join(written)}]{positions})"
        name = self.reducers[0][0]
        reducer = f'"{name}"' if written[0].endswith("()") else written[0]
        return f"compress.attach(model, {reducer}, keep={self.keep!r}{positions})"

    def arguments(self) -> dict[str, Any]:
        """The arguments of `compress.attach` after the model."""
        positions = {"positions": self.positions}
        if len(self.reducers) == 1:
            return {"reducer": self._instances[0], "keep": self.keep, **positions}
        return {"reducer": self._instances, **positions}

    @property
    def _instances(self) -> list[Reducer]:
        """The reducers, several with their own budgets; those inside the language model fit its depth."""
        several = len(self.reducers) > 1
        instances = [reducer_class(name)(**{"keep": keep} if several else {}) for name, keep in self.reducers]
        return [
            each.fitted(self.layers) if self.layers and isinstance(each, LayerReducer) else each
            for each in instances
        ]


def _written(reducer: Reducer) -> str:
    """The call that makes a reducer, with the fields that are not the method's own."""
    own = type(reducer)()
    values = {each.name: getattr(reducer, each.name) for each in fields(reducer) if each.init}
    changed = [f"{name}={value!r}" for name, value in values.items() if value != getattr(own, name)]
    return f"compress.{type(reducer).__name__}({', '.join(changed)})"


FULL = Setting("full")


def checked_names(names: Sequence[str] | None) -> list[str]:
    """The names of reducers as the registry spells them, once each; for None all that a budget alone steers.
    Raises ValueError for unknown ones and for an empty list."""
    if names is None:
        return comparable_reducers()
    if not names:
        raise ValueError(f"no reducer was named; there are {', '.join(reducers())}")
    classes = {kind: name for name, kind in reducers().items()}
    return list(dict.fromkeys(classes[reducer_class(name)] for name in names))


def composition(text: str) -> tuple[tuple[str, float | None], ...]:
    """Reducers that act together, from "pixelprune+tome:0.5+divprune:0.25": names with their budgets, or
    alone where a method decides its own number. Raises ValueError for other text, unknown names, budgets
    outside (0, 1] and where none is given."""
    parts: list[tuple[str, float | None]] = []
    for part in text.split("+"):
        name, colon, budget = part.strip().partition(":")
        try:
            keep = float(budget) if colon else None
        except ValueError:
            keep = 0.0
        if not name or (keep is not None and not 0 < keep <= 1):
            raise ValueError(
                f"{part.strip()!r} of {text!r} is not a reducer with its budget; reducers that act together "
                "are written as tome:0.5+divprune:0.25, with shares in (0, 1]"
            )
        parts.append((checked_names([name])[0], keep))
    if all(keep is None for _, keep in parts):
        raise ValueError(f"{text!r} has no budget; write one behind a reducer, as tome+divprune:0.25")
    return tuple(parts)


def plan(
    names: Sequence[str] | None,
    keeps: Sequence[float],
    positions: Sequence[str],
    *,
    native: bool,
    layers: int | None = None,
) -> list[Setting]:
    """The full model, then per budget (the largest first) the baselines and the named reducers, and at last
    the compositions among the names (see `composition`), which have budgets of their own.

    Reducers inside the language model run at one of several `positions`, which are about what enters it.
    `native` adds the processor's own budget; `layers` is the depth of the language model. Raises ValueError
    for unknown reducers, budgets outside (0, 1] and unknown positions.
    """
    if bad := [each for each in positions if each not in POSITIONS]:
        raise ValueError(f"positions is {bad[0]!r}; it takes {', '.join(POSITIONS)}")
    if not positions:
        raise ValueError(f"no positions were named; they are {', '.join(POSITIONS)}")
    if not keeps or not all(0 < keep <= 1 for keep in keeps):
        raise ValueError(f"keep is {', '.join(map(str, keeps)) or 'empty'}; it takes shares in (0, 1]")
    together = [name for name in names or () if "+" in name or ":" in name]
    alone = [name for name in names or () if name not in together]
    single = [] if together and not alone else checked_names(None if names is None else alone)
    ordered = list(dict.fromkeys([*BASELINES, *single]))
    settings = [FULL]
    for keep in sorted(set(keeps), reverse=True):
        if native and keep < 1:
            settings.append(Setting("native", keep))
        for name in ordered:
            inside = reducer_class(name).stage in (Stage.LAYER, Stage.CACHE)
            policies = dict.fromkeys(positions[:1] if inside else positions)
            settings += [Setting("reducers", keep, ((name, keep),), policy, layers) for policy in policies]
    for parts in dict.fromkeys(composition(text) for text in together):
        least = min(keep for _, keep in parts if keep is not None)
        settings.append(Setting("reducers", least, parts, "keep", layers))
    return settings
