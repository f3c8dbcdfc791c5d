"""Questions about noise pictures and tiny models that answer them, for tests of evaluations."""

import json
from functools import partial
from pathlib import Path

import tiny_vlms
from tiny_vlms import QUESTIONS, llava, picture, tiny_vlm

from vistok.eval.tasks.vlm import VisionLanguageModel

PLACEHOLDERS = {
    "llava": "<image>",
    "llava_deep": "<image>",
    "llava_next": "<image>",
    "qwen2_5_vl": "<|vision_start|> <|image_pad|> <|vision_end|>",
    "internvl": "<IMG_CONTEXT>",
    "gemma3": "<start_of_image>",
}
tiny_vlms.MORE["llava_deep"] = partial(llava, num_hidden_layers=26)  # as deep as published schedules need
TEMPLATE = (
    "{% for message in messages %}USER : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}PLACEHOLDER {% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endfor %} ASSISTANT :"
)


def answering_vlm(name="llava_next", max_new_tokens=4) -> VisionLanguageModel:
    """A tiny model of that family with a chat template."""
    model, processor, _ = tiny_vlm(name)
    processor.chat_template = TEMPLATE.replace("PLACEHOLDER", PLACEHOLDERS[name])
    return VisionLanguageModel(model, processor, max_new_tokens=max_new_tokens)


def write_rows(path: Path, rows) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_questions(folder: Path, count=5, answer="cat", **more) -> Path:
    """A file of questions of different lengths about pictures of different sizes, in two categories."""
    rows = []
    for number in range(count):
        picture(number).save(folder / f"{number}.png")
        question = " ".join([QUESTIONS[number % 4]] * (1 + number % 3))
        category = ("first", "second")[number % 2]
        row = {"images": [f"{number}.png"], "question": question, "answers": [answer], "category": category}
        rows.append(row | more)
    return write_rows(folder / "questions.jsonl", rows)
