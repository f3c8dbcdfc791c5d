"""Tokens of the text that rate an image, and what their attention says about its tokens.

SparseVLM (Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model
Inference", 2024, arXiv 2410.04417).
"""

from torch import Tensor

from .select import top_k


def text_raters(image: Tensor, text: Tensor) -> Tensor:
    """Which tokens of the text rate an image, bool [T], from input embeddings image [N, D] and text [T, D].

    They are those whose mean share in the image, over its tokens, of a soft-max over the text of the dot
    products exceeds the mean of all of the text.
    """
    relevance = (image.float() @ text.float().T).softmax(-1).mean(0)
    return relevance > relevance.mean()


def undecayed_attention(rows: Tensor, decay: Tensor, heads: int) -> Tensor:
    """Attention of raters [H, R, N] without the decay that rotary positions give it, mean over raters and
    over the `heads` (at most H) that attend to the image most, [N].

    `decay` [R, N] is the product of queries and keys of ones, rotated to their positions. Raises ValueError
    where it is not positive.
    """
    if not bool((decay > 0).all()):
        raise ValueError(
            f"the rotary product of a rater and a visual token is {float(decay.min()):.3g}, which attention "
            "cannot be divided by: they are too far apart for these positions. Use SparseVLM(version='1.5')"
        )
    chosen = top_k(rows.sum((1, 2)), min(heads, len(rows)))
    return (rows[chosen] / decay).mean((0, 1))
