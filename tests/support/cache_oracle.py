"""A Llama that runs token by token over explicit lists of cached entries, one list per layer and key head.

It uses the weights of a stock model and nothing of `vistok.compress`, so that a method can be written down as
its paper has it: a rule decides which entries of a list a token attends to and which are removed.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from oracles import decoder, visual_tokens
from torch import Tensor


@dataclass
class Entry:
    """One cached token of a layer and key head: its place in the sequence, and whether it is visual."""

    place: int
    key: Tensor
    value: Tensor
    visual: bool


class Rule:
    """Full attention. Subclasses are methods; `layer` and `head` (a key head) number the lists."""

    def sees(self, loop: "TokenLoop", layer: int, head: int, step: int) -> list[Entry]:
        """The entries that the current token attends to; `step` is 0 in the prompt, then 1, 2, …"""
        return loop.lists[layer, head]

    def attended(self, layer: int, query_head: int, logits: Tensor, entries: list[Entry], step: int) -> None:
        """What a query head's scaled logits were; called for every token."""

    def prompt_read(self, loop: "TokenLoop") -> None:
        """After the last prompt token."""


class TokenLoop:
    """One prompt and its greedy answer under a rule."""

    def __init__(self, model: Any, rule: Rule) -> None:
        self.model, self.lm, self.rule = model, decoder(model), rule
        config = self.lm.config
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.width = self.lm.layers[0].self_attn.head_dim
        self.lists: dict[tuple[int, int], list[Entry]] = defaultdict(list)
        self.queries: dict[int, Tensor] = {}

    @torch.no_grad()
    def run(
        self, embeds: Tensor, visual: list[bool], steps: int, suppress: list[int]
    ) -> tuple[list[int], Tensor]:
        """New tokens and the logits [steps, V] that each was chosen from; `embeds` [L, C] is the prompt."""
        for place, (state, is_visual) in enumerate(zip(embeds, visual, strict=True)):
            hidden = self._token(state, place, is_visual, 0)
        self.rule.prompt_read(self)
        tokens, logits = [], []
        for step in range(1, steps + 1):
            logits.append(self.model.lm_head(self.lm.norm(hidden)))
            allowed = logits[-1].clone()
            allowed[suppress] = -torch.inf
            tokens.append(int(allowed.argmax()))
            embedded = self.model.get_input_embeddings()(torch.tensor(tokens[-1]))
            hidden = self._token(embedded, len(embeds) + step - 1, False, step)
        return tokens, torch.stack(logits)

    def _token(self, hidden: Tensor, place: int, visual: bool, step: int) -> Tensor:
        for i, layer in enumerate(self.lm.layers):
            module, normed = layer.self_attn, layer.input_layernorm(hidden)
            query = self._rotated(module.q_proj(normed).view(self.heads, self.width), place)
            key = self._rotated(module.k_proj(normed).view(self.key_heads, self.width), place)
            value = module.v_proj(normed).view(self.key_heads, self.width)
            self.queries[i] = query
            for head in range(self.key_heads):
                self.lists[i, head].append(Entry(place, key[head], value[head], visual))
            outputs = []
            for query_head in range(self.heads):
                head = query_head // (self.heads // self.key_heads)
                entries = self.rule.sees(self, i, head, step)
                logits = torch.stack([entry.key for entry in entries]) @ query[query_head] / self.width**0.5
                self.rule.attended(i, query_head, logits, entries, step)
                outputs.append(logits.softmax(0) @ torch.stack([entry.value for entry in entries]))
            hidden = hidden + module.o_proj(torch.cat(outputs))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return hidden

    def _rotated(self, x: Tensor, place: int) -> Tensor:
        half = self.width // 2
        angles = place / 10000.0 ** (torch.arange(half) / half)
        first, second = x[:, :half], x[:, half:]
        return torch.cat(
            [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], 1
        )


@torch.no_grad()
def prompts(model: Any, inputs: Any) -> list[tuple[Tensor, list[bool]]]:
    """The embeddings [L, C] of every row without padding, pictures merged, and which of them are visual."""
    calls: list[Tensor] = []
    lm = decoder(model)
    hook = lm.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs)
    hook.remove()
    real, visual = inputs["attention_mask"].bool(), visual_tokens(model, inputs)
    return [
        (embeds[row], marks[row].tolist()) for embeds, marks, row in zip(calls[0], visual, real, strict=True)
    ]


# Methods ----------------------------------------------------------------------------------------------------


def highest(scores: list[float], count: int) -> list[int]:
    """Places of the highest scores; of equal ones the first."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


class HeavyHitters(Rule):
    """H2O: each list keeps the last visual entries and those with the largest sums of attention.

    `noise(layer, tokens)` gives Keyformer's draws [H, T, T], added to the logits of each query.
    """

    def __init__(self, count: int, recent: int, noise: Any = None, tau: float = 1.0) -> None:
        self.count, self.recent, self.noise, self.tau = count, recent, noise, tau
        self.logits: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        self.kept: dict[tuple[int, int], list[int]] = {}

    def attended(self, layer, query_head, logits, entries, step):
        if step == 0:
            self.logits[layer, query_head].append(logits)

    def prompt_read(self, loop):
        groups = loop.heads // loop.key_heads
        for (layer, head), entries in loop.lists.items():
            total = torch.zeros(len(entries))
            for query_head in range(head * groups, (head + 1) * groups):
                for row, logits in enumerate(self.logits[layer, query_head]):
                    if self.noise is not None:
                        draws = self.noise(layer, len(entries))[query_head, row]
                        logits = (logits + draws[: len(logits)]) / self.tau
                    total[: len(logits)] += logits.softmax(0)
            visual = [i for i, entry in enumerate(entries) if entry.visual]
            if len(visual) <= self.count:
                continue
            older = visual[: len(visual) - self.recent]
            best = highest([float(total[i]) for i in older], self.count - self.recent)
            kept = {older[i] for i in best} | set(visual[len(visual) - self.recent :])
            self.kept[layer, head] = sorted(visual.index(i) for i in kept)
            loop.lists[layer, head] = [e for i, e in enumerate(entries) if not e.visual or i in kept]


class Votes(Rule):
    """TokenSelect: each new token sees text and the visual entries that the heads of its layer vote for."""

    def __init__(self, count: int, pool: int = 1) -> None:
        self.count, self.pool = count, pool

    def sees(self, loop, layer, head, step):
        entries = loop.lists[layer, head]
        visual = [i for i, entry in enumerate(entries) if entry.visual]
        if step == 0 or not visual:
            return entries
        votes, groups = torch.zeros(len(visual)), loop.heads // loop.key_heads
        for query_head in range(loop.heads):
            keys = torch.stack([loop.lists[layer, query_head // groups][i].key for i in visual])
            votes += (keys @ loop.queries[layer][query_head] / loop.width**0.5).softmax(0)
        chosen = {visual[i] for i in highest(pooled(votes, visual, self.pool), self.count)}
        return [e for i, e in enumerate(entries) if not e.visual or i in chosen]


class Recycled(Rule):
    """Recycled Attention: the choice of the last full step, and when the next one comes."""

    def __init__(self, count: int, stride: int, threshold: float, kernel: int) -> None:
        self.count, self.stride, self.threshold, self.kernel = count, stride, threshold, kernel
        self.chosen: dict[tuple[int, int], set[int]] = {}
        self.query: dict[int, Tensor] = {}
        self.full: dict[int, list[int]] = defaultdict(list)
        self.rows: dict[tuple[int, int], Tensor] = {}

    def _is_full(self, loop, layer, step):
        if step == 0:
            return True
        if step % self.stride:
            return False
        mean, last = loop.queries[layer].mean(0), self.query[layer]
        return float(mean @ last / (mean.norm() * last.norm())) <= self.threshold

    def sees(self, loop, layer, head, step):
        entries = loop.lists[layer, head]
        if step and head == 0 and step not in self.full[layer] and self._is_full(loop, layer, step):
            self.full[layer].append(step)
        if step == 0 or step in self.full[layer]:
            return entries
        return [e for i, e in enumerate(entries) if not e.visual or i in self.chosen[layer, head]]

    def attended(self, layer, query_head, logits, entries, step):
        if step == 0 or step in self.full[layer]:
            self.rows[layer, query_head] = logits.softmax(0)
            if query_head == self.loop.heads - 1 and step:
                self._choose(self.loop, layer)

    def prompt_read(self, loop):
        for layer in range(len(loop.lm.layers)):
            self._choose(loop, layer)

    def _choose(self, loop, layer):
        self.query[layer] = loop.queries[layer].mean(0)
        groups = loop.heads // loop.key_heads
        for head in range(loop.key_heads):
            rows = [self.rows[layer, h] for h in range(head * groups, (head + 1) * groups)]
            row = torch.stack(rows).amax(0)
            visual = [i for i, entry in enumerate(loop.lists[layer, head]) if entry.visual]
            scores = pooled(row[visual], visual, self.kernel)
            self.chosen[layer, head] = {visual[i] for i in highest(scores, self.count)}


def pooled(scores: Tensor, places: list[int], size: int) -> list[float]:
    """The highest score within `size` places around each, of the scores at `places`."""
    reach = size // 2
    return [
        max(float(other) for other, q in zip(scores, places, strict=True) if abs(p - q) <= reach)
        for p in places
    ]
