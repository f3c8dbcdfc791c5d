"""Questions about pictures, to measure vision-language models: drawn scenes, JSON lines and hub datasets."""

import hashlib
import json
import os
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ... import hub
from ...configuration import shorten
from ...files import check_source, looks_like_path
from ...image_files import is_image, why_not_image
from ...images import MAX_FILE_BYTES, load_image
from .inventory import Inventory
from .sources import hub_table, table_of

SCENES = "scenes"
SCENE_COUNT = 500
"""Questions about drawn scenes where no count is given."""
LETTERS = string.ascii_uppercase
_ACCEPTED = f"{SCENES}, a FILE.jsonl of questions, or a hub dataset (hf://owner/name)"
_ROW = '{"images": ["photo.jpg"], "question": "…", "answers": ["…"]}'


@dataclass(frozen=True, eq=False)
class VisualQuestion:
    """A question about one or more pictures.

    `answers` are all accepted or given by annotators, with repeats. With `choices` the question lists them as
    "A. …", and `answers` are letters. `pictures` loads the pictures as upright 8-bit RGB.
    """

    name: str
    text: str
    answers: tuple[str, ...]
    pictures: Callable[[], list[Image.Image]]
    category: str = ""
    choices: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """The text that a model gets: the question, and one line per choice."""
        choices = zip(LETTERS, self.choices, strict=False)
        return "\n".join([self.text, *(f"{letter}. {choice}" for letter, choice in choices)])


@dataclass(frozen=True, eq=False)
class QuestionSet:
    """Questions in a fixed order; `open_questions` makes one.

    `again` has as many questions of another seed, None where the data has no seed. `inventory` has the files
    of the pictures.
    """

    source: str
    questions: Sequence[VisualQuestion]
    inventory: Inventory
    again: "QuestionSet | None" = None

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def digest(self) -> str:
        """Digest of all texts in order, but not of the pictures."""
        digest = hashlib.sha256()
        for each in self.questions:
            digest.update(json.dumps([each.name, each.prompt, each.answers, each.category]).encode())
        return digest.hexdigest()[:16]

    @property
    def categories(self) -> list[str]:
        """The names of the categories, in the order of their first question."""
        return list(dict.fromkeys(each.category for each in self.questions if each.category))


def open_questions(
    source: str, *, count: int | None = None, seed: int = 0, split: str | None = None
) -> QuestionSet:
    """Find the questions of a source; `count` keeps the first of them.

    "scenes" are questions about pictures that vistok draws (split "test" unless given; 500 unless counted).
    A JSONL file has one question per line: "images" (paths relative to the file), "question", "answers", and
    optionally "category" and "choices"; an answer to choices is one of them, its letter or its number from 0.
    A hub dataset, or a folder of parquet files, has columns of these names; "image", "answer" and "options"
    are accepted too.

    Raises:
        FileNotFoundError: no such file, folder, hub dataset or picture.
        ValueError: a line or row that is not such a question, named with its number; a split that does not
            apply; a count below 1.
        ImportError, ConnectionError: a hub dataset without the package datasets, or offline.
    """
    if count is not None and count < 1:
        raise ValueError(f"count={count}: give the number of questions to take, 1 or more")
    if source == SCENES:
        own = _scenes(count or SCENE_COUNT, seed, split or "test")
        return replace(own, again=_scenes(len(own), seed + 1, split or "test"))
    path = Path(os.path.expanduser(source))
    if path.suffix.lower() == ".jsonl":
        if split is not None:
            raise ValueError(f"split={split!r} does not apply to a file: it is for scenes and hub datasets")
        return _lines(path, count)
    if path.is_dir():
        return _rows(source, table_of(source, str(path), None, split), count)
    if looks_like_path(source) or os.path.lexists(path):
        problem = "is not a file of questions" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{source} {problem}: give {_ACCEPTED}")
    return _rows(source, hub_table(source.removeprefix(hub.PREFIX), split, accepted=_ACCEPTED), count)


# Drawn scenes -----------------------------------------------------------------------------------------------


def _scenes(count: int, seed: int, split: str) -> QuestionSet:
    from ...train.object_scenes import test_questions

    questions = [
        VisualQuestion(
            f"{split} scene {number}, seed {seed}",
            each.question,
            (each.answer,),
            partial(_drawn, scene),
            each.category,
        )
        for number, (scene, each) in enumerate(test_questions(count, split, seed))
    ]
    return QuestionSet(SCENES if split == "test" else f"{SCENES}, split {split}", questions, Inventory({}))


def _drawn(scene: Any) -> list[Image.Image]:
    from ...train.object_scenes import render

    return [Image.fromarray(render(scene))]


# JSON lines -------------------------------------------------------------------------------------------------


def _lines(path: Path, count: int | None) -> QuestionSet:
    check_source(path, limit=MAX_FILE_BYTES)
    questions, files = [], []
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if count is not None and len(questions) == count:
                    break
                if line.strip():
                    question, paths = _of_line(line, f"{path}, line {number}", path.parent)
                    questions.append(replace(question, name=f"line {number}"))
                    files += paths
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}): give JSON lines in UTF-8") from error
    if not questions:
        raise ValueError(f"{path} has no question: give one line {_ROW} per question")
    return QuestionSet(str(path), questions, Inventory.take(list(dict.fromkeys(map(str, files)))))


def _of_line(line: str, where: str, folder: Path) -> tuple[VisualQuestion, list[Path]]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}): give {_ROW}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {shorten(line.strip())}, not a JSON object: give {_ROW}")
    paths = []
    for name in _texts(row, ("images",), where):
        path = Path(folder, os.path.expanduser(name))
        if not path.is_file():
            raise FileNotFoundError(
                f"{where} names the image {shorten(name)}, and there is no file {path}: paths are "
                f"relative to {folder}"
            )
        if not is_image(path):
            raise ValueError(
                f"{where} names {path}, which is not an image ({why_not_image(path) or 'unreadable'})"
            )
        paths.append(path)
    return _question(row, where, partial(_loaded, paths, where)), paths


def _loaded(paths: Sequence[Path], where: str) -> list[Image.Image]:
    try:
        return [load_image(path) for path in paths]
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


# Hub datasets -----------------------------------------------------------------------------------------------


def _rows(source: str, table: Any, count: int | None) -> QuestionSet:
    import datasets

    names = [name for name in ("images", "image") if name in table.features]
    if not names or "question" not in table.features:
        raise ValueError(
            f"{source} has the columns {', '.join(table.features)}: questions need image or images, "
            "question, and answer or answers"
        )
    if count is not None:
        table = table.select(range(min(count, len(table))))
    column = names[0]
    feature = table.features[column]
    plain = datasets.Image(decode=False)
    if isinstance(feature, datasets.Image):
        table = table.cast_column(column, plain)
    elif isinstance(getattr(feature, "feature", None), datasets.Image):
        table = table.cast_column(column, datasets.List(plain))
    others = table.remove_columns([name for name in ("images", "image") if name in table.features])
    questions = []
    for number, row in enumerate(others):
        where = f"{source}, row {number}"
        load = partial(_stored, table, column, number, where)
        questions.append(replace(_question(row, where, load), name=f"row {number}"))
    files = [file["filename"] for file in table.cache_files]
    return QuestionSet(source, questions, Inventory.take(files))


def _stored(table: Any, column: str, number: int, where: str) -> list[Image.Image]:
    values = table[number][column]
    values = values if isinstance(values, list) else [values]
    pictures = []
    for value in values:
        content = value
        if isinstance(value, dict):  # an Image feature that is not decoded
            content = value["path"] if value["bytes"] is None else value["bytes"]
        if not isinstance(content, bytes | str) or not content:
            raise ValueError(f"{where} holds no image under {column!r}")
        try:
            pictures.append(load_image(content))
        except (OSError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
    if not pictures:
        raise ValueError(f"{where} holds no image under {column!r}")
    return pictures


# Rows -------------------------------------------------------------------------------------------------------


def _question(
    row: Mapping[str, Any], where: str, pictures: Callable[[], list[Image.Image]]
) -> VisualQuestion:
    """The checked question of a row; the caller names it."""
    text = row.get("question")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{where} has {_value(row, "question")} as "question": give a text, as in {_ROW}')
    category = row.get("category")
    if category is not None and (not isinstance(category, str) or not category.strip()):
        raise ValueError(f'{where} has {_value(row, "category")} as "category": give a text or leave it out')
    choices: tuple[str, ...] = ()
    if row.get("choices", row.get("options")) is not None:
        choices = tuple(_texts(row, ("choices", "options"), where))
        if not 2 <= len(choices) <= len(LETTERS) or len(set(choices)) < len(choices):
            raise ValueError(f'{where} has {len(choices)} "choices": give 2 to {len(LETTERS)} different ones')
    if choices:
        answers = tuple(_letter(answer, choices, where) for answer in _answers(row, where, number_too=True))
    else:
        answers = tuple(map(str, _answers(row, where)))
    return VisualQuestion("", text.strip(), answers, pictures, (category or "").strip(), choices)


def _texts(row: Mapping[str, Any], keys: Sequence[str], where: str) -> list[str]:
    """A list of at least one text under the first of the keys that is there."""
    key = next((key for key in keys if row.get(key) is not None), keys[0])
    values = row.get(key)
    if not isinstance(values, list) or not values:
        raise ValueError(f'{where} has {_value(row, key)} as "{key}": give a list of texts, as in {_ROW}')
    for value in values:
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f'{where} has {shorten(value)} in "{key}": give texts, as in {_ROW}')
    return values


def _answers(row: Mapping[str, Any], where: str, *, number_too: bool = False) -> list[str | int]:
    """The answers of a row: "answers", or one "answer"; as VQA stores them, each may be {"answer": …}."""
    key = "answers" if row.get("answers") is not None else "answer"
    values = row.get(key)
    if key == "answer" and values is not None and not isinstance(values, list):
        values = [values]
    if isinstance(values, list):
        values = [
            value["answer"] if isinstance(value, dict) and "answer" in value else value for value in values
        ]
    kinds = (str, int) if number_too else (str,)
    fits = isinstance(values, list) and all(
        isinstance(value, kinds) and not isinstance(value, bool) and str(value).strip() for value in values
    )
    if not fits or not values:
        key = key if key in row else "answers"
        raise ValueError(f'{where} has {_value(row, key)} as "{key}": give a list of texts, as in {_ROW}')
    return values


def _letter(answer: str | int, choices: Sequence[str], where: str) -> str:
    """The letter of a choice that is named by its text, its letter or its number from 0."""
    letters = LETTERS[: len(choices)]
    if answer in choices:
        return letters[choices.index(answer)]
    if isinstance(answer, str) and len(answer) == 1 and answer in letters:
        return answer
    if str(answer).isdecimal() and int(answer) < len(choices):
        return letters[int(answer)]
    raise ValueError(
        f"{where} has the answer {shorten(str(answer))}, which is not one of its {len(choices)} choices: "
        f"give a choice, its letter ({letters[0]} to {letters[-1]}) or its number from 0"
    )


def _value(row: Mapping[str, Any], key: str) -> str:
    """The value under a key, for messages."""
    if key not in row:
        return f"nothing (its keys are {', '.join(map(str, row))[:60]})"
    return shorten(row[key])
