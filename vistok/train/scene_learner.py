"""The losses of a small vision-language model on batches of `SceneBatches`."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from .object_scenes import COLOURS, LABELS, PICTURE_SIZE, SHAPES
from .scene_batches import FACTS, IGNORED, encode
from .scenes_vlm import prompt

_POINTER_LAYER, _POINTER_WIDTH = 2, 64
_FACT_LAYER = 4


class SceneReader(nn.Module):
    """A vision-language model on batches of `SceneBatches`, whose questions are read beside each other.

    Args:
        model: of `scenes_vlm` or `scenes_qwen`.
        processor: its processor.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        super().__init__()
        self.model = model
        picture = np.zeros((PICTURE_SIZE, PICTURE_SIZE, 3), dtype=np.uint8)
        inputs = processor(text=[prompt(processor, "")], images=[picture], return_tensors="pt")
        ids = inputs["input_ids"]
        is_visual = ids[0] == model.config.image_token_id
        # The prompt up to the question: what follows the picture, without the "assistant:" of the template.
        length = len(ids[0]) - len(encode(processor, "assistant:"))
        if "image_grid_thw" in inputs:
            positions, _ = model.model.get_rope_index(
                ids, inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
            )
            positions = positions[:, 0, :length]  # [3, P]
        else:
            positions = torch.arange(length)
        self.register_buffer("prefix", ids[0, :length], persistent=False)
        self.register_buffer("is_visual", is_visual[:length], persistent=False)
        self.register_buffer("positions", positions, persistent=False)

    def _prefix(self, visual_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """The prompt before the question: token ids [P], which of them are visual [P], and positions [...,
        P]."""
        return self.prefix, self.is_visual, self.positions

    def _states(self, features: Tensor, batch: dict[str, Tensor]) -> BaseModelOutputWithPast:
        """The language model's states of prefix and text, [B, P + T, D] per layer."""
        core = self.model.model
        prefix, is_visual, positions = self._prefix(features.shape[1])
        rows, length = len(features), len(prefix)
        ids = torch.cat([prefix.expand(rows, -1), batch["text"]], dim=1)
        embeddings = core.get_input_embeddings()(ids)
        visual = torch.cat([is_visual, is_visual.new_zeros(batch["text"].shape[1])])
        embeddings = embeddings.masked_scatter(visual[None, :, None], features.to(embeddings.dtype))
        following = (positions.max() + 1 + batch["offset"]).expand(*positions.shape[:-1], rows, -1)
        positions = positions.unsqueeze(-2).expand(*positions.shape[:-1], rows, length)
        return core.language_model(
            inputs_embeds=embeddings,
            attention_mask=_question_mask(batch["segment"], length, embeddings.dtype),
            position_ids=torch.cat([positions, following], dim=-1),
            use_cache=False,
            output_hidden_states=True,
        )

    def _answer_loss(self, states: BaseModelOutputWithPast, batch: dict[str, Tensor]) -> Tensor:
        """Cross entropy of the answers' tokens."""
        learned = batch["target"] != IGNORED
        text = states.last_hidden_state[:, -batch["text"].shape[1] :]
        return F.cross_entropy(self.model.lm_head(text[learned]).float(), batch["target"][learned])

    def _right(self, features: Tensor, batch: dict[str, Tensor]) -> list[bool]:
        """Whether the answer to each question of a batch of `question_batches` is right.

        The most likely token is compared at every place of the right answer, which is what greedy decoding
        finds where it is right.
        """
        target = batch["target"]
        text = self._states(features, batch).last_hidden_state[:, -target.shape[1] :]
        return ((self.model.lm_head(text).argmax(-1) == target) | (target == IGNORED)).all(dim=1).tolist()


class SceneLearner(SceneReader):
    """The losses of a vision-language model on batches of `SceneBatches`.

    "answer" is the cross entropy of answer tokens. Auxiliary losses let the model learn from scratch:
    "patches" asks of each visual token what it shows; "class_token" (only where the tower has one) asks of
    each tile's class token which things the tile holds; "phrases" asks of the last word of each phrase, after
    the second layer of the language model, which visual tokens show what it describes; "facts" asks it, after
    the fourth layer, how many things it fits and what the one thing looks like. Their linear heads belong to
    this module and are not part of the model.

    Args:
        model: of `scenes_vlm` or `scenes_qwen`.
        processor: its processor.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        super().__init__(model, processor)
        width = model.config.text_config.hidden_size
        self.patch_head = nn.Linear(width, sum(LABELS.values()))
        self.pointer_query = nn.Linear(width, _POINTER_WIDTH)
        self.pointer_key = nn.Linear(width, _POINTER_WIDTH)
        self.pointer_none = nn.Parameter(torch.zeros(1))  # the score of "nothing fits"
        self.fact_head = nn.Linear(width, sum(FACTS.values()))
        self.class_head = None
        if hasattr(model.config, "image_grid_pinpoints"):
            self.class_head = nn.Linear(
                model.config.vision_config.hidden_size, len(COLOURS) * (len(SHAPES) + 1)
            )

    def forward(self, batch: dict[str, Tensor], only_visual: bool = False) -> dict[str, Tensor]:
        """Return the scalars "answer", "phrases", "facts", "patches" and (see above) "class_token".

        With `only_visual` they are the last two alone, at a third of the cost: a first phase of training.
        """
        features, class_tokens = self._features(batch)
        if only_visual:
            return self._visual_losses(features, class_tokens, batch)
        states = self._states(features, batch)
        length = len(self.prefix)
        middle = states.hidden_states[_POINTER_LAYER]
        visual = middle[:, :length][:, self.is_visual]
        facts = self.fact_head(states.hidden_states[_FACT_LAYER][:, length:])
        return {
            "answer": self._answer_loss(states, batch),
            "phrases": self._phrase_loss(middle[:, length:], visual, batch["phrase"], batch["patches"]),
            "facts": _fact_loss(facts, batch["facts"]),
            **self._visual_losses(features, class_tokens, batch),
        }

    @torch.no_grad()
    def is_right(self, batch: dict[str, Tensor]) -> list[bool]:
        """Whether the answer to each question of a batch of `question_batches` is right, as greedy decoding
        would give it."""
        return self._right(self._features(batch)[0], batch)

    def compile(self) -> None:  # type: ignore[override]
        """Compile the vision tower and the language model; what is around them is small."""
        core = self.model.model
        (core.vision_tower if self.class_head is not None else core.visual).compile()
        core.language_model.compile()

    def _visual_losses(
        self, features: Tensor, class_tokens: Tensor | None, batch: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        losses = {"patches": self._patch_loss(features, batch["patches"])}
        if self.class_head is not None:
            contents = self.class_head(class_tokens).float()
            target = batch["contents"].flatten(0, 1)
            losses["class_token"] = F.binary_cross_entropy_with_logits(contents, target)
        return losses

    def _features(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Visual tokens [B, N, D] as the language model sees them, and class tokens [B · tiles, C]."""
        core = self.model.model
        dtype = self.model.lm_head.weight.dtype
        geometry = {name: batch[name] for name in ("image_sizes", "image_grid_thw") if name in batch}
        output = core.get_image_features(batch["pixel_values"].to(dtype), **geometry)
        features = torch.stack(list(output.pooler_output))
        if self.class_head is None:
            return features, None
        return features, core.vision_tower.post_layernorm(output.last_hidden_state[:, 0])

    def _phrase_loss(self, text: Tensor, visual: Tensor, phrase: Tensor, patches: Tensor) -> Tensor:
        """Cross entropy between where phrases point and the visual tokens [B, N] that they fit, or none."""
        row, place = (phrase[..., 0] >= 0).nonzero(as_tuple=True)
        described = phrase[row, place]  # [M, 4]
        labels = patches[row][..., :4]  # [M, N, 4]
        fits = ((described[:, None] == 0) | (described[:, None] == labels)).all(dim=-1)
        is_sign = labels[..., 1] == len(SHAPES) + 1
        fits &= (labels[..., 1] > 0) & (is_sign == (described[:, None, 1] == len(SHAPES) + 1))
        fits = torch.cat([fits, ~fits.any(dim=1, keepdim=True)], dim=1)
        query, key = self.pointer_query(text[row, place]), self.pointer_key(visual)[row]
        scores = (key @ query[..., None])[..., 0].float() / _POINTER_WIDTH**0.5  # [M, N]
        scores = torch.cat([scores, self.pointer_none.float().expand(len(scores), 1)], dim=1)
        share = fits / fits.sum(dim=1, keepdim=True)
        return -(share * scores.log_softmax(dim=1)).sum(dim=1).mean()

    def _patch_loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of what patches show, summed over the labels; an empty patch counts for a tenth."""
        logits = self.patch_head(features).float().split(list(LABELS.values()), dim=-1)
        weight = torch.where(labels[..., 0] > 0, 1.0, 0.1)
        total = features.new_zeros((), dtype=torch.float32)
        for kind, each in enumerate(logits):
            target = labels[..., kind]
            losses = F.cross_entropy(
                each.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="none"
            )
            scale = weight.flatten() * (target.flatten() != IGNORED)
            total = total + (losses * scale).sum() / scale.sum()
        return total


def _fact_loss(logits: Tensor, facts: Tensor) -> Tensor:
    """Cross entropy of facts about phrases, averaged over all facts that have a meaning."""
    losses = [
        F.cross_entropy(
            each.float().flatten(0, 1), facts[..., kind].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        for kind, each in enumerate(logits.split(list(FACTS.values()), dim=-1))
    ]
    return sum(losses) / (facts != IGNORED).sum().clamp_min(1)


def _question_mask(segment: Tensor, prefix: int, dtype: torch.dtype) -> Tensor:
    """Who sees whom: the prefix is seen by all, a question by its own later tokens.

    Padding sees the prefix, so that no row of the attention is empty. Returns what is added to the attention
    scores, [B, 1, P + T, P + T]: 0 or the lowest value of `dtype`.
    """
    segment = F.pad(segment, (prefix, 0))
    length = segment.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment.device).tril()
    is_prefix = torch.arange(length, device=segment.device) < prefix
    same = (segment[:, :, None] == segment[:, None]) & (segment[:, None] > 0)
    mask = torch.zeros(same.shape, dtype=dtype, device=segment.device)
    return mask.masked_fill(~((is_prefix | same) & causal), torch.finfo(dtype).min)[:, None]
