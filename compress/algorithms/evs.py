"""Efficient video sampling: keep the tokens of a video that differ most from the same place one frame
earlier."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .select import top_k_mask

FIRST_FRAME = 255.0  # above every score, which lies in [0, 2]


def evs_count(frames: int, tokens_per_frame: int, share: float) -> int:
    """How many tokens of a video stay at a retained `share` of them: truncated, at least one whole frame.

    Give 1 - q for a pruning rate q, in Python's floats: at q = 0.9 it is a little below 0.1, and 100 tokens
    become 9, as in the original.
    """
    return max(tokens_per_frame, int(frames * tokens_per_frame * share))


def evs_scores(features: Tensor) -> Tensor:
    """1 - cosine of each token to the token at its place one frame earlier: features [T, n, D] → [T, n].

    Scores are computed in the features' own precision; those of the first frame are 255, so that it stays.
    """
    scores = features.new_full(features.shape[:2], FIRST_FRAME)
    scores[1:] = 1 - F.cosine_similarity(features[1:], features[:-1], dim=-1, eps=1e-8)
    return scores


def evs_select(features: Tensor, count: int) -> Tensor:
    """Which tokens of a video's features [T, n, D] are the `count` with the highest scores, bool [T, n].

    Of equal scores the earliest token stays. Efficient Video Sampling: Pruning Temporally Redundant Tokens
    for Faster VLM Inference (Bagrov et al., 2025, arXiv 2510.14624), as the serving engine vLLM has it.
    """
    return top_k_mask(evs_scores(features).flatten(), count).view(features.shape[:2])


@dataclass(frozen=True)
class MediumSites:
    """The kept tokens of one picture or video, for `evs_positions`.

    `sites` [k] are their places, ascending, among the tokens of `frames` maps of `height` x `width` (1 for a
    picture), and `seconds` is how far apart frames are in positions: positions per second times the whole
    seconds per frame.
    """

    sites: Tensor
    frames: int
    height: int
    width: int
    seconds: float = 1.0

    @property
    def positions(self) -> Tensor:
        """Time, row and column of each kept token, for a medium that begins at 0, [3, k]."""
        tokens = self.height * self.width
        frame, place = self.sites // tokens, self.sites % tokens
        time = (frame.double() * self.seconds).long()
        return torch.stack([time, place // self.width, place % self.width])

    @property
    def extent(self) -> int:
        """One more than the largest position of the whole medium."""
        return max(int((self.frames - 1) * self.seconds), self.height - 1, self.width - 1) + 1


def evs_positions(
    ids: Tensor,
    media: Sequence[MediumSites],
    placeholders: Sequence[int],
    *,
    restart: Literal["evs", "original"] = "original",
    computed: Tensor | None = None,
) -> Tensor:
    """M-RoPE positions [3, N] of a prompt of token numbers `ids` [N] whose media were pruned.

    Each of `media` stands at a run of tokens that are in `placeholders`, one token after its start marker,
    and its tokens keep their places in the whole grid. Text after it starts where it does in the whole
    prompt, behind the largest position of the medium ("original"), or, as the engine numbers it, as many
    positions behind its start as it has columns ("evs"), which may lie inside the medium. `computed` [3, n]
    are positions of the first n tokens from an earlier call with the beginning of the prompt; they stay as
    they are. Raises ValueError where prompt and media do not belong together.
    """
    positions = torch.zeros(3, len(ids), dtype=torch.long)
    known = 0 if computed is None else computed.shape[1]
    if computed is not None:
        positions[:, :known] = computed
    is_placeholder = torch.isin(ids.cpu(), torch.tensor(list(placeholders)))
    place = following = number = 0
    while place < len(ids):
        if not is_placeholder[place]:
            if place >= known:
                positions[:, place] = following
            following, place = int(positions[-1, place]) + 1, place + 1
            continue
        if number == len(media):
            raise ValueError(f"the prompt holds placeholders for more than the {len(media)} media")
        medium, own = media[number].positions, following
        end = place
        while end < len(ids) and is_placeholder[end] and end - place < medium.shape[1]:
            end += 1
        if end - place < medium.shape[1] and end < len(ids):
            raise ValueError(
                f"medium {number} keeps {medium.shape[1]} tokens, and the prompt holds {end - place} for it"
            )
        fresh = max(place, known)
        positions[:, fresh:end] = own + medium[:, fresh - place : end - place]
        reach = media[number].width if restart == "evs" else media[number].extent
        following, place, number = own + reach, end, number + 1
    return positions
