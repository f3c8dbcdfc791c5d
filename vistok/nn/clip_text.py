"""CLIP's text tower on open_clip's modules: every state a tokenizer or generator is conditioned on."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .. import checkpoint, hub
from ..extras import needs
from ..files import looks_like_path

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
        with needs("open_clip_torch", "clip", "CLIP's text tower"):
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

        A tag is read from the hub's cache and never downloaded; `hf://owner/name` names a hub repository that
        is downloaded where needed.

        Raises:
            FileNotFoundError: the weights are not in the cache, or cannot be downloaded.
            ValueError: keys that do not fit, a tag that does not exist.
        """
        if isinstance(source, Path) or looks_like_path(source):
            path = checkpoint.locate(source).weights
        else:
            path = _hub_file(source)
        state, encoder = checkpoint.read(path), cls(activation=activation)
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


def _hub_file(source: str) -> Path:
    """The weights file of a tag, from the cache, or of `hf://owner/name`, downloaded where needed."""
    with needs("open_clip_torch", "clip", "CLIP's text tower"):
        from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    name, asked = "ViT-L-14-336", source.startswith(hub.PREFIX)
    repo = source.removeprefix(hub.PREFIX) if asked else get_pretrained_cfg(name, source).get("hf_hub")
    if not repo:
        raise ValueError(
            f"{source!r} is neither a file nor a pretrained tag of {name}; its tags are "
            f"{', '.join(list_pretrained_tags_by_model(name))}"
        )
    repo, problem = repo.rstrip("/"), None
    for file in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"):
        try:
            return hub.get_file(repo, file, local_files_only=not asked)
        except Exception as error:  # the hub's client raises many kinds when there is no network
            problem = problem or error
    raise FileNotFoundError(
        f"the CLIP text tower {name} is not in the hub's cache{' and could not be downloaded' * asked} "
        f"({type(problem).__name__}). Give its weights file: "
        f"tokenizer.attach_text_encoder('open_clip_model.safetensors'), or with a network "
        f"tokenizer.attach_text_encoder('{hub.PREFIX}{repo}')"
    ) from problem
