"""What a reducer costs per image against what it saves of the prefill of a 7B model, on this machine.

Costs are measured with the reducer attached to a random LLaVA with the widths of a 7B model: what the tower
takes longer (or shorter) and the time in the reducer itself. Savings are the time of one 7B-shaped layer on
the tokens that each layer loses, and the same in counted operations. The break-even is the fewest visual
tokens at which a method saves more than it costs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import Any

import numpy as np
import torch

from ...compress import attach
from ...compress.reducer import Reducer, Stage
from ...compress.report.accounting import llm_block_macs, skipped_macs
from ...compress.report.counts import Report
from ...extras import needs
from .paired import timed

with needs("transformers", None, "timing a vision-language model"):
    import transformers as hf
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

HEADER = [
    "reducer",
    "visual tokens",
    "kept",
    "tower ms",
    "reducer ms",
    "saved ms",
    "net ms",
    "saved of prefill (counted)",
    "pays from",
]
LAYERS = 32
TEXT = 64  # other tokens of the prompt
IMAGE_TOKEN = 3
PATCH = 14
PICTURES = {36: 84, 144: 168, 576: 336}
"""Visual tokens → side in pixels of a LLaVA-1.5-shaped picture."""
TILED = 2880
"""Visual tokens (without separators) of a LLaVA-NeXT-shaped picture of five tiles."""
MEASURED_LAYERS = 8  # of the language model whose reducers are timed
SHALLOW_TOWER = 4  # layers, for reducers that do not change the tower's tokens


@dataclass(frozen=True)
class Widths:
    """Widths of the language model (Llama 2 7B) and of its tower (CLIP ViT-L/14)."""

    width: int = 4096
    mlp_width: int = 11_008
    heads: int = 32
    tower_width: int = 1024
    tower_layers: int = 24
    tower_heads: int = 16


SEVEN_B = Widths()


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer of the model on n tokens, a polynomial through measurements."""

    widths: Widths

    coefficients: tuple[float, ...]
    measured: dict[int, float]

    def operations(self, tokens: int) -> int:
        """Multiply-adds of one layer on `tokens` tokens."""
        return llm_block_macs(tokens, self.widths.width, self.widths.mlp_width)

    def __call__(self, tokens: float) -> float:
        """Seconds of one layer on `tokens` tokens."""
        return float(np.polyval(self.coefficients, tokens))


@torch.no_grad()
def layer_time(
    widths: Widths,
    dtype: torch.dtype,
    device: str,
    repeats: int,
    tokens: Sequence[int] = (64, 256, 640, 1472, 2992),
) -> LayerTime:
    """Measure a random Llama layer on several numbers of tokens."""
    config = hf.LlamaConfig(
        hidden_size=widths.width,
        intermediate_size=widths.mlp_width,
        num_attention_heads=widths.heads,
        num_key_value_heads=widths.heads,
        attn_implementation="sdpa",
    )
    layer = LlamaDecoderLayer(config, 0).eval().to(device, dtype)
    rotary = LlamaRotaryEmbedding(config).to(device)
    measured = {}
    for count in tokens:
        hidden = torch.randn(1, count, widths.width, device=device, dtype=dtype)
        places = torch.arange(count, device=device)[None]
        angles = rotary(hidden, places)

        def run(hidden: Any = hidden, angles: Any = angles) -> Any:
            return layer(hidden, position_embeddings=angles, attention_mask=None)

        timed(run)
        measured[count] = median(timed(run)[1].seconds for _ in range(repeats))
    counts, times = np.array(list(measured)), np.array(list(measured.values()))
    return LayerTime(widths, tuple(np.polyfit(counts, times, 2, w=1 / times)), measured)


@dataclass
class Cost:
    """A reducer on one picture of `tokens` visual tokens: seconds that the tower takes longer, and seconds in
    the reducer."""

    tokens: int
    tower: float
    reducer: float

    @property
    def total(self) -> float:
        """Seconds in all; negative where the tower becomes faster by more."""
        return self.tower + self.reducer


@dataclass
class NetGain:
    """One reducer at one budget: its costs by size, and the visual tokens that each of 32 layers computes."""

    name: str
    stage: Stage
    costs: list[Cost]
    layers: dict[int, list[int]]
    layer: LayerTime
    skipped: dict[int, int] = field(default_factory=dict)
    """Multiply-adds of parts of layers that tokens skip, by size."""

    def kept(self, tokens: int) -> float:
        """Visual tokens averaged over layers."""
        return sum(self.layers[tokens]) / LAYERS

    def saved(self, tokens: int) -> float:
        """Seconds of the language model's prefill that lost tokens and skipped parts spare; of parts only
        their operations are counted."""
        skipped = self.skipped[tokens] / self.layer.operations(tokens + TEXT) * self.layer(tokens + TEXT)
        return self._saved(tokens, self.layers[tokens], self.layer) + skipped

    def saved_share(self, tokens: int) -> float:
        """The share of the language model's prefill that is saved, in time."""
        return self.saved(tokens) / (LAYERS * self.layer(tokens + TEXT))

    def counted_share(self, tokens: int) -> float:
        """The same share in counted operations."""
        counted = self.layer.operations
        saved = self._saved(tokens, self.layers[tokens], counted) + self.skipped[tokens]
        return saved / (LAYERS * counted(tokens + TEXT))

    def net(self, tokens: int) -> float:
        """Seconds saved in all per image; negative where the method costs more than it saves."""
        return self.saved(tokens) - self._cost(tokens)

    @cached_property
    def break_even(self) -> int | None:
        """The fewest visual tokens at which the method saves time, interpolated between measured sizes; None
        where it saves none at the largest. The smallest measured size stands for all below it."""
        sizes = sorted(cost.tokens for cost in self.costs)
        if self.net(sizes[-1]) <= 0:
            return None
        low = next((tokens for tokens in reversed(sizes) if self.net(tokens) <= 0), None)
        if low is None:
            return sizes[0]
        high = next(tokens for tokens in sizes if tokens > low)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._net_between(middle) > 0 else (middle, high)
        return high

    def _saved(self, tokens: int, layers: Sequence[float], price: Callable[[Any], float]) -> float:
        return sum(price(tokens + TEXT) - price(left + TEXT) for left in layers)

    def _cost(self, tokens: int) -> float:
        return next(cost.total for cost in self.costs if cost.tokens == tokens)

    def _net_between(self, tokens: int) -> float:
        """Net seconds at a size between two measured ones, by linear interpolation of costs and counts."""
        sizes = sorted(self.layers)
        above = next(size for size in sizes if size > tokens)
        below = sizes[sizes.index(above) - 1]
        part = (tokens - below) / (above - below)
        pairs = zip(self.layers[below], self.layers[above], strict=True)
        layers = [low + part * (high - low) for low, high in pairs]
        cost = self._cost(below) + part * (self._cost(above) - self._cost(below))
        skipped = self.skipped[below] + part * (self.skipped[above] - self.skipped[below])
        skipped *= self.layer(tokens + TEXT) / self.layer.operations(tokens + TEXT)
        return self._saved(tokens, layers, self.layer) + skipped - cost


@dataclass
class NetGains:
    """All reducers of one run. `failures` names those that cannot run at the asked setting, and why."""

    gains: list[NetGain]
    failures: dict[str, str]
    keep: float
    threads: int
    dtype: torch.dtype
    layer: LayerTime

    @property
    def title(self) -> str:
        """The title: what was measured, and on which hardware."""
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"cost and saving per image at keep {self.keep:g}, widths of a 7B model, {dtype}, {threads}"

    def table(self, sizes: Sequence[int]) -> list[list[str]]:
        """Table rows in the columns of HEADER: medians."""
        rows = []
        for gain in self.gains:
            for cost in gain.costs:
                if cost.tokens not in sizes:
                    continue
                n = cost.tokens
                share = f"{100 * gain.saved_share(n):.0f}% ({100 * gain.counted_share(n):.0f}%)"
                times = (cost.tower, cost.reducer, gain.saved(n), gain.net(n))
                milliseconds = [f"{1e3 * value:.1f}" for value in times]
                start = "never" if gain.break_even is None else str(gain.break_even)
                rows.append([gain.name, str(n), f"{gain.kept(n):.1f}", *milliseconds, share, start])
        return rows

    def warnings(self, sizes: Sequence[int]) -> list[str]:
        """One sentence per reducer and size at which it costs more than it saves."""
        return [
            f"{gain.name} cannot pay at {n} visual tokens and keep {self.keep:g} here: it costs "
            f"{1e3 * (gain.saved(n) - gain.net(n)):.1f} ms per image and saves {1e3 * gain.saved(n):.1f} ms "
            "of the prefill" + _cache_hint(gain)
            for gain in self.gains
            for n in sizes
            if n in gain.layers and gain.net(n) <= 0
        ]

    def record(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        return {
            "keep": self.keep,
            "threads": self.threads,
            "dtype": str(self.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "layer_seconds": {str(n): value for n, value in self.layer.measured.items()},
            "failures": self.failures,
            "reducers": [
                {
                    "name": gain.name,
                    "stage": gain.stage.value,
                    "break_even": gain.break_even,
                    "sizes": [
                        vars(cost)
                        | {
                            "kept": gain.kept(cost.tokens),
                            "saved": gain.saved(cost.tokens),
                            "net": gain.net(cost.tokens),
                            "saved_share": gain.saved_share(cost.tokens),
                            "counted_share": gain.counted_share(cost.tokens),
                        }
                        for cost in gain.costs
                    ],
                }
                for gain in self.gains
            ],
        }


def _cache_hint(gain: NetGain) -> str:
    if gain.stage is Stage.CACHE:
        return " (it shortens the cache after the prompt, which saves memory and decode time instead)"
    return ""


# The models -------------------------------------------------------------------------------------------------


def _llava(side: int, tiled: bool, text: Mapping[str, Any], vision: Mapping[str, Any]) -> hf.PreTrainedModel:
    """A random LLaVA-1.5, or LLaVA-NeXT that cuts every picture into 2×2 tiles."""
    text_config = {
        "model_type": "llama",
        "vocab_size": 320,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **text,
    }
    vision_config = {
        "model_type": "clip_vision_model",
        "image_size": side,
        "patch_size": PATCH,
        "projection_dim": 64,
        **vision,
    }
    common = {"text_config": text_config, "vision_config": vision_config, "image_token_id": IMAGE_TOKEN}
    if not tiled:
        return hf.LlavaForConditionalGeneration(hf.LlavaConfig(**common)).eval()
    config = hf.LlavaNextConfig(**common, image_grid_pinpoints=[[2 * side, 2 * side]])
    return hf.LlavaNextForConditionalGeneration(config).eval()


def _wide(widths: Widths, side: int, tiled: bool, tower_layers: int, layers: int = 1) -> hf.PreTrainedModel:
    """The measured model's widths; the language model's MLPs, which no reducer reads, are narrow."""
    text = {
        "hidden_size": widths.width,
        "intermediate_size": 256,
        "num_hidden_layers": layers,
        "num_attention_heads": widths.heads,
        "num_key_value_heads": widths.heads,
    }
    vision = {
        "hidden_size": widths.tower_width,
        "intermediate_size": 4 * widths.tower_width,
        "num_hidden_layers": tower_layers,
        "num_attention_heads": widths.tower_heads,
    }
    return _llava(side, tiled, text, vision)


def _narrow(side: int, tiled: bool) -> hf.PreTrainedModel:
    """32 layers as narrow as can be, to count the tokens of each."""
    small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    text = small | {"num_hidden_layers": LAYERS, "num_key_value_heads": 2}
    return _llava(side, tiled, text, small | {"num_hidden_layers": SEVEN_B.tower_layers})


def _prompt(model: hf.PreTrainedModel, side: int, tiled: bool) -> dict[str, Any]:
    """One picture of noise between text, as the model's inputs."""
    random = torch.Generator().manual_seed(side)
    tiles = (1, 5) if tiled else (1,)
    pixels = torch.randn(*tiles, 3, side, side, generator=random).to(model.device, model.dtype)
    inputs: dict[str, Any] = {"pixel_values": pixels}
    tokens = (side // PATCH) ** 2
    if tiled:
        inputs["image_sizes"] = torch.tensor([[2 * side, 2 * side]])
        rows = 2 * side // PATCH
        tokens = 5 * tokens + rows  # a separator ends each row of the tiles
    text = torch.randint(4, 320, (TEXT,), generator=random)
    ids = torch.cat([text[:8], torch.full((tokens,), IMAGE_TOKEN), text[8:]])[None].to(model.device)
    return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# Measuring --------------------------------------------------------------------------------------------------


@torch.no_grad()
def run(
    reducers: Mapping[str, Reducer],
    keep: float = 0.25,
    *,
    sizes: Sequence[int] = (*PICTURES, TILED),
    widths: Widths = SEVEN_B,
    repeats: int = 3,
    threads: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda text: None,
) -> NetGains:
    """Measure every reducer on pictures of several sizes, `repeats` pairs after one that warms up.

    Sets the number of threads of torch for the run only. `sizes` are of 36, 144, 576 (one tile) and 2880
    visual tokens (five tiles). Reducers that refuse a model or budget are listed with the reason.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        progress("one layer")
        layer = layer_time(widths, dtype, device, repeats)
        gains = {name: NetGain(name, item.stage, [], {}, layer) for name, item in reducers.items()}
        failures: dict[str, str] = {}
        first = _wide(widths, PICTURES[36], False, 1, MEASURED_LAYERS)
        language = first.model.language_model.to(device, dtype)
        for size in sizes:
            tiled = size == TILED
            side = PICTURES[576] if tiled else PICTURES[size]
            narrow = _narrow(side, tiled).to(device)
            depths = {False: SHALLOW_TOWER, True: widths.tower_layers}
            wide = {deep: _wide(widths, side, tiled, depth) for deep, depth in depths.items()}
            for model in wide.values():
                model.to(device, dtype).model.language_model = language
                model.config.text_config = language.config
            for name, reducer in reducers.items():
                if name in failures:
                    continue
                progress(f"{name}, {size} tokens")
                deep = reducer.stage is Stage.VISION
                try:
                    report = _report(narrow, reducer, keep, side, tiled)
                    gains[name].layers[size] = report.images[0].layers
                    gains[name].skipped[size] = sum(
                        skipped_macs(widths.width, widths.mlp_width, widths.width, size + TEXT, **parts)
                        for parts in report.skipped.values()
                    )
                    gains[name].costs.append(_cost(wide[deep], reducer, keep, size, side, tiled, repeats))
                except (ValueError, NotImplementedError) as error:
                    failures[name] = str(error)
        working = [gain for name, gain in gains.items() if name not in failures]
    finally:
        torch.set_num_threads(before)
    return NetGains(working, failures, keep, threads, dtype, layer)


def _report(model: hf.PreTrainedModel, reducer: Reducer, keep: float, side: int, tiled: bool) -> Report:
    """The report on one picture: the tokens that each of 32 layers computes, and what they skip."""
    with attach(model, reducer, keep=keep) as session:
        model(**_prompt(model, side, tiled), use_cache=True, logits_to_keep=1)
        return session.report()


def _cost(
    model: hf.PreTrainedModel, reducer: Reducer, keep: float, size: int, side: int, tiled: bool, repeats: int
) -> Cost:
    """What the reducer costs on one picture, medians of pairs."""
    inputs = _prompt(model, side, tiled)
    pictures = {name: value for name, value in inputs.items() if name in ("pixel_values", "image_sizes")}

    def tower() -> Any:
        return model.get_image_features(**pictures)

    longer = []
    for number in range(-1, repeats):
        _, plain = timed(tower)
        with attach(model, reducer, keep=keep):
            _, attached = timed(tower)
        if number >= 0:
            longer.append(attached.seconds - plain.seconds)
    with attach(model, reducer, keep=keep) as session:
        in_reducer = []
        for number in range(-1, repeats):
            model(**inputs, use_cache=True, logits_to_keep=1)
            if number >= 0:
                in_reducer.append(session.report().seconds)
    return Cost(size, median(longer), median(in_reducer))
