"""Batches of training pictures with questions for a small vision-language model.

One sequence holds a picture and several questions about it. Each question sees the picture and itself only,
and takes the positions it would have alone. So a picture is encoded once, and every question is trained
exactly as it is asked later. Only answers are learned.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import ProcessorMixin

from .object_scenes import (
    CATEGORIES,
    COLOURS,
    GRID_SIDE,
    LABELS,
    LETTERS,
    MATERIALS,
    PICTURE_SIZE,
    SHAPES,
    SIZES,
    ObjectScene,
    Sign,
    object_scene,
    patch_labels,
    plural,
    questions,
    render,
    test_questions,
)

__all__ = ["FACTS", "IGNORED", "SceneBatches", "encode", "question_batches"]

IGNORED = -100
_ADJECTIVES = {
    word: (kind, number)
    for kind, values in ((0, COLOURS), (2, MATERIALS), (3, SIZES))
    for number, word in enumerate(values, start=1)
}
_NOUNS = {"thing": 0, "things": 0, "sign": len(SHAPES) + 1}
_NOUNS |= {word: number for number, shape in enumerate(SHAPES, start=1) for word in (shape, plural(shape))}
FACTS = {
    "number": 8,
    "colour": LABELS["colour"],
    "shape": LABELS["shape"],
    "material": LABELS["material"],
    "size": LABELS["size"],
    "column": GRID_SIDE,
    "row": GRID_SIDE,
    **{f"letter {place}": LABELS["left_letter"] for place in range(1, 5)},
}  # fact about what a phrase describes to its number of classes
_SAMPLE_QUESTIONS = (*CATEGORIES, "attribute", "relation", "grounding")


@dataclass
class SceneBatches:
    """Batches of pictures with questions; `batches[n]` is the same in every process, for any n from 0.

    Args:
        processor: of `scenes_vlm` or `scenes_qwen`.
        batch_size: pictures per batch.
        text_length: tokens of questions and answers per picture; questions that do not fit are left out.
        seed: of the split "train", from 0.
        categories: the kinds of questions per picture, one question each.
    """

    processor: ProcessorMixin
    batch_size: int
    text_length: int = 136
    seed: int = 0
    categories: Sequence[str] = _SAMPLE_QUESTIONS

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """Batch `number` (from 0): what the image processor gives, and tensors of B pictures.

        With T = `text_length` and N visual tokens they are "text" [B, T] token ids; "segment" [B, T] the
        number of the question from 1, 0 for padding; "offset" [B, T] the place in the question; "phrase"
        [B, T, 4] at the last word of a phrase such as "small red cube" its colour, shape, material and size
        as numbers of `patch_labels`, 0 for any, and −1 at other tokens; "facts" [B, T, 11] there: how many
        objects the phrase fits and, if one, its colour, shape, material, size, column and row, or the four
        letters of a sign, else −100; "target" [B, T] the next token where it belongs to an answer, else −100;
        "patches" [B, N, 7] what each visual token shows (`patch_labels`), −100 where that has no meaning;
        "contents" [B, tiles, 56], only with tiles: which pairs of colour and shape (48) and which signs (8
        colours) each tile holds.

        Raises:
            IndexError: a negative number.
        """
        if number < 0:
            raise IndexError(f"batch {number} does not exist; batches are numbered from 0")
        start = number * self.batch_size
        scenes = [object_scene("train", self.seed, start + i) for i in range(self.batch_size)]
        images = self.processor.image_processor(
            images=[render(scene) for scene in scenes], return_tensors="pt"
        )
        rows = [self._text(scene, number) for scene in scenes]
        batch = dict(images)
        names = ("text", "segment", "offset", "phrase", "facts", "target")
        for name, column in zip(names, zip(*rows, strict=True), strict=True):
            batch[name] = torch.from_numpy(np.stack(column))
        tiled = hasattr(self.processor.image_processor, "image_grid_pinpoints")
        batch["patches"] = torch.from_numpy(np.stack([_visual_labels(scene, tiled) for scene in scenes]))
        if tiled:
            batch["contents"] = torch.from_numpy(np.stack([_tile_contents(scene) for scene in scenes]))
        return batch

    def _text(self, scene: ObjectScene, number: int) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng((*scene.seed, 2, number))
        asked = questions(scene, rng, self.categories)
        text, segment, offset = (np.zeros(self.text_length, dtype=np.int64) for _ in range(3))
        phrase = np.full((self.text_length, 4), -1, dtype=np.int64)
        facts = np.full((self.text_length, len(FACTS)), IGNORED, dtype=np.int64)
        target = np.full(self.text_length, IGNORED, dtype=np.int64)
        place = count = 0
        for i in rng.permutation(len(asked)):
            before = encode(self.processor, f"{asked[i].question} assistant:")
            answer = [*encode(self.processor, asked[i].answer), self.processor.tokenizer.eos_token_id]
            ids = [*before, *answer[:-1]]
            end = place + len(ids)
            if end > self.text_length:
                continue
            count += 1
            text[place:end], segment[place:end], offset[place:end] = ids, count, np.arange(len(ids))
            target[end - len(answer) : end] = answer
            words = self.processor.tokenizer.convert_ids_to_tokens(before)
            phrase[place : place + len(before)] = _phrases(words)
            place = end
        for place in np.flatnonzero(phrase[:, 0] >= 0):
            facts[place] = _facts(scene, phrase[place])
        return text, segment, offset, phrase, facts, target


def question_batches(
    processor: ProcessorMixin, split: str, count: int, size: int = 100
) -> list[tuple[list[str], dict[str, Tensor]]]:
    """The first `count` questions of `test_questions`, in batches of one question per picture.

    Each batch comes with the categories of its questions, and holds the image processor's tensors and those
    of `SceneBatches` without labels of patches and phrases.
    """
    pairs, batches = list(test_questions(count, split)), []
    for start in range(0, count, size):
        part = pairs[start : start + size]
        texts = [
            (
                encode(processor, f"{each.question} assistant:"),
                [*encode(processor, each.answer), processor.tokenizer.eos_token_id],
            )
            for _, each in part
        ]
        shape = len(part), max(len(before) + len(answer) for before, answer in texts)
        text, segment, offset = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
        target = torch.full(shape, IGNORED)
        for row, (before, answer) in enumerate(texts):
            ids = [*before, *answer[:-1]]
            text[row, : len(ids)], segment[row, : len(ids)] = torch.tensor(ids), 1
            offset[row, : len(ids)] = torch.arange(len(ids))
            target[row, len(ids) - len(answer) : len(ids)] = torch.tensor(answer)
        images = processor.image_processor(images=[render(scene) for scene, _ in part], return_tensors="pt")
        tensors = {"text": text, "segment": segment, "offset": offset, "target": target}
        batches.append(([each.category for _, each in part], dict(images) | tensors))
    return batches


def encode(processor: ProcessorMixin, text: str) -> list[int]:
    """The token ids of a text without the token that starts a sequence."""
    return processor.tokenizer(text, add_special_tokens=False).input_ids


def _phrases(words: Sequence[str]) -> np.ndarray:
    """What the phrase that ends at each word describes, [words, 4]; −1 where none ends.

    A phrase is a noun with the adjectives before it. "thing" alone fits everything and is left out.
    """
    rows = np.full((len(words), 4), -1, dtype=np.int64)
    description = np.zeros(4, dtype=np.int64)
    for place, word in enumerate(words):
        if word in _ADJECTIVES:
            kind, number = _ADJECTIVES[word]
            description[kind] = number
            continue
        if word in _NOUNS:
            description[1] = _NOUNS[word]
            if description.any():
                rows[place] = description
        description[:] = 0
    return rows


def _facts(scene: ObjectScene, description: np.ndarray) -> np.ndarray:
    """What is true of the things that a row of `_phrases` fits: [facts], −100 where that has no meaning."""
    colours, facts = list(COLOURS), np.full(len(FACTS), IGNORED, dtype=np.int64)
    if description[1] == len(SHAPES) + 1:
        signs = [sign for sign in scene.signs if colours.index(sign.colour) + 1 == description[0]]
        facts[0] = len(signs)
        for sign in signs[:1]:  # signs of a picture differ in colour
            letters = [LETTERS.index(letter) + 1 for letter in sign.code]
            facts[1:3], facts[7:] = description[:2], [*letters, 0, 0][:4]
        return facts
    things = [
        (
            colours.index(item.colour) + 1,
            SHAPES.index(item.shape) + 1,
            MATERIALS.index(item.material) + 1,
            SIZES.index(item.size) + 1,
            item.x * GRID_SIDE // PICTURE_SIZE,
            item.y * GRID_SIDE // PICTURE_SIZE,
        )
        for item in scene.objects
    ]
    fitting = [row for row in things if all(a in (0, b) for a, b in zip(description, row[:4], strict=True))]
    facts[0] = len(fitting)
    if len(fitting) == 1:
        facts[1:7] = fitting[0]
    return facts


def _visual_labels(scene: ObjectScene, tiled: bool) -> np.ndarray:
    """Labels [N, 7] in the order of the visual tokens; with tiles a base tile, then rows with a newline."""
    fine = patch_labels(scene, 10)
    if not tiled:
        return fine.reshape(-1, fine.shape[-1])
    base = patch_labels(scene, 20)
    base[..., 5:] = IGNORED
    newline = np.full((len(fine), 1, fine.shape[-1]), IGNORED)
    fine = np.concatenate([fine, newline], axis=1)
    return np.concatenate([base.reshape(-1, base.shape[-1]), fine.reshape(-1, fine.shape[-1])])


def _tile_contents(scene: ObjectScene) -> np.ndarray:
    """Which pairs and signs the base tile and the four tiles show: float32 [5, 56]."""
    contents = np.zeros((5, len(COLOURS) * (len(SHAPES) + 1)), dtype=np.float32)
    colours, half = list(COLOURS), PICTURE_SIZE // 2
    for item in (*scene.objects, *scene.signs):
        kind = len(SHAPES) if isinstance(item, Sign) else SHAPES.index(item.shape)
        tile = 1 + 2 * (item.y >= half) + (item.x >= half)
        contents[[0, tile], kind * len(COLOURS) + colours.index(item.colour)] = 1
    return contents
