"""Scenes of known objects: what is drawn, what is asked, and that every answer is right and not guessable."""

import re
from collections import Counter, defaultdict
from itertools import combinations

import numpy as np
import pytest

from vistok.train import object_scenes as sq

_WORDS = {
    word: (name, word)
    for name, values in {
        "size": sq.SIZES,
        "colour": sq.COLOURS,
        "material": sq.MATERIALS,
        "shape": sq.SHAPES,
    }.items()
    for word in values
}
_WORDS |= {f"{shape}s": ("shape", shape) for shape in sq.SHAPES} | {"crosses": ("shape", "cross")}


def _fitting(scene, phrase):
    """The objects that a phrase such as "small red cube" or "shiny things" fits."""
    description = dict(_WORDS[word] for word in phrase.split() if word not in ("thing", "things"))
    return [o for o in scene.objects if all(getattr(o, name) == value for name, value in description.items())]


def _only(scene, phrase):
    (item,) = _fitting(scene, phrase)
    return item


def _oracle(scene, question):
    """The answer, worked out from the words of the question alone."""
    if match := re.fullmatch(r"what (\w+) is the (left|right|top|bottom)most thing\?", question):
        key = {"left": lambda o: o.x, "right": lambda o: -o.x, "top": lambda o: o.y, "bottom": lambda o: -o.y}
        return getattr(min(scene.objects, key=key[match[2]]), match[1])
    if match := re.fullmatch(r"what (colour|shape|material) is the (.+)\?", question):
        return getattr(_only(scene, match[2]), match[1])
    if match := re.fullmatch(r"which is there, (.+) or (.+)\?", question):
        is_there = tuple(bool(_fitting(scene, phrase)) for phrase in match.groups())
        return {(1, 0): "first", (0, 1): "second", (1, 1): "both", (0, 0): "neither"}[is_there]
    if match := re.fullmatch(r"how many (.+) are there\?", question):
        return str(len(_fitting(scene, match[1])))
    if match := re.fullmatch(r"where is the (.+), seen from the (.+)\?", question):
        item, other = (_only(scene, phrase) for phrase in match.groups())
        across, down = item.x - other.x, item.y - other.y
        if abs(across) > abs(down):
            return "right" if across > 0 else "left"
        return "below" if down > 0 else "above"
    if match := re.fullmatch(r"which (\w+) is most common\?", question):
        counts = Counter(getattr(o, match[1]) for o in scene.objects).most_common()
        assert all(number < counts[0][1] for _, number in counts[1:])
        return counts[0][0]
    if match := re.fullmatch(r"are there more (.+) or (.+)\?", question):
        first, second = (len(_fitting(scene, phrase)) for phrase in match.groups())
        return (
            "neither" if first == second == 0 else ("second", "equal", "first")[np.sign(first - second) + 1]
        )
    if match := re.fullmatch(r"what does the (\w+) sign read\?", question):
        (code,) = [sign.code for sign in scene.signs if sign.colour == match[1]]
        return code
    match = re.fullmatch(r"in which cell is the (.+)\?", question)
    item = _only(scene, match[1])
    return "ABCDEF"[item.x // 20] + "123456"[item.y // 20]


@pytest.fixture(scope="module")
def asked():
    """(scene, question) pairs: several questions on each of 400 training scenes."""
    scenes = [sq.object_scene("train", 0, index) for index in range(400)]
    kinds = sq.CATEGORIES * 2
    return [
        (scene, question)
        for number, scene in enumerate(scenes)
        for question in sq.questions(scene, np.random.default_rng(number), kinds)
    ]


@pytest.fixture(scope="module")
def test_set():
    return list(sq.test_questions())


def test_every_answer_follows_from_the_words_of_the_question(asked, test_set):
    for scene, question in asked + test_set:
        assert question.answer == _oracle(scene, question.question), question


def test_set_is_fixed_and_has_every_category_equally_often(test_set):
    assert [q for _, q in sq.test_questions(50)] == [q for _, q in test_set[:50]]
    shares = Counter(question.category for _, question in test_set)
    assert len(test_set) == 2000
    assert set(shares) == set(sq.CATEGORIES)
    assert max(shares.values()) - min(shares.values()) <= 1


def test_best_constant_answer_stays_below_30_percent_in_every_category(asked, test_set):
    for pairs in (asked, test_set):
        answers = defaultdict(Counter)
        for _, question in pairs:
            answers[question.category][question.answer] += 1
        for category, counts in answers.items():
            assert max(counts.values()) / counts.total() < 0.3, category


def test_the_kind_of_question_does_not_give_the_answer_away(asked):
    answers = defaultdict(Counter)
    for _, question in asked:
        kind = re.sub(r"\b(" + "|".join(_WORDS) + r"|things?)\b", "…", question.question)
        answers[" ".join(kind.split()[:4])][question.answer] += 1
    common = {kind: counts for kind, counts in answers.items() if counts.total() >= 150}
    assert len(common) >= 6
    for kind, counts in common.items():
        assert max(counts.values()) / counts.total() < 0.37, kind


def test_words_of_all_questions_are_in_the_vocabulary(asked):
    for _, question in asked:
        assert set(re.findall(r"[a-z]+", question.question)) <= set(sq.VOCABULARY)


def test_held_out_pairs_appear_in_the_split_combinations_only(asked, test_set):
    for scene, question in asked + test_set:
        assert not {(o.colour, o.shape) for o in scene.objects} & sq.HELD_OUT_PAIRS
        assert not any(f"{colour} {shape}" in question.question for colour, shape in sq.HELD_OUT_PAIRS)
    scenes = [sq.object_scene("combinations", 0, index) for index in range(100)]
    objects = [o for scene in scenes for o in scene.objects]
    share = sum((o.colour, o.shape) in sq.HELD_OUT_PAIRS for o in objects) / len(objects)
    assert 0.4 < share < 0.7
    named = [q.question for _, q in sq.test_questions(200, "combinations")]
    assert any(f"{colour} {shape}" in question for question in named for colour, shape in sq.HELD_OUT_PAIRS)


def test_splits_and_seeds_give_other_scenes_and_the_same_key_the_same_picture():
    keys = [(split, seed, index) for split in sq.SPLITS for seed in (0, 1) for index in (0, 1)]
    pictures = [sq.render(sq.object_scene(*key)) for key in keys]
    assert all(not np.array_equal(a, b) for a, b in combinations(pictures, 2))
    assert all(
        np.array_equal(picture, sq.render(sq.object_scene(*key)))
        for key, picture in zip(keys, pictures, strict=True)
    )
    assert pictures[0].shape == (120, 120, 3) and pictures[0].dtype == np.uint8


def test_things_lie_inside_the_picture_and_do_not_overlap():
    for index in range(200):
        scene = sq.object_scene("train", 3, index)
        boxes = [(o.x - o.radius, o.y - o.radius, o.x + o.radius, o.y + o.radius) for o in scene.objects]
        boxes += [(s.x, s.y, s.x + s.width, s.y + 13) for s in scene.signs]
        for left, top, right, bottom in boxes:
            assert min(left, top) >= 0 and max(right, bottom) < sq.PICTURE_SIZE
        for a, b in combinations(boxes, 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        for o in scene.objects:  # two pixels from the borders of cells
            assert {o.x % 20, o.y % 20} <= set(range(2, 19))
        for s in scene.signs:  # one tile
            assert s.x // 60 == (s.x + s.width - 1) // 60 and s.y // 60 == (s.y + 12) // 60


def test_an_object_is_drawn_in_its_colour_at_its_place():
    for colour, tint in sq.COLOURS.items():
        item = sq.SceneObject(colour, "cross", "matte", "large", 60, 60, 13)
        picture = sq.render(sq.ObjectScene((item,), (), (0, 0, 0), ()))
        middle = picture[58:63, 58:63].mean(axis=(0, 1)) / 255
        nearest = min(sq.COLOURS, key=lambda name: np.abs(np.array(sq.COLOURS[name]) * 0.95 - middle).sum())
        assert nearest == colour, tint


def test_every_shape_and_material_looks_different():
    pictures = {}
    for shape in sq.SHAPES:
        for material in sq.MATERIALS:
            item = sq.SceneObject("red", shape, material, "small", 30, 30, 7)
            pictures[shape, material] = sq.render(sq.ObjectScene((item,), (), (0, 0, 0), ())).astype(float)
    for a, b in combinations(pictures, 2):
        difference = np.abs(pictures[a] - pictures[b])[22:39, 22:39].mean()
        assert difference > 2, (a, b)


@pytest.mark.parametrize("patch_size", [5, 10, 20])
def test_patch_labels_name_what_lies_at_the_centre(patch_size):
    colours = list(sq.COLOURS)
    for index in range(50):
        scene = sq.object_scene("train", 5, index)
        labels = sq.patch_labels(scene, patch_size)
        assert labels.shape == (120 // patch_size, 120 // patch_size, len(sq.LABELS))
        assert (labels >= 0).all() and (labels < list(sq.LABELS.values())).all()
        assert labels[..., 4].sum() == len({(o.x // patch_size, o.y // patch_size) for o in scene.objects})
        for o in scene.objects:
            if o.shape != "ring" and o.size == "large" and patch_size == 5:
                row = labels[o.y // patch_size, o.x // patch_size]
                assert colours[row[0] - 1] == o.colour and sq.SHAPES[row[1] - 1] == o.shape


def test_letters_of_patch_labels_spell_the_codes():
    letters = "ACEFHJKLNPRTUXYZ2479"
    for index in range(50):
        scene = sq.object_scene("train", 6, index)
        labels = sq.patch_labels(scene, 10)[..., 5:]
        for sign in scene.signs:
            row = labels[(sign.y + 6) // 10].reshape(-1)
            halves = row[sign.x // 5 : (sign.x + sign.width) // 5 + 1]
            assert "".join(letters[number - 1] for number in halves if number) == sign.code


def test_cells_run_from_a1_at_the_top_left_to_f6():
    assert [sq.grid_cell(*place) for place in ((0, 0), (119, 0), (0, 119), (119, 119), (45, 70))] == [
        "A1", "F1", "A6", "F6", "C4",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="outside the picture"):
        sq.grid_cell(120, 0)


def test_counts_from_zero_to_five_are_all_asked(test_set):
    counts = Counter(q.answer for _, q in test_set if q.category == "count")
    assert set(counts) == set("012345")
    assert min(counts.values()) / counts.total() > 0.08


def test_grounding_uses_the_whole_grid(asked):
    cells = Counter(q.answer for _, q in asked if q.category == "grounding")
    assert len(cells) == 36 and max(cells.values()) / cells.total() < 0.08


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="'dev' is not one of train, validation, test, combinations"):
        sq.object_scene("dev", 0, 0)
    with pytest.raises(ValueError, match="start at 0"):
        sq.object_scene("train", 0, -1)
    scene = sq.object_scene("train", 0, 0)
    with pytest.raises(ValueError, match="'colour' is not one of attribute, "):
        sq.questions(scene, np.random.default_rng(0), ("colour",))
    with pytest.raises(ValueError, match="does not divide 120"):
        sq.patch_labels(scene, 7)


def test_questions_follow_the_order_of_the_categories():
    scene = sq.object_scene("train", 0, 1)
    kinds = ("reading", "count", "reading")
    assert [q.category for q in sq.questions(scene, np.random.default_rng(1), kinds)] == list(kinds)
