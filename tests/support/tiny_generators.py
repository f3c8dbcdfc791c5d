"""Small generators of every family with weights that make classes differ."""

from vistok.eval.parity.case import fill
from vistok.generate import create

TOKENIZER, CODES, COUNT, CLASSES = "tiny", 64, 6, 5
NETWORK = {
    "tokenizer": TOKENIZER,
    "codebook_size": CODES,
    "image_seq_len": COUNT,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "condition_num_classes": CLASSES,
    "randomize_temperature": 2.0,
    "guidance_scale": 3.0,
}
CASES = {
    "bert-linear": ("maskgit", {**NETWORK, "num_steps": 4, "guidance_decay": "linear"}),
    "bert-constant": (
        "maskgit",
        {**NETWORK, "num_steps": 9, "guidance_decay": "constant", "softmax_temperature_annealing": False},
    ),
    "uvit-power-cosine": ("maskgit-uvit", {**NETWORK, "num_steps": 5, "guidance_decay": "power-cosine"}),
    "rar": ("rar", {**NETWORK, "guidance_scale_pow": 1.5}),
    "rar-grid": ("rar", {**NETWORK, "guidance_scale_pow": 0.0, "grid": (2, 3)}),
}
LLAMA = {
    "tokenizer": TOKENIZER,
    "dim": 32,
    "n_layer": 2,
    "n_head": 2,
    "num_classes": CLASSES,
    "multiple_of": 8,
    "temperature": 1.3,
    "cfg_scale": 3.0,
}
LLAMA_CASES = {
    "detailflow-gpt": ("detailflow-gpt", {**LLAMA, "vocab_size": CODES, "block_size": 8, "group_size": 2}),
    "detailflow-gpt-late": (
        "detailflow-gpt",
        {**LLAMA, "vocab_size": 40, "block_size": 16, "group_size": 4, "causal_num": 8, "top_k": 9},
    ),
    "elm-lm-1x6": (
        "elm-lm",
        {**LLAMA, "block_size": 9, "token_each": 1, "code_dim": 6, "cfg_schedule": "linear", "top_p": 0.8},
    ),
    "elm-lm-2x3": (
        "elm-lm",
        {**LLAMA, "block_size": 9, "token_each": 2, "code_dim": 3, "cfg_schedule": "log"},
    ),
    "elm-lm-3x2": (
        "elm-lm",
        {**LLAMA, "block_size": 9, "token_each": 3, "code_dim": 2, "cfg_schedule": "constant"},
    ),
}
"""Generators of LLaMA blocks, whose configurations have another form."""
FLEXTOK = {
    "tokenizer": TOKENIZER,
    "embed_dim": 32,
    "num_blocks": 2,
    "num_heads": 2,
    "codebook_size": CODES,
    "num_tokens": 8,
    "swiglu_hidden": 40,
    "temperature": 1.3,
    "guidance": 3.0,
}
PLAIN = {"pos_embed": "sincos1d", "qk_norm": False, "post_trunk_norm": True}
ALL = {"pos_embed": "absolute", "qk_norm": True, "post_trunk_norm": False}
ALL |= {"qkv_bias": True, "use_bias": True, "head_bias": True}
FLEXTOK_CASES = {
    "flextok-class": ("flextok-ar-class", {**FLEXTOK, **PLAIN, "num_classes": CLASSES}),
    "flextok-class-all": ("flextok-ar-class", {**FLEXTOK, **ALL, "num_classes": CLASSES, "top_k": 9}),
    "flextok-text": ("flextok-ar-text", {**FLEXTOK, **PLAIN, "text_dim": 12, "top_p": 0.8}),
    "flextok-text-all": ("flextok-ar-text", {**FLEXTOK, **ALL, "text_dim": 12, "text_bias": True}),
}
"""FlexTok's generators with the fewest and with all options of the transformer."""


def filled(model, seed=1):
    """The model in eval mode with the weights of parity cases."""
    model.load_state_dict({key: fill(key, value.shape, seed) for key, value in model.state_dict().items()})
    return model.eval()


def build(name, **changes):
    """A small generator of CASES, LLAMA_CASES or FLEXTOK_CASES."""
    family, config = {**CASES, **LLAMA_CASES, **FLEXTOK_CASES}[name]
    return filled(create(family, **{**config, **changes}))
