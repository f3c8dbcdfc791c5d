"""One forward of a model with reducers attached: its inputs, what was dropped, what the cache must
record."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..families import Host, Record
from ..hosts import cache_argument, entries, keywords
from ..layout import Layout, Prompt, find_spans
from ..reducer import Stage
from .cache import FUNCTIONAL, CacheState, Lease, StepState, adopt, check_kind, extended, state_of
from .features_made import MadeFeatures, record_of
from .prompt_end import Generation, Hints, PromptLength, last_of_prompt
from .revival_state import Step

CURRENT: ContextVar["Call | None"] = ContextVar("vistok_call", default=None)


@dataclass
class Call:
    """State of one forward of the core; it is kept in a context variable, one per thread."""

    host: Host
    outer: "Call | None" = None
    outer_probes: Any = None
    outer_changes: Any = None
    prefill: bool = False
    passed: bool = False  # features that session.prepare has reduced already
    ids: Tensor | None = None
    mask: Tensor | None = None  # the caller's 2-D mask
    outputs: dict[str, Any] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)  # of outputs that have lost theirs on the way
    state: CacheState | None = None
    cache: Cache | None = None
    entries: list[int] = field(default_factory=list)  # physical lengths before the call
    length: int = 0  # logical length before the call
    full: int = 0  # tokens of this call before reduction
    prompt: Prompt | None = None
    generation: Generation | None = None  # the running `generate` of this model
    hints: Hints = field(default_factory=Hints)
    prompt_length: PromptLength = None  # set by the user
    last: Tensor | None = None  # [B] places of the last prompt tokens; what follows are answers or drafts
    unsettled: int | None = None  # a row whose prompt would end before its images
    evicted: dict[int, Tensor] = field(default_factory=dict)  # by layer, chosen while attention ran
    start: Layout | None = None  # of the whole prompt
    entering: Layout | None = None  # of the language model's input
    layout: Layout | None = None  # of the layer that runs now
    layouts: list[Layout] = field(default_factory=list)  # of every layer
    relative: Tensor | None = None  # [B, L'] places in the language model's input, once a layer has cut
    positions: Tensor | None = None  # [B, L'] or [planes, B, L'] as the language model got them
    whole_positions: Tensor | None = None  # those of the whole prompt
    removed: list[Tensor | None] = field(default_factory=list)
    scores: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)  # by reducer and cut
    measured: dict[int, Tensor] = field(default_factory=dict)  # by reducer
    deepstack: list[Tensor] | None = None
    full_mask: Tensor | None = None  # of full-attention layers, where the core makes masks
    budgets: dict[Stage, list[list[Any]]] = field(
        default_factory=dict
    )  # of each reducer and span, inside the model
    derived: dict[Any, Any] = field(default_factory=dict)  # masks and rotations shared by layers
    held: dict[int, Layout] = field(default_factory=dict)  # layers whose cache holds less than they computed
    heads: dict[int, Tensor] = field(default_factory=dict)  # [B, H_k, L'] where each head holds its own
    attended: dict[int, Any] = field(default_factory=dict)  # what attention modules were called with
    steps: StepState | None = None  # of a prompt whose later tokens choose what they attend to
    made: dict[Any, Any] = field(default_factory=dict)  # parts of it that layers share
    step: Step | None = None  # of a call on a cache to which dropped tokens return
    expected: set[int] = field(default_factory=set)  # layers that have not yet asked what to attend to
    limits: list[int | None] | None = None  # how many tokens each layer's cache holds at most
    columns: list[Tensor | None] | None = None  # which entries of the cache are real, once it is shortened
    kept: list[Tensor] = field(default_factory=list)  # token numbers of each span that entered the model
    # by layer and part, how many tokens of each row were left out
    skipped: dict[int, dict[str, list[int]]] = field(default_factory=dict)
    seconds: float = 0.0

    def release(self) -> None:
        """Release everything but what explains the call: tensors of the model's size must not stay in
        memory."""
        state = state_of(self.cache)
        self.columns = None if state is None else state.columns
        self.cache = self.state = self.positions = self.deepstack = self.relative = None
        self.full_mask = self.whole_positions = None
        self.outputs, self.records, self.scores, self.derived, self.evicted = {}, {}, {}, {}, {}
        self.measured, self.attended, self.made, self.steps, self.step = {}, {}, {}, None, None
        self.hints, self.last = Hints(), None
        for span in self.prompt.spans:
            span.record = span.deepstack = None

    @property
    def answered(self) -> Tensor:
        """Which tokens of the whole call [B, L] follow the prompt, as answers or drafts do."""
        places = torch.arange(self.start.valid.shape[1], device=self.start.valid.device)
        return self.start.valid & (places > self.last[:, None])

    def check_prompt_end(self, reducer: str) -> None:
        """Raise ValueError unless the prompt of every row ends after its images: a reducer that looks at the
        prompt would otherwise rank by the answer."""
        if self.unsettled is not None:
            raise ValueError(
                f"{reducer} ranks visual tokens by the prompt, and it is not known where the prompt of row "
                f"{self.unsettled} ends: the labels (or logits_to_keep) reach back to its images. Set labels "
                "of prompt tokens to -100, or set session.prompt_length to the number of prompt tokens"
            )

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Counts what happens inside as time spent in the reducer."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


def current(host: Host | None) -> Call | None:
    """The call of this model that is under way in this thread of execution, if any."""
    call = CURRENT.get()
    return call if call is not None and call.host is host else None


def begin(
    host: Host,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    made: MadeFeatures,
    generation: Generation | None,
) -> tuple[Call, dict[str, Any]]:
    """Read a call of the core. Returns the call and the arguments, corrected for what earlier calls dropped.

    `made` holds the features that this thread has made or prepared and that no forward has used yet, and
    `generation` is the `generate` that this model is in. Raises NotImplementedError for static caches, masks
    that are already 4-D and chunked prefill, ValueError for images without placeholders.
    """
    arguments = keywords(host.core, args, kwargs)
    cache = cache_argument(host.core, arguments)
    call = Call(host, cache=cache, state=state_of(cache), generation=generation)
    outputs = {k: v for k, v in (arguments.get("mm_encoder_outputs") or {}).items() if v is not None}
    pixels = any(name.startswith("pixel_values") and value is not None for name, value in arguments.items())
    if outputs and made.are_prepared(outputs):
        call.passed = True
        return call, arguments
    mask = arguments.get("attention_mask")
    if (outputs or pixels or call.state) and not (
        mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
    ):
        raise NotImplementedError(
            "reducers need the 2-D attention mask (1 for real tokens), and this call brings a prepared "
            f"one, as static caches and compiled generation do; {FUNCTIONAL}"
        )
    call.mask = mask
    if outputs or pixels:
        call.records = made.records_of(outputs, generating=generation is not None)
        _begin_prefill(host, call, arguments, outputs)
    if call.state is not None:
        _correct(call, arguments)
    return call, arguments


def _begin_prefill(host: Host, call: Call, arguments: dict, outputs: dict[str, Any]) -> None:
    if call.cache is not None:
        check_kind(call.cache)
        if host.family.bidirectional and call.cache.get_seq_length():
            raise NotImplementedError(
                f"{host.name} attends in both directions within a picture, which reducers follow from an "
                "empty cache only; give the whole conversation with all its pictures"
            )
    call.ids = arguments.get("input_ids")
    if call.ids is None:
        call.ids = _ids_of(host, arguments["inputs_embeds"])
    if not any(bool((call.ids == token).any()) for token in host.media_ids.values()):
        raise ValueError(
            f"images were given, but the prompt holds none of the placeholder tokens {host.media_ids}; "
            "build prompt and images together with the model's processor"
        )
    call.prefill, call.outputs = True, outputs


def _ids_of(host: Host, embeds: Tensor) -> Tensor:
    """Placeholder ids [B, L] recognised by their embedding; 0 or another free id elsewhere."""
    table = host.model.get_input_embeddings()
    ids = torch.full(embeds.shape[:2], -1, device=embeds.device)
    for token in host.media_ids.values():
        vector = table(torch.tensor([[token]], device=embeds.device))[0, 0].to(embeds)
        ids[(embeds == vector).all(-1)] = token
    return ids


def _correct(call: Call, arguments: dict[str, Any]) -> None:
    """The mask and positions of a call that continues a shortened cache."""
    state, cache, mask = call.state, call.cache, call.mask
    embeds = arguments.get("inputs_embeds")
    tokens = arguments["input_ids"] if embeds is None else embeds
    batch, new = tokens.shape[:2]
    logical = cache.get_seq_length()
    first = call.host.first_attention
    columns = extended(state, first, entries(cache, first), mask)
    if columns is not None and (mask is not None or state.ragged[first]):
        latest = columns.new_ones(batch, new) if mask is None else mask[:, logical : logical + new].bool()
        arguments["attention_mask"] = torch.cat([columns, latest.to(columns.device)], 1).long()
    if arguments.get("position_ids") is None or state.compact:
        if mask is None:
            since = torch.arange(new, device=tokens.device)[None] + (logical - state.length)
        else:
            read = mask[:, state.length : logical + new].long()
            since = (read.cumsum(1) - 1).clamp_min(0)[:, -new:]
        positions = state.next.to(since.device)[:, None] + since
        if state.planes:
            positions = positions.expand(state.planes, batch, new)
        arguments["position_ids"] = positions


def read_prompt(host: Host, call: Call, length: int) -> None:
    """Find the images of the prompt once the core has merged their features."""
    records = {}
    for modality, output in call.outputs.items():
        lengths = [len(item) for item in output.pooler_output]
        record = record_of(output) or call.records.get(modality) or Record(modality, lengths)
        if sum(record.lengths) == sum(lengths):  # not repeated for beams; items of old releases may be tiles
            lengths = record.lengths
        records[modality] = (record, lengths)
        call.seconds += record.seconds
    call.full = length
    for modality, token in host.media_ids.items():
        if (
            modality not in records
            and token not in {host.media_ids[m] for m in records}
            and (call.ids == token).any()
        ):
            raise RuntimeError(
                f"the prompt holds {modality} placeholders, but {host.name} made no {modality} features "
                f"through get_{modality}_features while the reducer was attached, so nothing could be "
                "dropped; attach again, or give the features as mm_encoder_outputs"
            )
    real = torch.ones_like(call.ids, dtype=torch.bool)
    if call.mask is not None:
        real = call.mask[:, call.length : call.length + length].bool()
    prompts = None if call.generation is None else call.generation.prompts
    call.prompt = find_spans(host, call.ids, real, records, prompts)
    index = torch.arange(length, device=real.device).expand(real.shape[0], -1)
    call.start = call.layout = Layout(index, real, ragged=call.mask is not None)
    call.prompt.image = call.prompt.image.to(real.device)
    call.last = last_of_prompt(real, call.length, call.prompt_length, call.generation, call.hints)
    everything = (real * torch.arange(length, device=real.device)).amax(1)
    if call.prompt.spans and not torch.equal(call.last, everything):
        for span in call.prompt.spans:
            if int(span.places[-1]) > int(call.last[span.row]):
                call.unsettled = span.row if call.unsettled is None else call.unsettled
                call.last[span.row] = everything[span.row]
    for span in call.prompt.spans:
        span.places = span.places.to(real.device)


def finish(call: Call, cache: Cache, compact: bool, lease: Lease, evicting: bool) -> None:
    """Write into the cache what its layers hold after a prefill that dropped tokens, for as long as the
    session's `lease` runs. When `evicting`, tokens of the prompt cannot be taken back: read again, they would
    attend only to what is left."""
    state, length = call.state, call.length + call.full
    columns, ragged, gap, removed = [], [], [], []
    shared: dict[tuple[int, int], tuple[Tensor, bool]] = {}
    for i, layout in enumerate(call.layouts):
        # A running state counts no tokens: it has read as many as the attention beside it.
        at = i if call.host.attentions[i] is not None else call.host.first_attention
        past = None if state is None else state.columns[i]
        if past is None and layout is call.start:
            columns.append(None)
            ragged.append(call.mask is not None)
        else:
            key = (id(past), id(layout))
            if key not in shared:
                real = torch.cat([past_columns(call, at), layout.valid], 1)
                shared[key] = (real, not bool(real.all()))
            columns.append(shared[key][0])
            ragged.append(shared[key][1])
        held = entries(cache, at)
        gap.append(length - held if held else 0)
        before, now = None if state is None else state.removed[i], call.removed[i]
        removed.append(before if now is None else now if before is None else before + now)
    positions, planes = call.positions, 0
    if positions.ndim == 3:
        planes = positions.shape[0]
        positions = positions[-3:].amax(0)  # a fourth plane, in front, counts text
    valid = call.entering.valid.to(positions.device)
    last = positions.expand(valid.shape).masked_fill(~valid, -1).amax(1)
    text = (call.answered if evicting else call.start.valid & (call.prompt.image < 0)).all(0)
    tail = int(text.flip(0).long().cumprod(0).sum())
    fresh = CacheState(length, columns, ragged, removed, gap, last + 1, planes, compact, tail, lease)
    for i in () if state is None else state.numbers:
        fresh.numbers[i] = state.numbered(i, call.entries[i] + call.layouts[i].valid.shape[1])
        fresh.read[i] = int(fresh.numbers[i][0, -1]) + 1
    adopt(cache, fresh)


def past_columns(call: Call, layer: int) -> Tensor:
    """Which entries that a layer held before this call are real [B, entries]."""
    before, valid = call.entries[layer], call.start.valid
    if call.state is not None and call.state.columns[layer] is not None:
        return extended(call.state, layer, before, call.mask)
    if call.mask is None:
        return valid.new_ones(valid.shape[0], before)
    return call.mask[:, :before].bool()
