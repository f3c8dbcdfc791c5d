"""Frozen text encoders whose states a tokenizer reads: captions → states with a mask of real tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..extras import needs
from ..files import looks_like_path
from ..hub import PREFIX


class TextFeatures(NamedTuple):
    """`states` [B, T, D] of a text encoder and `mask` [B, T], True at real tokens."""

    states: Tensor
    mask: Tensor


class WordTextEncoder(nn.Module):
    """A fixed random vector per word, with sinusoids of its place: for captions of few known words.

    Vectors are a function of the word and `dim` alone; nothing is learned or stored.
    """

    def __init__(self, words: Sequence[str], dim: int, length: int) -> None:
        super().__init__()
        self.words, self.length = {word: number for number, word in enumerate(words, start=1)}, length
        seeds = [list(word.encode()) for word in words]
        vectors = np.stack([np.random.default_rng(seed).standard_normal(dim) for seed in seeds])
        table = torch.zeros(len(words) + 1, dim)
        table[1:] = torch.from_numpy(vectors).float()
        angles = torch.arange(length)[:, None] / 100 ** (torch.arange(dim // 2) / (dim // 2))
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("places", torch.cat([angles.sin(), angles.cos()], 1), persistent=False)

    def ids(self, captions: Sequence[str]) -> Tensor:
        """Captions → word numbers [B, T], 0 where none is. Raises ValueError for unknown words and captions
        that are too long."""
        rows = torch.zeros(len(captions), self.length, dtype=torch.long)
        for row, caption in enumerate(captions):
            words = caption.lower().replace(",", " ").split()
            unknown = [word for word in words if word not in self.words]
            if unknown:
                raise ValueError(
                    f"caption {caption!r} has the word {unknown[0]!r}; this text encoder knows "
                    f"{', '.join(self.words)}"
                )
            if len(words) > self.length:
                raise ValueError(
                    f"caption {caption[:60]!r} … has {len(words)} words; the tokenizer reads {self.length}"
                )
            rows[row, : len(words)] = torch.tensor([self.words[word] for word in words], dtype=torch.long)
        return rows

    def forward(self, captions: Sequence[str] | Tensor) -> TextFeatures:
        """Captions, or word numbers [B, T] → features."""
        ids = captions if isinstance(captions, Tensor) else self.ids(captions)
        ids = ids.to(self.table.device)
        return TextFeatures(self.table[ids] + self.places, ids > 0)


class T5TextEncoder(nn.Module):
    """The encoder of a T5 model of transformers, which cuts captions at `length` tokens."""

    def __init__(self, model: nn.Module, tokenizer: object, length: int) -> None:
        super().__init__()
        self.model, self.tokenize, self.length = model, tokenizer, length

    @classmethod
    def load(cls, source: str | Path, length: int) -> Self:
        """From a folder, or the name of a hub repository: one in the hub's cache, or `hf://owner/name`, which
        is downloaded where needed.

        Raises:
            FileNotFoundError: there is no such model, or it is not in the cache.
        """
        with needs("transformers", None, "a T5 text encoder"):
            from transformers import AutoTokenizer, T5EncoderModel

        name = str(source).removeprefix(PREFIX)
        local = not str(source).startswith(PREFIX)
        try:
            model = T5EncoderModel.from_pretrained(name, local_files_only=local)
            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
        except OSError as error:
            fix = (
                "give the folder of a T5 model"
                if looks_like_path(source)
                else f"give {PREFIX}{name} to download it, or the folder of a T5 model"
            )
            raise FileNotFoundError(f"no text encoder {source}: {fix}") from error
        return cls(model.eval(), tokenizer, length)

    def forward(self, captions: Sequence[str]) -> TextFeatures:
        """Captions → features [B, `length`, D]."""
        encoded = self.tokenize(
            list(captions), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.model.device)
        states = self.model(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask)
        return TextFeatures(states.last_hidden_state, encoded.attention_mask.bool())
