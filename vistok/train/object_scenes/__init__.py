"""Pictures of known objects with questions about them, to train and judge small vision-language models.

A picture shows up to seven objects (colour, shape, material, size) and one or two signs with a printed code.
`object_scene` makes a scene from its number, `render` draws it, `caption` puts it into words, `questions`
asks about it, `patch_labels` reports what each patch shows, and `test_questions` yields the fixed test set.
`video_scene` and `render_video` make short videos of such objects. Nothing is stored: everything is a
function of a split, a seed and an index.
"""

from .captions import CAPTION_WORDS, caption
from .labels import LABELS, patch_labels
from .layout import (
    COLOURS,
    GRID_SIDE,
    HELD_OUT_PAIRS,
    LETTERS,
    MATERIALS,
    PICTURE_SIZE,
    SHAPES,
    SIZES,
    SPLITS,
    ObjectScene,
    SceneObject,
    Sign,
    grid_cell,
    object_scene,
)
from .picture import render
from .questions import CATEGORIES, VOCABULARY, Question, plural, questions, test_questions
from .videos import (
    VIDEO_CATEGORIES,
    VIDEO_WORDS,
    VideoScene,
    render_video,
    video_questions,
    video_scene,
    video_test_questions,
)

__all__ = [
    "CAPTION_WORDS",
    "CATEGORIES",
    "COLOURS",
    "GRID_SIDE",
    "HELD_OUT_PAIRS",
    "LABELS",
    "LETTERS",
    "MATERIALS",
    "PICTURE_SIZE",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "VIDEO_CATEGORIES",
    "VIDEO_WORDS",
    "VOCABULARY",
    "ObjectScene",
    "Question",
    "SceneObject",
    "Sign",
    "VideoScene",
    "caption",
    "grid_cell",
    "object_scene",
    "patch_labels",
    "plural",
    "questions",
    "render",
    "render_video",
    "test_questions",
    "video_questions",
    "video_scene",
    "video_test_questions",
]
