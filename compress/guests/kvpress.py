"""Presses of kvpress on visual tokens: a press ranks, and the session evicts, as with any cache reducer.

kvpress is not imported: a press is recognised by its methods.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..reducer import CachedPrompt, CacheReducer, CacheTokens, Reducer

_INTERFACE = ("compress", "forward_hook", "post_init_from_model")
_OWNERS = {"compress": "ScorerPress", "forward_hook": "BasePress", "__call__": "BasePress"}


def is_press(value: object) -> bool:
    """Whether a value has the methods of a press of kvpress."""
    if isinstance(value, Reducer | nn.Module | type):
        return False
    return all(callable(getattr(value, name, None)) for name in _INTERFACE)


@dataclass(kw_only=True)
class Press(CacheReducer):
    """A press of kvpress that scores tokens, for visual tokens: those with the highest scores stay.

    `attach` takes a press as it is; this class is for the settings. `keep` sets how many stay, else the
    press's `compression_ratio` does. The press gets one whole prompt at a time (its states, keys, values and
    rotations, without padding), and its scores of the visual tokens count; with `span_only` it gets the
    visual tokens alone. Scores are averaged over the key heads of a layer, or with `per_head` every head
    keeps tokens of its own, as in kvpress. The images of a prompt have a budget each, unless `per_image` is
    False.

    Raises TypeError for what is not a press and for presses that do more than score: those with a choice or
    hooks of their own (budgets per head or layer, chunks, merging, channels, decoding), and those that read
    whole attention maps.
    """

    summary: ClassVar = "a press of kvpress"
    wants_prompt: ClassVar = True

    press: Any
    span_only: bool = False
    per_head: bool = False
    per_image: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self.press).__name__
        if not is_press(self.press):
            raise TypeError(
                f"press is {self.press!r}; it takes an instance of a press of kvpress, such as KnormPress()"
            )
        reason = _reason_against(self.press)
        if reason is not None:
            raise TypeError(
                f"{name} cannot act on visual tokens alone: {reason}. Presses that override "
                "ScorerPress.score and nothing else can"
            )

    def prepare(self, model: nn.Module) -> None:
        """Let the press read the model's configuration. Raises ValueError when it cannot."""
        try:
            self.press.post_init_from_model(model)
        except Exception as error:
            raise ValueError(
                f"{type(self.press).__name__} cannot read what it needs of {type(model).__name__}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def default_count(self, tokens: int) -> int:
        """What the press's compression ratio leaves, at least 1."""
        return max(1, int(tokens * (1 - self.press.compression_ratio)))

    def rank(self, tokens: CacheTokens) -> Tensor:
        """The press's scores of the visual tokens, [N], or [H_k, N] with `per_head`.

        Raises ValueError when the press fails, and for scores that are not numbers or of another shape.
        """
        prompt, name = tokens.prompt, type(self.press).__name__
        if self.span_only:
            prompt = _span_of(prompt)
        length = prompt.keys.shape[2]
        evicted = len(prompt.places) - tokens.count
        try:
            with _ratio(self.press, evicted / length), _rotary(prompt):
                scores = self.press.score(
                    prompt.module, prompt.hidden, prompt.keys, prompt.values, None, _arguments(prompt)
                )
        except Exception as error:
            raise ValueError(
                f"{name} could not score the {length} tokens of a prompt in layer {tokens.layer}: "
                f"{type(error).__name__}: {error}"
            ) from error
        expected = prompt.keys.shape[:3]
        if not isinstance(scores, Tensor) or scores.shape != expected:
            shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"{name} returned scores of shape {shape} in layer {tokens.layer}; a press returns one "
                f"per key head and token, {tuple(expected)}"
            )
        scores = scores[0, :, prompt.places].float()
        if bool(scores.isnan().any()):
            raise ValueError(
                f"{name} returned scores that are not numbers (NaN) in layer {tokens.layer}, so no choice "
                "means anything; check its settings and the model's precision"
            )
        return scores if self.per_head else scores.mean(0)


def _reason_against(press: Any) -> str | None:
    """Why a press cannot be restricted to visual tokens; None: it can."""
    kinds = type(press).__mro__
    if not callable(getattr(press, "score", None)):
        inside = getattr(press, "press", None) or getattr(press, "base_press", None)
        hint = f"; give the {type(inside).__name__} inside it" if is_press(inside) else ""
        return f"it has no score per token{hint}"
    if any(kind.__name__ == "ObservedAttentionPress" for kind in kinds):
        return "it reads whole attention maps, which fused kernels do not return; use the reducer h2o"
    for method, owner in _OWNERS.items():
        kind = next((kind for kind in kinds if method in vars(kind)), None)
        if kind is not None and kind.__name__ != owner:
            return (
                f"{kind.__name__}.{method} is its own, and a score does not carry what it does (such as "
                "budgets per layer or head, chunks, merging, or steps of decoding)"
            )
    return None


def _span_of(prompt: CachedPrompt) -> CachedPrompt:
    """The visual tokens as if they were the whole prompt."""
    places = prompt.places
    embeddings = prompt.position_embeddings
    if isinstance(embeddings, tuple | list):
        embeddings = tuple(part[..., places.to(part.device), :] for part in embeddings)
    return CachedPrompt(
        module=prompt.module,
        lm=prompt.lm,
        hidden=prompt.hidden[:, places],
        keys=prompt.keys[:, :, places],
        values=prompt.values[:, :, places],
        position_embeddings=embeddings,
        places=torch.arange(len(places), device=places.device),
    )


class _Arguments(dict[str, Any]):
    """What the attention module was called with; reading rotations in several planes is an error."""

    def __getitem__(self, name: str) -> Any:
        self._check(name)
        return super().__getitem__(name)

    def _check(self, name: str) -> None:
        if name == "position_embeddings" and _in_planes(super().get(name)):
            raise ValueError(_PLANES)

    def get(self, name: str, default: Any = None) -> Any:
        """The argument of a name, checked as `[name]` does."""
        self._check(name)
        return super().get(name, default)


_PLANES = (
    "this model rotates by positions in several planes (M-RoPE), which presses do not know; use a press that "
    "reads keys and values alone"
)


def _arguments(prompt: CachedPrompt) -> dict[str, Any]:
    return _Arguments(hidden_states=prompt.hidden, position_embeddings=prompt.position_embeddings)


def _in_planes(embeddings: Any) -> bool:
    return isinstance(embeddings, tuple | list) and any(part.ndim > 3 for part in embeddings)


def _refused(*_: Any, **__: Any) -> Any:
    raise ValueError(_PLANES)


@contextmanager
def _rotary(prompt: CachedPrompt) -> Iterator[None]:
    """While inside, the attention module has the model's `rotary_emb`, as presses expect."""
    attributes = vars(prompt.module)
    rotary = getattr(prompt.lm, "rotary_emb", None)
    if hasattr(prompt.module, "rotary_emb") or rotary is None:
        yield
        return
    replacement: Callable[..., Any] = _refused if _in_planes(prompt.position_embeddings) else rotary
    try:
        attributes["rotary_emb"] = replacement
        yield
    finally:
        attributes.pop("rotary_emb", None)


@contextmanager
def _ratio(press: Any, evicted: float) -> Iterator[None]:
    """While inside, the press compresses by the share that is to be `evicted`."""
    before = press.compression_ratio
    try:
        press.compression_ratio = evicted
        yield
    finally:
        press.compression_ratio = before
