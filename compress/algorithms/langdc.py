"""LangDC: the states of a small language model that captions a clip stand for the clip's tokens."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .grid import square_side

# Paper: Seeing More, Saying More: Lightweight Language Experts are Dynamic Video Token Compressors (Wang et
# al., EMNLP 2025, arXiv 2509.00969).
END_OF_CAPTION = 151643
"""The token number that ends a caption, of Qwen2.5's vocabulary."""


def pooled_frames(features: Tensor, side: int) -> Tensor:
    """Square frames [T, n, D] as side x side means, [T, side², D]."""
    maps = features.transpose(1, 2).unflatten(2, (square_side(features.shape[1]), -1))
    return F.adaptive_avg_pool2d(maps, side).flatten(2).transpose(1, 2)


def base_tokens(image: Tensor, video: Tensor) -> Tensor:
    """The tokens of a whole video, [N, D]: those of the image encoder, 6 x 6 per frame of `image` [T, n, D],
    then those of the video encoder, 4 x 4 per frame of `video` [T, m, D]."""
    return torch.cat([pooled_frames(image, 6).flatten(0, 1), pooled_frames(video, 4).flatten(0, 1)])


def caption_inputs(image: Tensor, video: Tensor, frames_per_clip: int) -> Tensor:
    """The tokens that the captioning model reads of each clip, [clips, N, D]: 12 x 12 per frame of `image`
    [T, n, D], then 8 x 8 per frame of `video` [T, m, D]."""
    parts = pooled_frames(image, 12), pooled_frames(video, 8)
    return torch.cat([part.unflatten(0, (-1, frames_per_clip)).flatten(1, 2) for part in parts], 1)


def caption_states(steps: Sequence[Sequence[Tensor]], layer: int) -> Tensor:
    """The states that stand for a caption, [clips, S, C], one per step of generation.

    `steps[s][layer]` are the states [clips, L, C] that the captioning model returns with step s (0 for its
    embeddings); the last place counts. So the first state is that of the prompt's last token, and step s
    shows the token before the one that it generates.
    """
    return torch.stack([step[layer][:, -1] for step in steps], 1)


def padded_captions(states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The captions of all clips one after the other, steps after their ends included: states [clips, S, C]
    and the generated `ids` [clips, S] → tokens [clips · S, C] and which of them are to be attended to, bool
    [clips · S]."""
    return states.flatten(0, 1), (ids != END_OF_CAPTION).flatten()


def cut_captions(states: Tensor, ids: Tensor) -> Tensor:
    """The captions of all clips one after the other, each up to its end: states [clips, S, C] and the
    generated `ids` [clips, S] → [N, C].

    Parity: a caption that does not end loses its last step.
    """
    steps = ids.shape[1]
    is_end = ids == END_OF_CAPTION
    ends = torch.where(is_end.any(1), is_end.int().argmax(1), steps - 1).tolist()
    return torch.cat([own[:end] for own, end in zip(states, ends, strict=True)])


def spliced(text: Tensor, ids: Tensor, placeholder: int, visual: Tensor) -> Tensor:
    """The embeddings `text` [L, D] of a prompt of token numbers `ids` [L] with its one run of `placeholder`
    replaced by `visual` [N, D]. Raises ValueError for prompts with no run or several."""
    places = (ids == placeholder).nonzero().squeeze(1)
    if not len(places) or int(places[-1] - places[0]) + 1 != len(places):
        raise ValueError(
            f"the prompt holds {len(places)} placeholders {placeholder} that are not one run; give one run"
        )
    return torch.cat([text[: places[0]], visual, text[places[-1] + 1 :]])
