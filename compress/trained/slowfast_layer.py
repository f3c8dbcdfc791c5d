"""Layers of a language model whose text reads a video's slow tokens by gated cross-attention.

"Slow-Fast Architecture for Video Multi-Modal Large Language Models" (Shi et al., 2025, arXiv 2504.01328).
Few fast tokens are in the prompt (`compress.algorithms.slowfast` makes them); all slow tokens are read beside
it in some layers, at a cost linear in their number. Parameters have the keys of the published checkpoints.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import checkpoint
from ...configuration import build, shorten
from ..hosts import cache_in, entries, keywords
from ..undo import Undo

PROMPT_TEXT, RESPONSE_TEXT, VISUAL, PADDING = 1, 2, 3, 4
"""Types of tokens."""
_IMPLEMENTATION = re.compile(r"(?:text-only-)?vanilla(?:-(?:flashattn|masksystem))*")
_GATE = re.compile(r"whole-dynamic(?:-tanh)?(?:-warmup)?")
_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")
_OWN = ("cross_attn_kv_proj", "cross_attn_gate_proj", "cross_attn_warm_up_gate")


@dataclass(frozen=True)
class SlowFastConfig:
    """Which layers read slow tokens, and how, by the original's strings.

    `cross_attn_implementation` is "vanilla" (every token reads) or "text-only-vanilla", with "-masksystem"
    for text from the first visual token on alone; "-flashattn" names a kernel and changes nothing.
    `cross_attn_gating_type` is "whole-dynamic", with "-tanh" around the gate of each token and "-warmup" for
    a factor per layer that starts at 0. Raises ValueError for other strings and for layers that repeat.
    """

    layers: tuple[int, ...]
    cross_attn_implementation: str = "text-only-vanilla-flashattn"
    cross_attn_gating_type: str = "whole-dynamic-tanh-warmup"

    def __post_init__(self) -> None:
        for name, pattern, accepted in (
            ("cross_attn_implementation", _IMPLEMENTATION, "[text-only-]vanilla[-flashattn][-masksystem]"),
            ("cross_attn_gating_type", _GATE, "whole-dynamic[-tanh][-warmup]"),
        ):
            if not pattern.fullmatch(getattr(self, name)):
                raise ValueError(f"{name} is {shorten(getattr(self, name))}; it takes {accepted}")
        if not self.layers or len(set(self.layers)) < len(self.layers) or min(self.layers) < 0:
            raise ValueError(f"layers is {list(self.layers)}; give different layers from 0, at least one")

    @property
    def text_only(self) -> bool:
        """Whether visual tokens and padding do not read."""
        return self.cross_attn_implementation.startswith("text-only") or self.from_first_visual

    @property
    def from_first_visual(self) -> bool:
        """Whether text before the first visual token does not read."""
        return "masksystem" in self.cross_attn_implementation


@dataclass(frozen=True)
class SlowTokens:
    """The slow tokens [B, S, D] of a prompt, which of them are real [B, S], and the types [B, L] of the
    prompt's tokens."""

    tokens: Tensor
    mask: Tensor
    types: Tensor


class SlowFast:
    """Cross-attention to slow tokens in layers of a Llama or Qwen2 language model.

    The layers stay what they are: modules named `cross_attn_*` are added to their self-attention, and hooks
    add what the text reads to the attention's output before its last projection. `detach` removes all of it.

    Args:
        model: a model with `get_decoder`, a decoder with `layers`, or a sequence of decoder layers.
        config: which layers, and how they read.
        init: how the projection of keys and values starts: "interleaved" with the layer's own keys and
            values, head by head as they are read, or "reference", where they are stacked, as the original
            does, so that half of the heads' values start as keys.
        decode_cross_attention: whether tokens that are generated read slow tokens, too. The original's do
            not, although its responses learn to.

    Raises:
        TypeError: the layers are not those of Llama or Qwen2.
        ValueError: `config` names a layer that is not there, or `init` is another one.
    """

    def __init__(
        self,
        model: Any,
        config: SlowFastConfig,
        *,
        init: Literal["interleaved", "reference"] = "interleaved",
        decode_cross_attention: bool = False,
    ) -> None:
        self.config, self.decode_cross_attention = config, decode_cross_attention
        self.trace: dict[str, Tensor] | None = None
        """Set to a dictionary to record what is read, "layer i" [B, rows, D], before gates and masks."""
        self._slow: SlowTokens | None = None
        self._keys_values: dict[int, Tensor] = {}
        self._undo = Undo()
        layers = _layers(model)
        if init not in ("interleaved", "reference"):
            raise ValueError(f'init is {init!r}; it takes "interleaved" or "reference"')
        if max(config.layers) >= len(layers):
            raise ValueError(f"layers is {list(config.layers)}; the model has layers 0 to {len(layers) - 1}")
        self.layers = {number: layers[number] for number in config.layers}
        for layer in self.layers.values():
            _check(layer)
        try:
            for number, layer in self.layers.items():
                self._add(layer.self_attn, init)
                self._hook(number, layer)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Remove modules and hooks. A second call does nothing."""
        self._undo.run()

    @contextmanager
    def reading(self, slow: Tensor, types: Tensor, mask: Tensor | None = None) -> Iterator[None]:
        """Let forwards and `generate` in the block read slow tokens.

        Args:
            slow: [B, S, D], as wide as the language model's states.
            types: [B, L] of the prompt's tokens: 1 text of the prompt, 2 of the response, 3 visual, 4
                padding.
            mask: [B, S], true for real tokens; None: all are.

        Raises:
            ValueError: shapes that do not fit, other types, and prompts with visual tokens but no slow ones.
        """
        mask = torch.ones(slow.shape[:2], dtype=torch.bool, device=slow.device) if mask is None else mask
        mask = mask.bool()
        if slow.ndim != 3 or mask.shape != slow.shape[:2] or types.ndim != 2 or len(types) != len(slow):
            raise ValueError(
                f"slow is {list(slow.shape)}, mask {list(mask.shape)} and types {list(types.shape)}; they "
                "are [B, S, D], [B, S] and [B, L]"
            )
        if not bool(((types >= PROMPT_TEXT) & (types <= PADDING)).all()):
            raise ValueError("types holds other numbers than 1 to 4 (text, response, visual, padding)")
        types = types.to(mask.device)
        empty = (types == VISUAL).any(1) & ~mask.any(1)
        if bool(empty.any()):
            raise ValueError(
                f"prompt {int(empty.nonzero()[0])} has visual tokens and no slow ones; give it slow tokens"
            )
        before = self._slow, self._keys_values
        self._slow, self._keys_values = SlowTokens(slow, mask, types), {}
        try:
            yield
        finally:
            self._slow, self._keys_values = before

    # Weights ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """The added weights under the published keys, `model.layers.0.self_attn.cross_attn_…`."""
        return {
            f"model.layers.{number}.self_attn.{key}": value
            for number, layer in self.layers.items()
            for key, value in layer.self_attn.state_dict().items()
            if key.startswith(_OWN)
        }

    def load_state_dict(self, state: Mapping[str, Tensor], source: str | Path = "the weights") -> None:
        """Take the added weights from `state`, whose other keys are not read.

        Raises ValueError, before anything changes, for keys that are missing, of another layer or shape, and
        for values that are not finite.
        """
        own = self.state_dict()
        values = {key: value for key, value in state.items() if "cross_attn_" in key}
        different = sorted(own.keys() ^ values.keys())
        different += [key for key in own.keys() & values.keys() if own[key].shape != values[key].shape]
        if different:
            raise ValueError(
                f"{source} does not fit layers {list(self.config.layers)} with the gate "
                f"{self.config.cross_attn_gating_type}: {len(different)} keys differ, the first is "
                f"{different[0]}; give the configuration of these weights"
            )
        checkpoint.check_values(values, source)
        with torch.no_grad():
            for key, value in values.items():
                own[key].copy_(value)

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, which `load` reads."""
        config = {"module": "SlowFast", "config": dataclasses.asdict(self.config)}
        checkpoint.save(folder, self.state_dict(), config)

    @classmethod
    def load(cls, model: Any, folder: str | Path, *, decode_cross_attention: bool = False) -> "SlowFast":
        """Attach what `save` wrote. Raises FileNotFoundError, and ValueError for what does not fit."""
        located = checkpoint.locate(folder)
        config = located.config or {}
        if config.get("module") != "SlowFast" or "config" not in config:
            raise ValueError(
                f"{folder} holds no layers of SlowFast: config.json states the module "
                f"{shorten(config.get('module'))}; give a folder that SlowFast.save wrote"
            )
        settings = build(SlowFastConfig, config["config"], str(Path(folder) / checkpoint.CONFIG_NAME))
        slowfast = cls(model, settings, decode_cross_attention=decode_cross_attention)
        try:
            slowfast.load_state_dict(checkpoint.read(located.weights), located.weights)
        except BaseException:
            slowfast.detach()
            raise
        return slowfast

    # Attaching ----------------------------------------------------------------------------------------------

    def _add(self, attention: nn.Module, init: str) -> None:
        """Give an attention module the parameters of the cross-attention."""
        key, value = attention.k_proj, attention.v_proj
        width, out = key.in_features, key.out_features
        options = {"device": key.weight.device, "dtype": key.weight.dtype}
        projection = nn.Linear(width, 2 * out, bias=key.bias is not None, **options)
        with torch.no_grad():
            projection.weight.copy_(_joined(key.weight, value.weight, attention.head_dim, init))
            if key.bias is not None:
                projection.bias.copy_(_joined(key.bias, value.bias, attention.head_dim, init))
        gate = nn.Sequential(nn.Linear(attention.o_proj.in_features, 1, **options))
        for name, module in zip(_OWN[:2], (projection, gate), strict=True):
            self._undo.step(lambda name=name: attention._modules.pop(name, None))
            attention.add_module(name, module)
        if "warmup" in self.config.cross_attn_gating_type:
            self._undo.step(lambda: attention._parameters.pop(_OWN[2], None))
            attention.register_parameter(_OWN[2], nn.Parameter(torch.zeros(1, **options)))

    def _hook(self, number: int, layer: nn.Module) -> None:
        attention, call = layer.self_attn, {}

        def entered(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            call.clear()
            if self._slow is not None:
                call.update(keywords(module, args, kwargs))
                call["past"] = entries(cache_in(call), module.layer_idx)  # before this call's are added

        def projected(module: nn.Module, args: tuple, query: Tensor) -> None:
            if self._slow is not None:
                call["query"] = query

        def attended(module: nn.Module, args: tuple) -> tuple | None:
            if self._slow is None:
                return None
            output = self._with_context(number, layer, args[0], call)
            call.clear()
            return (output, *args[1:])

        self._undo.pre_hook(attention, entered)
        self._undo.hook(attention.q_proj, projected, with_kwargs=False)
        self._undo.pre_hook(attention.o_proj, attended, with_kwargs=False)

    # Reading ------------------------------------------------------------------------------------------------

    def _with_context(self, number: int, layer: nn.Module, output: Tensor, call: dict[str, Any]) -> Tensor:
        """The attention's output [B, L, D] with what its tokens read of the slow ones."""
        readers, has_visual = self._readers(output, call["past"])
        if readers is None:
            return output
        attention, config = layer.self_attn, self.config
        rows, is_real = packed_rows(readers)
        query = _heads(call["query"], attention.head_dim)  # [B, H, L, d]
        cos, sin = (part.unsqueeze(1) for part in call["position_embeddings"])
        query = query * cos + _rotated(query) * sin
        query = query.transpose(1, 2).flatten(2)  # [B, L, H · d]
        index = rows[..., None].expand(-1, -1, query.shape[-1])
        query = query.gather(1, index) * is_real[..., None]
        context = self._context(number, layer, query)
        if self.trace is not None:
            self.trace[f"layer {number}"] = context
        gate = attention.cross_attn_gate_proj(output)  # [B, L, 1]
        if "tanh" in config.cross_attn_gating_type:
            gate = gate.tanh()
        if "warmup" in config.cross_attn_gating_type:
            warm_up = attention.cross_attn_warm_up_gate
            # Parity: where every token reads, this factor is not bounded.
            bounded = config.cross_attn_implementation.startswith("text-only")
            gate = gate * (warm_up.tanh() if bounded else warm_up)
        context = context * (is_real & has_visual[:, None])[..., None]
        return output + gate * torch.zeros_like(output).scatter_add(1, index, context.to(output))

    def _readers(self, output: Tensor, past: int) -> tuple[Tensor | None, Tensor]:
        """Which tokens read, bool [B, L] (None: none does), and which samples have visual tokens [B].

        Raises ValueError for a forward that is neither the prompt nor a step behind it.
        """
        batch, length = output.shape[:2]
        types = self._slow.types.to(output.device)
        if batch != len(types):
            raise ValueError(
                f"this forward has {batch} rows, and slow tokens were given for {len(types)}; give every row "
                "its own, repeated for beams"
            )
        has_visual = (types == VISUAL).any(1)
        if past >= types.shape[1]:
            # Parity: by default tokens behind the prompt read nothing.
            readers = torch.ones(batch, length, dtype=torch.bool, device=types.device)
            return readers if self.decode_cross_attention else None, has_visual
        if past or length != types.shape[1]:
            raise ValueError(
                f"types are for a prompt of {types.shape[1]} tokens, and this forward has {length} behind "
                f"{past}; run the whole prompt in one forward"
            )
        if not self.config.text_only:
            return torch.ones_like(types, dtype=torch.bool), has_visual
        readers = types <= RESPONSE_TEXT
        if self.config.from_first_visual:
            readers &= (types == VISUAL).cumsum(1) > 0
        return readers, has_visual

    def _context(self, number: int, layer: nn.Module, query: Tensor) -> Tensor:
        """What queries [B, Q, H · d] read of the slow tokens [B, Q, H · d]."""
        attention, slow = layer.self_attn, self._slow
        keys_values = self._keys_values.get(number)
        if keys_values is None:
            tokens = layer.input_layernorm(slow.tokens.to(query))
            # Parity: each head's keys are followed by its values.
            keys_values = attention.cross_attn_kv_proj(tokens).unflatten(2, (-1, 2, attention.head_dim))
            if not torch.is_grad_enabled():
                self._keys_values[number] = keys_values
        keys, values = keys_values.permute(3, 0, 2, 1, 4)  # [B, H_kv, S, d] each
        # A sample without slow tokens reads one that its contribution, 0, hides.
        mask = slow.mask | ~slow.mask.any(1, keepdim=True)
        context = F.scaled_dot_product_attention(
            _heads(query, attention.head_dim),
            keys,
            values,
            attn_mask=mask[:, None, None].to(query.device),
            enable_gqa=True,
        )
        return context.transpose(1, 2).flatten(2)


def token_types(
    input_ids: Tensor, visual_id: int, *, mask: Tensor | None = None, labels: Tensor | None = None
) -> Tensor:
    """The types of a prompt's tokens, int64 [B, L]: `visual_id` is the number of visual tokens in `input_ids`
    [B, L], `mask` [B, L] is 0 for padding, and `labels` [B, L] are -100 but for responses, in training."""
    types = torch.full_like(input_ids, PROMPT_TEXT)
    if labels is not None:
        types[labels != -100] = RESPONSE_TEXT
    types[input_ids == visual_id] = VISUAL
    if mask is not None:
        types[mask == 0] = PADDING
    return types


def packed_rows(readers: Tensor) -> tuple[Tensor, Tensor]:
    """The places [B, Q] of the tokens that read [B, L], in order, and which of them are real, bool [B, Q]; Q
    is the largest number in a row."""
    count = int(readers.sum(1).max()) if readers.numel() else 0
    rows = (~readers).to(torch.uint8).sort(dim=1, stable=True).indices[:, :count]
    return rows, readers.gather(1, rows)


def _heads(x: Tensor, width: int) -> Tensor:
    """[B, L, H · d] → [B, H, L, d]."""
    return x.unflatten(2, (-1, width)).transpose(1, 2)


def _rotated(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _joined(keys: Tensor, values: Tensor, width: int, init: str) -> Tensor:
    if init == "reference":
        return torch.cat([keys, values])
    both = (part.unflatten(0, (-1, width)) for part in (keys, values))
    return torch.stack(list(both), 1).flatten(0, 2)


def _layers(model: Any) -> Sequence[nn.Module]:
    if isinstance(model, Sequence | nn.ModuleList):
        return model
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    layers = getattr(decoder, "layers", None)
    if layers is None:
        raise TypeError(
            f"a {type(model).__name__} has no decoder layers; give a model with get_decoder, or its layers"
        )
    return layers


def _check(layer: nn.Module) -> None:
    """Raise TypeError for a layer of which the parts are not those of Llama and Qwen2."""
    attention = getattr(layer, "self_attn", None)
    parts = all(isinstance(getattr(attention, name, None), nn.Linear) for name in _PARTS)
    if not parts or not hasattr(layer, "input_layernorm") or hasattr(attention, "q_norm"):
        raise TypeError(
            f"{type(layer).__name__} is not a decoder layer of Llama or Qwen2: it needs input_layernorm and "
            f"self_attn with {', '.join(_PARTS)} and without norms of queries"
        )
    if hasattr(attention, _OWN[0]):
        raise ValueError("this layer reads slow tokens already; detach what does first")
