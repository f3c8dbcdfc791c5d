"""Attaching reducers to a model, and what an attached session tells."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import change_masks, watch, watched
from .earlier import EarlierCalls, is_running
from .families import Record, resolve
from .hosts import (
    cache_in,
    check_growth,
    entries,
    keywords,
    recomputes,
    release,
    wants_cache,
    window_limit,
)
from .language import cutpoints
from .language.boundary import budget_of, choose, enter, shorten, view
from .language.cache import Lease, state_of
from .language.call import CURRENT, Call, begin, current, finish
from .language.eviction import evict, hide_from_answers
from .language.features_made import MadeFeatures
from .language.layers import LayerCuts
from .language.prepare import Prepared, prepare
from .language.prompt_end import (
    GENERATION,
    Hints,
    PromptLength,
    generating,
    generation_on_stack,
    shape_of_prompts,
)
from .layout import Span, flat
from .reducer import Budget, Positions, Reducer, Stage, fraction_or_count
from .registry import reducer_by_name
from .report.counts import Report, count
from .report.explain import Explanation, explain
from .undo import Undo
from .vision import standalone, tower
from .vision.features import FeatureRecorder, check_groups
from .vision.merging import VisionMerging

# A core knows its session; its hooks keep the session alive, and nothing here does.
_ATTACHED: WeakKeyDictionary[nn.Module, ReferenceType[Session]] = WeakKeyDictionary()


def attach(
    model: nn.Module,
    reducer: Reducer | str | list[Reducer | str],
    *,
    keep: Budget = None,
    positions: Positions = "keep",
) -> Session:
    """Have a stock model spend fewer visual tokens, until `detach` (or the end of a `with` block).

    `model` is a transformers VLM; a timm VisionTransformer or a CLIP or SigLIP tower takes merging reducers.
    `reducer` is a name (`list_reducers()`), an instance, or a list of these, at most one per stage. `keep` is
    the budget of every method: a fraction in (0, 1] of an image's tokens, a count of tokens per image, or a
    function of the image that returns either; without it each method uses its own. `positions`: kept tokens
    "keep" their position ids, are renumbered ("compact"), or as the paper of each method does ("paper").

    Weights and sources of the model stay as they are, and after `detach` its outputs are bit-identical.
    Logits and the last hidden state come back at the length of the whole prompt, with zeros for dropped
    tokens; `hidden_states` and `attentions` of single layers hold the tokens that are left there. Calls that
    began in other threads before this one go on without the reducer.
    Raises TypeError for models that cannot host a reducer and ValueError for a model with a session already.
    """
    if positions not in ("keep", "compact", "paper"):
        raise ValueError(f'positions is {positions!r}; it takes "keep", "compact" or "paper"')
    given = reducer if isinstance(reducer, list | tuple) else [reducer]
    reducers = [reducer_by_name(item) if isinstance(item, str) else item for item in given]
    if not reducers:
        raise ValueError("no reducer was given; see list_reducers() for names")
    stages: dict[Stage, Reducer] = {}
    for item in reducers:
        if not isinstance(item, Reducer):
            raise TypeError(f"{item!r} is not a reducer; give a name from list_reducers() or an instance")
        if item.stage in stages:
            raise ValueError(
                f"{type(stages[item.stage]).__name__} and {type(item).__name__} both act at {item.stage}; "
                "attach one of them, or one a stage"
            )
        stages[item.stage] = item
    if not isinstance(model, nn.Module):
        inner = isinstance(getattr(model, "model", None), nn.Module)  # as in a pipeline
        hint = f": its .model, a {type(model.model).__name__}" if inner else ""
        raise TypeError(
            f"model is a {type(model).__name__}; give a transformers VLM or a timm VisionTransformer{hint}"
        )
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            f"model is a compiled {type(model._orig_mod).__name__}, in which new hooks do not run; attach to "
            "the model first and compile it then, or use session.prepare(inputs)"
        )
    model = _unwrapped(model)
    session = Session(model, stages, keep, positions)
    try:
        session._attach()
        return session
    except BaseException:
        session.detach()
        raise


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a PEFT wrapper."""
    base = getattr(model, "get_base_model", None)
    return model if base is None else base()


def _anchor(model: nn.Module) -> nn.Module:
    """What a model and its parts have in common, however they are given."""
    return getattr(model, "base_model", model)


def _attached(model: nn.Module) -> Session | None:
    found = _ATTACHED.get(_anchor(model))
    return None if found is None else found()


class Session:
    """Reducers at work in a model. Use as a context manager, or call `detach`."""

    def __init__(
        self, model: nn.Module, stages: dict[Stage, Reducer], keep: Budget, positions: Positions
    ) -> None:
        self.model, self.reducers = model, list(stages.values())
        self.trace: dict[str, list[Tensor]] | None = None
        self.host, self._elsewhere = None, None
        self._stages, self._positions = stages, positions
        self._undo, self._lease = Undo(), Lease()
        self._last: Call | None = None
        self._made_features = MadeFeatures([])
        self._hints = threading.local()  # what this thread's call of the whole model says of its prompt
        self._prompt_length: PromptLength = None
        self.merging: VisionMerging | None = None
        self.keep = keep

    @property
    def keep(self) -> Budget:
        """The budget of the calls to come; None: each method's own."""
        return self._keep

    @keep.setter
    def keep(self, keep: Budget) -> None:
        if keep is not None and not callable(keep):
            fraction_or_count(keep)
        self._keep = keep
        if self.merging is not None:
            self.merging.keep = keep

    @property
    def prompt_length(self) -> PromptLength:
        """How many tokens of `input_ids` are the prompt, for reducers that rank by it: a count, or one per
        row, padding on the left included. None: as `generate`, the labels (-100 up to the answer) or
        `logits_to_keep` say, else everything. Answers that follow the prompt in the same forward have no say
        in what is kept."""
        return self._prompt_length

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
        self._prompt_length = length

    def __enter__(self) -> Session:
        if not self._lease.runs:
            raise RuntimeError("this session has been detached and does nothing any more; attach again")
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Take everything out of the model again. Doing so twice is harmless.

        Caches made while attached cannot be continued afterwards: they raise when they are.
        """
        self._lease.runs = False
        self._undo.run()
        if self.host is not None:
            self._leave(current(self.host))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"a {type(self.model).__name__} with reducers attached cannot be pickled or saved whole: detach "
            "first, or save model.state_dict()"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        raise TypeError(
            f"a {type(self.model).__name__} with reducers attached cannot be copied: the copy could not be "
            "detached; detach, copy, and attach again"
        )

    # What happened ------------------------------------------------------------------------------------------

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
        """The picture with the patches of kept tokens lit and the others dimmed, as a PIL image.

        `image` is what `vistok.images.load_image` takes (path, PIL, array), the `index`-th image of the last
        prompt, as the tower saw it: families that crop show the crop. Raises ValueError where the family does
        not tell the layout of its tokens.
        """
        found = self.explain(layer)
        if not 0 <= index < len(found):
            raise ValueError(f"index is {index}; the last prompt held {len(found)} images")
        return found[index].overlay(image)

    def prepare(self, inputs: Mapping[str, Any]) -> Prepared:
        """The inputs without the tokens that the reducer drops, for `model.generate(**prepared.inputs)`: no
        hook acts on the language model, so static caches, compiled models and chunked prefill work.

        See `Prepared`. Raises NotImplementedError for reducers that act inside the language model.
        """
        prepared = prepare(self, inputs)
        self._made_features.add_prepared(prepared.inputs.get("mm_encoder_outputs") or {})
        return prepared

    def _call(self) -> Call:
        if self._elsewhere is not None:
            raise NotImplementedError(
                f"tokens of a {type(self.model).__name__} are not traced to the picture; see report()"
            )
        if self._last is None:
            raise RuntimeError("no prompt with images has run in this session yet")
        return self._last

    # Attaching ----------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        self._register()
        self._earlier = EarlierCalls(())
        for place in (standalone, cutpoints):
            self._elsewhere = place.attach(
                self.model, self._stages, self._budget_of(self.reducers[0]), self._undo
            )
            if self._elsewhere is not None:
                self.merging = getattr(self._elsewhere, "merging", None)
                if self.merging is not None:
                    self.merging.earlier = EarlierCalls([self.model])
                return
        host = self.host = resolve(self.model)
        self._earlier = EarlierCalls([self.model, host.core, host.lm, host.tower])
        vision, features = self._stages.get(Stage.VISION), self._stages.get(Stage.FEATURES)
        layer, cache = self._stages.get(Stage.LAYER), self._stages.get(Stage.CACHE)
        wanted = {} if features is None else features.tower_layers()
        states = None if features is None else features.wants_states()
        if vision is not None and (wanted or states is not None):
            raise ValueError(
                f"{type(features).__name__} reads the tower's attention, which is not that of its patches "
                f"once {type(vision).__name__} merges them; attach one of them, or a method that reads "
                "features alone"
            )
        pixels = features is not None and features.wants_pixels
        self._features = FeatureRecorder(host, wanted, states, self._made, self._earlier, pixels=pixels)
        if vision is not None:
            check_groups(host, vision)
            merging = tower.install(
                host.tower, vision, self._undo, keep=self._keep, depth=self._features.depth
            )
            merging.earlier = self._earlier
            self._features.merging = self.merging = merging
        self._features.attach(self._undo)
        watch_text = cache is not None or (layer is not None and layer.rows is not None)
        watch_tower = bool(wanted) or states is not None
        if watch_text or watch_tower:
            self._watch(text=watch_text, vision=watch_tower)
        self._cuts = None
        if layer is not None or cache is not None:
            self._cuts = LayerCuts(host, layer, self._compact(layer), self._note, cache is not None)
        core, lm, undo = host.core, host.lm, self._undo
        ranked = [r for r in (layer, cache) if r is not None and (r is cache or r.rows is not None)]
        if ranked and self.model is core and not hasattr(core, "generate"):
            raise TypeError(
                f"{type(ranked[0]).__name__} must know where the prompt ends, which a call of the whole "
                f"model says and one of its {type(core).__name__} does not; attach to the whole model"
            )
        if self.model is not core:
            undo.pre_hook(self.model, self._model_before)
            undo.hook(self.model, self._model_after, always=True)
        if hasattr(self.model, "generate"):
            undo.attribute(self.model, "generate", self._generate(self.model.generate))
        undo.pre_hook(core, self._core_before, prepend=True)
        undo.hook(core, self._core_after, always=True)
        undo.pre_hook(lm, self._lm_before)
        undo.hook(lm, self._lm_after)
        if self._cuts is not None:
            self._cuts.attach(undo)

    def _register(self) -> None:
        """Note that the model has a session. Raises ValueError when it has another one."""
        anchor = _anchor(self.model)

        def forget() -> None:
            if _attached(self.model) is self:
                del _ATTACHED[anchor]

        self._undo.step(forget)
        # One operation and no lock, which an interrupt could leave taken.
        known, mine = None, ref(self)
        while known is not mine:
            known = _ATTACHED.setdefault(anchor, mine)
            other = known()
            if other is None:  # forgotten without being detached
                _ATTACHED.pop(anchor, None)
            elif other is not self:
                raise ValueError(
                    f"this {type(self.model).__name__} already has a session with "
                    f"{', '.join(type(r).__name__ for r in other.reducers)}; detach it first, change "
                    "session.keep between calls, or attach one list of reducers"
                )

    def _generate(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """`generate` of the model, with the length of its prompts noted while it runs."""
        model = ref(self.model)

        @wraps(stock)
        def generate(*args: Any, **kwargs: Any) -> Any:
            with generating(model(), shape_of_prompts(args, kwargs)):
                return stock(*args, **kwargs)

        return generate

    def _watch(self, *, text: bool, vision: bool) -> None:
        """Have the attention of the language model or the tower report to probes; the kernels stay."""
        config, names, stock = self.model.config, {}, {}
        for part, module, wanted in (("text", self.host.lm, text), ("vision", self.host.tower, vision)):
            if not wanted:
                continue
            name = next((k for k in config.sub_configs if getattr(config, k, None) is module.config), None)
            if name is None:
                raise TypeError(
                    f"the attention of {type(module).__name__} cannot be observed: its configuration is not "
                    f"one of the model's ({', '.join(config.sub_configs) or 'none'}); use a reducer that "
                    f"reads no {part} attention"
                )
            stock[name] = module.config._attn_implementation
            names[name] = watched(stock[name])

        def restore() -> None:  # what the user has set since stays
            ours = {n: stock[n] for n in names if getattr(config, n)._attn_implementation == names[n]}
            if ours:
                self.model.set_attn_implementation(ours)

        self._undo.step(restore)
        self.model.set_attn_implementation(names)

    def _budget_of(self, reducer: Reducer | None) -> Callable[[], Budget]:
        return lambda: None if reducer is None else reducer.keep if self._keep is None else self._keep

    def _compact(self, reducer: Reducer | None) -> bool:
        if reducer is None:
            return False
        planes = hasattr(self.host.core, "get_rope_index")
        positions = self._positions
        if positions == "paper":
            positions = "keep" if planes else reducer.paper_positions
        if positions == "compact" and planes and reducer.stage is Stage.LAYER:
            raise ValueError(
                f"{self.host.name} has positions in several planes (M-RoPE), where renumbering inside the "
                "layers is not defined; attach with positions='keep'"
            )
        return positions == "compact"

    # Hooks --------------------------------------------------------------------------------------------------

    def _made(self, modality: str, output: Any, record: Record) -> None:
        if getattr(self._hints, "passed_by", False) and is_running(self.host.core):
            raise RuntimeError(
                f"{self.host.name} made {modality} features in a forward that was given none and no pixel "
                f"values that reducers know, so nothing would be dropped; {release()}"
            )
        self._made_features.add(modality, output, record)
        call = current(self.host)
        if call is not None:  # else generate makes features before its first forward
            call.outputs[modality] = output

    def _model_before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = keywords(model, args, kwargs)
        labels, shifted = arguments.get("labels"), arguments.get("shift_labels")
        if labels is None and shifted is not None:
            labels = F.pad(shifted, (1, 0), value=-100)[:, :-1]
        self._hints.of_call = Hints(labels, arguments.get("logits_to_keep", 0))

    def _model_after(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._hints.of_call = None

    def _core_before(self, core: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._earlier.include_this_one():
            return None
        stale = current(self.host)
        if stale is not None:  # an interrupt has left it behind
            self._leave(stale)
        hints, self._hints.of_call = getattr(self._hints, "of_call", None), None
        generation = GENERATION.get()
        if generation is None or generation.model is not self.model:
            generation = generation_on_stack(self.model)
        call, arguments = begin(self.host, args, kwargs, self._made_features, generation)
        self._hints.passed_by = not call.prefill
        if not call.prefill and call.state is None:
            return None
        call.hints, call.prompt_length = hints or Hints(), self._prompt_length
        # Another model's, if this one runs inside it.
        call.outer, call.outer_probes, call.outer_masks = CURRENT.get(), watch(None), change_masks(None)
        CURRENT.set(call)
        return (), arguments

    @staticmethod
    def _leave(call: Call | None) -> None:
        if call is not None:
            CURRENT.set(call.outer)
            watch(call.outer_probes)
            change_masks(call.outer_masks)

    def _core_after(self, core: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._hints.passed_by = False
        self._leave(current(self.host))

    def _lm_before(self, lm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = current(self.host)
        kwargs = keywords(lm, args, kwargs)
        if call is None:
            if state_of(cache_in(kwargs)) is not None and not self._earlier.include_this_one():
                raise RuntimeError(
                    f"the language model of {self.host.name} was called on its own with a cache that a "
                    "reducer has shortened, whose masks and positions the model corrects; call the model"
                )
            return None
        enter(self.host, call, kwargs)
        if call.prefill:
            kwargs = self._reduce(call, kwargs)
            self._observe(call)
        return (), kwargs

    def _observe(self, call: Call) -> None:
        """Have the attention of the language model report to the reducers inside it."""
        layer, eviction = self._stages.get(Stage.LAYER), self._stages.get(Stage.CACHE)
        if layer is not None and layer.rows is not None:
            call.check_prompt_end(type(layer).__name__)
        if self._cuts is not None:
            watch(self._cuts.probes(call))
        if eviction is not None and call.unsettled is not None:
            warnings.warn(
                f"{type(eviction).__name__} evicts once the prompt has been read, and labels that reach back "
                "to an image do not say where that is: it has no effect here. Set labels of prompt "
                "tokens to -100, or session.prompt_length",
                stacklevel=2,
            )
        if eviction is None or not bool(call.answered.any()):
            return
        if torch.is_grad_enabled() and recomputes(self.host.lm):
            raise NotImplementedError(
                f"{type(eviction).__name__} hides what it evicts from answers in this forward, and gradient "
                "checkpointing would compute them again without that; turn gradient checkpointing off"
            )
        if self.host.kernel not in ("sdpa", "eager"):
            raise NotImplementedError(
                f"{type(eviction).__name__} must hide what it evicts from the answers in this forward, and "
                f"{self.host.kernel} takes no such mask; load the model with attn_implementation='sdpa', or "
                "give the prompt alone"
            )
        attentions = self.host.attentions
        change_masks(
            {attention: hide_from_answers(call, eviction, i) for i, attention in enumerate(attentions)}
        )

    def _reduce(self, call: Call, kwargs: dict[str, Any]) -> dict[str, Any]:
        features = self._stages.get(Stage.FEATURES)
        call.kept = [torch.arange(len(span.places)) for span in call.prompt.spans]
        changed = kwargs["inputs_embeds"]
        if features is not None or Stage.VISION in self._stages:
            budget, renumbered = self._budget_of(features)(), self._compact(features)
            embeds = kwargs["inputs_embeds"]
            with torch.no_grad() if not embeds.requires_grad else torch.enable_grad():
                stay, changed, call.kept = choose(
                    self.host, call, embeds, features, budget, self._groups, renumbered
                )
            kwargs = {**kwargs, "inputs_embeds": changed, "position_ids": call.positions}
            if not torch.equal(stay, call.start.valid):
                kwargs = shorten(self.host, call, kwargs, stay, "compact" if renumbered else "keep")
                call.positions = kwargs["position_ids"]
        if self._cuts is not None:
            self._budgets(call, changed)
        mask = kwargs.get("attention_mask")
        call.full_mask = mask.get("full_attention") if isinstance(mask, dict) else None
        call.entering = call.layout
        before = len(self.host.layers) if self._cuts is None else self._cuts.first
        call.layouts, call.removed = [call.layout] * before, [None] * before
        if self._cuts is not None and kwargs.get("deepstack_visual_embeds") is not None:
            kwargs = self._spread_deepstack(call, kwargs)
        return kwargs

    def _budgets(self, call: Call, embeds: Tensor) -> None:
        """Ask budgets that are functions of the image, with the tokens that enter the language model."""
        for stage in (Stage.LAYER, Stage.CACHE):
            keep = self._budget_of(self._stages.get(stage))()
            call.budgets[stage] = []
            for span, kept in zip(call.prompt.spans, call.kept, strict=True):
                if callable(keep):
                    places = span.places.to(embeds.device)[kept.to(embeds.device)]
                    image = view(self.host, span, embeds[span.row, places], embeds[span.row, :0])
                    call.budgets[stage].append(budget_of(keep, image, None))
                else:
                    call.budgets[stage].append(keep)

    def _spread_deepstack(self, call: Call, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Features that Qwen3-VL adds after its first layers, as tensors [B, L, D] that can be cut like
        tokens."""
        shown, embeds = kwargs["visual_pos_masks"], kwargs["inputs_embeds"]
        call.deepstack = []
        for features in kwargs["deepstack_visual_embeds"]:
            spread = embeds.new_zeros(embeds.shape[0], embeds.shape[1], features.shape[-1])
            spread[shown.to(spread.device)] = features.to(spread)
            call.deepstack.append(spread)
        return {**kwargs, "visual_pos_masks": None, "deepstack_visual_embeds": None}

    def _groups(self, span: Span) -> Tensor | None:
        """Which tokens of an image the tower made equal by merging: rows [N, ...] that are equal are a
        group."""
        if span.record.groups is None:
            return None
        return self._features.token_groups(span)

    def _lm_after(self, lm: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        call = current(self.host)
        if call is None:
            return None
        cache, kept = cache_in(output), wants_cache(lm, keywords(lm, args, kwargs))
        if kept and recomputes(lm):
            kept = entries(cache, 0) > call.entries[0]
        if call.prefill and len(call.layouts) != len(self.host.layers):
            raise RuntimeError(
                f"{len(call.layouts)} of the {len(self.host.layers)} layers of {self.host.name} ran, so the "
                "reducer's plan does not hold; set num_hidden_layers before attaching"
            )
        if kept:
            planned = [layout.valid.shape[1] for layout in call.layouts] or [call.full] * len(call.entries)
            check_growth(self.host.name, self.host.attentions, cache, call.entries, planned)
        if not call.prefill:
            return None
        watch(None)
        change_masks(None)
        call.cache = cache if kept else None
        if kept:
            call.limits = [window_limit(cache, i) for i in range(len(call.entries))]
        dropped = any(layout is not call.start for layout in call.layouts)
        eviction = self._stages.get(Stage.CACHE)
        if kept and (dropped or call.state is not None or eviction is not None):
            features = self._stages.get(Stage.FEATURES)
            finish(call, cache, self._compact(features), self._lease, eviction is not None)
            if eviction is not None:
                evict(call, eviction)
        if call.layouts[-1] is not call.start:
            output.last_hidden_state = _restored(output.last_hidden_state, call)
        call.release()
        self._last = call
        return output

    def _note(self, name: str, value: Tensor) -> None:
        if self.trace is not None:
            self.trace.setdefault(name, []).append(value.detach().cpu())


def _restored(hidden: Tensor, call: Call) -> Tensor:
    """The states of the last layer at their places in the whole prompt; zeros where tokens were dropped."""
    layout = call.layouts[-1]
    index, valid = layout.index.to(hidden.device), layout.valid.to(hidden.device)
    real = hidden.masked_fill(~valid[..., None], 0) if layout.ragged else hidden
    full = hidden.new_zeros(len(hidden) * call.full, hidden.shape[-1])
    return full.index_copy(0, flat(index, call.full), real.flatten(0, 1)).view(len(hidden), call.full, -1)
