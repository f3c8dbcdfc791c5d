"""Two small vision-language models in the standard Hugging Face form, for pictures of `object_scenes`.

`scenes_vlm` is of the LLaVA-NeXT family (class token, AnyRes tiles), `scenes_qwen` of the Qwen2.5-VL family
(M-RoPE, merged patches). Both come with random weights and a processor whose tokenizer is built here; once
saved, plain `AutoModelForImageTextToText` and `AutoProcessor` load them.
"""

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from .object_scenes import PICTURE_SIZE, VOCABULARY

__all__ = ["prompt", "scenes_qwen", "scenes_vlm"]

_TILE = PICTURE_SIZE // 2
_MEAN, _STD = [0.45, 0.45, 0.45], [0.25, 0.25, 0.25]
_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


def prompt(processor: ProcessorMixin, question: str) -> str:
    """Return the text that asks `question` about one picture, in the form the models are trained on."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def scenes_vlm() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Build the LLaVA-NeXT-type model with random weights, and its processor.

    A picture of 120×120 pixels becomes a base tile and 2×2 tiles of 60×60: 36 + 12·13 = 192 visual tokens.
    """
    tokenizer = _tokenizer(("<image>",), "<image>")
    text = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}
    vision = {"model_type": "clip_vision_model", "hidden_size": 192, "intermediate_size": 768}
    config = transformers.LlavaNextConfig(
        vision_config={
            **vision,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "image_size": _TILE,
            "patch_size": 10,
            "projection_dim": 192,
        },
        text_config=_text_config(tokenizer, text),
        image_grid_pinpoints=[[PICTURE_SIZE, PICTURE_SIZE]],
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    processor = transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessor(
            image_grid_pinpoints=config.image_grid_pinpoints,
            size={"shortest_edge": _TILE},
            crop_size={"height": _TILE, "width": _TILE},
            image_mean=_MEAN,
            image_std=_STD,
        ),
        tokenizer,
        patch_size=10,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    return _with_generation(transformers.LlavaNextForConditionalGeneration(config), tokenizer), processor


def scenes_qwen() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Build the Qwen2.5-VL-type model with random weights, and its processor.

    A picture of 120×120 pixels becomes 24×24 patches of 5×5 pixels, merged two by two: 144 visual tokens.
    """
    start, end, image, video = _QWEN_TOKENS
    tokenizer = _tokenizer(_QWEN_TOKENS, f"{start}{image}{end}")
    text = {
        "hidden_size": 224,
        "intermediate_size": 640,
        "num_hidden_layers": 6,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 10, 10]},
    }
    config = transformers.Qwen2_5_VLConfig(
        vision_config={
            "depth": 4,
            "hidden_size": 160,
            "intermediate_size": 480,
            "num_heads": 4,
            "patch_size": 5,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 40,
            "out_hidden_size": 224,
            "fullatt_block_indexes": [3],
            "tokens_per_second": 2,
        },
        text_config=_text_config(tokenizer, text),
        vision_start_token_id=tokenizer.convert_tokens_to_ids(start),
        vision_end_token_id=tokenizer.convert_tokens_to_ids(end),
        image_token_id=tokenizer.convert_tokens_to_ids(image),
        video_token_id=tokenizer.convert_tokens_to_ids(video),
    )
    sizes = {"shortest_edge": 20 * 20, "longest_edge": PICTURE_SIZE * PICTURE_SIZE}  # pixels
    patches = {"patch_size": 5, "merge_size": 2, "temporal_patch_size": 2}
    normal = {"image_mean": _MEAN, "image_std": _STD}
    processor = transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessor(size=sizes, **patches, **normal),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(size=sizes, **patches, **normal),
        chat_template=tokenizer.chat_template,
    )
    return _with_generation(transformers.Qwen2_5_VLForConditionalGeneration(config), tokenizer), processor


def _text_config(tokenizer: PreTrainedTokenizerFast, fields: dict) -> dict:
    """The language model's configuration; four heads, embeddings not shared with the output."""
    return {
        "vocab_size": len(tokenizer),
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
        **fields,
    }


def _with_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The model, generating greedily until the end of an answer."""
    settings = model.generation_config
    settings.do_sample, settings.max_new_tokens = False, 8
    settings.bos_token_id, settings.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    settings.pad_token_id = tokenizer.pad_token_id
    return model


def _tokenizer(special: tuple[str, ...], placeholder: str) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer: words of the questions are one token, everything else is spelled by characters.

    Its chat template writes one image as `placeholder` and starts an answer with "assistant:".
    """
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *special, *VOCABULARY, "user", "assistant", *":,.?!-'"]
    tokens += [*_CHARACTERS, *(f"##{character}" for character in _CHARACTERS)]
    pieces = Tokenizer(
        models.WordPiece({token: number for number, token in enumerate(tokens)}, unk_token="<unk>")
    )
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    pieces.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokens.index("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=4096,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: "
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}" + placeholder + " "
        "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        "{% if message['role'] == 'assistant' %}</s>{% endif %} {% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return tokenizer
