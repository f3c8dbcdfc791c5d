"""The state of a stream as plain values, and the checks of one that comes back."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .cacher import CacherState, reference_tensors, references_of
from .kept import KeptFrame, KeptTokens
from .pruner import PrunerState
from .state import StreamState
from .towers import VideoModel

FORMAT = "vistok stream 1"
_SAMPLE = 16  # values of each weight in the digest
_NUMBERS = ("frames", "chunks")
_TENSORS = (
    "references",
    "memory",
    "channels",
    "numbers",
    "lengths",
    "features",
    "index",
    "scores",
    "pending",
)
_KEYS = {"format", "digest", "settings", *_NUMBERS, *_TENSORS}


def digest(parts: VideoModel) -> str:
    """A fingerprint of what makes a model's features: settings, and of each weight the name, shape, dtype and
    first values."""
    weights = parts.weights()
    names = [(key, tuple(value.shape), str(value.dtype)) for key, value in sorted(weights.items())]
    values = torch.cat([weights[key].flatten()[:_SAMPLE].float() for key, _, _ in names]).cpu()
    total = hashlib.sha256(repr((parts.settings, names)).encode())
    total.update(values.numpy().tobytes())
    return total.hexdigest()


def state_dict_of(state: StreamState, parts: VideoModel, settings: dict[str, Any]) -> dict[str, Any]:
    """A state in plain values and tensors of their own."""
    frames, empty = list(state.kept.frames), torch.zeros(0)

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(frame, name) for frame in frames]) if frames else empty

    def copied(tensor: Tensor | None) -> Tensor:
        return empty if tensor is None else tensor.clone()

    return {
        "format": FORMAT,
        "digest": digest(parts),
        "settings": settings,
        "frames": state.processed,
        "chunks": state.cacher.chunks,
        "references": reference_tensors(state.cacher),
        "memory": copied(state.pruner.memory),
        "channels": copied(state.pruner.channels),
        "numbers": torch.tensor([frame.number for frame in frames], dtype=torch.int64),
        "lengths": torch.tensor([len(frame.index) for frame in frames], dtype=torch.int64),
        "features": joined("features"),
        "index": joined("index"),
        "scores": joined("scores"),
        "pending": copied(state.pending),
    }


def state_from(state: Mapping[str, Any], kept: KeptTokens, device: torch.device) -> StreamState:
    """The state in a dictionary that `check` accepts, in tensors of its own on a device; `kept` is empty,
    with the bounds of the stream."""
    tensors, chunks = {name: state[name].to(device) for name in _TENSORS}, state["chunks"]
    frames, start = [], 0
    for number, length in zip(state["numbers"].tolist(), state["lengths"].tolist(), strict=True):
        own = (tensors[name][start : start + length].clone() for name in ("features", "index", "scores"))
        frames.append(KeptFrame(number, *own))
        start += length
    kept.replace(frames)
    if not chunks:
        return StreamState(kept, pending=_own(tensors["pending"]))
    cacher = CacherState(chunks, references_of(tensors["references"]))
    pruner = PrunerState(chunks, tensors["memory"].clone(), tensors["channels"].clone())
    return StreamState(kept, state["frames"], cacher, pruner, _own(tensors["pending"]))


def _own(pending: Tensor) -> Tensor | None:
    return pending.clone() if len(pending) else None


def check(state: Any, parts: VideoModel, settings: dict[str, Any], count: int) -> None:
    """Raise TypeError or ValueError, in one sentence, unless a state is whole and belongs to a stream of this
    model, of `settings` and `count` tokens per frame."""
    if not isinstance(state, Mapping):
        raise TypeError(f"the state is a {type(state).__name__}; it is what state_dict() of a stream returns")
    if state.get("format") != FORMAT:
        raise ValueError(
            f"the state has the format {state.get('format')!r}; this version reads {FORMAT!r}, which "
            "state_dict() of a stream returns"
        )
    if lacking := sorted(_KEYS - set(state)):
        raise ValueError(f"the state is not whole: it lacks {', '.join(lacking)}; save it again")
    if state["digest"] != digest(parts):
        raise ValueError(
            f"the state was made by another model than this {parts.name} (other settings, shapes or weights "
            "of its tower and projector); load it into a stream of the model that made it"
        )
    if state["settings"] != settings:
        saved = state["settings"] if isinstance(state["settings"], Mapping) else {}
        names = [name for name in settings if saved.get(name) != settings[name]]
        listed = ", ".join(f"{name} {saved.get(name)!r}, here {settings[name]!r}" for name in names)
        raise ValueError(f"the state was made with other settings ({listed}); make the stream with those")
    reason = _flaw(state, parts, settings, count)
    if reason is not None:
        raise ValueError(f"the state is damaged: {reason}; use another copy")


def _flaw(state: Mapping[str, Any], parts: VideoModel, settings: dict[str, Any], count: int) -> str | None:
    """What does not fit in a state; None: everything does."""
    for name in _NUMBERS:
        if isinstance(state[name], bool) or not isinstance(state[name], int) or state[name] < 0:
            return f"{name} is {state[name]!r}, not a number from 0"
    for name in _TENSORS:
        if not isinstance(state[name], Tensor) or not state[name].ndim:
            return f"{name} is a {type(state[name]).__name__}, not a tensor with rows"
    frames, chunks, weight = state["frames"], state["chunks"], parts.weight
    if frames != chunks * settings["chunk"]:
        return f"{frames} frames are not {chunks} chunks of {settings['chunk']}"
    held, tokens = len(state["numbers"]), len(state["features"])
    exact = torch.promote_types(weight.dtype, torch.float32)
    places, width = parts.tower.embeddings.position_embedding.weight.shape
    channels = parts.core.get_input_embeddings().weight.shape[1]
    pictures, side = len(state["pending"]), parts.image_size
    shapes = {
        "references": ((len(parts.layers), 4, places, width), weight.dtype),
        "memory": ((channels // 2,), exact),
        "channels": ((channels // 2,), torch.int64),
        "features": ((tokens, channels), weight.dtype),
        "index": ((tokens,), torch.int64),
        "scores": ((tokens,), exact),
    }
    empty = ((0,), torch.float32)
    shapes = shapes if chunks else dict.fromkeys(shapes, empty)
    shapes |= {
        "numbers": ((held,), torch.int64),
        "lengths": ((held,), torch.int64),
        "pending": ((pictures, 3, side, side), weight.dtype) if pictures else empty,
    }
    for name, (shape, dtype) in shapes.items():
        tensor = state[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            return f"{name} is {list(tensor.shape)} {tensor.dtype}, expected {list(shape)} {dtype}"
        if not bool(tensor.isfinite().all()):
            return f"{name} holds NaN or infinity"
    if held and not chunks:
        return f"{held} frames are held before any chunk"
    if pictures >= settings["chunk"]:
        return f"{pictures} frames wait for a chunk of {settings['chunk']}"
    return _flaw_in_frames(state, parts, settings, count) if chunks else None


def _flaw_in_frames(
    state: Mapping[str, Any], parts: VideoModel, settings: dict[str, Any], count: int
) -> str | None:
    numbers, lengths = state["numbers"].tolist(), state["lengths"].tolist()
    if numbers != sorted(set(numbers)) or numbers[:1] < [0] or numbers[-1:] != [state["frames"] - 1]:
        return f"the numbers of the frames held do not ascend to {state['frames'] - 1}"
    if min(lengths) < 1 or max(lengths) > count or sum(lengths) != len(state["index"]):
        return (
            f"its frames hold {sum(lengths)} tokens, at most {max(lengths)} each, for {len(state['index'])}"
        )
    if sum(lengths) > settings["max_tokens"]:
        return f"it holds {sum(lengths)} tokens, above max_tokens {settings['max_tokens']}"
    for index in state["index"].split(lengths):
        if int(index[0]) < 0 or int(index[-1]) >= parts.frame_tokens or bool((index.diff() <= 0).any()):
            return f"the places of kept tokens do not ascend within {parts.frame_tokens}"
    chosen = state["channels"]
    width = parts.core.get_input_embeddings().weight.shape[1]
    if int(chosen.min()) < 0 or int(chosen.max()) >= width or len(chosen.unique()) < len(chosen):
        return f"channels are not different ones below {width}"
    return None
