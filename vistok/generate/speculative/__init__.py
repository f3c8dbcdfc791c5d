"""Speculative decoding: tokens are drafted cheaply, and one pass of the model verifies several of them.

`trees` describes drafts, `verify` has the one verifier with its rules (plain, LANTERN), and `jacobi` verifies
the drafts that a model makes for itself (SJD, GSD).
"""

from .jacobi import GSD, JacobiVerdict, verify_drafts
from .neighbours import neighbour_table
from .trees import DraftTree
from .verify import Lantern, Verdict, verify, verify_greedy

__all__ = [
    "GSD",
    "DraftTree",
    "JacobiVerdict",
    "Lantern",
    "Verdict",
    "neighbour_table",
    "verify",
    "verify_drafts",
    "verify_greedy",
]
