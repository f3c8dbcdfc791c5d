"""Keyformer: evict by attention with Gumbel noise, and keep the newest tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..algorithms.heavy_hitters import favour_recent, gumbel_softmax
from ..reducer import CacheReducer, CacheTokens


@dataclass(kw_only=True)
class Keyformer(CacheReducer):
    """Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient Generative Inference (Adnan et
    al., MLSys 2024, arXiv 2403.09054), for visual tokens.

    As H2O, but what a token receives is a soft-max of logits with Gumbel noise at temperature `tau_init`,
    drawn from `seed`: equal prompts draw the same on one kind of device. A share `kv_cache` of the prompt's
    visual tokens stays (`keep` sets it), of which a share `recent` are the last ones. Generated tokens always
    stay, so tokens are evicted once, after the prompt, and the temperatures of later steps play no part.
    With `per_head=False` the heads of a layer keep the same tokens. The images of a prompt share one budget,
    unless `per_image`.

    Raises ValueError for shares outside (0, 1] (`recent`: [0, 1]) and temperatures that are not above 0.
    """

    summary: ClassVar = "attention with Gumbel noise, and the newest"
    paper: ClassVar = "arXiv 2403.09054"

    kv_cache: float = 0.6
    recent: float = 0.3
    tau_init: float = 1.0
    seed: int = 0
    per_head: bool = True
    per_image: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.kv_cache <= 1:
            raise ValueError(f"kv_cache is {self.kv_cache}; it takes a share above 0 and up to 1")
        if not 0 <= self.recent <= 1:
            raise ValueError(f"recent is {self.recent}; it takes a share from 0 to 1")
        if not self.tau_init > 0:
            raise ValueError(f"tau_init is {self.tau_init}; it takes a temperature above 0")

    def default_count(self, tokens: int) -> int:
        """The share `kv_cache`, rounded, at least 1."""
        return max(1, round(self.kv_cache * tokens))

    def attention_scores(self, layer: int) -> Callable[[Tensor], Tensor]:
        """Attention of noisy logits; the draws depend on the seed, the layer, and the prompt's length."""
        generators: dict[torch.device, torch.Generator] = {}

        def scores(logits: Tensor) -> Tensor:
            if logits.device not in generators:
                generator = torch.Generator(logits.device)
                generators[logits.device] = generator.manual_seed(self.seed * 1_000_003 + layer)
            return gumbel_softmax(logits, self.tau_init, generators[logits.device])

        return scores

    def rank(self, tokens: CacheTokens) -> Tensor:
        """The noisy attention received, and infinity for the newest tokens, [H_k, N] or [N]."""
        received = tokens.received if self.per_head else tokens.received.sum(0)
        return favour_recent(received, round(tokens.count * self.recent))
