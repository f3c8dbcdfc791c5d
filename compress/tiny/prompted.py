"""Tiny random-weight vision-language models with the processors of their families, built in code without any
file.

`build(name)` returns a model with its processor, and `inputs_of` makes its inputs. Equal arguments give equal
models and inputs in every process. Three things make the models useful as fixtures: the global seed is set
before construction (some parameters are drawn there and nowhere else), every parameter is refilled with a
spread that lets the prompt and the pictures decide the output, and no token ends a sequence early.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.utils import is_num2words_available

WORDS = "what is in the image describe a cat dog red how many USER ASSISTANT system answer briefly now :"
QUESTIONS = ("what is in the image", "describe", "how many red dog", "answer briefly now")
BETWEEN = ("a cat", "a red dog", "how many")
SIZES = ((80, 60), (60, 90), (120, 50), (50, 110), (90, 90))  # width, height
FRAMES = 4

CLIP_CROP = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
SQUARE = {"height": 56, "width": 56}
PINPOINTS = [[56, 112], [112, 56], [112, 112]]
QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


@dataclass(frozen=True)
class Fixture:
    """A model with its processor, and how a prompt of this family names a picture and a video.

    `layout` says how many pictures a row may hold: "any", "nested" (any, given as one list per row) or "one"
    (exactly one, which the processor itself puts before the text).
    """

    model: hf.PreTrainedModel
    processor: hf.ProcessorMixin
    image: str
    video: str | None = None
    layout: str = "any"


def build(name: str, seed: int = 0) -> Fixture:
    """The fixture `name` of `FIXTURES` or `MORE`, with weights that let prompt and pictures decide the
    output.

    Raises KeyError for other names.
    """
    torch.manual_seed(1234 + seed)
    fixture = {**FIXTURES, **MORE}[name]()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in fixture.model.parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if parameter.dim() > 1:
                parameter.copy_(noise * 1.5 / parameter[0].numel() ** 0.5)
            elif parameter.numel() == 1:  # a gate, closed by default
                parameter.fill_(0.7)
            else:
                parameter.add_(0.05 * noise)
        embedding = fixture.model.get_input_embeddings().weight
        # Tied embeddings of the usual size would repeat the last token whatever the picture.
        tied = fixture.model.get_output_embeddings().weight is embedding
        embedding.copy_((0.02 if tied else 0.7) * torch.randn(embedding.shape, generator=random))
    for module in fixture.model.modules():  # BLIP-2 generates by its language model's own settings
        if getattr(module, "generation_config", None) is not None:
            module.generation_config.eos_token_id, module.generation_config.pad_token_id = None, 0
    return fixture


def inputs_of(
    fixture: Fixture,
    batch: int = 2,
    *,
    images: Sequence[int] | None = None,
    videos: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    padding_side: str = "left",
) -> hf.BatchFeature:
    """The processor's output for a padded batch of prompts.

    `images=(2, 1, 0)` has that many pictures in its rows (default: one in each of `batch`), `videos=`
    likewise; `rows=(1,)` picks rows of such a batch, which keep their pictures and text but are padded anew.
    Raises ValueError for counts that the family's prompts cannot hold.
    """
    if images is None:
        images = (1,) * batch if videos is None else (0,) * len(videos)
    videos = videos if videos is not None else (0,) * len(images)
    if fixture.layout == "one" and any(count != 1 for count in images):
        raise ValueError(f"this family takes exactly one picture a row, not {tuple(images)}")
    if fixture.video is None and any(videos):
        raise ValueError("this fixture has no videos")
    rows = range(len(images)) if rows is None else rows
    texts = [_prompt(fixture, row, images[row], videos[row]) for row in rows]
    pictures = [[picture(row + 7 * place) for place in range(images[row])] for row in rows]
    clips = [clip(row + 7 * place) for row in rows for place in range(videos[row])]
    media: dict[str, Any] = {}
    if any(pictures):
        flat = [image for group in pictures for image in group]
        media["images"] = pictures if fixture.layout == "nested" else flat
    if clips:
        times = {"fps": 2.0, "total_num_frames": FRAMES, "frames_indices": list(range(FRAMES))}
        media |= {"videos": clips, "video_metadata": [dict(times) for _ in clips], "do_sample_frames": False}
    processor = fixture.processor
    processor.tokenizer.padding_side = padding_side
    if not hasattr(processor, "qformer_tokenizer"):  # InstructBLIP would hand it to its second tokenizer, too
        media["padding_side"] = padding_side  # and others would overrule their tokenizer
    out = processor(text=texts, **media, return_tensors="pt", padding=True)
    out.pop("labels", None)
    for key, value in out.items():
        if torch.is_floating_point(value):
            out[key] = value.float()
    return out


def _prompt(fixture: Fixture, row: int, images: int, videos: int) -> str:
    """One row's text, with words between its media."""
    media = [fixture.image] * images + [fixture.video] * videos
    words = ["USER :"]
    for place, placeholder in enumerate(media if fixture.layout != "one" else []):
        words += [*([BETWEEN[place % len(BETWEEN)]] if place else []), placeholder]
    return " ".join([*words, QUESTIONS[row % len(QUESTIONS)], "ASSISTANT :"])


def picture(seed: int) -> Image.Image:
    """Noise, of a size that depends on the seed."""
    width, height = SIZES[seed % len(SIZES)]
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8))


def clip(seed: int) -> np.ndarray:
    """A video [FRAMES, H, W, 3] of noise frames, of a size that depends on the seed."""
    width, height = SIZES[seed % len(SIZES)]
    return np.random.RandomState(100 + seed).randint(0, 256, (FRAMES, height, width, 3), dtype=np.uint8)


def make_tokenizer(special: Sequence[str], named: dict[str, str] | None = None) -> hf.PreTrainedTokenizerFast:
    """A word tokenizer over a small vocabulary; `named` special tokens become attributes of it."""
    special = [*special, *(named or {}).values()]
    vocab: dict[str, int] = {}
    for token in [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        *special,
        *WORDS.split(),
        *(f"w{i}" for i in range(40)),
        "\n",
    ]:
        vocab.setdefault(token, len(vocab))
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        **({"extra_special_tokens": named} if named else {}),
    )
    fast.add_tokens(special, special_tokens=True)
    return fast


def text_config(model_type: str | None, tokenizer: hf.PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    """Four layers of width 64, four query heads on two key heads."""
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return config | ({"model_type": model_type} if model_type else {}) | more


def vision_config(model_type: str | None = None, **more: Any) -> dict[str, Any]:
    """Three layers of width 48 over 4 × 4 patches of a 56 × 56 picture."""
    config = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
    }
    return config | ({"model_type": model_type} if model_type else {}) | more


def clip_vision(**more: Any) -> dict[str, Any]:
    """The small tower as CLIP's."""
    return vision_config("clip_vision_model", projection_dim=48, **more)


def siglip_vision() -> dict[str, Any]:
    """The small tower as SigLIP's, without its head."""
    return vision_config("siglip_vision_model", vision_use_head=False)


def llava(text: str = "llama", **settings: Any) -> Fixture:
    """CLS token, plain features, LLM token i is patch i."""
    tokenizer = make_tokenizer(["<image>"])
    config = hf.LlavaConfig(
        vision_config=clip_vision(),
        text_config=text_config(text, tokenizer, **settings),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=16,
    )
    processor = _llava_processor(tokenizer)
    return Fixture(hf.LlavaForConditionalGeneration(config), processor, "<image>")


def vipllava() -> Fixture:
    """Features of several tower layers side by side."""
    tokenizer = make_tokenizer(["<image>"])
    config = hf.VipLlavaConfig(
        vision_config=clip_vision(),
        text_config=text_config("llama", tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=[-2, -3, 1],
        image_seq_length=16,
    )
    return Fixture(hf.VipLlavaForConditionalGeneration(config), _llava_processor(tokenizer), "<image>")


def _llava_processor(tokenizer: hf.PreTrainedTokenizerFast) -> hf.LlavaProcessor:
    return hf.LlavaProcessor(
        hf.CLIPImageProcessor(**CLIP_CROP),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def llava_next() -> Fixture:
    """Tiles by aspect ratio, packed with newline tokens: rows of uneven length."""
    tokenizer = make_tokenizer(["<image>"])
    config = hf.LlavaNextConfig(
        vision_config=clip_vision(),
        text_config=text_config("llama", tokenizer),
        image_grid_pinpoints=PINPOINTS,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    processor = hf.LlavaNextProcessor(
        hf.LlavaNextImageProcessor(image_grid_pinpoints=PINPOINTS, **CLIP_CROP),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return Fixture(hf.LlavaNextForConditionalGeneration(config), processor, "<image>")


def llava_next_video() -> Fixture:
    """LLaVA-NeXT with videos, pooled before the projector."""
    tokenizer = make_tokenizer(["<image>", "<video>"])
    config = hf.LlavaNextVideoConfig(
        vision_config=clip_vision(),
        text_config=text_config("llama", tokenizer),
        image_grid_pinpoints=PINPOINTS,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_seq_length=16,
        video_seq_length=4 * FRAMES,
    )
    processor = hf.LlavaNextVideoProcessor(
        hf.LlavaNextVideoVideoProcessor(**CLIP_CROP),
        hf.LlavaNextImageProcessor(image_grid_pinpoints=PINPOINTS, **CLIP_CROP),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return Fixture(hf.LlavaNextVideoForConditionalGeneration(config), processor, "<image>", "<video>")


def llava_onevision() -> Fixture:
    """SigLIP tiles, shrunk bilinearly when there are many (here beyond one tile), and videos."""
    tokenizer = make_tokenizer(["<image>", "<video>"])
    config = hf.LlavaOnevisionConfig(
        vision_config=siglip_vision(),
        text_config=text_config("qwen2", tokenizer),
        image_grid_pinpoints=PINPOINTS,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        vision_aspect_ratio="anyres_max_1",
    )
    processor = hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(image_grid_pinpoints=PINPOINTS, size=SQUARE),
        tokenizer,
        hf.LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_1",
    )
    model = hf.LlavaOnevisionForConditionalGeneration(config)
    return Fixture(model, processor, "<image>", "<video>", layout="nested")


def _qwen(kind: str, vision: dict[str, Any], patch: int, video_processor: type, **text: Any) -> Fixture:
    tokenizer = make_tokenizer(QWEN_TOKENS)
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    config = getattr(hf, f"{kind}Config")(
        vision_config={
            "depth": 3,
            "num_heads": 4,
            "patch_size": patch,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **vision,
        },
        text_config=text_config(None, tokenizer, rope_theta=10000.0, **text),
        **dict(zip(names, tokenizer.convert_tokens_to_ids(QWEN_TOKENS), strict=True)),
    )
    patches = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2}
    low, high = (4 * patch) ** 2, (8 * patch) ** 2
    processor = getattr(hf, f"{kind}Processor")(
        hf.Qwen2VLImageProcessor(size={"shortest_edge": low, "longest_edge": high}, **patches),
        tokenizer,
        video_processor(
            size={"shortest_edge": low, "longest_edge": 4 * high}, cap_pixels_per_frame=False, **patches
        ),
    )
    start, end, image, video = QWEN_TOKENS
    model = getattr(hf, f"{kind}ForConditionalGeneration")(config)
    return Fixture(model, processor, f"{start} {image} {end}", f"{start} {video} {end}")


def qwen2_vl() -> Fixture:
    """Packed patches of any size, M-RoPE."""
    vision = {"embed_dim": 48, "hidden_size": 64, "mlp_ratio": 2}
    rope = {"type": "mrope", "mrope_section": [2, 3, 3]}
    return _qwen("Qwen2VL", vision, 14, hf.Qwen2VLVideoProcessor, rope_scaling=rope)


def qwen2_5_vl() -> Fixture:
    """Window attention in the tower, M-RoPE."""
    vision = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "window_size": 56,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    }
    rope = {"type": "mrope", "mrope_section": [2, 3, 3]}
    return _qwen("Qwen2_5_VL", vision, 14, hf.Qwen2VLVideoProcessor, rope_scaling=rope)


def qwen3_vl() -> Fixture:
    """Interleaved M-RoPE, and deepstack features added after the first two decoder layers."""
    vision = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "out_hidden_size": 64,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    return _qwen("Qwen3VL", vision, 16, hf.Qwen3VLVideoProcessor, head_dim=16, rope_scaling=rope)


def internvl() -> Fixture:
    """Tiles of four tokens by pixel shuffle, as one tensor."""
    tokenizer = make_tokenizer(
        (),
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    config = hf.InternVLConfig(
        vision_config=vision_config(image_size=[56, 56], patch_size=[14, 14]),
        text_config=text_config("qwen2", tokenizer),
        image_seq_length=4,
        downsample_ratio=0.5,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        tie_word_embeddings=False,
    )
    processor = hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer,
        hf.InternVLVideoProcessor(size=SQUARE),
        image_seq_length=4,
    )
    return Fixture(hf.InternVLForConditionalGeneration(config), processor, "<IMG_CONTEXT>", "<video>")


def idefics3() -> Fixture:
    """Tiles by pixel shuffle with marker tokens between them; the decoder is called `text_model`."""
    tokenizer = make_tokenizer(_idefics_tokens())
    config = hf.Idefics3Config(
        vision_config=vision_config(),
        text_config=text_config("llama", tokenizer),
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
    )
    images = hf.Idefics3ImageProcessor(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    processor = hf.Idefics3Processor(images, tokenizer, image_seq_len=4)
    return Fixture(hf.Idefics3ForConditionalGeneration(config), processor, "<image>", layout="nested")


def smolvlm() -> Fixture:
    """Idefics3 under another name; its processor needs the package num2words."""
    tokenizer = make_tokenizer(
        _idefics_tokens(),
        {
            "fake_image_token": "<fake_token_around_image>",
            "image_token": "<image>",
            "end_of_utterance_token": "<end_of_utterance>",
            "global_image_token": "<global-img>",
        },
    )
    config = hf.SmolVLMConfig(
        vision_config=vision_config(),
        text_config=text_config("llama", tokenizer),
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
    )
    size = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
    images, videos = hf.SmolVLMImageProcessor(**size), hf.SmolVLMVideoProcessor(**size)
    processor = hf.SmolVLMProcessor(images, tokenizer, videos, image_seq_len=4)
    return Fixture(hf.SmolVLMForConditionalGeneration(config), processor, "<image>", layout="nested")


def _idefics_tokens() -> list[str]:
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    return ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tiles]


def paligemma() -> Fixture:
    """Bidirectional attention over the prompt, positions from 1, tied embeddings."""
    tokenizer = make_tokenizer((), {"image_token": "<image>"})
    images = hf.SiglipImageProcessor(size=SQUARE)
    images.image_seq_length = 16
    processor = hf.PaliGemmaProcessor(images, tokenizer)  # adds tokens to the tokenizer
    config = hf.PaliGemmaConfig(
        vision_config=siglip_vision(),
        text_config=text_config("gemma", tokenizer, head_dim=16),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=64,
        hidden_size=64,
    )
    return Fixture(hf.PaliGemmaForConditionalGeneration(config), processor, "<image>", layout="nested")


def gemma3(window: int = 12) -> Fixture:
    """Bidirectional attention within a picture, sliding-window layers, tied embeddings."""
    tokenizer = make_tokenizer(
        (),
        {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
    )
    config = hf.Gemma3Config(
        vision_config=siglip_vision(),
        text_config=text_config(
            None,
            tokenizer,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=window,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    processor = hf.Gemma3Processor(hf.Gemma3ImageProcessor(size=SQUARE), tokenizer, image_seq_length=4)
    return Fixture(hf.Gemma3ForConditionalGeneration(config), processor, "<start_of_image>", layout="nested")


def mistral3() -> Fixture:
    """Pixtral tower over all pictures in one row, text tokens after each line of patches."""
    special = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    tokenizer = make_tokenizer(special)
    config = hf.Mistral3Config(
        vision_config=vision_config("pixtral", image_size=112),
        text_config=text_config("mistral", tokenizer, head_dim=16, sliding_window=None),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    images = hf.PixtralImageProcessor(size={"longest_edge": 112}, patch_size=14)
    processor = hf.PixtralProcessor(images, tokenizer, patch_size=14, spatial_merge_size=2)
    return Fixture(hf.Mistral3ForConditionalGeneration(config), processor, "[IMG]")


def _qformer() -> dict[str, Any]:
    return {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "cross_attention_frequency": 1,
        "encoder_hidden_size": 48,
    }


def blip2() -> Fixture:
    """Eight queries look at the picture; the language model (OPT) has its own `generate`."""
    tokenizer = make_tokenizer(["<image>"])
    text = text_config("opt", tokenizer, ffn_dim=96, word_embed_proj_dim=64, tie_word_embeddings=False)
    config = hf.Blip2Config(
        vision_config=vision_config(),
        qformer_config=_qformer(),
        text_config=text,
        num_query_tokens=8,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    processor = hf.Blip2Processor(hf.BlipImageProcessor(size=SQUARE), tokenizer, num_query_tokens=8)
    return Fixture(hf.Blip2ForConditionalGeneration(config), processor, "<image>", layout="one")


def instructblip() -> Fixture:
    """BLIP-2 whose queries also read the prompt."""
    tokenizer = make_tokenizer(["<image>"])
    config = hf.InstructBlipConfig(
        vision_config=vision_config(),
        qformer_config=_qformer() | {"vocab_size": len(tokenizer)},
        text_config=text_config("llama", tokenizer),
        num_query_tokens=8,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    images = hf.BlipImageProcessor(size=SQUARE)
    # The queries' own tokenizer pads on the right, because the positions of the Q-Former count padding.
    processor = hf.InstructBlipProcessor(images, tokenizer, make_tokenizer(()), num_query_tokens=8)
    return Fixture(hf.InstructBlipForConditionalGeneration(config), processor, "<image>", layout="one")


def mllama() -> Fixture:
    """Pictures enter by cross-attention layers; the prompt holds one marker token a picture."""
    tokenizer = make_tokenizer(["<|image|>", "<|python_tag|>"])
    config = hf.MllamaConfig(
        vision_config=vision_config(
            "mllama_vision_model",
            num_global_layers=1,
            intermediate_layers_indices=[0, 1],
            vision_output_dim=48 * 3,
        ),
        text_config=text_config("mllama_text_model", tokenizer, cross_attention_layers=[1, 3]),
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
    )
    processor = hf.MllamaProcessor(hf.MllamaImageProcessor(size=SQUARE, max_image_tiles=4), tokenizer)
    return Fixture(hf.MllamaForConditionalGeneration(config), processor, "<|image|>", layout="nested")


def llama4(chunk: int = 32) -> Fixture:
    """Mixture of experts, layers without rotary positions, attention in chunks."""
    special = ["<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>"]
    tokenizer = make_tokenizer([*special, "<|tile_x_separator|>", "<|tile_y_separator|>"])
    config = hf.Llama4Config(
        vision_config=vision_config(
            intermediate_size=48 * 4,  # four patches side by side enter the adapter
            vision_output_dim=64,
            projector_input_dim=64,
            projector_output_dim=64,
        ),
        text_config=text_config(
            None,
            tokenizer,
            head_dim=16,
            intermediate_size_mlp=96,
            num_local_experts=2,
            interleave_moe_layer_step=2,
            attention_chunk_size=chunk,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<|patch|>"),
    )
    images = hf.Llama4ImageProcessor(size=SQUARE, max_patches=4)
    processor = hf.Llama4Processor(images, tokenizer, patch_size=14)
    return Fixture(hf.Llama4ForConditionalGeneration(config), processor, "<|image|>")


FIXTURES: dict[str, Callable[[], Fixture]] = {
    "llava": llava,
    "llava_next": llava_next,
    "qwen2_5_vl": qwen2_5_vl,
    "internvl": internvl,
    "idefics3": idefics3,
    "qwen3_vl": qwen3_vl,
}
MORE: dict[str, Callable[[], Fixture]] = {
    "vipllava": vipllava,
    "llava_onevision": llava_onevision,
    "llava_next_video": llava_next_video,
    "qwen2_vl": qwen2_vl,
    "paligemma": paligemma,
    "gemma3": gemma3,
    "gemma3_wide": partial(gemma3, window=512),
    "mistral3": mistral3,
    "blip2": blip2,
    "instructblip": instructblip,
    "mllama": mllama,
    "llama4": llama4,
    "llama4_wide": partial(llama4, chunk=512),
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
TEXTS: dict[str, dict[str, Any]] = {  # their windows stand in no list of layer types
    "mistral": {},
    "ministral3": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 16384,
        },
    },
    "mixtral": EXPERTS,
    "phi3": {},
    "phimoe": EXPERTS,
    "starcoder2": {},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "use_sliding_window": True,
    },
}
WINDOWED = {
    f"llava_{text}{name}": partial(llava, text, sliding_window=window, **settings)
    for text, settings in TEXTS.items()
    for name, window in (("", 4096), ("_narrow", 12))
}
MORE |= WINDOWED
if is_num2words_available():
    MORE["smolvlm"] = smolvlm
