"""One-D-Piece: a TiTok whose 256 tokens are ordered, so that the first k of them are an image.

"One-D-Piece: Image Tokenizer Meets Quality-Controllable Compression" (Miwa et al., 2025, arXiv 2501.10064).
The network is legacy TiTok's; trained with "Tail Token Drop", its decoder reads the first k tokens alone: a
dropped token is absent from the sequence, neither zero nor masked.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..registry import Entry, register, register_family
from ..tokenizer import TrainingOutput
from .titok import TiTok


@register_family("one-d-piece")
class OneDPiece(TiTok):
    """One-D-Piece; its configuration is TiTok's (`TiTokConfig`), legacy and with VQ.

    In training mode a forward without `lengths` draws one length for the whole batch, uniformly from 1 to K,
    as the original does in both stages (section 3 of the paper). Its recipe decays `patch_embed` and
    `decoder_embed`, which TiTok's does not: leave "embed" out of `optimizer.undecayed`.
    """

    ordered = True

    @classmethod
    def recognise(
        cls, shapes: Mapping[str, torch.Size], config: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Only a configuration with this model type: the keys are those of a legacy TiTok of 256 tokens."""
        stated = (config or {}).get("model")
        return config if isinstance(stated, Mapping) and stated.get("type") == "one_d_piece" else None

    def draw(self, latents: Tensor, lengths: Tensor | None, *, proxy: bool) -> Tensor:
        """The decoder's output for the first `lengths` [B] of the latents [B, K, C], images of equal length
        in one pass: pixels [B, 3, H, W], or with `proxy` the logits of MaskGIT-VQGAN codes."""
        decode = self.decoder if proxy else super().pixels
        if lengths is None:
            return decode(latents)
        pieces, rows = [], []
        for length in lengths.unique().tolist():
            which = (lengths == length).nonzero().flatten()
            rows.append(which)
            pieces.append(decode(latents[which, :length]))
        return torch.cat(pieces)[torch.cat(rows).argsort()]

    def pixels(self, latents: Tensor, lengths: Tensor | None = None, text: Tensor | None = None) -> Tensor:
        """Latents [B, k, C] with k up to K, of which each image has the first `lengths` [B] → images [B, 3,
        H, W], not clamped."""
        return self.draw(latents, lengths, proxy=False)

    def forward(self, images: Tensor, lengths: Tensor | None = None) -> TrainingOutput:
        """Training pass on the first `lengths` [B] tokens; stage-1 weights give proxy-code logits."""
        quantized = self.quantize(self.latents(images))
        if lengths is None and self.training:
            # Parity: one draw per call, from 1 to K, by the CPU generator.
            lengths = torch.randint(1, self.num_tokens + 1, (1,)).expand(len(images)).to(images.device)
        proxy = not self.config.finetune_decoder
        return TrainingOutput(
            self.draw(quantized.latents, lengths, proxy=proxy), quantized.codes, quantized.losses
        )


register(
    *(
        Entry(
            name=f"one-d-piece-{letter}256",
            family="one-d-piece",
            config={
                "num_latent_tokens": 256,
                "vit_enc_model_size": size,
                "vit_dec_model_size": size,
                "use_l2_norm": True,
            },
            repo=f"turing-motors/One-D-Piece-{letter.upper()}-256",
            file="pytorch_model.bin",
            license="Apache-2.0",
            paper="One-D-Piece (arXiv 2501.10064)",
            parameters=parameters,
            figures={"rFID": rfid},
            notes="any prefix of 256 tokens; trained on ImageNet; licence as the project states it",
            verified=verified,
        )
        for letter, size, parameters, rfid, verified in (
            ("s", "small", 83.9, 1.48, "codes equal, latents 3.8e-6, images 5.1e-5"),
            ("b", "base", 205.3, 1.11, ""),
            ("l", "large", 641.7, 1.08, ""),
        )
    )
)
