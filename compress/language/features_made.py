"""Features that a session has made or prepared, until a forward takes them.

A record hangs on the output object that carries the features. Hooks of dispatched models rebuild that object
on the way to the forward, so the session also identifies its records by the lengths and a sample of the
features.
"""

import threading
import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..families import Record
from .cache import FUNCTIONAL


def record_of(output: Any) -> Record | None:
    """The record that hangs on features, if any."""
    return getattr(output, "vistok_record", None)


@dataclass(frozen=True)
class _Waiting:
    """Features of one modality: their record, the lengths of the items, the first and the last vector."""

    record: Record
    lengths: list[int]
    ends: tuple[Tensor, Tensor]


class MadeFeatures(threading.local):
    """The features that this thread has made since its last forward, and those that `prepare` returned to
    any thread."""

    def __init__(self, prepared: list[weakref.ref]) -> None:
        self._waiting: dict[str, _Waiting] = {}
        self._prepared = prepared

    def add(self, modality: str, output: Any, record: Record) -> None:
        """Note features that were just made."""
        output.vistok_record = record
        if sum(record.lengths):
            self._waiting[modality] = _Waiting(record, _lengths(output), _ends(output))

    def add_prepared(self, outputs: dict[str, Any]) -> None:
        """Note features that are reduced already; those that they were made of enter no forward."""
        self._waiting = {}
        self._prepared[:] = [reference for reference in self._prepared if reference() is not None]
        self._prepared += [weakref.ref(output) for output in outputs.values()]

    def are_prepared(self, outputs: dict[str, Any]) -> bool:
        """Whether features, or pieces of them, come from `prepare`, so that nothing is left to drop."""
        return any(self._is_prepared(modality, output) for modality, output in outputs.items())

    def _is_prepared(self, modality: str, output: Any) -> bool:
        record = record_of(output)
        if record is not None:
            return record.reduced
        if modality in self._waiting:  # these were just made
            return False
        return any(
            _contains(known, output) for reference in self._prepared if (known := reference()) is not None
        )

    def records_of(self, outputs: dict[str, Any], generating: bool) -> dict[str, Record]:
        """The records of features that reach a forward; features of the caller have none.

        Raises NotImplementedError, while `generating`, for pieces of features that were just made, as a
        chunked prefill gives.
        """
        waiting, records = self._waiting, {}
        if outputs:  # a chunk of text alone leaves them waiting
            self._waiting = {}
        for modality, output in outputs.items():
            record, known = record_of(output), waiting.get(modality)
            if record is None and known is not None:
                record = _matched(known, output, generating)
            if record is not None:
                records[modality] = record
        return records


def _matched(known: _Waiting, output: Any, generating: bool) -> Record | None:
    lengths, ends = _lengths(output), _ends(output)
    repeats = max(1, len(lengths) // len(known.lengths))  # once per beam
    whole = Counter(lengths) == Counter(known.lengths * repeats)
    if whole and _equal(ends[0], known.ends[0]) and _equal(ends[1], known.ends[1]):
        return known.record
    if generating and sum(lengths) < sum(known.lengths):
        raise NotImplementedError(
            f"this prefill is cut into chunks (prefill_chunk_size): {sum(lengths)} of {sum(known.lengths)} "
            "visual tokens came, so a reducer would see pieces of an image; leave prefill_chunk_size unset, "
            f"or {FUNCTIONAL}"
        )
    return None


def _lengths(output: Any) -> list[int]:
    return [len(item) for item in output.pooler_output]


def _ends(output: Any) -> tuple[Tensor, Tensor]:
    items = [item for item in output.pooler_output if len(item)] or [torch.empty(1, 0)]
    return items[0][0].detach().clone(), items[-1][-1].detach().clone()


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b.to(a))


def _contains(whole: Any, piece: Any) -> bool:
    """Whether the features [n, D] of an output are a stretch of those of another."""
    known, vectors = (
        torch.cat([x.flatten(0, -2) for x in output.pooler_output]) for output in (whole, piece)
    )
    count = len(vectors)
    if not 0 < count <= len(known) or known.shape[1] != vectors.shape[1]:
        return False
    vectors = vectors.to(known)
    starts = (known[: len(known) - count + 1] == vectors[0]).all(-1).nonzero().flatten().tolist()
    return any(torch.equal(known[start : start + count], vectors) for start in starts)
