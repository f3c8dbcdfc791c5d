"""Frames of video files that PyAV writes here, and of folders."""

import struct
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.video_files import iterate_frames, read_frames

RATE, COUNT, SIZE = 10, 25, (48, 64)  # frames per second, frames, height and width


def shade(number: int) -> int:
    return 20 + 8 * number


@pytest.fixture(scope="module")
def av():
    return pytest.importorskip("av", reason="PyAV (the extra `video`) is not installed")


def write(av, path, *, codec="libx264", options=None, container=None):
    """A video whose frame n is grey of `shade(n)` with a white stripe on the left."""
    with av.open(str(path), "w", options=container or {}) as output:
        stream = output.add_stream(codec, rate=RATE, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        for number in range(COUNT):
            picture = np.full((*SIZE, 3), shade(number), np.uint8)
            picture[:, :8] = 255
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def video(av, tmp_path_factory):
    return write(av, tmp_path_factory.mktemp("video") / "clip.mp4")


def is_frame(pixels, number):
    return abs(float(pixels[:, :, 16:].float().mean()) - shade(number)) < 3


def test_all_frames_come_in_order_with_their_times(video):
    frames = list(iterate_frames(video))
    assert [frame.number for frame in frames] == list(range(COUNT))
    assert [frame.seconds for frame in frames] == pytest.approx([n / RATE for n in range(COUNT)])
    assert all(frame.pixels.shape == (3, *SIZE) and frame.pixels.dtype == torch.uint8 for frame in frames)
    assert all(is_frame(frame.pixels, frame.number) for frame in frames)
    stacked = read_frames(video)
    assert torch.equal(stacked, torch.stack([frame.pixels for frame in frames]))


@pytest.mark.parametrize(
    ("fps", "numbers"),
    [(5, range(0, 25, 2)), (2, range(0, 25, 5)), (3, [0, 4, 7, 10, 14, 17, 20, 24]), (30, range(25))],
)
def test_a_rate_takes_the_first_frame_of_each_stretch(video, fps, numbers):
    assert [frame.number for frame in iterate_frames(video, fps=fps)] == list(numbers)


def test_other_codecs_are_read_too(av, tmp_path):
    frames = read_frames(write(av, tmp_path / "clip.avi", codec="mpeg4"))
    assert len(frames) == COUNT and is_frame(frames[7], 7)


def test_frames_of_a_telephone_stand_upright(av, video, tmp_path):
    """The matrix of the track is changed to the one of a recording that is turned clockwise for display."""
    data = bytearray(video.read_bytes())
    header = data.index(b"tkhd")
    matrix = header + 4 + 4 + 4 * 5 + 8 + 8  # behind version, times, number, duration, layer and volume
    assert struct.unpack(">i", data[matrix : matrix + 4])[0] == 0x10000
    width = SIZE[0]
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 0x10000, 0, -0x10000, 0, 0, width << 16, 0, 0x40000000)
    (tmp_path / "phone.mp4").write_bytes(data)
    frames = read_frames(tmp_path / "phone.mp4")
    assert frames.shape == (COUNT, 3, SIZE[1], SIZE[0])
    stripe = frames[0].float().mean(0)
    assert float(stripe[:6].mean()) > 240 and float(stripe[16:].mean()) < 40  # the left edge is on top


@pytest.mark.parametrize(("name", "number"), [("ITU709", 1), ("ITU601", 5)])
def test_colours_follow_the_matrix_that_the_file_states(av, tmp_path, name, number):
    picture = np.zeros((*SIZE, 3), np.uint8)
    picture[..., 0], picture[..., 1] = 200, 40
    with av.open(str(tmp_path / "red.mp4"), "w") as output:
        stream = output.add_stream("libx264", rate=RATE)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = number, 1
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace=name, dst_color_range="MPEG")
        frame.colorspace, frame.color_range = number, 1
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    mean = read_frames(tmp_path / "red.mp4").float().mean((0, 2, 3))
    assert mean.tolist() == pytest.approx([200, 40, 0], abs=3)


# What is not whole ------------------------------------------------------------------------------------------


def test_a_file_without_its_index_is_refused(video, tmp_path):
    (tmp_path / "half.mp4").write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"half.mp4 is cut off, damaged or not a video: .* no frame"):
        read_frames(tmp_path / "half.mp4")


@pytest.mark.parametrize(
    "options", [{"g": "1", "bf": "0", "preset": "ultrafast"}, {}], ids=["intra", "usual"]
)
@pytest.mark.parametrize("share", [0.87, 0.93, 0.99])
def test_a_truncated_file_names_its_last_good_frame(av, tmp_path, share, options):
    path = write(av, tmp_path / "clip.mp4", options=options, container={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    frames, reader = [], iterate_frames(path)
    with pytest.raises(ValueError, match="the last good frame is number") as error:
        while True:
            frames.append(next(reader))
    assert 0 < len(frames) < COUNT
    assert all(is_frame(frame.pixels, frame.number) for frame in frames)
    assert f"number {frames[-1].number}, at {frames[-1].seconds:.3f} s" in str(error.value)


def test_text_and_sound_are_not_videos(av, tmp_path):
    (tmp_path / "notes.mp4").write_text("not a video")
    with pytest.raises(ValueError, match="no frame of it could be read"):
        read_frames(tmp_path / "notes.mp4")
    with av.open(str(tmp_path / "sound.wav"), "w") as output:
        stream = output.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.rate = 8000
        output.mux(stream.encode(sound))
    with pytest.raises(ValueError, match="holds no video"):
        read_frames(tmp_path / "sound.wav")


def test_missing_files_and_wrong_rates_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        iterate_frames(tmp_path / "none.mp4")
    for rate in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="fps is"):
            iterate_frames(tmp_path, fps=rate)


def test_without_pyav_the_extra_is_named(video, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ModuleNotFoundError, match=r"vistok\[video\]"):
        read_frames(video)


# Folders ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for number in range(12):
        Image.new("RGB", (10, 6), (number, 0, 0)).save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    return tmp_path


def test_pictures_of_a_folder_are_frames_in_the_order_of_their_numbers(folder):
    frames = read_frames(folder)
    assert frames.shape == (12, 3, 6, 10)
    assert frames[:, 0, 0, 0].tolist() == list(range(12))
    assert [frame.number for frame in iterate_frames(folder, fps=1, folder_fps=4)] == [0, 4, 8]


def test_folders_without_pictures_times_or_one_size_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="give folder_fps"):
        iterate_frames(folder, fps=1)
    Image.new("RGB", (11, 6)).save(folder / "frame12.png")
    with pytest.raises(ValueError, match=r"frame12.png has 11 × 6 .* have 10 × 6"):
        read_frames(folder)
    (folder / "frame12.png").write_bytes((folder / "frame11.png").read_bytes()[:40])
    with pytest.raises(ValueError, match="the last good frame is number 11"):
        read_frames(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        read_frames(tmp_path / "empty")


def test_the_rate_of_a_folder_is_not_for_files(video):
    with pytest.raises(ValueError, match="is for folders"):
        iterate_frames(video, folder_fps=2)
