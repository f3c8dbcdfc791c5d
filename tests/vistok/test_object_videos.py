"""Videos of known objects: what is drawn is what is described, and no answer can be guessed."""

from collections import Counter

import numpy as np
import pytest

from vistok.train.object_scenes import (
    COLOURS,
    VIDEO_CATEGORIES,
    object_scene,
    render,
    render_video,
    video_questions,
    video_scene,
    video_test_questions,
)


def centre(frame, background, colour):
    """Where pixels differ from a frame without the object, in pixels (x, y); None where none do."""
    changed = np.abs(frame.astype(int) - background.astype(int)).max(-1) > 24
    if not changed.any():
        return None
    rows, columns = changed.nonzero()
    return (columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2


def test_videos_are_a_function_of_their_number():
    first, again, other = (video_scene("train", 0, index) for index in (3, 3, 4))
    assert first == again != other
    assert np.array_equal(render_video(first), render_video(again))
    assert render_video(video_scene("test", 0, 0, frames=5)).shape == (5, 120, 120, 3)


@pytest.mark.parametrize("index", range(6))
def test_objects_are_drawn_where_and_when_they_are_described(index):
    scene = video_scene("validation", 1, index)
    everything = range(len(scene.objects))
    for number, each in enumerate(scene.objects):
        for frame in range(scene.frames):
            still, hidden = scene.frame(frame)
            assert (number in hidden) == (not each.first <= frame <= each.last)
            alone = render(still, hidden=set(everything) - {number})
            place = centre(alone, render(still, hidden=everything), each.item.colour)
            x, y = still.objects[number].x, still.objects[number].y
            assert abs(place[0] - x) <= 3 and abs(place[1] - y) <= 3
            assert 8 <= x < 112 and 8 <= y < 112
    colours = {(each.item.colour, each.item.shape) for each in scene.objects}
    assert len(colours) == len(scene.objects) and all(colour in COLOURS for colour, _ in colours)


def test_what_stands_still_has_the_same_pixels_in_every_frame():
    scenes = [video_scene("train", 2, index) for index in range(50)]
    scene = next(s for s in scenes if any(each.direction == "nowhere" for each in s.objects))
    still = next(each for each in scene.objects if each.direction == "nowhere")
    frames = render_video(scene)[still.first : still.last + 1]
    box = slice(still.item.y - 8, still.item.y + 9), slice(still.item.x - 8, still.item.x + 9)
    assert all(np.array_equal(frame[box], frames[0][box]) for frame in frames)


def test_objects_never_cover_each_other():
    for index in range(40):
        scene = video_scene("train", 5, index)
        for frame in range(scene.frames):
            items = scene.frame(frame)[0].objects
            for i, one in enumerate(items):
                assert all(max(abs(one.x - b.x), abs(one.y - b.y)) >= 17 for b in items[i + 1 :])


def test_answers_follow_from_the_video():
    for index in range(60):
        scene = video_scene("test", 0, index)
        for each in video_questions(scene, np.random.default_rng(index)):
            if each.category == "direction":
                *_, colour, shape, _ = each.question.removesuffix("?").split()
                moved = next(o for o in scene.objects if (o.item.colour, o.item.shape) == (colour, shape))
                before, after = scene.frame(0)[0], scene.frame(1)[0]
                number = scene.objects.index(moved)
                across = after.objects[number].x - before.objects[number].x
                down = after.objects[number].y - before.objects[number].y
                names = {"right": across > 0, "left": across < 0, "down": down > 0, "up": down < 0}
                assert names.get(each.answer, across == down == 0)
            elif each.category == "count":
                seen = [
                    [frame for frame in range(scene.frames) if number not in scene.frame(frame)[1]]
                    for number in range(len(scene.objects))
                ]
                expected = {
                    "how many things appear later?": sum(frames[0] > 0 for frames in seen),
                    "how many things vanish?": sum(frames[-1] < scene.frames - 1 for frames in seen),
                    "how many things are seen in all?": len(seen),
                }
                assert each.answer == str(expected[each.question])
            else:
                assert each.answer in {*(o.item.colour for o in scene.objects)} | {
                    o.item.shape for o in scene.objects
                }


def test_no_constant_answer_does_well():
    answers = {category: Counter() for category in VIDEO_CATEGORIES}
    asked = list(video_test_questions(300))
    for _, each in asked:
        answers[each.category][each.answer] += 1
    for category, counts in answers.items():
        assert counts.total() == 100
        assert counts.most_common(1)[0][1] <= 38, (category, counts)
    assert [each for _, each in video_test_questions(30)] == [each for _, each in asked[:30]]


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="split is one of train"):
        video_scene("no", 0, 0)
    with pytest.raises(ValueError, match="videos have 4 to 64 frames"):
        video_scene("train", 0, 0, frames=3)
    with pytest.raises(ValueError, match="is not one of order, count, direction"):
        video_questions(video_scene("train", 0, 0), np.random.default_rng(0), ("shape",))


def test_hidden_objects_leave_the_others_as_they_are():
    scene = object_scene("train", 0, 1)
    whole, without = render(scene), render(scene, hidden={0})
    item = scene.objects[0]
    changed = np.abs(whole.astype(int) - without.astype(int)).max(-1) > 0
    rows, columns = changed.nonzero()
    assert changed.any()
    assert abs(rows - item.y).max() <= item.radius and abs(columns - item.x).max() <= item.radius
