"""Questions for vision-language models: every source, and clear messages for what is not a question."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_vlms import picture
from vlm_questions import write_questions, write_rows

from vistok.eval.data.questions import open_questions


@pytest.fixture
def row(tmp_path):
    picture(0).save(tmp_path / "a.png")
    return {"images": ["a.png"], "question": "what is it?", "answers": ["a cat"]}


def opened(folder, *rows):
    return open_questions(str(write_rows(folder / "rows.jsonl", rows)))


def test_lines_become_questions_with_their_pictures(tmp_path, row):
    picture(1).save(tmp_path / "b.png")
    data = opened(tmp_path, row, row | {"images": ["a.png", "b.png"], "category": "two"})
    one, two = data.questions
    assert (one.name, one.text, one.answers, one.category) == ("line 1", "what is it?", ("a cat",), "")
    assert [image.size for image in two.pictures()] == [picture(0).size, picture(1).size]
    assert np.array_equal(two.pictures()[1], picture(1)) and data.categories == ["two"]
    assert len(data.inventory.files) == 2


def test_answers_to_choices_are_letters(tmp_path, row):
    choices = row | {"choices": ["cat", "dog"]}
    data = opened(
        tmp_path, choices | {"answers": ["dog"]}, choices | {"answers": ["A"]}, choices | {"answers": [1]}
    )
    assert [each.answers for each in data.questions] == [("B",), ("A",), ("B",)]
    assert data.questions[0].prompt == "what is it?\nA. cat\nB. dog"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": None}, 'None as "images"'),
        ({"images": "a.png"}, "'a.png' as \"images\": give a list of texts"),
        ({"images": []}, '[] as "images"'),
        ({"images": [3]}, '3 in "images"'),
        ({"images": ["no.png"]}, "there is no file"),
        ({"images": ["rows.jsonl"]}, "not an image"),
        ({"question": ""}, "'' as \"question\""),
        ({"question": 7}, '7 as "question"'),
        ({"answers": []}, '[] as "answers"'),
        ({"answers": "a cat"}, "'a cat' as \"answers\""),
        ({"answers": [1]}, '[1] as "answers"'),
        ({"answers": [" "]}, "[' '] as \"answers\""),
        ({"category": 2}, '2 as "category"'),
        ({"choices": ["one"]}, '1 "choices"'),
        ({"choices": ["cat", "cat"]}, '2 "choices": give 2 to 26 different ones'),
        ({"choices": ["cat", "dog"], "answers": ["cow"]}, "not one of its 2 choices"),
    ],
)
def test_a_line_that_is_not_a_question_is_named(tmp_path, row, change, words):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        opened(tmp_path, row, row | change)
    assert f"{tmp_path / 'rows.jsonl'}, line 2" in str(error.value) and words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "line 1 is not JSON"), ("[1]", "line 1 is '[1]', not a JSON object"), ("\n", "has no question")],
)
def test_a_file_without_rows_is_refused(tmp_path, text, words):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ValueError) as error:
        open_questions(str(tmp_path / "rows.jsonl"))
    assert words in str(error.value)


def test_a_missing_key_lists_the_keys_that_are_there(tmp_path, row):
    row.pop("answers")
    with pytest.raises(ValueError, match=r'nothing \(its keys are images, question\) as "answers"'):
        opened(tmp_path, row)


def test_a_damaged_picture_is_named_with_its_line_when_it_is_read(tmp_path, row):
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(content[: len(content) // 2])
    data = opened(tmp_path, row, row | {"images": ["b.png"]})
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: .*b.png"):
        data.questions[1].pictures()


def test_scenes_have_categories_and_a_second_seed():
    data = open_questions("scenes", count=9, seed=3)
    assert len(data) == len(data.again) == 9 and len(data.categories) == 7
    assert data.digest == open_questions("scenes", count=9, seed=3).digest != data.again.digest
    assert data.again.digest == open_questions("scenes", count=9, seed=4).digest
    (image,) = data.questions[0].pictures()
    assert image.size == (120, 120)
    with pytest.raises(ValueError, match="split 'no'"):
        open_questions("scenes", count=2, split="no")


def test_a_count_takes_the_first_questions(tmp_path):
    path = write_questions(tmp_path, count=4)
    assert [each.name for each in open_questions(str(path), count=2).questions] == ["line 1", "line 2"]
    with pytest.raises(ValueError, match="count=0"):
        open_questions(str(path), count=0)
    with pytest.raises(ValueError, match="does not apply to a file"):
        open_questions(str(path), split="test")


def write_table(folder, **columns):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {name: datasets.Image() if name == "image" else datasets.Value("string") for name in columns}
    )
    (folder / "table").mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(folder / "table" / "test.parquet"))
    return str(folder / "table")


def test_a_folder_of_parquet_files_is_read_like_a_hub_dataset(tmp_path):
    paths = []
    for number in range(2):
        picture(number).save(tmp_path / f"{number}.png")
        paths.append(str(tmp_path / f"{number}.png"))
    source = write_table(tmp_path, image=paths, question=["what?", "who?"], answer=["a cat", "a dog"])
    data = open_questions(source)
    assert [(each.text, each.answers) for each in data.questions] == [
        ("what?", ("a cat",)),
        ("who?", ("a dog",)),
    ]
    assert np.array_equal(data.questions[1].pictures()[0], np.asarray(Image.open(paths[1])))
    assert len(open_questions(source, count=1)) == 1


def test_a_dataset_without_questions_lists_its_columns(tmp_path):
    picture(0).save(tmp_path / "0.png")
    source = write_table(tmp_path, image=[str(tmp_path / "0.png")], label=["cat"])
    with pytest.raises(ValueError, match="has the columns image, label: questions need"):
        open_questions(source)


def test_names_that_are_nothing_here_are_explained(tmp_path, offline):
    with pytest.raises(ConnectionError, match="hub cannot be reached"):
        open_questions("owner/questions")
    for source in ("./missing", str(tmp_path / "missing.txt")):
        with pytest.raises(FileNotFoundError, match=r"does not exist: give scenes, a FILE.jsonl"):
            open_questions(source)
    (tmp_path / "notes.txt").write_text(json.dumps({}))
    with pytest.raises(FileNotFoundError, match="is not a file of questions"):
        open_questions(str(tmp_path / "notes.txt"))
    with pytest.raises(FileNotFoundError, match=r"missing.jsonl does not exist"):
        open_questions(str(tmp_path / "missing.jsonl"))
