"""CLIP's text tower on open_clip's modules: every state a tokenizer or generator is conditioned on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from .. import checkpoint

ACTIVATIONS = ("quickgelu", "gelu")


@dataclass(frozen=True)
class TextStates:
    """`states` [B, 77, D] after the last block and `ln_final`; `penultimate` [B, 77, D] the last block's
    input; `pooled` [B, E] the projected state of the end token."""

    states: Tensor
    penultimate: Tensor
    pooled: Tensor


class CLIPTextEncoder(nn.Module):
    """The text encoder of CLIP ViT-L/14-336 by default (Radford et al., 2021, arXiv 2103.00020).

    `activation`: OpenAI's weights were trained with "quickgelu", x·sigmoid(1.702x); "gelu" is what open_clip
    2.29 and later build for the same model name, and so what some published pipelines ran.
    """

    def __init__(
        self,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        context_length: int = 77,
        vocab_size: int = 49408,
        embed_dim: int = 768,
        activation: str = "quickgelu",
    ) -> None:
        super().__init__()
        from open_clip.tokenizer import SimpleTokenizer
        from open_clip.transformer import QuickGELU, TextTransformer

        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; it is {' or '.join(ACTIVATIONS)}")
        self.model = TextTransformer(
            context_length=context_length,
            vocab_size=vocab_size,
            width=width,
            heads=heads,
            layers=layers,
            output_dim=embed_dim,
            act_layer=QuickGELU if activation == "quickgelu" else nn.GELU,
        )
        self.tokenize = SimpleTokenizer(context_length=context_length)

    @classmethod
    def load(cls, source: str | Path = "openai", activation: str = "quickgelu") -> Self:
        """Weights of open_clip's tag for ViT-L-14-336, or of a local file (whole CLIP or text tower alone).

        Raises FileNotFoundError when the tag is neither cached nor reachable, and ValueError listing keys
        that do not fit.
        """
        encoder = cls(activation=activation)
        if Path(source).suffix in checkpoint.SUFFIXES or Path(source).exists():
            state = checkpoint.read(checkpoint.locate(source).weights)
        else:
            state = _download(str(source))
        state = {key.removeprefix("text."): value for key, value in state.items()}
        ignore = ("visual.*", "logit_scale", "logit_bias", "attn_mask")
        ignore += ("input_resolution", "context_length", "vocab_size")
        checkpoint.load_strictly(encoder.model, state, ignore=ignore, source=source)
        return encoder.eval()

    def forward(self, text: list[str] | Tensor) -> TextStates:
        """Captions, or token ids [B, 77], → states."""
        device = self.model.positional_embedding.device
        ids = (text if isinstance(text, Tensor) else self.tokenize(text)).to(device)
        x = self.model.token_embedding(ids) + self.model.positional_embedding
        mask = self.model.attn_mask.to(x)
        blocks = self.model.transformer.resblocks
        for block in blocks[:-1]:
            x = block(x, attn_mask=mask)
        states = self.model.ln_final(blocks[-1](x, attn_mask=mask))
        end = states[torch.arange(len(ids), device=device), ids.argmax(-1)]
        return TextStates(states, x, end @ self.model.text_projection)


def _download(tag: str) -> dict[str, Tensor]:
    from open_clip.factory import load_state_dict
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model

    name = "ViT-L-14-336"
    config = get_pretrained_cfg(name, tag)
    if not config:
        raise ValueError(
            f"{tag!r} is neither a file nor a pretrained tag of {name}; its tags are "
            f"{', '.join(list_pretrained_tags_by_model(name))}"
        )
    try:
        path = download_pretrained(config)
    except Exception as error:  # hub and urllib raise many kinds when there is no network
        raise FileNotFoundError(
            f"the CLIP text tower {name}/{tag} is not in the local cache and could not be downloaded "
            f"({type(error).__name__}). Give its weights file: "
            "tokenizer.attach_text_encoder('open_clip_model.safetensors')"
        ) from error
    return load_state_dict(path)
