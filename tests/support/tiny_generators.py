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


def filled(model, seed=1):
    """The model in eval mode with the weights of parity cases."""
    model.load_state_dict({key: fill(key, value.shape, seed) for key, value in model.state_dict().items()})
    return model.eval()


def build(name, **changes):
    """A small generator of CASES."""
    family, config = CASES[name]
    return filled(create(family, **{**config, **changes}))
