"""The text half of a vision-language encoder, for methods that compare a picture with the instruction."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TextTower:
    """CLIP's text tower, and the layers that bring its image tower's states into the same space.

    transformers' vision-language models hold the image half of CLIP alone, so the whole CLIP is given: `clip`
    is a `transformers.CLIPModel` with the same image tower, `clip_tokenizer` its tokenizer, and `tokenizer`
    the vision-language model's own, which turns the prompt back into words. Raises TypeError for another
    model.

        clip = CLIPModel.from_pretrained(name)
        tower = TextTower(clip, AutoTokenizer.from_pretrained(name), processor.tokenizer)
        compress.attach(model, CDPruner(text_tower=tower), keep=0.1)
    """

    def __init__(self, clip: nn.Module, clip_tokenizer: Any, tokenizer: Any) -> None:
        parts = ("vision_model", "visual_projection", "text_model", "text_projection")
        missing = [part for part in parts if not hasattr(clip, part)]
        if missing:
            raise TypeError(
                f"clip is a {type(clip).__name__} without {', '.join(missing)}; give a transformers.CLIPModel"
            )
        self.clip, self.clip_tokenizer, self.tokenizer = clip.eval(), clip_tokenizer, tokenizer

    @torch.no_grad()
    def image_embeds(self, states: Tensor) -> Tensor:
        """Embeddings [N, E] of the image tower's states [N, C] before its last norm.

        Raises ValueError for states of another width than this CLIP's.
        """
        projection = self.clip.visual_projection
        if states.shape[-1] != projection.in_features:
            raise ValueError(
                f"the model's vision tower has states of width {states.shape[-1]}, and the one of this CLIP "
                f"{projection.in_features}; give the CLIP that the model's tower is taken from"
            )
        return projection(self.clip.vision_model.post_layernorm(states.to(projection.weight)))

    @torch.no_grad()
    def text_embeds(self, ids: Tensor) -> Tensor:
        """Embeddings [M, E] of a text, of which `ids` [T] are the model's tokens: one per segment of as many
        of CLIP's tokens as its text tower takes (77), the last one filled up with zeros.

        Raises ValueError for ids that are not known (-1).
        """
        if bool((ids < 0).any()):
            raise ValueError(
                "the prompt was given as inputs_embeds, from which the text tower cannot read words; give "
                "input_ids"
            )
        text = self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        numbers = self.clip_tokenizer(text, verbose=False)["input_ids"]
        length = self.clip.text_model.config.max_position_embeddings
        weight = self.clip.text_projection.weight
        segments = F.pad(torch.tensor(numbers), (0, -len(numbers) % length)).view(-1, length)
        pooled = self.clip.text_model(input_ids=segments.to(weight.device)).pooler_output
        return self.clip.text_projection(pooled)
