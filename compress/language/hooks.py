"""The hooks of reducers on a vision-language model: on the whole model, its core and its language model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import change_attention, watch, watched
from ..earlier import EarlierCalls, is_running
from ..families import Host, Record
from ..hosts import (
    cache_in,
    check_growth,
    entries,
    keywords,
    recomputes,
    release,
    wants_cache,
    window_limit,
)
from ..layout import Span, flat
from ..reducer import Budget, PixelReducer, Positions, Reducer, SkipReducer, Stage, keeps_everything
from ..undo import InModel, Undo
from ..vision import tower
from ..vision.features import FeatureRecorder, check_groups
from ..vision.merging import VisionMerging
from ..vision.pixels import PixelPruning
from .boundary import Border, enter, reduce_prompt
from .cache import Lease, state_of
from .cache_stage import CacheStage
from .call import CURRENT, Call, begin, current, finish
from .features_made import MadeFeatures
from .layers import LayerCuts
from .prepare import Prepared, prepare
from .prompt_end import (
    GENERATION,
    Hints,
    PromptLength,
    generating,
    generation_on_stack,
    shape_of_prompts,
)


@dataclass
class Settings:
    """Settings that a user may change between calls: budget, end of the prompt, and a trace to fill."""

    keep: Budget = None
    positions: Positions = "keep"
    prompt_length: PromptLength = None
    trace: dict[str, list[Tensor]] | None = None

    def budget(self, reducer: Reducer | None, *, last: bool = True) -> Callable[[], Budget]:
        """The budget of a reducer as of the call: the session's where it is the last of its stage or keeps
        everything, else its own."""

        def budget() -> Budget:
            if reducer is None:
                return None
            if self.keep is not None and (last or keeps_everything(self.keep)):
                return self.keep
            return reducer.keep

        return budget


class ModelHooks(InModel):
    """The reducers of a session in one model, from the features of the tower to the cache.

    Raises TypeError for models that cannot host them and ValueError for reducers that exclude each other.
    """

    def __init__(
        self,
        model: nn.Module,
        host: Host,
        stages: Mapping[Stage, Sequence[Reducer]],
        settings: Settings,
    ) -> None:
        self.model, self.host, self.settings = model, host, settings
        self.last: Call | None = None
        self.merging: VisionMerging | None = None
        self.lease = Lease()
        self._made_features = MadeFeatures([])
        self._hints = threading.local()  # labels and logits_to_keep of this thread's call
        self._earlier = EarlierCalls([model, host.core, host.lm, host.tower])
        self._vision = next(iter(stages.get(Stage.VISION, ())), None)
        self._feature = next(iter(stages.get(Stage.FEATURES, ())), None)
        pixels = (each for each in stages.get(Stage.PIXELS, ()) if isinstance(each, PixelReducer))
        self._pixels = next(pixels, None)
        self._layer, self._eviction = list(stages.get(Stage.LAYER, ())), list(stages.get(Stage.CACHE, ()))
        self._inside = {
            stage: [settings.budget(reducer, last=reducer is reducers[-1]) for reducer in reducers]
            for stage, reducers in ((Stage.LAYER, self._layer), (Stage.CACHE, self._eviction))
            if reducers
        }
        self._border = Border(
            active=any(each is not None for each in (self._feature, self._vision, self._pixels)),
            reducer=self._feature,
            budget=settings.budget(self._feature),
            left=self._left,
            renumbered=self._compact([self._feature] if self._feature is not None else []),
            closes_gaps=self._pixels is not None and self._pixels.positions == "engine",
            spread=settings.positions == "spread",
        )
        if (self._border.renumbered or self._border.spread) and self._border.closes_gaps:
            raise ValueError(
                f'{type(self._pixels).__name__}(positions="engine") keeps the positions of pictures, which '
                f'positions="{settings.positions}" numbers anew; leave one of them out'
            )
        self._check_spread()

    def attach(self, undo: Undo) -> None:
        """Register the hooks; `undo` takes them out again."""
        self._attach_tower(undo)
        self._attach_attention(undo)
        host, core, lm = self.host, self.host.core, self.host.lm
        self._cuts = None
        if self._inside:
            host.check_attention([*self._layer, *self._eviction])
            self._cuts = LayerCuts(
                host,
                self._layer,
                self._compact(self._layer),
                self._note,
                bool(self._eviction),
                spread=self.settings.positions == "spread",
            )
        self._cache_stage = CacheStage(host, self._eviction, self._note)
        self._cache_stage.attach(undo)
        ranked = [r for r in self._layer if r.reads_attention] + self._eviction
        if self._feature is not None and self._feature.reads_text:
            ranked.insert(0, self._feature)
        if ranked and self.model is core and not hasattr(core, "generate"):
            raise TypeError(
                f"{type(ranked[0]).__name__} must know where the prompt ends, which a call of the whole "
                f"model states and one of its {type(core).__name__} does not; attach to the whole model"
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

    def leave(self) -> None:
        """End the call that an interrupt may have left under way in this thread."""
        self._leave(current(self.host))

    def prepare(self, inputs: Mapping[str, Any]) -> Prepared:
        """See `Session.prepare`."""
        inside = [type(reducer).__name__ for reducer in [*self._layer, *self._eviction]]
        if inside:
            raise NotImplementedError(
                f"{' and '.join(inside)} act inside the language model, so the inputs cannot be shortened up "
                "front; attach reducers of the FEATURES or VISION stage alone"
            )
        prepared = prepare(self.host, self._border, inputs)
        self._made_features.add_prepared(prepared.inputs.get("mm_encoder_outputs") or {})
        return prepared

    # Attaching ----------------------------------------------------------------------------------------------

    def _attach_tower(self, undo: Undo) -> None:
        host, features, vision = self.host, self._feature, self._vision
        rows = {} if features is None else features.tower_layers()
        states = None if features is None else features.wants_states()
        if vision is not None and (rows or states is not None):
            raise ValueError(
                f"{type(features).__name__} reads the tower's attention, which is not that of its patches "
                f"once {type(vision).__name__} merges them; attach one of them, or a method that reads "
                "features alone"
            )
        pixels = features is not None and features.wants_pixels
        self._features = FeatureRecorder(host, rows, states, self._made, self._earlier, pixels=pixels)
        if vision is not None:
            check_groups(host, vision)
            merging = tower.install(
                host.tower, vision, undo, keep=self.settings.keep, depth=self._features.depth
            )
            merging.earlier = self._earlier
            self._features.merging = self.merging = merging
        if self._pixels is not None:
            if pixels:
                raise ValueError(
                    f"{type(features).__name__} encodes the whole picture again, of which "
                    f"{type(self._pixels).__name__} drops patches; attach one of them"
                )
            self._features.pruning = PixelPruning(host, self._pixels, self.settings.budget(self._pixels))
            self._features.pruning.attach(undo)
        self._features.attach(undo)

    def _attach_attention(self, undo: Undo) -> None:
        """Make attention report to probes where reducers read it."""
        features = self._feature
        text = bool(self._eviction) or any(
            reducer.reads_attention or isinstance(reducer, SkipReducer) for reducer in self._layer
        )
        vision = features is not None and (
            bool(features.tower_layers()) or features.wants_states() is not None
        )
        if text or vision:
            self._watch(undo, text=text, vision=vision)

    def _generate(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """`generate` of the model, with the length of its prompts noted while it runs."""
        model = ref(self.model)

        @wraps(stock)
        def generate(*args: Any, **kwargs: Any) -> Any:
            with generating(model(), shape_of_prompts(args, kwargs)):
                return stock(*args, **kwargs)

        return generate

    def _watch(self, undo: Undo, *, text: bool, vision: bool) -> None:
        """Make the attention of the language model or the tower report to probes; the kernels stay."""
        config, names, stock = self.model.config, {}, {}
        for part, module, observed in (("text", self.host.lm, text), ("vision", self.host.tower, vision)):
            if not observed:
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
            replaced = {n: stock[n] for n in names if getattr(config, n)._attn_implementation == names[n]}
            if replaced:
                self.model.set_attn_implementation(replaced)

        undo.step(restore)
        self.model.set_attn_implementation(names)

    def _compact(self, reducers: Sequence[Reducer]) -> bool:
        """Whether the tokens that these reducers of one stage leave are numbered anew."""
        if not reducers:
            return False
        planes = hasattr(self.host.core, "get_rope_index")
        positions = self.settings.positions
        if positions == "paper":
            papers = {"keep"} if planes else {reducer.paper_positions for reducer in reducers}
            if len(papers) > 1:
                raise ValueError(
                    f"{' and '.join(type(reducer).__name__ for reducer in reducers)} number tokens "
                    "differently in their papers; attach with positions='keep' or 'compact'"
                )
            positions = papers.pop()
        if positions == "compact" and planes and reducers[0].stage is Stage.LAYER:
            raise ValueError(
                f"{self.host.name} has positions in several planes (M-RoPE), where renumbering inside the "
                "layers is not defined; attach with positions='keep'"
            )
        return positions == "compact"

    def _check_spread(self) -> None:
        """Raise ValueError where positions are to be spread and no reducer drops tokens before they are
        used."""
        drops = self._border.active or any(not isinstance(reducer, SkipReducer) for reducer in self._layer)
        if self._border.spread and not drops:
            names = [type(reducer).__name__ for reducer in [*self._layer, *self._eviction]]
            raise ValueError(
                f"{' and '.join(names)} drops no token before its position is used, so there is nothing to "
                "spread; attach with positions='keep', or a reducer of features or layers beside it"
            )

    def _left(self, span: Span) -> Tensor | None:
        """Which tokens of an image go on from the tower: see `FeatureRecorder.tokens_left`."""
        if span.record.groups is None:
            return None
        return self._features.tokens_left(span)

    # Hooks --------------------------------------------------------------------------------------------------

    def _made(self, modality: str, output: Any, record: Record) -> None:
        if getattr(self._hints, "passed_by", False) and is_running(self.host.core):
            raise RuntimeError(
                f"{self.host.name} made {modality} features in a forward that has none and no pixel "
                f"values that reducers recognise, so nothing would be dropped; {release()}"
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
        if stale is not None:  # left by an interrupt
            self._leave(stale)
        hints, self._hints.of_call = getattr(self._hints, "of_call", None), None
        generation = GENERATION.get()
        if generation is None or generation.model is not self.model:
            generation = generation_on_stack(self.model)
        call, arguments = begin(self.host, args, kwargs, self._made_features, generation)
        self._hints.passed_by = not call.prefill
        if not call.prefill and call.state is None:
            return None
        call.hints, call.prompt_length = hints or Hints(), self.settings.prompt_length
        # Another model's, if this one runs inside it.
        call.outer, call.outer_probes, call.outer_changes = CURRENT.get(), watch(None), change_attention(None)
        CURRENT.set(call)
        return (), arguments

    @staticmethod
    def _leave(call: Call | None) -> None:
        if call is not None:
            CURRENT.set(call.outer)
            watch(call.outer_probes)
            change_attention(call.outer_changes)

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
            first = len(self.host.layers) if self._cuts is None else self._cuts.first
            kwargs = reduce_prompt(self.host, call, kwargs, self._border, self._inside, first)
            self._start(call, kwargs["inputs_embeds"])
            self._observe(call)
        else:
            self._start(call)
            self._cache_stage.follow(call)
        return (), kwargs

    def _start(self, call: Call, embeds: Tensor | None = None) -> None:
        """Plan what the layers do with a call; a prompt comes with its input embeddings [B, L', D]."""
        for reducer in self._layer if call.prefill else ():
            if reducer.reads_attention:
                call.check_prompt_end(type(reducer).__name__)
        if self._cuts is not None:
            self._cuts.start(call, embeds)

    def _observe(self, call: Call) -> None:
        """Make the attention of the language model report to the reducers inside it."""
        if self._cuts is not None:
            watch(self._cuts.probes(call))
        self._cache_stage.observe(call)

    def _lm_after(self, lm: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        call = current(self.host)
        if call is None:
            return None
        cache, kept = cache_in(output), wants_cache(lm, keywords(lm, args, kwargs))
        if kept and recomputes(lm):
            first = self.host.first_attention
            kept = entries(cache, first) > call.entries[first]
        if call.prefill and len(call.layouts) != len(self.host.layers):
            raise RuntimeError(
                f"{len(call.layouts)} of the {len(self.host.layers)} layers of {self.host.name} ran, so the "
                "reducer's plan does not hold; set num_hidden_layers before attaching"
            )
        if kept:
            planned = [layout.valid.shape[1] for layout in call.layouts] or [call.full] * len(call.entries)
            if call.step is not None:
                planned = call.step.added
            check_growth(self.host.name, self.host.attentions, cache, call.entries, planned)
        watch(None)
        change_attention(None)
        self._cache_stage.check(call)
        if not call.prefill:
            if call.step is not None and kept:
                self._cuts.revival.finish_step(call)
            return None
        call.cache = cache if kept else None
        if kept:
            call.limits = [window_limit(cache, i) for i in range(len(call.entries))]
        dropped = any(layout is not call.start for layout in call.layouts)
        continues = self._cuts is not None and self._cuts.continues(call)
        if kept and (dropped or continues or call.state is not None or bool(self._eviction)):
            evicting = bool(self._eviction) or (self._cuts is not None and self._cuts.truncates)
            counts_anew = self._border.renumbered or self._border.closes_gaps
            finish(call, cache, counts_anew, self.lease, evicting)
            cache.reduction.skips = continues
            self._cache_stage.finish(call)
            if self._cuts is not None:
                self._cuts.finish(call, cache)
        if call.layouts[-1] is not call.start:
            output.last_hidden_state = _restored(output.last_hidden_state, call)
        call.release()
        self.last = call
        return output

    def _note(self, name: str, value: Tensor) -> None:
        if self.settings.trace is not None:
            self.settings.trace.setdefault(name, []).append(value.detach().cpu())


def _restored(hidden: Tensor, call: Call) -> Tensor:
    """The states of the last layer at their places in the whole prompt; zeros where tokens were dropped."""
    layout = call.layouts[-1]
    index, valid = layout.index.to(hidden.device), layout.valid.to(hidden.device)
    if layout.shown is not None:  # means have no place of their own
        shown = layout.shown.to(hidden.device)
        index, valid = torch.where(shown < 0, -1 - shown, shown), valid & (shown >= 0)
    ragged = layout.ragged or layout.shown is not None
    real = hidden.masked_fill(~valid[..., None], 0) if ragged else hidden
    full = hidden.new_zeros(len(hidden) * call.full, hidden.shape[-1])
    return full.index_copy_(0, flat(index, call.full), real.flatten(0, 1)).view(len(hidden), call.full, -1)
