"""Draw assets/kept_patches.png: the patches of a photograph that two reducers keep.

`python docs/kept_patches.py` needs no published weights: the model has the layout of LLaVA-1.5, 336 pixels
in 24×24 patches, with random weights. UniformGrid's choice does not depend on weights. DivPrune's depends on
the features, which are random functions of the patches here: the picture shows how the method spreads over a
photograph, and not what a trained model would keep.
"""

from pathlib import Path

import torch
import transformers as hf

import vistok
from vistok import compress
from vistok.images import load_image, side_by_side

ROOT = Path(__file__).parents[1]
SIDE, PATCH, KEEP, IMAGE_TOKEN = 336, 14, 0.25, 1


def random_llava() -> hf.LlavaForConditionalGeneration:
    """A small LLaVA with random weights and the 576 visual tokens of LLaVA-1.5."""
    vision = hf.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = hf.LlamaConfig(
        vocab_size=8,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    config = hf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, vision_feature_layer=-2
    )
    model = hf.LlavaForConditionalGeneration(config).eval()
    for name, parameter in model.model.vision_tower.named_parameters():
        if name.endswith("patch_embedding.weight"):
            parameter.data.mul_(20)  # at the initial spread the position embeddings outweigh the patches
    return model


def main() -> None:
    """Write the picture: the photograph, UniformGrid and DivPrune side by side."""
    model = random_llava()
    pixels = vistok.to_tensor(load_image(ROOT / "assets" / "chelsea.jpg"), SIDE)  # [1, 3, 336, 336]
    photograph = vistok.to_pil(pixels)[0]
    prompt = torch.tensor([[2, *[IMAGE_TOKEN] * (SIDE // PATCH) ** 2, 3]])
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "pixel_values": pixels * 2 - 1}
    pictures = [photograph]
    for reducer in ("uniformgrid", "divprune"):
        with compress.attach(model, reducer, keep=KEEP) as session, torch.no_grad():
            model(**inputs)
        pictures.append(session.overlay(photograph))
    labels = ["576 patches", "uniformgrid, 144", "divprune, 144"]
    sheet = side_by_side([pictures], labels)
    sheet.quantize(256).save(ROOT / "assets" / "kept_patches.png", optimize=True)


if __name__ == "__main__":
    main()
