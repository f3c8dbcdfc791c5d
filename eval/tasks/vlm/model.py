"""A vision-language model with its processor: batches of questions as inputs, and greedy answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ....extras import needs
from ....files import looks_like_path
from ...data.questions import LETTERS, VisualQuestion

SHIPPED = {"scenes-vlm": "LLaVA-NeXT type", "scenes-qwen": "Qwen2.5-VL type"}
"""Models in `vistok.assets`, for the questions about drawn scenes."""
PLACES = ("image_token_id", "video_token_id")
UNUSED = -1
"""Fills the table of token ids behind the end of an answer."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Questions with their pictures, and the inputs that the processor made of them."""

    questions: Sequence[VisualQuestion]
    pictures: list[list[Image.Image]]
    inputs: dict[str, Any]

    def __len__(self) -> int:
        return len(self.questions)

    def sizes(self, row: int) -> tuple[tuple[int, int], ...]:
        """Height and width in pixels of each picture of a question."""
        return tuple((picture.height, picture.width) for picture in self.pictures[row])


@dataclass(frozen=True, eq=False)
class Answers:
    """Greedy answers: token ids int32 [B, T] without the end, UNUSED behind it, and where it was asked for
    int16 [B], the most likely letter of the choices as the first token (-1 for questions without choices)."""

    ids: Tensor
    letters: Tensor | None = None


class VisionLanguageModel:
    """A transformers model and its processor, in evaluation mode.

    `prompt` is the text around "{question}" with the family's placeholder of one image, for processors that
    have no chat template. Raises ValueError for a processor that has neither.
    """

    def __init__(
        self, model: nn.Module, processor: Any, *, max_new_tokens: int = 32, prompt: str | None = None
    ) -> None:
        if prompt is None and not getattr(processor, "chat_template", None):
            raise ValueError(
                f"the {type(processor).__name__} has no chat template, so the form of its prompts is not "
                'known: give --prompt, such as "USER: <image>\\n{question} ASSISTANT:"'
            )
        if prompt is not None and "{question}" not in prompt:
            raise ValueError(f"--prompt {prompt!r} has no {{question}}: put it where the question goes")
        self.model, self.processor, self.prompt = model.eval(), processor, prompt
        self.max_new_tokens = max_new_tokens
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.model.device

    @property
    def num_layers(self) -> int:
        """Layers of the language model."""
        return self.model.config.get_text_config().num_hidden_layers

    @cached_property
    def placeholders(self) -> list[int]:
        """Ids of the tokens that stand for pictures and videos."""
        ids = [getattr(self.model.config, name, None) for name in PLACES]
        return [int(each) for each in ids if each is not None]

    @cached_property
    def ends(self) -> Tensor:
        """Ids of the tokens that end an answer, int64 [n]."""
        end = self.model.generation_config.eos_token_id
        ids = [] if end is None else end if isinstance(end, list) else [end]
        return torch.tensor(ids, dtype=torch.int64)

    # Inputs -------------------------------------------------------------------------------------------------

    def batch(self, questions: Sequence[VisualQuestion]) -> Batch:
        """Load the pictures of some questions and make the model's inputs of them."""
        pictures = [question.pictures() for question in questions]
        return Batch(questions, pictures, self.inputs(questions, pictures))

    def inputs(
        self, questions: Sequence[VisualQuestion], pictures: Sequence[list[Image.Image]]
    ) -> dict[str, Any]:
        """The processor's output, padded on the left, on the model's device and in its precision."""
        texts = [self.text(question, len(own)) for question, own in zip(questions, pictures, strict=True)]
        options: dict[str, Any] = {}
        start = self.tokenizer.bos_token
        if start and texts[0].startswith(start):  # the template writes it, and the tokenizer would, too
            options["add_special_tokens"] = False
        encoding = self.processor(
            text=texts, images=[list(own) for own in pictures], padding=True, return_tensors="pt", **options
        )
        dtype = self.model.dtype
        return {
            name: value.to(self.device, dtype if value.is_floating_point() else None)
            if isinstance(value, Tensor)
            else value
            for name, value in encoding.items()
        }

    def text(self, question: VisualQuestion, images: int) -> str:
        """The prompt of a question about so many images."""
        if self.prompt is not None:
            if images != 1:
                raise ValueError(
                    f"{question.name} has {images} images, and --prompt is for one: use a processor with a "
                    "chat template"
                )
            return self.prompt.replace("{question}", question.prompt)
        content = [{"type": "image"} for _ in range(images)] + [{"type": "text", "text": question.prompt}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )

    def visual_tokens(self, inputs: dict[str, Any]) -> Tensor:
        """Placeholders of pictures per prompt, int64 [B]."""
        ids = inputs["input_ids"]
        return torch.isin(ids, torch.tensor(self.placeholders, device=ids.device)).sum(1).cpu()

    # Answers ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, inputs: dict[str, Any], **options: Any) -> Any:
        """The output of the model's own `generate`, greedy and with a cache; `options` are passed on."""
        return self.model.generate(
            **inputs,
            **{
                "max_new_tokens": self.max_new_tokens,
                "do_sample": False,
                "num_beams": 1,
                "temperature": None,
                "top_p": None,
                "top_k": None,
                "use_cache": True,
                "pad_token_id": self.tokenizer.pad_token_id,
                "suppress_tokens": self.placeholders or None,
                "return_dict_in_generate": True,
            }
            | options,
        )

    def answer(self, inputs: dict[str, Any], choices: Sequence[int] | None = None) -> Answers:
        """Answer a batch; `choices` are the numbers of choices [B] where the most likely letter is needed."""
        out = self.generate(inputs, output_logits=choices is not None)
        sequences, prompt = out.sequences, inputs["input_ids"]
        length = prompt.shape[1]
        if sequences.shape[1] > length and torch.equal(sequences[:, :length], prompt):
            sequences = sequences[:, length:]
        ids = torch.full((len(prompt), self.max_new_tokens), UNUSED, dtype=torch.int32)
        new = sequences.cpu()
        behind = torch.isin(new, self.ends).cumsum(1) > 0
        ids[:, : new.shape[1]] = new.masked_fill(behind, UNUSED).int()
        letters = None
        if choices is not None:
            first = out.logits[0].float().cpu()[:, self.letter_ids]  # [B, letters]
            barred = torch.arange(len(LETTERS)) >= torch.tensor(choices)[:, None]
            letters = first.masked_fill(barred, -torch.inf).argmax(1).short()
            letters[torch.tensor(choices) == 0] = -1
        return Answers(ids, letters)

    @cached_property
    def letter_ids(self) -> list[int]:
        """The token of each letter at the beginning of an answer. Raises ValueError where letters are not
        single tokens."""
        ids = [self.tokenizer(letter, add_special_tokens=False).input_ids for letter in LETTERS]
        if any(len(each) != 1 for each in ids) or len({each[0] for each in ids}) < len(LETTERS):
            raise ValueError(
                "the tokenizer has no token of its own for every letter A to Z, so their likelihoods cannot "
                "be compared: use --scorer choice"
            )
        return [each[0] for each in ids]

    def texts(self, ids: Tensor) -> list[str]:
        """Token ids [n, T] as answers, without special tokens and outer white space."""
        rows = [row[row >= 0].tolist() for row in ids]
        return [text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]


def load(
    source: str,
    *,
    dtype: str = "auto",
    device: torch.device | None = None,
    max_new_tokens: int = 32,
    prompt: str | None = None,
) -> VisionLanguageModel:
    """Load a model and its processor from a folder, the hub, or by the name of one that ships with vistok.

    Raises FileNotFoundError for what is not there, OSError or ValueError for what transformers cannot read,
    and ImportError without transformers.
    """
    with needs("transformers", None, "evaluating a vision-language model"):
        import transformers as hf
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is {dtype!r}; it takes auto, float32, bfloat16 or float16")
    place = _located(source)
    options = {"local_files_only": True} if Path(place).is_dir() else {}
    try:
        processor = hf.AutoProcessor.from_pretrained(place, **options)
        model = hf.AutoModelForImageTextToText.from_pretrained(
            place, dtype=dtype if dtype == "auto" else getattr(torch, dtype), **options
        )
    except (OSError, ValueError, KeyError) as error:
        line = str(error).strip().partition("\n")[0]
        kind = ValueError if isinstance(error, ValueError) else OSError
        raise kind(
            f"{source} cannot be loaded as a vision-language model with its processor ({line}): give a "
            "folder or hub repository that AutoModelForImageTextToText reads; offline, one of the hub's cache"
        ) from error
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise ValueError(
            f"{source} has a {type(processor).__name__}, not a processor of images and text: add the files "
            "of its processor to the folder"
        )
    model = model.to(device or torch.device("cpu"))
    return VisionLanguageModel(model, processor, max_new_tokens=max_new_tokens, prompt=prompt)


def _located(source: str) -> str:
    """The folder of a shipped model, a folder, or a hub repository's name. Raises FileNotFoundError."""
    if source in SHIPPED:
        folder = Path(str(files("vistok.assets") / source))
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{source} ({SHIPPED[source]}) should be in {folder}, and this installation does not have "
                "it: install vistok anew, or give --model a folder"
            )
        return str(folder)
    path = Path(source).expanduser()
    if path.is_dir():
        return str(path)
    if looks_like_path(source) or "/" not in source:
        problem = "is a file, and a folder is needed" if path.is_file() else "does not exist"
        raise FileNotFoundError(
            f"{source} {problem}: give the folder of a transformers model, a hub repository (owner/name), or "
            f"{' or '.join(SHIPPED)}"
        )
    return source.removeprefix("hf://")
