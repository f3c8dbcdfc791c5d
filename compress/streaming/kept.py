"""The tokens that a stream holds, in bounded space."""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algorithms import stc


@dataclass(frozen=True)
class KeptFrame:
    """The tokens held of one frame: its `number` in the stream, and of each token the `features` [n, D], its
    place `index` int64 [n] in the frame, ascending, and its score [n] (low: novel)."""

    number: int
    features: Tensor
    index: Tensor
    scores: Tensor

    def thinned(self, count: int) -> "KeptFrame":
        """The frame with its `count` most novel tokens."""
        places = stc.most_novel(self.scores[None], count)[0]
        return KeptFrame(self.number, self.features[places], self.index[places], self.scores[places])


class KeptTokens:
    """Tokens of the frames of a stream, at most `limit` of them.

    When more come, tokens leave from the oldest frame that holds more than `least` of them, the least novel
    first, until it holds `least`; then from the next. When no frame but the newest holds more, the
    oldest frame leaves in the same way, down to nothing.
    """

    def __init__(self, limit: int, least: int) -> None:
        self.limit, self.least = limit, least
        self.frames: deque[KeptFrame] = deque()
        self.total = 0
        self._thin = 0  # how many of the oldest frames hold at most `least`

    def add(self, frame: KeptFrame) -> None:
        """Hold a frame, and let tokens of older ones leave."""
        self.frames.append(frame)
        self.total += len(frame.index)
        while self.total > self.limit:
            self._leave(self.total - self.limit)

    def _leave(self, surplus: int) -> None:
        """Let at most `surplus` tokens of one frame leave."""
        place, least = self._thin, self.least
        if place >= len(self.frames) - 1:  # the newest stays whole as long as there are others
            place, least = 0, 0
        frame = self.frames[place]
        held = len(frame.index)
        left = max(held - surplus, min(least, held))
        self.total -= held - left
        if left == 0:
            del self.frames[place]
            self._thin = max(self._thin - 1, 0)
            return
        if left < held:
            self.frames[place] = frame.thinned(left)
        if left <= self.least:
            self._thin = max(self._thin, place + 1)

    def features(self) -> Tensor:
        """All tokens in the order of time [N, D]."""
        return torch.cat([frame.features for frame in self.frames])

    def copy(self) -> "KeptTokens":
        """The same tokens, to which others can be added."""
        copy = KeptTokens(self.limit, self.least)
        copy.frames, copy.total, copy._thin = self.frames.copy(), self.total, self._thin
        return copy

    def replace(self, frames: list[KeptFrame]) -> None:
        """Hold these frames, in the order of time, in place of all others."""
        self.frames, self.total, self._thin = deque(frames), 0, 0
        self.total = sum(len(frame.index) for frame in frames)
        while self._thin < len(frames) and len(frames[self._thin].index) <= self.least:
            self._thin += 1

    def bytes(self) -> int:
        """Memory of the tensors."""
        return sum(f.features.nbytes + f.index.nbytes + f.scores.nbytes for f in self.frames)
