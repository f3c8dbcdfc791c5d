"""Streams of video: questions about frames that come one after the other."""

import runpy
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image
from tiny_vlms import tiny_vlm
from torch.utils.flop_counter import FlopCounterMode

from vistok import compress
from vistok.compress import STC, DivPrune, FastV, Stream
from vistok.video_files import iterate_frames

FAMILIES = ("llava_onevision", "llava_next_video")
PROMPT = "USER : <video> what is in the image ASSISTANT :"
EXACT = STC(keep=1.0, interval=1)  # everything is computed and kept
GREEDY = {"max_new_tokens": 4, "do_sample": False}


def fixture(name, seed=0):
    return shared(name, seed)


@cache
def shared(name, seed):
    return tiny_vlm(name, seed=seed)


def stream_of(name="llava_onevision", method=None, seed=0, **settings):
    model, processor, _ = fixture(name, seed)
    return Stream(model, method or STC(keep=2), processor, **settings)


def video(count=7, seed=0, size=(60, 80)):
    """Frames uint8 [T, 3, H, W] of which a part changes from one to the next."""
    source = np.random.RandomState(seed)
    frames = np.repeat(source.randint(0, 256, (1, 3, *size)), count, 0)
    for number in range(1, count):
        top, left = source.randint(0, size[0] // 2), source.randint(0, size[1] // 2)
        frames[number:, :, top : top + 20, left : left + 20] = source.randint(0, 256, (3, 20, 20))
    return torch.from_numpy(frames.astype(np.uint8))


def pixels_of(name, frames):
    processor = fixture(name)[1].video_processor
    batch = processor(videos=[frames], do_sample_frames=False, return_tensors="pt")
    return batch["pixel_values_videos"][0]


def state_equal(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[key], other[key]) if isinstance(one[key], torch.Tensor) else one[key] == other[key]
        for key in one
    )


# What it computes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_with_everything_kept_the_answer_is_that_of_the_model_itself(name, dtype):
    model, processor, inputs = tiny_vlm(name)
    prompt = inputs(videos=(1,))
    model.to(dtype)
    prompt["pixel_values_videos"] = prompt["pixel_values_videos"].to(dtype)
    settings = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**prompt, **settings)
    frames = STC(keep=1.0, interval=1, chunk=4)  # in one batch, as the model has them
    stream = Stream(model, frames, processor)
    stream.add(pixel_values=prompt["pixel_values_videos"][0])
    answer = stream.ask(prompt["input_ids"], **settings)
    count = prompt["input_ids"].shape[1]
    assert torch.equal(answer.sequences, expected.sequences[:, count:])
    assert all(torch.equal(one, other) for one, other in zip(answer.logits, expected.logits, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_text_is_answered_as_text_and_ids_as_ids(name):
    stream = stream_of(name)
    stream.add(video())
    tokenizer = fixture(name)[1].tokenizer
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    text = stream.ask(PROMPT, **GREEDY)
    assert isinstance(text, str) and text
    assert text == tokenizer.decode(stream.ask(ids, **GREEDY)[0], skip_special_tokens=True)


def test_a_chat_template_puts_the_question_behind_the_video():
    model, processor, _ = tiny_vlm("llava_onevision")
    processor.chat_template = (
        "{% for message in messages %}USER : {% for part in message['content'] %}"
        "{% if part['type'] == 'video' %}<video> {% else %}{{ part['text'] }} {% endif %}"
        "{% endfor %}{% endfor %}ASSISTANT :"
    )
    stream = Stream(model, STC(keep=2), processor)
    stream.add(video())
    assert stream.ask("what is in the image", **GREEDY) == stream.ask(PROMPT, **GREEDY)


@pytest.mark.parametrize("chunk", [1, 2, 3, 9])
@pytest.mark.parametrize("name", FAMILIES)
def test_frames_may_come_in_any_portions(name, chunk):
    method, frames = STC(keep=2, chunk=chunk), video()
    whole = stream_of(name, method)
    whole.add(frames)
    for portions in ([1] * 7, [2, 5], [4, 3]):
        stream = stream_of(name, method)
        for part in frames.split(portions):
            stream.add(part)
        assert stream.frames == 7 and stream.tokens == 2 * (7 - 7 % chunk)
        torch.testing.assert_close(stream.visual_tokens(), whole.visual_tokens(), rtol=1e-5, atol=1e-5)
        ends = name == "llava_onevision"
        assert len(stream.visual_tokens()) == 2 * 7 + ends  # waiting frames are part of the answer


@pytest.mark.parametrize("chunk", [1, 3])
def test_asking_does_not_change_the_stream(chunk):
    method, frames = STC(keep=2, chunk=chunk), video(11)
    asked, silent = stream_of(method=method), stream_of(method=method)
    for part in frames.split(1):
        asked.add(part)
        asked.ask(PROMPT, **GREEDY)
        silent.add(part)
    assert state_equal(asked.state_dict(), silent.state_dict())


def test_frames_between_full_ones_reuse_the_tower():
    """A partial frame differs from its full computation, and from the frame that it reuses."""
    frames = video(2)
    partial, full = stream_of(method=STC(keep=4)), stream_of(method=EXACT)
    partial.add(frames)
    full.add(frames)
    one, other = partial.visual_tokens().split([4, 4, 1]), full.visual_tokens().split([4, 4, 1])
    assert torch.equal(one[0], other[0])
    assert not torch.equal(one[1], other[1]) and not torch.equal(one[1], one[0])


def test_images_tensors_and_pixel_values_are_the_same_frames():
    frames = video()
    tensors, floats, pictures, pixels = (stream_of() for _ in range(4))
    tensors.add(frames)
    floats.add(frames.float() / 255)
    pictures.add([Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames])
    pixels.add(pixel_values=pixels_of("llava_onevision", frames))
    expected = tensors.visual_tokens()
    for stream in (floats, pictures, pixels):
        torch.testing.assert_close(stream.visual_tokens(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [(57, 91), (20, 300), (56, 56)])
def test_one_frame_of_any_size_is_a_video(name, size):
    stream = stream_of(name)
    stream.add(video(1, size=size))
    assert stream.frames == 1 and stream.tokens == 2
    assert stream.ask(PROMPT, **GREEDY)


# Several streams --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_streams_on_one_model_and_other_calls_do_not_mix(name):
    model, _, inputs = fixture(name)
    prompt, picture = inputs(videos=(1,)), inputs(images=(1,))
    clips = [video(6, seed) for seed in range(3)]
    alone = []
    for frames in clips:
        stream = stream_of(name)
        stream.add(frames)
        alone.append((stream.visual_tokens(), stream.ask(PROMPT, **GREEDY)))
    with torch.no_grad():
        expected = model(**prompt).logits
    streams = [stream_of(name) for _ in clips]
    for number in range(6):
        for stream, frames in zip(streams, clips, strict=True):
            stream.add(frames[number : number + 1])
            with torch.no_grad():
                assert torch.equal(model(**prompt).logits, expected)
        with compress.attach(model, DivPrune(), keep=0.5), torch.no_grad():
            streams[0].visual_tokens()
            model(**picture)
    for stream, (tokens, answer) in zip(streams, alone, strict=True):
        torch.testing.assert_close(stream.visual_tokens(), tokens, rtol=1e-5, atol=1e-5)
        assert stream.ask(PROMPT, **GREEDY) == answer


def test_after_a_reset_nothing_of_earlier_frames_is_left():
    used, new = stream_of(), stream_of()
    used.add(video(9, seed=1))
    used.reset()
    assert used.frames == used.tokens == used.bytes() == 0
    for stream in (used, new):
        stream.add(video(5))
    assert state_equal(used.state_dict(), new.state_dict())


# Memory -----------------------------------------------------------------------------------------------------


def test_memory_is_flat_and_the_oldest_frames_are_thinned():
    stream = stream_of(method=STC(keep=3), max_tokens=30, min_frame_tokens=1)
    sizes = []
    for part in video(60).split(4):
        stream.add(part)
        sizes.append(stream.bytes())
    assert len(set(sizes[-7:])) == 1 and stream.tokens == 30 and stream.frames == 60
    numbers, counts = zip(*((held.number, len(held.index)) for held in stream.held), strict=True)
    assert numbers[-1] == 59 and list(counts) == sorted(counts) and counts[-1] == 3
    assert len(stream.visual_tokens()) == 31


def test_the_bytes_are_those_of_all_tensors_held():
    stream = stream_of(method=STC(keep=2, chunk=2))
    stream.add(video(5))
    state = stream.state_dict()
    listed = ("references", "memory", "channels", "features", "index", "scores", "pending")
    assert stream.bytes() == sum(state[name].nbytes for name in listed)
    held = [tensor for each in stream.held for tensor in (each.features, each.index, each.scores)]
    held += [tensor for each in stream._state.cacher.references for tensor in vars(each).values()]
    assert all(
        tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in [*held, stream._state.pending]
    )


def test_the_report_counts_frames_tokens_and_operations():
    stream = stream_of(method=STC(keep=2, interval=3, chunk=2))
    with FlopCounterMode(display=False) as counter:
        stream.add(video(13))
    report = stream.report()
    patches, projector = 12 * 2 * 16 * 48 * 3 * 14 * 14, 12 * 2 * 16 * (48 * 64 + 64 * 64)
    assert report.flops == counter.get_total_flops() - patches - projector
    assert report.flops_full == 12 * 3 * (2 * 16 * (4 * 48 * 48 + 2 * 48 * 64) + 4 * 16 * 16 * 48)
    assert (report.frames, report.held, report.tokens, report.tokens_full) == (13, 12, 24, 48)
    assert report.bytes == stream.bytes()


def test_a_video_file_goes_into_a_stream_frame_by_frame(tmp_path):
    for number, frame in enumerate(video(9)):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
    stream, expected = stream_of(), stream_of()
    for frame in iterate_frames(tmp_path, fps=1, folder_fps=2):
        stream.add(frame.pixels[None])
    expected.add(video(9)[::2])
    torch.testing.assert_close(stream.visual_tokens(), expected.visual_tokens(), rtol=1e-5, atol=1e-5)


# State ------------------------------------------------------------------------------------------------------

CONTINUED = """
import sys
import torch
from vistok.compress import STC, Stream
from vistok.compress.tiny.prompted import build

folder, prompt, *names = sys.argv[1:]
for name in names:
    fixture = build(name)
    fixture.model.eval()
    stream = Stream(fixture.model, STC(keep=2, chunk=2), fixture.processor)
    stream.load_state_dict(torch.load(f"{folder}/{name}.pt", weights_only=True))
    stream.add(torch.load(f"{folder}/frames.pt", weights_only=True))
    answer = stream.ask(prompt, max_new_tokens=4, do_sample=False)
    torch.save([stream.visual_tokens(), answer, stream.state_dict()], f"{folder}/{name}.pt")
"""


def test_streams_continue_in_another_process(tmp_path):
    frames, streams = video(11), {name: stream_of(name, STC(keep=2, chunk=2)) for name in FAMILIES}
    for name, stream in streams.items():
        stream.add(frames[:5])
        state = stream.state_dict()
        torch.save(state, tmp_path / f"{name}.pt")
        stream.add(frames[5:])
        assert state["frames"] == 4 and len(state["pending"]) == 1  # what was saved has not gone on
    torch.save(frames[5:], tmp_path / "frames.pt")
    subprocess.run([sys.executable, "-c", CONTINUED, str(tmp_path), PROMPT, *FAMILIES], check=True)
    for name, stream in streams.items():
        tokens, answer, following = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert torch.equal(tokens, stream.visual_tokens())
        assert answer == stream.ask(PROMPT, **GREEDY)
        assert state_equal(following, stream.state_dict())


def test_a_state_of_no_frames_is_a_new_stream():
    empty, used = stream_of(), stream_of()
    used.add(video())
    used.load_state_dict(empty.state_dict())
    assert state_equal(used.state_dict(), empty.state_dict())


def refused(stream, state, message, error=ValueError):
    """Loading raises one sentence, and the stream is as it was."""
    before = stream.state_dict()
    with pytest.raises(error, match=message) as raised:
        stream.load_state_dict(state)
    assert "\n" not in str(raised.value)
    assert state_equal(stream.state_dict(), before)


def test_states_of_other_models_and_settings_are_refused():
    stream = stream_of()
    stream.add(video())
    other = stream_of(seed=1)
    other.add(video())
    refused(stream, other.state_dict(), "made by another model")
    model, processor, _ = tiny_vlm("llava_onevision")
    half = Stream(model.to(torch.bfloat16), STC(keep=2), processor)
    half.add(video())
    refused(stream, half.state_dict(), "made by another model")
    next_video = stream_of("llava_next_video")
    next_video.add(video())
    refused(stream, next_video.state_dict(), "made by another model")
    wider = stream_of(method=STC(keep=3), max_tokens=9)
    wider.add(video())
    refused(stream, wider.state_dict(), r"keep 3, here 2, max_tokens 9, here 12000")


def test_one_token_and_all_tokens_are_different_settings():
    one, everything = stream_of(method=STC(keep=1)), stream_of(method=STC(keep=1.0))
    one.add(video())
    refused(everything, one.state_dict(), "keep 1, here 4")
    the_same = stream_of(method=STC(keep=0.25))
    the_same.load_state_dict(one.state_dict())
    assert torch.equal(the_same.visual_tokens(), one.visual_tokens())


def test_states_that_are_not_whole_are_refused():
    stream = stream_of(method=STC(keep=2, chunk=2))
    stream.add(video())
    state = stream.state_dict()
    refused(stream, [], "is a list", TypeError)
    refused(stream, {}, "has the format None")
    for key in state.keys() - {"format"}:
        refused(stream, {k: v for k, v in state.items() if k != key}, f"not whole: it lacks {key}")
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            refused(stream, {**state, key: value[:-1]}, "is damaged")
            refused(stream, {**state, key: value.tolist()}, "is damaged")
            if value.is_floating_point():
                refused(stream, {**state, key: value.double()}, "is damaged")
                refused(stream, {**state, key: torch.full_like(value, float("nan"))}, "NaN")
    first = stream_of(method=stream.method).state_dict()
    held = {"numbers": state["numbers"], "lengths": state["lengths"]}
    refused(stream, {**first, **held}, "6 frames are held before any chunk")
    refused(stream, {**state, "index": torch.tensor(1)}, "not a tensor with rows")
    refused(stream, {**state, "frames": 7}, "7 frames are not 3 chunks of 2")
    refused(stream, {**state, "chunks": -1}, "chunks is -1")
    refused(stream, {**state, "index": state["index"] + 9}, "places of kept tokens")
    refused(stream, {**state, "index": state["index"].flip(0)}, "places of kept tokens")
    refused(stream, {**state, "channels": state["channels"] * 0}, "channels are not different")
    refused(stream, {**state, "numbers": state["numbers"].flip(0)}, "do not ascend")
    refused(stream, {**state, "lengths": state["lengths"] + 1}, "hold 18 tokens")
    refused(stream, {**state, "pending": state["pending"].repeat(2, 1, 1, 1)}, "2 frames wait")


def test_the_state_stays_as_it_was_when_the_stream_goes_on():
    stream = stream_of(max_tokens=10)
    stream.add(video(5))
    state = stream.state_dict()
    copy = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in state.items()}
    stream.add(video(9, seed=2))
    assert state_equal(state, copy)


# What is refused --------------------------------------------------------------------------------------------


def test_questions_before_any_frame_are_refused():
    with pytest.raises(RuntimeError, match="no frame has come yet"):
        stream_of().ask(PROMPT)


@pytest.mark.parametrize(
    ("frames", "error", "message"),
    [
        (torch.zeros(2, 1, 8, 8), ValueError, r"have the shape \[2, 1, 8, 8\]"),
        (torch.zeros(0, 3, 8, 8), ValueError, r"have the shape \[0, 3, 8, 8\]"),
        (torch.zeros(3, 8, 8), ValueError, "have the shape"),
        (torch.full((1, 3, 8, 8), 2.0), ValueError, r"range from 2 to 2"),
        (torch.full((1, 3, 8, 8), float("nan")), ValueError, "range from nan"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), TypeError, "int64"),
        ([], ValueError, "there is at least one"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))], ValueError, "2 sizes"),
        (["frame.png"], TypeError, "a sequence of str"),
        ("frame.png", TypeError, "are a str"),
    ],
)
def test_frames_of_other_kinds_are_refused_and_nothing_is_lost(frames, error, message):
    stream = stream_of()
    stream.add(video(3))
    before = stream.state_dict()
    with pytest.raises(error, match=message):
        stream.add(frames)
    assert state_equal(stream.state_dict(), before)


def test_pixel_values_of_another_size_are_refused():
    stream = stream_of()
    with pytest.raises(ValueError, match=r"takes \[T, 3, 56, 56\], and frames of other sizes go through"):
        stream.add(pixel_values=torch.zeros(1, 3, 50, 56))
    with pytest.raises(ValueError, match="NaN or infinity"):
        stream.add(pixel_values=torch.full((1, 3, 56, 56), float("inf")))
    with pytest.raises(TypeError, match="uint8"):
        stream.add(pixel_values=torch.zeros(1, 3, 56, 56, dtype=torch.uint8))
    with pytest.raises(ValueError, match="one of the two"):
        stream.add()
    with pytest.raises(ValueError, match="one of the two"):
        stream.add(video(), pixel_values=torch.zeros(1, 3, 56, 56))


def test_a_model_that_fails_leaves_the_frames_before(monkeypatch):
    stream, frames = stream_of(), video(6)
    connect, calls = type(stream._parts).connect, []

    def failing(parts, states):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return connect(parts, states)

    with monkeypatch.context() as patch:
        patch.setattr(type(stream._parts), "connect", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            stream.add(frames)
    assert stream.frames == 3
    stream.add(frames[3:])
    expected = stream_of()
    expected.add(frames)
    torch.testing.assert_close(stream.visual_tokens(), expected.visual_tokens(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (STC(keep=0.1), "less than one token per frame"),
        (STC(), "keep is 60 tokens per frame, and a frame of this model has 4"),
    ],
)
def test_budgets_that_do_not_fit_a_frame_are_refused(method, message):
    with pytest.raises(ValueError, match=message):
        stream_of(method=method)


@pytest.mark.parametrize(
    "settings",
    [
        {"keep": 0},
        {"keep": 0.0},
        {"keep": 1.5},
        {"interval": 0},
        {"chunk": 0},
        {"chunk": 1.5},
        {"update_ratio": 0.0},
        {"update_ratio": 2},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        STC(**settings)


def test_bounds_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="max_tokens is 1, and 2 tokens are kept"):
        stream_of(max_tokens=1)
    with pytest.raises(ValueError, match="min_frame_tokens is 0"):
        stream_of(min_frame_tokens=0)
    with pytest.raises(TypeError, match=r"takes STC\(\)"):
        stream_of(method="stc")


@pytest.mark.parametrize(
    ("name", "reason"), [("qwen2_5_vl", "packs the patches of two frames"), ("llava", "is not known here")]
)
def test_other_families_are_refused_by_name(name, reason):
    model, processor, _ = tiny_vlm(name)
    with pytest.raises(TypeError, match=rf"{type(model).__name__} .*{reason}.*llava_next_video, llava_onevi"):
        Stream(model, STC(), processor)


def test_prompts_without_exactly_one_video_are_refused():
    stream = stream_of()
    stream.add(video())
    with pytest.raises(ValueError, match="no chat template"):
        stream.ask("what is in the image")
    with pytest.raises(ValueError, match="several stretches"):
        stream.ask("<video> what <video>")
    with pytest.raises(ValueError, match="placeholder of a picture"):
        stream.ask("<video> what <image>")
    with pytest.raises(ValueError, match="no placeholder"):
        stream.ask(torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match=r"have the shape \[2\]"):
        stream.ask(torch.tensor([1, 2]))
    with pytest.raises(TypeError, match="is a list"):
        stream.ask([1, 2])


def test_without_a_processor_pixel_values_and_ids_are_needed():
    model, processor, _ = fixture("llava_onevision")
    stream = Stream(model, STC(keep=2))
    with pytest.raises(ValueError, match="stream has none"):
        stream.add(video())
    stream.add(pixel_values=pixels_of("llava_onevision", video()))
    with pytest.raises(ValueError, match="no processor with a tokenizer"):
        stream.ask(PROMPT)
    assert stream.ask(processor.tokenizer(PROMPT, return_tensors="pt").input_ids, **GREEDY).shape == (1, 4)


def test_questions_are_refused_while_reducers_are_attached():
    model, _, _ = fixture("llava_onevision")
    stream = stream_of()
    stream.add(video())
    with compress.attach(model, FastV(k=1)), pytest.raises(RuntimeError, match=r"FastV.*detach the session"):
        stream.ask(PROMPT)
    assert stream.ask(PROMPT, **GREEDY)


def test_the_example_reports_flat_memory(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["stream.py", "240"])
    runpy.run_path(str(ROOT / "docs" / "stream.py"), run_name="__main__")
    *_, last = capsys.readouterr().out.strip().splitlines()
    assert last.startswith("second half: the stream grew by 0.00%")
