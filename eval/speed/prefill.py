"""The share of the possible prefill speed-up that an attached reducer reaches, measured in one run.

A random LLaVA-shaped model reads one prompt with a picture. Compared are the stock model on the whole prompt,
the stock model on the shortened prompt (what no reducer can beat), and the stock model with the reducer
attached.
"""

from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ...compress import attach
from ...compress.hosts import cache_in, with_cache
from ...compress.reducer import Reducer
from ...extras import needs
from .paired import ratios, timed

with needs("transformers", None, "timing a vision-language model"):
    import transformers as hf
    from transformers.modeling_outputs import BaseModelOutputWithPooling

HEADER = [
    "reducer",
    "keep",
    "full ms",
    "short ms",
    "attached ms",
    "speed-up (of possible)",
    "extra ms per decode step",
]
IMAGE_TOKEN = 31_999


@dataclass
class Prefill:
    """One reducer at one budget."""

    reducer: Reducer
    keep: float
    full: list[float] = field(default_factory=list)
    short: list[float] = field(default_factory=list)
    attached: list[float] = field(default_factory=list)
    extra_step: list[float] = field(default_factory=list)

    @property
    def speedup(self) -> float:
        """Full over attached, median of pairs."""
        return median(ratios(self.full, self.attached))

    @property
    def possible(self) -> float:
        """Full over short, median of pairs."""
        return median(ratios(self.full, self.short))

    @property
    def share(self) -> float:
        """Short over attached: how much of the possible speed-up is reached."""
        return median(ratios(self.short, self.attached))

    @property
    def overhead(self) -> float:
        """Extra seconds per decode step with the reducer attached."""
        return median(self.extra_step)


@dataclass
class PrefillSpeed:
    """All reducers and budgets of one run."""

    parameters: int
    tokens: int
    threads: int
    runs: list[Prefill]

    @property
    def title(self) -> str:
        """The title: what was measured, and on which hardware."""
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"prefill of {self.parameters / 1e6:.1f}M parameters, {self.tokens} visual tokens, {threads}"

    def table(self) -> list[list[str]]:
        """Table rows in the columns of HEADER: medians."""
        return [
            [
                type(run.reducer).__name__,
                f"{run.keep:g}",
                f"{1e3 * median(run.full):.1f}",
                f"{1e3 * median(run.short):.1f}",
                f"{1e3 * median(run.attached):.1f}",
                f"{run.speedup:.2f}x ({100 * run.share:.0f}%)",
                f"{1e3 * run.overhead:.3f}",
            ]
            for run in self.runs
        ]

    def record(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        runs = [
            {k: v for k, v in vars(run).items() if k != "reducer"}
            | {"reducer": type(run.reducer).__name__, "share": run.share, "overhead": run.overhead}
            for run in self.runs
        ]
        return {"parameters": self.parameters, "tokens": self.tokens, "threads": self.threads, "runs": runs}


def llava_shaped(device: str = "cpu", width: int = 384) -> hf.LlavaForConditionalGeneration:
    """A random LLaVA whose language model has 8 layers of that `width`, a multiple of 64: of about 27M
    parameters by default, of 135M with 1024."""
    torch.manual_seed(0)
    text = {
        "model_type": "llama",
        "vocab_size": 32_000,
        "hidden_size": width,
        "intermediate_size": width * 8 // 3,
        "num_hidden_layers": 8,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "tie_word_embeddings": True,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 64,
    }
    config = hf.LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN, tie_word_embeddings=True
    )
    return hf.LlavaForConditionalGeneration(config).eval().to(device)


@torch.no_grad()
def run(
    reducers: list[Reducer],
    keeps: tuple[float, ...] = (0.5, 0.25, 0.1),
    *,
    repeats: int = 9,
    threads: int = 1,
    tokens: int = 576,
    steps: int = 16,
    device: str = "cpu",
    width: int = 384,
) -> PrefillSpeed:
    """Time every reducer at every budget `repeats` times, full, short and attached in turn, after a warm-up,
    in a language model of that `width`.

    Sets the number of threads of torch for the run only. Reducers of features only, because the prompt is
    shortened as they do it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model, stock = llava_shaped(device, width), llava_shaped(device, width)
        features = torch.randn(tokens, width, device=device)
        ids = torch.randint(3, 30_000, (9,), device=device)
        prompt = torch.cat([ids[:4], ids.new_full((tokens,), IMAGE_TOKEN), ids[4:]])[None]
        runs = [Prefill(reducer, keep) for reducer in reducers for keep in keeps]
        for one in runs:
            for measured in range(-2, repeats):
                _measure(model, stock, prompt, features, one, steps, measured >= 0)
    finally:
        torch.set_num_threads(before)
    return PrefillSpeed(sum(p.numel() for p in model.parameters()), tokens, threads, runs)


def _measure(
    model: hf.LlavaForConditionalGeneration,
    stock: hf.LlavaForConditionalGeneration,
    prompt: Tensor,
    features: Tensor,
    one: Prefill,
    steps: int,
    keep: bool,
) -> None:
    """Time one prompt on `stock`, on `model` with the reducer, and shortened on `stock`, whose weights are
    the same."""

    def prefill(which: hf.LlavaForConditionalGeneration, ids: Tensor, values: Tensor) -> Any:
        media = {"image": BaseModelOutputWithPooling(pooler_output=[values])}
        return timed(lambda: which(input_ids=ids, mm_encoder_outputs=media, use_cache=True, logits_to_keep=1))

    _, full = prefill(stock, prompt, features)
    with attach(model, one.reducer, keep=one.keep, positions="compact") as session:
        out, attached = prefill(model, prompt, features)
        kept = session.explain()[0].tokens
        short = features[kept.to(features.device)]
        begin, end = prompt[:, :4], prompt[:, 4 + len(features) :]
        ids = torch.cat([begin, prompt.new_full((1, len(short)), IMAGE_TOKEN), end], 1)
        expected, short_seconds = prefill(stock, ids, short)
        if not torch.allclose(out.logits, expected.logits, atol=1e-3):
            raise RuntimeError(
                f"{type(one.reducer).__name__} attached gives other logits than its shortened prompt"
            )
        if keep:
            one.full.append(full.seconds)
            one.short.append(short_seconds.seconds)
            one.attached.append(attached.seconds)
            one.extra_step += _extra_steps(model, stock, cache_in(out), cache_in(expected), steps)


def _extra_steps(
    model: hf.LlavaForConditionalGeneration,
    stock: hf.LlavaForConditionalGeneration,
    reduced: hf.Cache,
    plain: hf.Cache,
    steps: int,
) -> list[float]:
    """Extra seconds per decode step, attached against the shortened prompt's cache, step by step in
    turn."""
    token = torch.full((1, 1), 7, device=model.device)
    differences = []
    for _ in range(steps):
        _, attached = timed(lambda: model(input_ids=token, **with_cache(model, reduced), use_cache=True))
        _, alone = timed(lambda: stock(input_ids=token, **with_cache(stock, plain), use_cache=True))
        differences.append(attached.seconds - alone.seconds)
    return differences
