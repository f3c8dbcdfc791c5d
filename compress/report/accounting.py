"""Multiply-adds of transformer blocks as a function of the tokens that enter them.

Papers call these FLOPs; a multiply-add is two floating-point operations.
"""


def llm_block_macs(n: int, d: int, m: int, kv_dim: int | None = None) -> int:
    """Multiply-adds of one language-model block on `n` tokens: width `d`, gated MLP of hidden width `m`.

    4 n d² + 2 n² d + 3 n d m (FastV and its successors). `kv_dim` is the width of keys and values, heads
    times head width, where grouped queries make it less than `d`.
    """
    kv_dim = d if kv_dim is None else kv_dim
    return 2 * n * d * (d + kv_dim) + 2 * n * n * d + 3 * n * d * m


def skipped_macs(
    d: int, m: int, kv_dim: int, n: int, *, projections: int = 0, rows: int = 0, keys: int = 0, mlp: int = 0
) -> int:
    """Multiply-adds that a block on `n` tokens saves where some skip parts of it: so many `projections` of
    queries and outputs, `rows` of attention, `keys` and values, and passes through the gated MLP of hidden
    width `m`; `d` and `kv_dim` as in `llm_block_macs`."""
    return 2 * projections * d * d + 2 * rows * n * d + 2 * keys * d * kv_dim + 3 * mlp * d * m


def vit_block_macs(n: int, C: int) -> int:
    """Multiply-adds of one ViT block on `n` tokens, class token included: width `C`, MLP width 4 C.

    12 n C² + 2 n² C.
    """
    return 12 * n * C * C + 2 * n * n * C


def renewed_block_macs(n: int, C: int, hidden: int, renewed: int) -> int:
    """Multiply-adds of one ViT block on `n` tokens, of which `renewed` have queries, values, outputs and an
    MLP of width `hidden`, and the others only keys (STC); `renewed` = n is the whole block.

    n C² + r (3 C² + 2 n C + 2 C M).
    """
    return n * C * C + renewed * (3 * C * C + 2 * n * C + 2 * C * hidden)
