"""Where the tokens of a batch of prompts are: visual tokens, their images, and shortened sequences."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from .algorithms.grid import Grid
from .families import Host, Record, frames_grid, tiled
from .hosts import check_beams


@dataclass
class Span:
    """One image in one prompt: `places` [N] of its tokens in row `row`, `item` and `offset` of its first
    token in the record its features came from. `deepstack` [n, D] per layer is what its kept tokens get
    inside the model in place of the recorded features, `shown` [N] which token each place shows
    (-1: none of them, or several merged)."""

    row: int
    places: Tensor
    record: Record | None
    item: int
    offset: int = 0
    items: int = 1
    number: int = 0
    grid: Grid | None = None
    deepstack: list[Tensor] | None = None
    shown: Tensor | None = None


@dataclass
class Layout:
    """A (shortened) batch of sequences: `index` [B, L] is the place of each token in the full call, `valid`
    [B, L] which entries are real (the rest is padding, on the left), `ragged` whether there is padding.
    `shown` [B, L] is the token whose states stand at each place, where that is not `index` (for a mean of
    several, -1 minus the place of one that was dropped)."""

    index: Tensor
    valid: Tensor
    ragged: bool
    shown: Tensor | None = None

    @property
    def tokens(self) -> Tensor:
        """The token whose states stand at each place [B, L], as `shown` has it."""
        return self.index if self.shown is None else self.shown


@dataclass
class Prompt:
    """The visual tokens of one call: `image` [B, L] numbers the span of each token (-1: text)."""

    image: Tensor
    spans: list[Span] = field(default_factory=list)


def compact(keep: Tensor) -> tuple[Tensor, Tensor, bool]:
    """The kept tokens of each row, moved to the right: keep [B, L] → index [B, L'], valid [B, L'], ragged.

    L' is the longest row's count; padding entries point at dropped tokens.
    """
    counts = keep.sum(1).tolist()
    longest = max(counts, default=0)
    order = keep.to(torch.uint8).sort(dim=1, stable=True).indices  # dropped first, order kept within
    index = order[:, keep.shape[1] - longest :]
    return index, keep.gather(1, index), min(counts, default=0) < longest


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Tokens [B, L, ...] at index [B, L'] → [B, L', ...]."""
    return (
        x.flatten(0, 1).index_select(0, flat(index.to(x.device), x.shape[1])).view(*index.shape, *x.shape[2:])
    )


def flat(index: Tensor, length: int) -> Tensor:
    """Places [B, L'] in sequences of `length` as places in all of them, one after the other [B L']."""
    return (index + torch.arange(len(index), device=index.device)[:, None] * length).flatten()


def find_spans(
    host: Host,
    ids: Tensor,
    real: Tensor,
    records: dict[str, tuple[Record, list[int]]],
    prompts: int | None = None,
) -> Prompt:
    """The images of a batch of prompts.

    `ids` [B, L] are the token ids, `real` [B, L] what is not padding, `records[modality]` the record of the
    features and the lengths of the items as they are merged now (each sample's repeated under beams),
    `prompts` how many there are before that. Raises ValueError when placeholders and features do not match.
    """
    spans: list[Span] = []
    image = torch.full(ids.shape, -1, dtype=torch.long)
    ids, real = ids.cpu(), real.cpu()
    for modality, (record, lengths) in records.items():
        placeholder = (ids == host.media_ids[modality]) & real
        beams = max(1, len(lengths) // max(1, len(record.lengths)))
        grids = host.grids(record)
        cursor = original = medium = 0
        pictures: list[int] = []
        sizes = host.media_sizes if modality == "image" else None
        copies = beams if prompts is None else max(1, ids.shape[0] // prompts)  # rows of one prompt
        for row in range(ids.shape[0]):
            places = placeholder[row].nonzero().squeeze(1)
            taken, total = 0, 0
            while total < len(places) and cursor + taken < len(lengths):
                total += lengths[cursor + taken]
                taken += 1
            if total != len(places):
                check_beams(
                    ids.shape[0], prompts, [2]
                )  # prompts of several pictures would get those of others
                raise ValueError(
                    f"prompt {row} holds {len(places)} {modality} placeholders, which is not a whole number "
                    f"of the {modality} items given ({lengths[cursor : cursor + taken]} tokens); prompt and "
                    "images do not belong together, or the prefill was cut into chunks"
                )
            pictures.append(taken)
            row_spans = _row_spans(
                host, record, ids[row], places, lengths[cursor : cursor + taken], original, grids
            )
            media = 0
            if sizes is not None:
                row_spans = joined_frames(host, row_spans, sizes[medium:])
                media = len(row_spans)
            elif host.frame_reader is not None and "video" not in host.media_ids and len(row_spans) > 1:
                warnings.warn(
                    f"{host.frame_reader} keeps pictures whole, and frames of videos enter {host.name} as "
                    "pictures; set session.media_sizes to state which of them form a video",
                    stacklevel=2,
                )
            for number, span in enumerate(row_spans):
                span.row, span.number = row, number
                image[row, span.places] = len(spans)
                spans.append(span)
            cursor += taken
            if (row + 1) % beams == 0:
                original += taken
            if (row + 1) % copies == 0:
                medium += media
        if sizes is not None and medium < len(sizes):
            raise ValueError(
                f"media_sizes is {list(sizes)}, and the prompts hold pictures for the first {medium} of "
                "these media; give one number per medium, in order: 1 for a picture, the number of frames "
                "for a video"
            )
        check_beams(ids.shape[0], prompts, pictures)
    return Prompt(image, spans)


def _row_spans(
    host: Host,
    record: Record,
    ids: Tensor,
    places: Tensor,
    lengths: list[int],
    first: int,
    grids: list[Grid | None],
) -> list[Span]:
    if first + len(lengths) > len(grids):
        raise ValueError(
            f"{host.name} repeats its features item by item, so prompts of several pictures cannot be "
            "distinguished; generate one sequence per prompt"
        )
    starts = [0, *torch.tensor(lengths, dtype=torch.long).cumsum(0).tolist()]
    segment = host.family.segment
    if segment == "items":
        return [
            Span(0, places[a:b], record, first + i, grid=grids[first + i])
            for i, (a, b) in enumerate(pairwise(starts))
        ]
    runs = _runs(places)
    if segment == "stretches":
        return [_stretch(record, places[a:b], starts, first, a) for a, b in runs]
    if segment == "runs":  # tiles are items, an image is a run of them
        spans = []
        for a, b in runs:
            items = [i for i, start in enumerate(starts[:-1]) if a <= start < b]
            grid = tiled([lengths[i] for i in items], None, thumbnail_last=record.modality == "image")
            spans.append(Span(0, places[a:b], record, first + items[0], items=len(items), grid=grid))
        return spans
    # Items are whole samples, tiles are runs; the token before a run differs for tiles and whole images, and
    # every image ends with the tile that shows it whole.
    before = [int(ids[places[a] - 1]) for a, _ in runs]
    spans, start = [], 0
    for i, token in enumerate(before):
        if token == before[-1]:
            image_runs = runs[start : i + 1]
            a, b = image_runs[0][0], image_runs[-1][1]
            grid = tiled([e - s for s, e in image_runs], _columns(places, image_runs), thumbnail_last=True)
            spans.append(Span(0, places[a:b], record, first, offset=a, grid=grid))
            start = i + 1
    return spans


def joined_frames(host: Host, spans: list[Span], sizes: Sequence[int]) -> list[Span]:
    """The pictures of a prompt with those that are frames of one video joined: the first `sizes[0]` of them,
    the next `sizes[1]`, and so on.

    Raises ValueError where media do not end with the prompt's pictures, and for frames of several tiles or
    different sizes.
    """
    media, start = [], 0
    for size in sizes:
        if start >= len(spans):
            break
        frames, start = spans[start : start + size], start + size
        media.append(frames[0] if size == 1 else _video(host, frames))
    if start != len(spans):
        raise ValueError(
            f"media_sizes states {start} pictures for the media of a prompt that holds {len(spans)}; give "
            "one number per medium, in order: 1 for a picture, the number of frames for a video"
        )
    return media


def _video(host: Host, frames: list[Span]) -> Span:
    first, grid = frames[0], frames[0].grid
    layouts = {
        None if each.grid is None else (each.grid.num_tiles, each.grid.height, each.grid.width)
        for each in frames
    }
    whole = grid is not None and grid.num_tiles == 1 and len(grid.tile) == grid.tokens_per_tile
    if len(layouts) > 1 or not whole:
        raise ValueError(
            f"media_sizes joins {len(frames)} pictures of {host.name} to a video, but they are not frames of "
            "one tile each and of one size; give 1 for a picture"
        )
    places = torch.cat([frame.places for frame in frames])
    items = len({frame.item for frame in frames})
    grid = frames_grid(len(frames), grid.height, grid.width, video=True)
    return Span(0, places, first.record, first.item, offset=first.offset, items=items, grid=grid)


def _stretch(record: Record, places: Tensor, starts: list[int], first: int, start: int) -> Span:
    """The image at a stretch of places, the `start`-th visual token of its prompt and those after it; items
    begin at `starts`."""
    end = start + len(places)
    items = [i for i, (a, b) in enumerate(pairwise(starts)) if a < end and b > start]
    return Span(0, places, record, first + items[0], offset=start - starts[items[0]], items=len(items))


def stretches(places: Tensor) -> list[Tensor]:
    """The places of an image [N] as stretches of neighbouring ones."""
    return [places[a:b] for a, b in _runs(places)]


def _runs(places: Tensor) -> list[tuple[int, int]]:
    """Stretches of consecutive places, as ranges into `places`."""
    if not len(places):
        return []
    breaks = ((places[1:] - places[:-1]) != 1).nonzero().squeeze(1) + 1
    edges = [0, *breaks.tolist(), len(places)]
    return list(pairwise(edges))


def _columns(places: Tensor, runs: list[tuple[int, int]]) -> int | None:
    """The number of tiles per row: the gap between tiles is longer where a row ends."""
    gaps = [int(places[b[0]] - places[a[1] - 1]) for a, b in pairwise(runs)]
    return next((i + 1 for i, gap in enumerate(gaps) if gap > gaps[0]), None)
