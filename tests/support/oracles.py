"""What a model that drops visual tokens must compute, worked out by hand and without `vistok.compress`.

`shortened_*` drop tokens before the language model: stock code merges pictures and text, then the chosen
embeddings are cut out and the decoder runs on the short sequence in a plain loop with its own beam search.
`masked_*` drop tokens inside the language model: nothing gets shorter, but from one layer on no query sees
the dropped columns. At layer 0 the two are the same computation.

`keep_rows` is one bool tensor a row over that row's visual tokens, in order. Logits at dropped and padded
places come back as zeros.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import transformers as hf
from torch import Tensor, nn

# Older releases make features inside the forward alone, and stock code mixes up pictures under beams.
BEFORE_5_18 = not hasattr(hf.GenerationMixin, "_supports_mm_encoder_outputs")
Inputs = Mapping[str, Any]
Positions = Literal["keep", "compact"]


@dataclass(frozen=True)
class Generated:
    """New `tokens` [B, n] and the raw logits [B, n, V] each was chosen from (along the winning beam).

    `prompt_logits` [B, L, V] are those of the prompt, where the oracle has them.
    """

    tokens: Tensor
    logits: Tensor | None
    prompt_logits: Tensor | None = None


def decoder(model: hf.PreTrainedModel) -> nn.Module:
    """The text model that owns the decoder layers."""
    module = model.get_decoder()
    while not hasattr(module, "layers"):
        module = module.model  # Llama4's `get_decoder` stops at its causal model
    return module


def checkpoint_layers(model: hf.PreTrainedModel, on: bool) -> None:
    """Turn gradient checkpointing, which is called activation checkpointing since 5.24, on or off."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{kind}_checkpointing_disable")()


def the_cache(values: Mapping[str, Any]) -> hf.Cache | None:
    """The cache among a call's arguments or an output's fields; releases call it by different names."""
    caches = [value for value in values.values() if isinstance(value, hf.Cache)]
    assert len(caches) <= 1
    return caches[0] if caches else None


def going_on(module: nn.Module, cache: hf.Cache) -> dict[str, hf.Cache]:
    """The argument that hands `cache` to a module of this release."""
    names = inspect.signature(type(module).forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


def real_tokens(inputs: Inputs) -> Tensor:
    """Which places of the prompt are not padding: bool [B, L]."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"]).bool() if mask is None else mask.bool()


def visual_tokens(model: hf.PreTrainedModel, inputs: Inputs) -> Tensor:
    """Which places of the prompt a picture or video fills: bool [B, L]."""
    names = ("image_token_id", "video_token_id")
    ids = [getattr(model.config, name) for name in names if getattr(model.config, name, None) is not None]
    visual = torch.isin(inputs["input_ids"], torch.tensor(ids, device=inputs["input_ids"].device))
    return visual & real_tokens(inputs)


def random_keep(
    model: hf.PreTrainedModel, inputs: Inputs, share: float | Sequence[float], seed: int = 0
) -> list[Tensor]:
    """A `keep_rows` with that share of each row's visual tokens, at random; one share a row or for all."""
    counts = visual_tokens(model, inputs).sum(1).tolist()
    shares = [share] * len(counts) if isinstance(share, float | int) else share
    random = torch.Generator().manual_seed(seed)
    return [
        torch.randperm(count, generator=random) < round(wanted * count)
        for count, wanted in zip(counts, shares, strict=True)
    ]


def kept_tokens(model: hf.PreTrainedModel, inputs: Inputs, keep_rows: Sequence[Tensor]) -> Tensor:
    """Which places of the prompt remain: bool [B, L], all text and the visual tokens of `keep_rows`."""
    kept, visual = real_tokens(inputs), visual_tokens(model, inputs)
    counts = visual.sum(1).tolist()
    if [len(row) for row in keep_rows] != counts:
        raise ValueError(f"keep_rows are {[len(row) for row in keep_rows]} long; the rows hold {counts}")
    kept[visual] = torch.cat(list(keep_rows)).to(kept)
    return kept


@torch.no_grad()
def shortened_logits(
    model: hf.PreTrainedModel, inputs: Inputs, keep_rows: Sequence[Tensor], positions: Positions = "keep"
) -> Tensor:
    """`model(**inputs).logits` [B, L, V] after dropping before the language model."""
    prompt = _shorten(model, inputs, keep_rows, positions, generating=False)
    return prompt.spread(_logits(model, decoder(model)(**prompt.call, use_cache=False)))


@torch.no_grad()
def shortened_generate(
    model: hf.PreTrainedModel,
    inputs: Inputs,
    keep_rows: Sequence[Tensor],
    positions: Positions = "keep",
    *,
    max_new_tokens: int = 8,
    num_beams: int = 1,
    suppress_tokens: Sequence[int] = (),
) -> Generated:
    """`model.generate(**inputs)` without sampling, after dropping before the language model."""
    prompt = _shorten(model, inputs, keep_rows, positions, generating=True)
    language_model = decoder(model)
    cache = hf.DynamicCache(config=language_model.config)
    out = language_model(**prompt.call, **going_on(language_model, cache), use_cache=True)
    batch, prompt_logits = len(out.last_hidden_state), prompt.spread(_logits(model, out))

    # From here on every row stands once a beam; at first only one of a row's equal beams may win.
    logits = _logits(model, out, last=True).repeat_interleave(num_beams, 0)  # [B * beams, V]
    if num_beams > 1:  # layers with a running state cannot be repeated
        cache.batch_repeat_interleave(num_beams)
    valid = prompt.valid.repeat_interleave(num_beams, 0)
    position = prompt.next_position.repeat_interleave(num_beams, -2)
    scores = torch.full((batch, num_beams), -torch.inf)
    scores[:, 0] = 0
    tokens, history = logits.new_empty(batch * num_beams, 0, dtype=torch.long), logits[:, None, :][:, :0]
    for step in range(max_new_tokens):
        choices = logits.float().log_softmax(-1)
        choices[:, list(suppress_tokens)] = -torch.inf
        totals = (scores.flatten()[:, None] + choices).view(batch, -1)
        scores, best = totals.topk(num_beams, -1)
        source = (torch.arange(batch)[:, None] * num_beams + best // logits.shape[-1]).flatten()
        token = (best % logits.shape[-1]).view(-1, 1)
        history = torch.cat([history[source], logits[source, None]], 1)
        tokens = torch.cat([tokens[source], token], 1)
        if step == max_new_tokens - 1:
            break
        cache.reorder_cache(source)
        valid = torch.cat([valid, torch.ones_like(token, dtype=torch.bool)], 1)
        out = language_model(
            inputs_embeds=model.get_input_embeddings()(token),
            attention_mask=valid.long(),
            position_ids=position + step,
            **going_on(language_model, cache),
            use_cache=True,
        )
        logits = _logits(model, out, last=True)
    return Generated(tokens[::num_beams], history[::num_beams], prompt_logits)


@torch.no_grad()
def masked_logits(
    model: hf.PreTrainedModel, inputs: Inputs, keep_rows: Sequence[Tensor], layer: int
) -> Tensor:
    """`model(**inputs).logits` [B, L, V] when no query of layer `layer` or later sees a dropped token."""
    with columns_masked(model, inputs, keep_rows, layer):
        logits = model(**inputs).logits
    return logits * kept_tokens(model, inputs, keep_rows)[..., None]


@torch.no_grad()
def masked_generate(
    model: hf.PreTrainedModel, inputs: Inputs, keep_rows: Sequence[Tensor], layer: int, **generate: Any
) -> Generated:
    """`model.generate(**inputs)` when no query of layer `layer` or later ever sees a dropped token."""
    settings = {"max_new_tokens": 8, "do_sample": False, **generate}
    with columns_masked(model, inputs, keep_rows, layer):
        out = model.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)
    tokens = out.sequences[:, inputs["input_ids"].shape[1] :]
    greedy = settings.get("num_beams", 1) == 1
    return Generated(tokens, torch.stack(out.logits, 1) if greedy else None)


@contextmanager
def columns_masked(
    model: hf.PreTrainedModel, inputs: Inputs, keep_rows: Sequence[Tensor], layer: int
) -> Iterator[None]:
    """Hide the dropped tokens of the prompt from the queries of layer `layer` and later, in every call.

    Nesting hides the tokens of each `with` from its own layer on.
    """
    dropped = real_tokens(inputs) & ~kept_tokens(model, inputs, keep_rows)
    layers = decoder(model).layers
    handles = [
        layers[index].register_forward_pre_hook(partial(_hide, dropped, index), with_kwargs=True)
        for index in range(layer, len(layers))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hide(dropped: Tensor, index: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Hook before decoder layer `index`: its attention mask without the columns of `dropped` [B, L], or of
    `dropped` [B, heads, L] for each head."""
    hidden, cache, mask = args[0], the_cache(kwargs), kwargs.get("attention_mask")
    queries = hidden.shape[1]
    keys, past = queries, 0
    if cache is not None:
        keys, past = cache.get_mask_sizes(queries, index)[0], cache.get_seq_length(index)
    if mask is None:
        allowed = torch.ones(queries, keys).tril(keys - queries).bool()
    else:
        allowed, keys = mask if mask.dtype == torch.bool else mask == 0, mask.shape[-1]
    columns = nn.functional.pad(dropped, (0, max(0, past + queries - dropped.shape[-1])))
    columns = columns[..., : past + queries][..., -keys:]  # a sliding window holds the last ones
    columns = columns.repeat_interleave(len(hidden) // len(dropped), 0)  # beams
    columns = columns[:, None] if columns.ndim == 2 else columns  # [B, 1 or heads, keys]
    return args, kwargs | {"attention_mask": _additive(allowed & ~columns[:, :, None], hidden.dtype)}


@dataclass(frozen=True)
class _Short:
    """A shortened prompt: the language model's arguments, and where its tokens were in the long one.

    `index` [B, L'] counts places of the long prompt; what is not `valid` [B, L'] is padding on the left.
    `next_position` [..., B, 1] is the position of the first new token.
    """

    call: dict[str, Any]
    index: Tensor
    valid: Tensor
    next_position: Tensor
    length: int

    def spread(self, logits: Tensor) -> Tensor:
        """Short [B, L', V] → long [B, L, V]."""
        out = logits.new_zeros(len(logits), self.length, logits.shape[-1])
        row, place = self.valid.nonzero(as_tuple=True)
        out[row, self.index[row, place]] = logits[row, place]
        return out


def _shorten(
    model: hf.PreTrainedModel,
    inputs: Inputs,
    keep_rows: Sequence[Tensor],
    policy: Positions,
    generating: bool,
) -> _Short:
    call = _language_model_call(model, inputs, generating)
    embeds, real = call["inputs_embeds"], real_tokens(inputs)
    kept, visual = kept_tokens(model, inputs, keep_rows), visual_tokens(model, inputs)
    batch, length = kept.shape
    short = int(kept.sum(1).max())
    index, valid = torch.zeros(batch, short, dtype=torch.long), torch.zeros(batch, short, dtype=torch.bool)
    for row in range(batch):
        places = kept[row].nonzero()[:, 0]
        index[row, short - len(places) :] = places
        valid[row, short - len(places) :] = True

    positions = call.get("position_ids")
    if positions is None:
        positions = torch.arange(length)[None]
    positions = positions.expand(*positions.shape[:-2], batch, length)  # [B, L] or [planes, B, L]
    last = length - 1 - real.flip(1).long().argmax(1)
    next_position = positions[..., torch.arange(batch), last, None] + 1
    positions = torch.stack([positions[..., row, index[row]] for row in range(batch)], -2)
    if policy == "compact":
        first = torch.stack([positions[..., row, valid[row].long().argmax()] for row in range(batch)], -1)
        count = (valid.cumsum(1) - 1).clamp_min(0)
        positions = first[..., None] + count
        next_position = positions[..., -1:] + 1

    rows = torch.arange(batch)[:, None]
    mask = call.get("attention_mask")
    arguments = {
        "inputs_embeds": embeds[rows, index],
        "position_ids": positions,
        "attention_mask": valid.long()
        if mask is None
        else _short_mask(model, mask, index, valid, embeds.dtype),
    }
    for name, value in call.items():  # such as which experts a token goes to
        if name not in arguments and isinstance(value, Tensor) and value.shape[:2] == (batch, length):
            arguments[name] = value[rows, index]
    if call.get("deepstack_visual_embeds") is not None:
        arguments["visual_pos_masks"] = visual[rows, index] & valid
        arguments["deepstack_visual_embeds"] = [
            layer[kept[visual]] for layer in call["deepstack_visual_embeds"]
        ]
    return _Short(arguments, index, valid, next_position, length)


def _short_mask(
    model: hf.PreTrainedModel, mask: Tensor | dict, index: Tensor, valid: Tensor, dtype: torch.dtype
) -> Tensor | dict:
    """The short prompt's mask: 2-D where the language model makes its own, else cut out of the 4-D one.

    PaliGemma and Gemma3 hand over 4-D masks. The window of a sliding layer counts kept tokens.
    """
    if isinstance(mask, dict):
        full = _short_mask(model, mask["full_attention"], index, valid, dtype)
        if full.dim() == 2:
            return full
        places = torch.arange(index.shape[1])
        near = places > places[:, None] - decoder(model).config.sliding_window
        return {"full_attention": full, "sliding_attention": _additive((full == 0) & near, dtype)}
    if mask is None or mask.dim() == 2:
        return valid.long()
    allowed = mask if mask.dtype == torch.bool else mask == 0
    allowed = allowed.expand(len(index), -1, -1, -1)
    rows = torch.arange(len(index))[:, None, None]
    allowed = allowed[rows, 0, index[:, :, None], index[:, None, :]]  # [B, L', L']
    return _additive((allowed & valid[:, None, :])[:, None], dtype)


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Where queries may look [..., queries, keys] as a mask to add; each sees itself, so no row is empty."""
    queries, keys = allowed.shape[-2:]
    own = torch.arange(keys - queries, keys)[:, None] == torch.arange(keys)
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~(allowed | own), -torch.inf)


def _language_model_call(model: hf.PreTrainedModel, inputs: Inputs, generating: bool) -> dict[str, Any]:
    """The keyword arguments with which stock code calls the language model on this prompt."""
    calls: list[dict[str, Any]] = []
    hook = decoder(model).register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(dict(kwargs)), with_kwargs=True
    )
    try:
        if generating:
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
        else:
            model(**inputs, use_cache=False)
    finally:
        hook.remove()
    return calls[0]


def _logits(model: hf.PreTrainedModel, out: Any, last: bool = False) -> Tensor:
    """Logits [B, L, V] of a decoder's output, or [B, V] of its last place."""
    head, hidden = model.get_output_embeddings(), out.last_hidden_state
    logits = head(hidden[:, -1:])[:, -1] if last else head(hidden)
    cap = getattr(decoder(model).config, "final_logit_softcapping", None)
    return logits if cap is None else (logits / cap).tanh() * cap
