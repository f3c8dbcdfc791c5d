"""Budgets of videos: for the whole clip, for each frame, or shared by the relevance of the frames."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .algorithms.grid import Grid
from .algorithms.quota import frame_weights, quota_budgets
from .reducer import FeatureReducer, Image, Reducer, Selection, Stage, TowerLayer, count_of


@dataclass(frozen=True, kw_only=True)
class QuoTA:
    """A clip's budget shared among its frames by how relevant each is to the question.

    QuoTA: Query-oriented Token Assignment via CoT Query Decouple for Long Video Comprehension (Luo et al.,
    2025, arXiv 2503.08689). `relevance` returns the scores of a video's frames from 0 to 1, [T]; the paper
    asks a small model whether each frame shows what the question is about. Without one it is `nearness`,
    which needs no second model. Shares are the squares of the scores, and no frame gets more than its tokens:
    what is cut off goes to other frames in one pass in their order, as published, so that the clip may keep
    fewer tokens than its budget. Frames whose share is below one token are dropped. The paper resizes frames
    to their shares (`algorithms.quota.quota_frames`); here the reducer chooses the tokens of each frame.
    """

    relevance: Callable[[Image], Tensor] | None = None

    def budgets(self, video: Image, total: int) -> list[int]:
        """How many tokens of each frame stay, [T], of `total` for the clip. Raises ValueError for scores that
        are not one number from 0 to 1 per frame, and where no frame gets a token."""
        grid, least = video.grid, "leaves every frame below one token; raise keep"
        if total < 1:
            raise ValueError(f"a budget of {total} tokens for {grid.cols} frames {least}")
        scores = nearness(video) if self.relevance is None else torch.as_tensor(self.relevance(video))
        if scores.shape != (grid.cols,):
            raise ValueError(
                f"relevance returned scores of shape {list(scores.shape)}; a video of {grid.cols} frames "
                "takes one number per frame"
            )
        weights = frame_weights(scores.cpu(), grid.tokens_per_tile, total, is_capped=True)
        budgets = quota_budgets(weights, total).tolist()
        if not any(budgets):
            raise ValueError(f"a budget of {total} tokens for {grid.cols} frames {least}")
        return budgets


def nearness(video: Image) -> Tensor:
    """How near the frames of a video are to the instruction, [T] from 0 to 1: for each token of text the
    largest cosine to a token of the frame, as a mean over the text, scaled from -1 … 1.

    Not of the paper, whose scores come from a second model. Raises ValueError for prompts without text.
    """
    text = video.text[video.instruction]
    if not len(text):
        raise ValueError("the prompt holds no text, to which frames could be relevant; give relevance=")
    frames = video.features[frame_places(video.features, video.grid)]  # [T, n, D]
    cosine = F.normalize(frames.float(), dim=-1) @ F.normalize(text.float(), dim=-1).T  # [T, n, L]
    return (1 + cosine.amax(1).mean(1).clamp(-1, 1)) / 2


VideoBudget = Literal["clip", "frame"] | QuoTA


def selected_of_frames(
    features: Tensor, grid: Grid | None, count: int, select: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """The tokens to keep of a video, as a mask [N] with exactly `count` True: separators, and of the frames
    as many as `select(frames [T, n, D], count)` marks in a mask [T, n]. A picture is one frame."""
    if grid is None or not grid.video:
        return select(features[None], count)[0]
    places = frame_places(features, grid)
    ends = grid.separators.nonzero().squeeze(1).to(features.device)
    own = max(0, count - len(ends))
    mask = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    mask[places[select(features[places], own)]] = True
    mask[ends[: count - own]] = True
    return mask


def frame_places(features: Tensor, grid: Grid) -> Tensor:
    """The places [T, n] of the tokens of each frame among the features [N, D] of a video. Raises ValueError
    where a reducer or the tower has dropped some."""
    places = grid.place.to(features.device)
    if bool((places < 0).any()):
        raise ValueError(
            f"{int((places < 0).sum())} of the video's {places.numel()} tokens were dropped before its "
            "frames are compared; put the reducer that compares frames first"
        )
    return places


def with_video_budget(
    stages: Mapping[Stage, list[Reducer]], video_budget: VideoBudget
) -> dict[Stage, list[Reducer]]:
    """The reducers of each stage, with those of features as `video_budget` asks.

    Raises ValueError for other values and where no reducer of features can take frames one by one.
    """
    if not isinstance(video_budget, QuoTA) and video_budget not in ("clip", "frame"):
        raise ValueError(f'video_budget is {video_budget!r}; it takes "clip", "frame" or QuoTA()')
    if video_budget == "clip":
        return dict(stages)
    if not stages.get(Stage.FEATURES):
        raise ValueError(
            f"video_budget is {video_budget!r}, and no reducer acts on features; attach one, such as divprune"
        )
    (reducer,) = stages[Stage.FEATURES]
    return {**stages, Stage.FEATURES: [FrameByFrame(reducer=reducer, shares=video_budget)]}


@dataclass(kw_only=True)
class FrameByFrame(FeatureReducer):
    """A reducer of features that gets each frame of a video as an image of its own; pictures as they are.

    The budget is for each frame (`shares="frame"`; separators that belong to no frame stay beside it), or for
    the clip with its separators and shared by `QuoTA`.
    """

    reducer: FeatureReducer
    shares: Literal["frame"] | QuoTA

    default_keep: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        inner = self.reducer
        if any(each.reads_frames for each in getattr(inner, "reducers", (inner,))):
            raise ValueError(
                f"{type(inner).__name__} compares the frames of a video, so its budget is for the whole "
                'clip; leave video_budget="clip"'
            )
        self.keep, self.default_keep = inner.keep, inner.default_keep
        self.wants_pixels, self.merges, self.by_token = inner.wants_pixels, inner.merges, inner.by_token
        self.paper_positions = inner.paper_positions
        by_text = isinstance(self.shares, QuoTA) and self.shares.relevance is None
        self.reads_text = inner.reads_text or by_text

    def tower_layers(self) -> dict[TowerLayer, bool | Literal["joined"]]:
        """Those of the reducer."""
        return self.reducer.tower_layers()

    def wants_states(self) -> TowerLayer | None:
        """Those of the reducer."""
        return self.reducer.wants_states()

    def retained_count(self, grid: Grid | int, budget: float | int | None) -> int:
        """How many tokens of a picture stay, or of a video at a budget per frame. Raises ValueError for
        shares by relevance, which depend on the frames."""
        if isinstance(grid, int) or not grid.video:
            return self.reducer.retained_count(grid, budget)
        if isinstance(self.shares, QuoTA):
            raise ValueError("how many tokens QuoTA keeps depends on the frames and the question")
        frame = Grid.single(grid.height, grid.width)
        return grid.cols * self.reducer.retained_count(frame, budget) + int(grid.separators.sum())

    def reduce(self, image: Image, budget: float | int | None) -> Selection:
        """The tokens kept of every frame, in the order of frames."""
        grid = image.grid
        if grid is None or not grid.video:
            return self.reducer.reduce(image, budget)
        budgets = self._budgets(image, budget)
        parts = [self._of_frame(image, number, own) for number, own in enumerate(budgets) if own != 0]
        ends = grid.separators.nonzero().squeeze(1).to(image.features.device)
        return _joined(image, [part for part in parts if part is not None], ends)

    def _budgets(self, image: Image, budget: float | int | None) -> list[float | int | None]:
        if isinstance(self.shares, QuoTA):
            if budget is None:
                raise ValueError(
                    f"QuoTA shares a budget among frames, and {type(self.reducer).__name__} has a number "
                    "of its own; give keep"
                )
            separators = int(image.grid.separators.sum())
            return self.shares.budgets(image, count_of(budget, image.num_tokens) - separators)
        if image.dropped:
            raise ValueError(
                f"{image.dropped} tokens of this video were dropped before the tower, so a budget per frame "
                'is not defined; use video_budget="clip"'
            )
        if isinstance(budget, int) and budget > image.grid.tokens_per_tile:
            raise ValueError(
                f"keep is {budget} tokens per frame, and a frame has {image.grid.tokens_per_tile}; lower it, "
                'or give the whole clip\'s with video_budget="clip"'
            )
        return [budget] * image.grid.cols

    def _of_frame(self, image: Image, number: int, budget: float | int | None) -> Selection | None:
        """The selection among the tokens of one frame, at their places in the video; None: it has none."""
        grid = image.grid
        own = (grid.tile == number).nonzero().squeeze(1)
        if not len(own):
            return None
        places = own.to(image.features.device)
        whole = isinstance(budget, int) and budget >= len(own)
        if whole and not self.wants_pixels:  # those have values of their own even for whole frames
            return Selection(places)
        index = grid.index[own]
        frame = replace(
            image,
            features=image.features[places],
            grid=Grid(torch.zeros_like(index), index, grid.height, grid.width),
            rows={layer: rows[number : number + 1] for layer, rows in image.rows.items()},
            states=None if image.states is None else image.states[number : number + 1],
            keys=None if image.keys is None else image.keys[number : number + 1],
            encode=None if image.encode is None else partial(_encode_frame, image.encode, number, grid.cols),
        )
        selection = self.reducer.reduce(frame, budget)
        source = selection.source
        if source is not None:
            source = places[source.clamp_min(0).to(places.device)].masked_fill(
                source.to(places.device) < 0, -1
            )
        return Selection(
            places[selection.kept.to(places.device)], selection.values, source, selection.deepstack
        )


def _encode_frame(
    encode: Callable[[Grid], list[Tensor]], number: int, frames: int, grid: Grid
) -> list[Tensor]:
    """The features of one frame of a video in the layout of a smaller grid."""
    tile = torch.full_like(grid.tile, number)
    return encode(replace(grid, tile=tile, rows=1, cols=frames, video=True))


def _joined(image: Image, parts: list[Selection], ends: Tensor) -> Selection:
    """The selections of frames as one of the video, with the separators at `ends`."""
    parts = [*parts, Selection(ends)] if len(ends) else parts
    kept = torch.cat([part.kept for part in parts])
    if all(part.values is None for part in parts):
        return Selection(kept)
    values = [image.features[p.kept] if p.values is None else p.values.to(image.features) for p in parts]
    sources = [p.kept if p.source is None else p.source for p in parts]
    depth = max((len(part.deepstack) for part in parts if part.deepstack is not None), default=0)
    whole = all(part.deepstack is not None for part in parts)
    deepstack = [torch.cat([p.deepstack[i] for p in parts]) for i in range(depth)] if whole else None
    return Selection(kept, torch.cat(values), torch.cat(sources), deepstack)
