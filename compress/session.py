"""Attach reducers to a model, and report what they kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from .chain import by_stage
from .earlier import EarlierCalls
from .families import Host, resolve
from .guests.kvpress import Press, is_press
from .language import cutpoints
from .language.call import Call
from .language.hooks import ModelHooks, Settings
from .language.prepare import Prepared
from .language.prompt_end import PromptLength
from .reducer import (
    Budget,
    FeatureReducer,
    PixelReducer,
    Positions,
    ProcessorReducer,
    Reducer,
    Stage,
    fraction_or_count,
    keeps_everything,
)
from .registry import reducer_by_name
from .report.counts import Report, count
from .report.explain import Explanation, explain
from .undo import InModel, Undo
from .video_budget import VideoBudget, with_video_budget
from .vision import standalone
from .vision.merging import VisionMerging

# Weak references: only the hooks in a core keep its session alive.
_ATTACHED: WeakKeyDictionary[nn.Module, ReferenceType[Session]] = WeakKeyDictionary()


def attach(
    model: nn.Module,
    reducer: Reducer | str | Any | list[Reducer | str | Any],
    *,
    keep: Budget = None,
    positions: Positions = "keep",
    video_budget: VideoBudget = "clip",
) -> Session:
    """Make a stock model use fewer visual tokens, until `detach` (or the end of a `with` block).

    `model` is a transformers VLM; a vision transformer alone (timm's VisionTransformer, Eva and Beit, or a
    CLIP, SigLIP, DINOv2 or DINOv3 tower of transformers) takes the reducers of its tokens.
    `reducer` is a name (`list_reducers()`), an instance, a press of kvpress (its settings are those of
    `compress.guests.kvpress.Press`), or a list of these; those of one stage act in the order given. `keep` is
    the budget of every stage: a fraction in (0, 1] of an image's tokens, a count of tokens per image, or a
    function of the image that returns either; without it each method uses its own.
    Of several reducers at one stage it is the budget of the last; the others use their own, unless it is 1.0,
    which keeps everything. How many patches a reducer of pixels drops depends on the picture: a budget is for
    those beside it, and one of features counts the tokens that the image had before. `positions`:
    kept tokens "keep" their position ids, are renumbered ("compact"), stand at evenly spaced positions within
    the extent that their image had ("spread": along the sequence, or over rows and columns where positions
    have several planes; text keeps its own), or as the paper of each method does ("paper").
    `video_budget`: reducers of features take the frames of a video as one image, whose budget is for the
    whole "clip", or each "frame" as an image with that budget of its own (a fraction of a frame's tokens, a
    count per frame), or frames with shares of the clip's budget by their relevance to the question (`QuoTA`).
    Where videos enter as pictures (InternVL), `Session.media_sizes` states which pictures are frames of one.

    Weights and sources of the model stay as they are, and after `detach` its outputs are bit-identical.
    Logits and the last hidden state are returned at the length of the whole prompt, with zeros for dropped
    tokens; `hidden_states` and `attentions` of single layers hold the tokens that are left there. Calls that
    began in other threads before this one continue without the reducer.
    Raises TypeError for models that cannot host a reducer and ValueError for a model with a session already.
    """
    if positions not in get_args(Positions):
        raise ValueError(f'positions is {positions!r}; it takes "keep", "compact", "spread" or "paper"')
    items = reducer if isinstance(reducer, list | tuple) else [reducer]
    reducers = [reducer_by_name(item) if isinstance(item, str) else item for item in items]
    reducers = [Press(press=item) if is_press(item) else item for item in reducers]
    if not reducers:
        raise ValueError("no reducer was given; see list_reducers() for names")
    for item in reducers:
        if not isinstance(item, Reducer):
            raise TypeError(
                f"{item!r} is not a reducer; give a name from list_reducers(), an instance, or a press of "
                "kvpress"
            )
    stages = with_video_budget(by_stage(reducers), video_budget)
    if not isinstance(model, nn.Module):
        inner = isinstance(getattr(model, "model", None), nn.Module)  # as in a pipeline
        hint = f": its .model, a {type(model.model).__name__}" if inner else ""
        raise TypeError(
            f"model is a {type(model).__name__}; give a transformers VLM or a vision "
            f"transformer of timm or transformers{hint}"
        )
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            f"model is a compiled {type(model._orig_mod).__name__}, in which new hooks do not run; attach to "
            "the model first and compile it then, or use session.prepare(inputs)"
        )
    model = unwrapped(model)
    session = Session(model, reducers, stages, keep, positions)
    try:
        session._attach()
        return session
    except BaseException:
        session.detach()
        raise


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a PEFT wrapper."""
    base = getattr(model, "get_base_model", None)
    return model if base is None else base()


def _has_budget(reducer: Reducer) -> bool:
    return not isinstance(reducer, PixelReducer)


def _anchor(model: nn.Module) -> nn.Module:
    """The module that a model and its parts share, whichever of them is passed."""
    return getattr(model, "base_model", model)


def attached_session(model: nn.Module) -> Session | None:
    """The session that is attached to a model, if there is one."""
    reference = _ATTACHED.get(_anchor(model))
    return None if reference is None else reference()


class Session(InModel):
    """Reducers at work in a model. Use as a context manager, or call `detach`."""

    def __init__(
        self,
        model: nn.Module,
        reducers: list[Reducer],
        stages: dict[Stage, list[Reducer]],
        keep: Budget,
        positions: Positions,
    ) -> None:
        self.model, self.reducers = model, reducers
        self.host: Host | None = None
        self.merging: VisionMerging | None = None
        self._elsewhere: Any = None
        self._hooks: ModelHooks | None = None
        self._stages, self._settings, self._undo = stages, Settings(positions=positions), Undo()
        self._detached = False
        self.keep = keep

    @property
    def keep(self) -> Budget:
        """The budget of later calls; None: each method's own."""
        return self._settings.keep

    @keep.setter
    def keep(self, keep: Budget) -> None:
        if keep is not None and not callable(keep):
            fraction_or_count(keep)
        if keep is not None and not keeps_everything(keep) and not any(map(_has_budget, self.reducers)):
            names = " and ".join(type(reducer).__name__ for reducer in self.reducers)
            raise ValueError(
                f"keep is {keep!r}, and how many patches {names} keeps depends on the pixels; leave keep "
                "out, give 1.0 (everything stays), or attach a reducer with a budget beside it"
            )
        self._settings.keep = keep
        if self.merging is not None:
            self.merging.keep = keep

    @property
    def trace(self) -> dict[str, list[Tensor]] | None:
        """Set to a dictionary to have reducers inside the language model record their scores in it."""
        return self._settings.trace

    @trace.setter
    def trace(self, trace: dict[str, list[Tensor]] | None) -> None:
        self._settings.trace = trace

    @property
    def media_sizes(self) -> Sequence[int] | None:
        """How many pictures of later prompts form each medium, in order, for models whose videos enter as
        pictures, frame by frame (InternVL): 1 for a picture, the number of frames for a video. None: every
        picture stands alone."""
        return None if self.host is None else self.host.media_sizes

    @media_sizes.setter
    def media_sizes(self, sizes: Sequence[int] | None) -> None:
        if self.host is None:
            raise TypeError(f"a {type(self.model).__name__} has no prompts, so no media to size")
        if sizes is not None and not (sizes and all(type(size) is int and size >= 1 for size in sizes)):
            raise ValueError(
                f"media_sizes is {sizes!r}; it takes one whole number per medium, in order: 1 for a picture, "
                "the number of frames for a video, or None"
            )
        self.host.media_sizes = sizes

    @property
    def prompt_length(self) -> PromptLength:
        """How many tokens of `input_ids` are the prompt, for reducers that rank by it: a count, or one per
        row, padding on the left included. None: as `generate`, the labels (-100 up to the answer) or
        `logits_to_keep` state, else everything. Answers that follow the prompt in the same forward do not
        affect what is kept."""
        return self._settings.prompt_length

    @prompt_length.setter
    def prompt_length(self, length: PromptLength) -> None:
        if length is not None:
            try:
                counts = torch.as_tensor(length).reshape(-1)
            except (TypeError, ValueError, RuntimeError):
                counts = torch.empty(0)
            if (
                counts.is_floating_point()
                or counts.dtype == torch.bool
                or not len(counts)
                or counts.min() < 1
            ):
                raise ValueError(
                    f"prompt_length is {length!r}; it takes a number of tokens from 1, one per row, or None"
                )
        self._settings.prompt_length = length

    def __enter__(self) -> Session:
        if self._detached:
            raise RuntimeError("this session has been detached and does nothing any more; attach again")
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Remove everything from the model. A second call does nothing.

        Caches made while attached cannot be continued afterwards: they raise when they are.
        """
        self._detached = True
        if self._hooks is not None:
            self._hooks.lease.runs = False
        self._undo.run()
        if self._hooks is not None:
            self._hooks.leave()

    # Reports -----------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """Tokens kept, computation and cache spared by the last prompt with images. Raises RuntimeError
        before one."""
        names = [type(reducer).__name__ for reducer in self.reducers]
        if self._elsewhere is not None:
            return self._elsewhere.report(names)
        return count(self.host, self._call(), names)

    def explain(self, layer: int = -1, *, cache: bool = False) -> list[Explanation]:
        """Which tokens of each image of the last prompt reached a layer (the last one by default), or stayed
        in its cache, and the part of the picture that each shows. Raises RuntimeError before a prompt with
        images."""
        call = self._call()
        count = len(call.layouts)
        if isinstance(layer, bool) or not isinstance(layer, int) or not -count <= layer < count:
            raise ValueError(f"layer is {layer!r}; the model has layers 0 to {count - 1} (-1 is the last)")
        return explain(call, layer, cache)

    def overlay(self, image: Any, *, index: int = 0, layer: int = -1) -> Any:
        """The picture with the patches of kept tokens bright and the others dimmed, as a PIL image.

        `image` is what `vistok.images.load_image` takes (path, PIL, array), the `index`-th image of the last
        prompt, as the tower gets it: families that crop show the crop. Raises ValueError where the layout of
        its tokens is not known.
        """
        explanations = self.explain(layer)
        if not 0 <= index < len(explanations):
            raise ValueError(f"index is {index}; the last prompt held {len(explanations)} images")
        return explanations[index].overlay(image)

    def prepare(self, inputs: Mapping[str, Any]) -> Prepared:
        """The inputs without the tokens that the reducer drops, for `model.generate(**prepared.inputs)`: no
        hook acts on the language model, so static caches, compiled models and chunked prefill work.

        See `Prepared`. Raises NotImplementedError for reducers that act inside the language model.
        """
        if self._hooks is None:
            raise NotImplementedError(
                "inputs can be prepared for vision-language models with placeholder tokens only"
            )
        return self._hooks.prepare(inputs)

    def _call(self) -> Call:
        if self._elsewhere is not None:
            raise NotImplementedError(
                f"tokens of a {type(self.model).__name__} are not traced to the picture; see report()"
            )
        if self._hooks is None or self._hooks.last is None:
            raise RuntimeError("no prompt with images has run in this session yet")
        return self._hooks.last

    # Attaching ----------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        self._register()
        first = {stage: reducers[0] for stage, reducers in self._stages.items()}
        budget = self._settings.budget(next(iter(first.values())))
        for place in (standalone, cutpoints):
            self._elsewhere = place.attach(self.model, first, budget, self._undo)
            if self._elsewhere is not None:
                if self._settings.positions == "spread":
                    raise ValueError(
                        'positions="spread" is for visual tokens in a prompt, of which '
                        f"{type(self.model).__name__} has none; attach with positions='keep'"
                    )
                self.merging = getattr(self._elsewhere, "merging", None)
                if self.merging is not None:
                    self.merging.earlier = EarlierCalls([self.model])
                return
        self.host = resolve(self.model)
        readers = (r for r in self.reducers if isinstance(r, FeatureReducer) and r.reads_frames)
        self.host.frame_reader = next((type(reducer).__name__ for reducer in readers), None)
        self._hooks = ModelHooks(self.model, self.host, self._stages, self._settings)
        self._hooks.attach(self._undo)
        self.merging = self._hooks.merging
        for reducer in self._stages.get(Stage.PIXELS, ()):
            if isinstance(reducer, ProcessorReducer):
                reducer.install(self.model, self._settings.budget(reducer), self._undo)

    def _register(self) -> None:
        """Note that the model has a session. Raises ValueError when it has another one."""
        anchor = _anchor(self.model)

        def forget() -> None:
            if attached_session(self.model) is self:
                del _ATTACHED[anchor]

        self._undo.step(forget)
        # One operation and no lock, which an interrupt could leave taken.
        known, mine = None, ref(self)
        while known is not mine:
            known = _ATTACHED.setdefault(anchor, mine)
            other = known()
            if other is None:  # garbage-collected without being detached
                _ATTACHED.pop(anchor, None)
            elif other is not self:
                raise ValueError(
                    f"this {type(self.model).__name__} already has a session with "
                    f"{', '.join(type(r).__name__ for r in other.reducers)}; detach it first, change "
                    "session.keep between calls, or attach one list of reducers"
                )
