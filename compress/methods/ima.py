"""IMA: leave out layers, or parts of them, for perceptual tokens, which layers change slowly."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

from ..algorithms.select import uniform
from ..reducer import Skip, SkipReducer

MODE = re.compile(
    r"(?P<calls>context_|onlycontext_|)(?P<what>skip_block|skip_ffn|skip_attn|parrallel_attn|parrallel_block)"
    r"(?P<prompt>_prompt|)"
)
LENGTHS = {"": (1, 1), "context_": (1, 2100), "onlycontext_": (6, 2100)}
"""Tokens of the forwards that a mode acts on, by the beginning of its name."""
EFFECTS: dict[str, Literal["block", "ffn", "attn", "parallel_attn", "parallel_block"]] = {
    "skip_block": "block",
    "skip_ffn": "ffn",
    "skip_attn": "attn",
    "parrallel_attn": "parallel_attn",
    "parrallel_block": "parallel_block",
}


@dataclass(kw_only=True)
class IMA(SkipReducer):
    """Implicit Multimodal Alignment: On the Generalization of Frozen LLMs to Multimodal Inputs (Shukor and
    Cord, NeurIPS 2024, arXiv 2405.16700).

    Layer i is treated when `start_layer` < i < `end_layer` and i is a multiple of `skip_interval` (of a list,
    each number holds for an equal part of the depth). `skip_mode` "normal" leaves out nothing; the other
    names are those of the code:

    - in front "context_" acts on the prompt and on the steps after it, "onlycontext_" on the prompt alone,
      nothing on the steps alone;
    - "skip_block" leaves out the layer, "skip_ffn" its MLP, "skip_attn" its attention, "parrallel_attn" has
      both read the same input, and "parrallel_block" runs each layer of `block_pairs` (or every so many
      layers, from 0) beside the one after it;
    - "_prompt" behind a skip leaves out the part for an image's tokens only. Text attends to the keys and
      values of their unchanged states. This is the form for many visual tokens, and the default.

    All tokens stay in the sequence and in the cache. Modes for all tokens act in forwards of up to 2100
    tokens and take no budget but 1.0; else `keep` is the share of the layers that compute an image's tokens
    (as many as there are between `start_layer` and `end_layer` can be left out), and the treated layers lie
    at even distances. Parity: with `prompt_len`, "skip_ffn_prompt" takes that many leading tokens of every
    forward and adds the input of the MLP for them, as the code does.
    """

    summary: ClassVar = "layers left out, no token dropped"
    paper: ClassVar = "arXiv 2405.16700"
    verified: ClassVar = "13 modes: logits 3.6e-6, two decode steps"

    skip_mode: str = "context_skip_block_prompt"
    skip_interval: int | Sequence[int] = 2
    start_layer: int = 0
    end_layer: int = 31
    block_pairs: int | Sequence[int] | None = None
    prompt_len: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        mode = self._mode()
        intervals = [self.skip_interval] if isinstance(self.skip_interval, int) else self.skip_interval
        if not intervals or any(isinstance(i, bool) or not isinstance(i, int) or i < 1 for i in intervals):
            raise ValueError(
                f"skip_interval is {self.skip_interval!r}; it takes a number of layers from 1, or several"
            )
        if (self.block_pairs is None) == (mode is not None and mode["what"] == "parrallel_block"):
            raise ValueError(
                f"block_pairs is {self.block_pairs!r} and skip_mode {self.skip_mode!r}: parrallel_block "
                "takes the first layers of its pairs, or the distance between them, and other modes take none"
            )
        if self.block_pairs is not None:
            pairs = sorted(self._pairs(math.inf))
            if not pairs or pairs[0] < 0 or any(b - a < 2 for a, b in pairwise(pairs)):
                raise ValueError(
                    f"block_pairs is {self.block_pairs!r}; it takes layers from 0, two or more apart, or "
                    "such a distance"
                )
        if self.prompt_len is not None and (
            mode is None or mode["what"] != "skip_ffn" or not mode["prompt"] or self.prompt_len < 1
        ):
            raise ValueError(
                f"prompt_len is {self.prompt_len} and skip_mode {self.skip_mode!r}; it takes a number of "
                "tokens from 1, for skip_ffn_prompt alone"
            )

    def _mode(self) -> dict[str, str] | None:
        """The parts of the mode's name; None for "normal". Raises ValueError for other names."""
        if self.skip_mode == "normal":
            return None
        match = MODE.fullmatch(self.skip_mode)
        if match is None or (match["prompt"] and match["what"].startswith("parrallel")):
            raise ValueError(
                f"skip_mode is {self.skip_mode!r}; it takes normal, or skip_block, skip_ffn, skip_attn, "
                "parrallel_attn or parrallel_block, with context_ or onlycontext_ in front and, for skips, "
                "_prompt behind"
            )
        if match["prompt"] and not match["calls"] and self.prompt_len is None:
            raise ValueError(
                f"skip_mode is {self.skip_mode!r}, which acts on steps after the prompt, where no image's "
                "tokens are; put context_ in front"
            )
        return match.groupdict()

    def _pairs(self, num_layers: float) -> tuple[int, ...]:
        """The first layers of the pairs that run side by side, of the model's layers."""
        if not isinstance(self.block_pairs, int):
            return tuple(self.block_pairs)
        distance = self.block_pairs
        end = 3 * abs(distance) if num_layers == math.inf else int(num_layers) - 1
        return tuple(range(0, end, distance)) if distance > 0 else ()

    def skips(self, num_layers: int, budget: float | None) -> dict[int, Skip]:
        """What each treated layer leaves out.

        Raises ValueError for budgets other than 1.0 in modes for all tokens.
        """
        mode = self._mode()
        if mode is None or (budget is not None and budget >= 1):
            return {}
        what, everyone = EFFECTS[mode["what"]], not mode["prompt"]
        if budget is not None and (everyone or self.prompt_len is not None):
            raise ValueError(
                f"keep is {budget:.3g}, and skip_mode {self.skip_mode!r} takes no budget but 1.0, at which "
                "nothing is left out: set skip_interval, or a mode for an image's tokens such as "
                "context_skip_block_prompt"
            )
        least, most = LENGTHS[mode["calls"]]
        if everyone:
            skip = Skip(what, "all", least, most)
        elif self.prompt_len is not None:
            skip = Skip(what, "visual", least, most, leading=self.prompt_len)
        else:
            skip = Skip(what)
        return dict.fromkeys(self._treated(num_layers, budget, what == "parallel_block"), skip)

    def _treated(self, num_layers: int, budget: float | None, pairs: bool) -> Sequence[int]:
        """The layers that leave something out."""
        if pairs:
            return self._pairs(num_layers)
        layers = range(max(0, self.start_layer) + 1, min(self.end_layer, num_layers))
        if budget is not None:
            count = min(len(layers), round((1 - budget) * num_layers))
            return [layers[place] for place in uniform(len(layers), count).tolist()]
        intervals = [self.skip_interval] if isinstance(self.skip_interval, int) else self.skip_interval
        return [i for i in layers if i % intervals[i * len(intervals) // num_layers] == 0]
