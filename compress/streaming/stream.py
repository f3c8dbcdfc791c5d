"""A video that comes frame by frame, and questions about what it has shown so far."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..algorithms.stc import update_count
from ..report.accounting import renewed_block_macs
from ..session import attached_session, unwrapped
from . import saved
from .cacher import encode_chunk
from .kept import KeptFrame, KeptTokens
from .pruner import prune_chunk
from .state import StreamReport, StreamState
from .stc import STC
from .towers import video_model

Frames = Tensor | Sequence[Image.Image]


class Stream:
    """A stream of video for a vision-language model: `add` frames, `ask` about all of them.

        stream = compress.Stream(model, compress.STC(), processor)
        for frame in iterate_frames("kitchen.mp4", fps=0.5):  # of vistok.video_files
            stream.add(frame.pixels[None])
        stream.ask("What happened so far?", max_new_tokens=32)

    The model is LLaVA-OneVision or LLaVA-NeXT-Video of transformers. Nothing of a stream is kept in the
    model: several streams on one model, and ordinary calls between, do not affect each other. Memory has a
    bound: of each frame the tokens that `STC.keep` states are held, of all frames at most `max_tokens`. Above
    that, tokens leave from the oldest frame with more than `min_frame_tokens`, the least novel first, then
    from the next; when only the newest frame holds more, the oldest frame leaves altogether.

    Args:
        processor: the model's, for frames that are pictures and questions that are text. Without it `add`
            takes `pixel_values` and `ask` takes token ids.
        max_tokens: the most tokens held, at least those kept of one frame.
        min_frame_tokens: what a frame is thinned to before any frame leaves, at most the tokens kept.

    Raises:
        TypeError: a model that cannot take streams, by name.
        ValueError: bounds that do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        method: STC,
        processor: Any = None,
        *,
        max_tokens: int = 12_000,
        min_frame_tokens: int = 6,
    ) -> None:
        if not isinstance(method, STC):
            raise TypeError(f"method is {method!r}; a stream takes STC() with its settings")
        self.method, self.processor = method, processor
        self._parts = video_model(unwrapped(model))
        self._count = method.count(self._parts.frame_tokens)
        for name, value in (("max_tokens", max_tokens), ("min_frame_tokens", min_frame_tokens)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it takes a number of tokens from 1")
        if max_tokens < self._count:
            raise ValueError(
                f"max_tokens is {max_tokens}, and {self._count} tokens are kept of each frame; raise it, or "
                "lower keep"
            )
        self._limits = (max_tokens, min(min_frame_tokens, self._count))
        self.reset()

    # What it holds ------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all frames."""
        self._state = StreamState(KeptTokens(*self._limits))

    @property
    def frames(self) -> int:
        """How many frames have come."""
        return self._state.processed + self._state.waiting

    @property
    def tokens(self) -> int:
        """How many tokens are held; those of waiting frames come beside them when a question is asked."""
        return self._state.kept.total

    @property
    def held(self) -> list[KeptFrame]:
        """The frames of which tokens are held, in the order of time, with these tokens."""
        return list(self._state.kept.frames)

    def bytes(self) -> int:
        """Memory of the stream in bytes: the tower's reference, kept tokens, scores, and waiting frames."""
        return self._state.bytes()

    def report(self) -> StreamReport:
        """Frames, tokens, memory and computation so far."""
        state, parts, chunk = self._state, self._parts, self.method.chunk
        places, width = parts.tower.embeddings.position_embedding.weight.shape
        hidden = parts.core.config.vision_config.intermediate_size
        renewed = update_count(places, self.method.update_ratio)
        whole, part = (
            2 * len(parts.layers) * renewed_block_macs(places, width, hidden, count)
            for count in (places, renewed)
        )
        full = chunk * -(-state.cacher.chunks // self.method.interval)
        return StreamReport(
            frames=self.frames,
            held=len(state.kept.frames),
            tokens=state.kept.total,
            tokens_full=state.processed * parts.frame_tokens,
            bytes=state.bytes(),
            flops=full * whole + (state.processed - full) * part,
            flops_full=state.processed * whole,
        )

    # Frames -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def add(self, frames: Frames | None = None, *, pixel_values: Tensor | None = None) -> None:
        """Take the next frames.

        `frames` are pictures of any size, through the processor: a tensor [T, 3, H, W], uint8 or floats in
        [0, 1], or a sequence of PIL images of one size. `pixel_values` [T, 3, S, S] are what the processor
        makes of them. Frames that fill no chunk wait for the next ones. After an error inside the model,
        `frames` counts the frames that are part of the stream.

        Raises TypeError and ValueError for other input; the stream is then as it was.
        """
        if (frames is None) == (pixel_values is None):
            raise ValueError("add takes frames or pixel_values, one of the two")
        if frames is None:
            self._take(self._checked(pixel_values))
            return
        if self.processor is None:
            raise ValueError(
                "frames go through the model's processor, and the stream has none; give it as "
                "Stream(model, method, processor), or give pixel_values"
            )
        pictures = _pictures(frames)
        for part in pictures.split(max(self.method.chunk, 8)):  # few pictures in full size at a time
            self._take(self._checked(self._processed_pixels(part)))

    def _processed_pixels(self, pictures: Tensor) -> Tensor:
        processor = getattr(self.processor, "video_processor", self.processor)
        batch = processor(videos=[pictures], do_sample_frames=False, return_tensors="pt")
        pixels = batch["pixel_values_videos"][0]
        if len(pixels) != len(pictures):
            raise ValueError(
                f"the processor made {len(pixels)} frames of {len(pictures)}; give one that takes all of "
                "them, or give pixel_values"
            )
        return pixels

    def _checked(self, pixels: Tensor) -> Tensor:
        side = self._parts.image_size
        if not isinstance(pixels, Tensor) or not pixels.is_floating_point():
            what = pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__
            raise TypeError(f"pixel_values are {what}; they are a float tensor [T, 3, {side}, {side}]")
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, side, side):
            raise ValueError(
                f"pixel_values have the shape {list(pixels.shape)}; {self._parts.name} takes [T, 3, {side}, "
                f"{side}], and frames of other sizes go through the processor: add(frames)"
            )
        if not bool(pixels.isfinite().all()):
            raise ValueError("pixel_values hold NaN or infinity; give what the processor returns")
        weight = self._parts.weight
        return pixels.to(weight.device, weight.dtype)

    def _take(self, pixels: Tensor) -> None:
        """Process the chunks that are full now; what is left waits."""
        if self._state.pending is not None:
            pixels = torch.cat([self._state.pending, pixels])
        size = self.method.chunk
        while len(pixels) >= size:
            self._state, pixels = self._following(pixels[:size]), pixels[size:]
        # A view would hold all frames in memory.
        self._state = replace(self._state, pending=pixels.clone() if len(pixels) else None)

    def _following(self, pixels: Tensor, *, trailing: bool = False) -> StreamState:
        """The state behind a chunk; nothing waits in it."""
        method, state = self.method, self._state
        encoded = encode_chunk(
            self._parts.layers,
            self._parts.embed(pixels),
            state.cacher,
            interval=method.interval,
            update_ratio=method.update_ratio,
            trailing=trailing,
        )
        features = self._parts.connect(encoded.hidden_states)
        if features.shape[1] != self._parts.frame_tokens:
            raise RuntimeError(
                f"{self._parts.name} made {features.shape[1]} tokens of a frame where "
                f"{self._parts.frame_tokens} were planned"
            )
        pruned = prune_chunk(features, state.pruner, self._count, fixed_channels=method.fixed_channels)
        kept = state.kept.copy()
        for number, (own, index) in enumerate(zip(features, pruned.index, strict=True)):
            scores = pruned.scores[number, index]
            kept.add(KeptFrame(state.processed + number, own[index], index.clone(), scores))
        return StreamState(kept, state.processed + len(pixels), encoded.state, pruned.state)

    # Questions ----------------------------------------------------------------------------------------------

    def visual_tokens(self) -> Tensor:
        """The tokens that a question is asked about [N, D]: those held, of waiting frames, and what ends a
        video in this family. Raises RuntimeError before any frame."""
        if not self.frames:
            raise RuntimeError("no frame has come yet; add frames before asking about them")
        with torch.no_grad():
            state = self._state
            if state.pending is not None:
                state = self._following(state.pending, trailing=True)
            return torch.cat([state.kept.features(), *self._parts.ends()])

    def ask(self, question: str | Tensor, **generate: Any) -> str | Tensor:
        """Answer a question about everything seen so far; the stream stays as it is.

        `question` is text, which the processor's chat template puts behind the video (or which holds the
        video's placeholder itself, as a whole prompt), and the answer is text; or token ids [1, L] with one
        placeholder, and the answer is token ids [1, n]. Frames that fill no chunk are computed as the chunk
        before them was. Keywords go to the model's `generate`.

        Raises:
            RuntimeError: before any frame, and while a session is attached to the model.
            ValueError: a prompt without exactly one place for the video.
        """
        session = attached_session(self._parts.model)
        if session is not None:
            raise RuntimeError(
                f"reducers are attached to {self._parts.name} "
                f"({', '.join(type(each).__name__ for each in session.reducers)}), and the tokens of a "
                "stream are reduced already; detach the session first"
            )
        video = self.visual_tokens()
        ids = self._prompt(question) if isinstance(question, str) else question
        before, after = self._around_video(ids)
        table = self._parts.model.get_input_embeddings()
        with torch.no_grad():
            text = [table(part.to(table.weight.device)) for part in (before, after)]
        embeddings = torch.cat([text[0], video.to(text[0]), text[1]])[None]
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        answer = self._parts.model.generate(inputs_embeds=embeddings, attention_mask=mask, **generate)
        if isinstance(question, str):
            ids = getattr(answer, "sequences", answer)
            return self._tokenizer().decode(ids[0], skip_special_tokens=True)
        return answer

    def _tokenizer(self) -> Any:
        tokenizer = getattr(self.processor, "tokenizer", None)
        if tokenizer is None:
            raise ValueError(
                "the question is text, and the stream has no processor with a tokenizer; give it as "
                "Stream(model, method, processor), or ask with token ids"
            )
        return tokenizer

    def _prompt(self, question: str) -> Tensor:
        tokenizer = self._tokenizer()
        placeholder = tokenizer.convert_ids_to_tokens(self._parts.video_token_id)
        if placeholder not in question:
            if getattr(self.processor, "chat_template", None) is None:
                raise ValueError(
                    f"the processor has no chat template; give the whole prompt, with {placeholder} where "
                    "the video belongs"
                )
            content = [{"type": "video"}, {"type": "text", "text": question}]
            question = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
        return tokenizer(question, return_tensors="pt").input_ids

    def _around_video(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The token ids before and behind the placeholders of the video."""
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"the question is a {type(ids).__name__}; it is text or token ids [1, L]")
        if ids.ndim != 2 or len(ids) != 1:
            raise ValueError(f"token ids have the shape {list(ids.shape)}; a stream takes one prompt, [1, L]")
        if bool((ids == self._parts.image_token_id).any()):
            raise ValueError(
                "the prompt has a placeholder of a picture; a stream is asked about its video alone"
            )
        places = (ids[0] == self._parts.video_token_id).nonzero().flatten().tolist()
        if not places or places[-1] - places[0] != len(places) - 1:
            stretches = "no placeholder" if not places else "several stretches of placeholders"
            raise ValueError(
                f"the prompt has {stretches} of a video (token {self._parts.video_token_id}); a stream is "
                "one video, so give exactly one"
            )
        return ids[0, : places[0]], ids[0, places[-1] + 1 :]

    # State --------------------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        most, least = self._limits
        own = {"keep": self._count, "max_tokens": most, "min_frame_tokens": least}
        return asdict(self.method) | own

    def state_dict(self) -> dict[str, Any]:
        """Everything that the stream holds, for `torch.save`: tensors, numbers and text. It stays valid when
        the stream goes on."""
        return saved.state_dict_of(self._state, self._parts, self._settings())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state returned by `state_dict`, in this or another process.

        Raises TypeError or ValueError, in one sentence, for a state of another model, of other settings, or
        one that is not whole; the stream is then as it was.
        """
        saved.check(state, self._parts, self._settings(), self._count)
        self._state = saved.state_from(state, KeptTokens(*self._limits), self._parts.weight.device)


def _pictures(frames: Frames) -> Tensor:
    """Frames as uint8 [T, 3, H, W]."""
    accepted = "uint8 or floats in [0, 1] of the shape [T, 3, H, W], or a sequence of PIL images of one size"
    if isinstance(frames, Sequence) and not isinstance(frames, str | bytes):
        if not all(isinstance(frame, Image.Image) for frame in frames):
            kinds = sorted({type(frame).__name__ for frame in frames})
            raise TypeError(f"frames are a sequence of {', '.join(kinds)}; they are {accepted}")
        sizes = sorted({frame.size for frame in frames})
        if len(sizes) != 1:
            raise ValueError(
                f"frames have {len(sizes)} sizes {sizes[:3]}; the frames of one call have one size, and "
                "there is at least one"
            )
        arrays = [np.asarray(frame.convert("RGB")) for frame in frames]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    if not isinstance(frames, Tensor):
        raise TypeError(f"frames are a {type(frames).__name__}; they are {accepted}")
    if frames.ndim != 4 or frames.shape[1] != 3 or not frames.numel():
        raise ValueError(f"frames have the shape {list(frames.shape)}; they are {accepted}")
    if frames.dtype == torch.uint8:
        return frames
    if not frames.is_floating_point():
        raise TypeError(f"frames are {frames.dtype}; they are {accepted}")
    low, high = frames.aminmax()
    if not (low >= 0 and high <= 1):  # NaN fails both
        raise ValueError(
            f"frames range from {float(low):.3g} to {float(high):.3g}; they are {accepted} (what the "
            "processor has normalised is pixel_values)"
        )
    return (frames * 255).round().to(torch.uint8)
