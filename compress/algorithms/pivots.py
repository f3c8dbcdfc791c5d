"""Keeping the tokens that duplicate a few pivots least."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .select import top_k


def least_duplicates(
    states: Tensor,
    text_states: Tensor,
    keys: Tensor,
    text_keys: Tensor,
    count: int,
    *,
    pivot_image: int = 4,
    pivot_text: int = 4,
    places: Tensor | None = None,
    text_places: Tensor | None = None,
) -> Tensor:
    """The `count` tokens of an image that stay, ascending [count].

    Pivots are the tokens with the largest L1 norm of their keys: `pivot_image` of the image's, which stay,
    and `pivot_text` of the text's. Each pivot takes as many of the remaining tokens, those least similar to
    it by the cosine of the states; where the number cannot be shared out evenly, the first pivots take one
    more.
    `states` [N, D] and `keys` [N, K] are the image's, `text_states` [T, D] and `text_keys` [T, K] the text's,
    `places` [N] and `text_places` [T] count tokens in the prompt (by default the image comes first), which
    decides the order of the pivots. Of equal values the lower place wins.

    DART (Wen et al., "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters
    More", 2025, arXiv 2502.11494). Raises ValueError unless 0 ≤ count ≤ N.
    """
    number = len(states)
    if not 0 <= count <= number:
        raise ValueError(f"count is {count}; of {number} tokens between 0 and all can stay")
    places = torch.arange(number) if places is None else places
    text_places = torch.arange(len(text_states)) + number if text_places is None else text_places
    first = top_k(keys.float().abs().sum(-1), min(pivot_image, count))
    second = top_k(text_keys.float().abs().sum(-1), min(pivot_text, len(text_keys)))
    by_place = {
        **dict(zip(places[first.to(places.device)].tolist(), states[first], strict=True)),
        **dict(zip(text_places[second.to(text_places.device)].tolist(), text_states[second], strict=True)),
    }
    # Parity: the pivots' turns follow the order in which CPython iterates a set of the list of their places.
    turns = list(set(list(by_place)))
    free = torch.ones(number, dtype=torch.bool, device=states.device)
    free[first] = False
    unit = normalize(states.float(), dim=-1)
    each, more = divmod(count - len(first), max(1, len(turns)))
    for turn, place in enumerate(turns):
        similarity = unit @ normalize(by_place[place].float(), dim=-1)
        order = similarity.masked_fill(~free, torch.inf).sort(stable=True).indices
        free[order[: each + (turn < more)]] = False
    return (~free).nonzero().squeeze(1)
