"""Frames of video files and of folders of pictures."""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .extras import needs
from .files import check_source
from .image_files import is_image
from .images import load_image

_EARLY = 1e-6  # seconds by which a frame may come before its time


@dataclass(frozen=True)
class Frame:
    """One frame: its `number` in the file from 0, its time in `seconds` behind the first, and `pixels` uint8
    [3, H, W], upright."""

    number: int
    seconds: float
    pixels: Tensor


def iterate_frames(
    path: str | os.PathLike[str], *, fps: float | None = None, folder_fps: float | None = None
) -> Iterator[Frame]:
    """The frames of a video, one after the other, at constant memory.

    `path` is a video file that FFmpeg decodes (H.264 in MP4 and others; the extra `video`), or a folder of
    pictures, which are frames in the order of the numbers in their names. With `fps` it is the first frame
    of each stretch of 1/fps seconds, and at most the frames that there are; without it all of them. A folder
    holds no times: `folder_fps` states how many of its pictures are one second.

    Raises:
        FileNotFoundError, OSError: nothing or no ordinary file or folder there.
        ModuleNotFoundError: PyAV is not installed.
        ValueError: what is not a video, frames of several sizes, and a file that is cut off or damaged, with
            the last frame that is whole. Frames before it have been returned.
    """
    for name, rate in (("fps", fps), ("folder_fps", folder_fps)):
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"{name} is {rate}; it takes a number of frames per second above 0")
    path = Path(path).expanduser()
    if path.is_dir():
        if fps is not None and folder_fps is None:
            raise ValueError(
                f"{path} is a folder, and fps={fps} needs the times of its pictures; give folder_fps, the "
                "number of pictures per second"
            )
        frames = _folder_frames(path, folder_fps or 1.0)
    else:
        if folder_fps is not None:
            raise ValueError(f"folder_fps is for folders of pictures, and {path} is not one; leave it out")
        frames = _file_frames(check_source(path))
    return frames if fps is None else _sampled(frames, fps)


def read_frames(
    path: str | os.PathLike[str], *, fps: float | None = None, folder_fps: float | None = None
) -> Tensor:
    """All frames that `iterate_frames` returns, uint8 [T, 3, H, W]; long videos are better read one by one.

    Raises what `iterate_frames` does.
    """
    return torch.stack([frame.pixels for frame in iterate_frames(path, fps=fps, folder_fps=folder_fps)])


def _sampled(frames: Iterator[Frame], fps: float) -> Iterator[Frame]:
    following = 0.0
    for frame in frames:
        if frame.seconds >= following - _EARLY:
            yield frame
            following = (math.floor((frame.seconds + _EARLY) * fps) + 1) / fps


# Folders ----------------------------------------------------------------------------------------------------


def _folder_frames(folder: Path, rate: float) -> Iterator[Frame]:
    paths = sorted((path for path in folder.iterdir() if is_image(path)), key=_by_number)
    if not paths:
        raise ValueError(f"{folder} holds no pictures; give a folder of frames, or a video file")
    size = None
    for number, path in enumerate(paths):
        try:
            image = load_image(path)
        except ValueError as error:
            raise ValueError(f"{error} ({_last(number - 1, (number - 1) / rate)})") from error
        if size is not None and image.size != size:
            raise ValueError(
                f"{path} has {image.size[0]} × {image.size[1]} pixels, and the frames before it have "
                f"{size[0]} × {size[1]}; the frames of a video have one size"
            )
        size = image.size
        yield Frame(number, number / rate, torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous())


def _by_number(path: Path) -> list[tuple[int, int | str]]:
    """Names in the order of the numbers in them: frame2 before frame10."""
    parts = re.split(r"(\d+)", path.name)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]


# Files ------------------------------------------------------------------------------------------------------


def _file_frames(path: Path) -> Iterator[Frame]:
    with needs("av", "video", "reading video files"):
        import av
    number, seconds = -1, 0.0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} holds no video ({len(container.streams)} other streams)")
            stream = container.streams.video[0]
            first = None
            for frame in _decoded(container, stream):
                own = _seconds(frame, stream, number + 1)
                first = own if first is None else first
                number, seconds = number + 1, own - first
                yield Frame(number, seconds, _pixels(frame))
    except (av.error.FFmpegError, _Damage) as error:
        raise ValueError(
            f"{path} is cut off, damaged or not a video: {_reason(error)}; {_last(number, seconds)}"
        ) from error
    if number < 0:
        raise ValueError(f"{path} holds no frames")


class _Damage(Exception):
    """A file that FFmpeg reads without an error, and that is not whole."""


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """The whole frames of a video stream. Raises _Damage behind the last of them where others are missing."""
    packets, damage, last = 0, None, None
    for packet in container.demux(stream):
        if packet.is_corrupt:
            damage = "a packet is incomplete"
            break
        packets += packet.size > 0
        for frame in _whole(packet.decode()):
            last = frame.pts
            yield frame
    else:
        if packets < stream.frames:
            damage = f"it holds {packets} of the {stream.frames} frames that its header states"
    if damage is not None:
        for frame in _whole(stream.decode(None)):  # frames that waited for others, of which some are missing
            if not _follows(last, frame.pts, stream):
                break
            last = frame.pts
            yield frame
        raise _Damage(damage)


def _follows(last: int | None, following: int | None, stream: Any) -> bool:
    """Whether no frame is missing between two times, at the stream's rate."""
    if last is None or following is None or not stream.average_rate:
        return last is None
    return (following - last) * stream.time_base * stream.average_rate < 1.5


def _whole(frames: list[Any]) -> Iterator[Any]:
    for frame in frames:
        if frame.is_corrupt:
            raise _Damage("a frame is incomplete")
        yield frame


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _last(number: int, seconds: float) -> str:
    if number < 0:
        return "no frame of it could be read"
    return f"the last good frame is number {number}, at {seconds:.3f} s"


def _seconds(frame: Any, stream: Any, number: int) -> float:
    """The time of a frame; by its number where the file states none."""
    if frame.pts is not None:
        return float(frame.pts * stream.time_base)  # frames behind damage have no base of their own
    return number / float(stream.average_rate or 1)


def _pixels(frame: Any) -> Tensor:
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    # Phones store frames as the sensor is turned, with the angle, counterclockwise, that makes them upright.
    return torch.rot90(pixels, round(frame.rotation / 90), (1, 2)).contiguous()
