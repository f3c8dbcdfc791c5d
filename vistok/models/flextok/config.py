"""Sizes and constants of FlexTok, from the fields of FlexTokConfig or the original's nested configuration."""

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open

from ...configuration import build
from ..ranges import require_between, require_depths, require_multiple, require_sizes

KeptTokens = Literal["uniform", "pow2", "uniform_pow2"]
Times = Literal["mode", "logit_normal", "stratified"]

_LARGEST_TABLE = 2**28
LICENSE = "apple-amlr (not open source: research only)"


@dataclass(frozen=True)
class FlexTokConfig:
    """Sizes and constants of encoder, decoder, quantizer and VAE; the defaults are the d12-d12 sizes."""

    encoder_dim: int = 768
    encoder_depth: int = 12
    decoder_dim: int = 768
    decoder_depth: int = 12
    head_dim: int = 64
    num_tokens: int = 256
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    latent_channels: int = 16
    latent_size: int = 32
    """Side of the VAE's latents, in latent pixels."""
    patch_size: int = 2
    frequency_embedding_size: int = 256
    max_timestep: float = 1.0
    """Scale of the time features; times themselves are always in [0, 1]."""
    vae: bool = True
    """Whether the checkpoint holds the VAE; without it, `attach_vae`."""
    vae_block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    vae_layers_per_block: int = 2
    vae_norm_num_groups: int = 32
    vae_scaling_factor: float | None = None
    """Factor on the VAE's latents; None takes that of the VAE's own configuration."""
    vae_source: str | None = None
    """Hub repository whose config.json has that factor."""
    sample_posterior: bool = False
    """Whether training samples the VAE's posterior; `encode` always takes its mean."""
    kept_tokens: KeptTokens = "pow2"
    """In training: how many tokens nested dropout keeps."""
    null_probability: float = 0.2
    """In training: the share of images whose tokens are hidden from the decoder."""
    times: Times = "mode"
    """In training: how times are drawn."""
    mode_scale: float = 0.25

    def __post_init__(self) -> None:
        require_sizes(self, "encoder_dim", "decoder_dim", "head_dim", "num_tokens", "latent_channels")
        require_sizes(self, "latent_size", "patch_size", "frequency_embedding_size", "vae_norm_num_groups")
        require_depths(self, "encoder_depth", "decoder_depth", "vae_layers_per_block")
        require_sizes(self, "vae_block_out_channels")
        require_between(self, ["levels"], 2, 2**16)
        if math.prod(self.levels) >= 2**63 or len(self.vae_block_out_channels) > 8:
            raise ValueError(
                f"levels {self.levels} and vae_block_out_channels {self.vae_block_out_channels} make more "
                "than 2**63 codes or 8 VAE levels"
            )
        for side in ("encoder_dim", "decoder_dim"):
            if getattr(self, side) % self.head_dim or getattr(self, side) % 4:
                raise ValueError(
                    f"{side} is {getattr(self, side)}; it must be a multiple of head_dim {self.head_dim} "
                    "and of 4"
                )
        require_multiple(self, "latent_size", "patch_size")
        positions = (self.latent_size // self.patch_size) ** 2 * max(self.encoder_dim, self.decoder_dim)
        if positions > _LARGEST_TABLE:
            raise ValueError(
                f"latent_size {self.latent_size} in patches of {self.patch_size} needs a position table of "
                f"{positions:,} numbers; up to {_LARGEST_TABLE:,} are taken: give a smaller latent_size"
            )
        require_multiple(self, "vae_block_out_channels", "vae_norm_num_groups")
        if self.frequency_embedding_size % 2:
            raise ValueError(
                f"frequency_embedding_size is {self.frequency_embedding_size}; it must be even, half of it "
                "sines and half cosines"
            )
        require_between(self, ["max_timestep"], 1e-6, 1e9)
        require_between(self, ["null_probability"], 0, 1)
        if not -1 <= self.mode_scale <= 2 / (math.pi - 2):
            raise ValueError(
                f"mode_scale is {self.mode_scale}; times stay in order from -1 to {2 / (math.pi - 2):.3f}"
            )
        if self.vae_scaling_factor is not None:
            require_between(self, ["vae_scaling_factor"], 1e-9, 1e9)

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels."""
        return self.latent_size * 2 ** (len(self.vae_block_out_channels) - 1)

    @property
    def size_multiple(self) -> int:
        """Sides of images are multiples of this, in pixels: one patch of the VAE's latents."""
        return self.patch_size * 2 ** (len(self.vae_block_out_channels) - 1)

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, whole: bool = True) -> "FlexTokConfig":
        """Read field names, or the original's graph of modules (`vae`, `encoder`, `decoder`, …).

        Without `whole` a graph may be of some modules only, and what it does not state has the fields'
        defaults. ValueError names every module, class or argument of a graph that is not the published
        model's.
        """
        values = values["config"] if isinstance(values.get("config"), Mapping) else values
        if any(isinstance(values.get(section), Mapping) for section in ("vae", "encoder", "decoder")):
            return build(cls, _fields_of_graph(values, whole), "the configuration")
        return build(cls, values, "flextok")


# The original's configuration -------------------------------------------------------------------------------

# Section or module, its class, and its arguments: @field fills a field of FlexTokConfig (? may be absent), *
# marks one that has no effect here, anything else is the only accepted value.
_GRAPH = """
vae StableDiffusionVAE latent_channels=@latent_channels? scaling_factor=@vae_scaling_factor?
    sample_posterior=@sample_posterior? hf_hub_path=@vae_source? dtype_override=* force_vae_encode=*
encoder.enc_patch_emb PatchEmbedder channels_in=@latent_channels patch_sizes=@patch_size dim=@encoder_dim
    flatten_patches=False
encoder.enc_posemb_module PositionalEmbeddingAdder dim=@encoder_dim max_sizes=@grid posemb_type=sincos
    posemb_scaling=absolute
encoder.enc_register_module Registers1D dim=@encoder_dim n_min=@num_tokens n_max=@num_tokens
    ordering_mode=nested size_sampling_mode=*
encoder.enc_seq_packer BlockWiseSequencePacker mask_mode=causal_last pad_to_multiple=*
encoder.enc_transformer FlexTransformer dim=@encoder_dim depth=@encoder_depth
encoder.enc_to_latents LinearHead dim=@encoder_dim dim_out=@code_dim use_mup_readout=False dtype_override=*
decoder.dec_from_latents LinearLayer dim_in=@code_dim dim=@decoder_dim
decoder.dec_registers_posemb_module PositionalEmbeddingAdder dim=@decoder_dim max_sizes=@num_tokens
    posemb_type=learnable_sum posemb_scaling=absolute
decoder.dec_nested_dropout MaskedNestedDropout dim=@decoder_dim size_sampling_mode=@kept_tokens?
decoder.dec_latent_dropout LearnedNullCond dim=@decoder_dim dropout_prob=@null_probability?
decoder.dec_noise_patch_emb PatchEmbedder channels_in=@latent_channels patch_sizes=@patch_size
    dim=@decoder_dim flatten_patches=False
decoder.dec_patches_posemb_module PositionalEmbeddingAdder dim=@decoder_dim max_sizes=@grid
    posemb_type=sincos posemb_scaling=absolute
decoder.dec_seq_packer BlockWiseSequencePacker mask_mode=full per_subseq_embs=True pad_to_multiple=*
decoder.dec_time_embedder TimestepEmbedder dim=@decoder_dim max_timestep=@max_timestep
    frequency_embedding_size=@frequency_embedding_size?
decoder.dec_transformer FlexTransformer dim=@decoder_dim depth=@decoder_depth adaLN_expansion=2
    intermediate_layers=*
decoder.dec_to_patches ToPatchesLinearHead dim=@decoder_dim channels_out=@latent_channels
    patch_sizes=@patch_size use_mup_readout=False dtype_override=*
regularizer FSQ levels=@levels packed_call=*
flow_matching_noise_module MinRFNoiseModule ln=@ln? stratisfied=@stratisfied? mode_scale=@mode_scale?
pipeline MinRFPipeline out_channels=@latent_channels
"""
_TRAINING_ONLY = (
    *("drop", "drop_path_rate", "drop_quant_p", "dropout_prob", "corrupt_*", "frozen", "ln", "stratisfied"),
    *("mode_scale", "use_act_checkpoint", "compile_*", "weight_init_style", "zero_init_*", "*_init*"),
)
_SIDES = ("patch_sizes", "max_sizes")
_LARGEST_SECTION = 2**20  # characters of one section in the head of a file
_WIRING = ("_target_", "_partial_", "*_key", "*_keys")


def _known_modules() -> dict[str, tuple[str, dict[str, str]]]:
    """The table above: where → class and arguments."""
    table = {}
    for line in _GRAPH.replace("\n    ", " ").strip().splitlines():
        where, kind, *arguments = line.split()
        table[where] = (kind, dict(argument.split("=") for argument in arguments))
    return table


def _fields_of_graph(graph: Mapping[str, Any], whole: bool) -> dict[str, Any]:
    """Fields of FlexTokConfig from the original's nested configuration; anything else in it is an error."""
    known, settings = _known_modules(), {}
    nodes = _nodes_of_graph(graph, {where.partition(".")[0] for where in known}, whole)
    missing = [where for where in known if where not in nodes and where != "flow_matching_noise_module"]
    if missing and whole:
        raise ValueError(f"the configuration lacks {', '.join(missing)}")
    for where, node in nodes.items():
        if where in known:
            _read(where, node, *known[where], settings)
        else:
            _check_moves(where, node)
    code_dim = settings.pop("code_dim", None)
    if code_dim is not None and "levels" not in settings:
        settings["levels"] = (2,) * _positive("dim_out", code_dim, 1024)  # of a part that quantizes nothing
    if code_dim not in (None, len(settings.get("levels", ()))):
        raise ValueError(
            f"encoder and decoder do not have one channel for each of levels={settings['levels']}"
        )
    if "vae" in nodes and settings.get("vae_scaling_factor") is None and not settings.get("vae_source"):
        raise ValueError("the configuration's vae has neither scaling_factor nor hf_hub_path to take it from")
    patch = _positive("patch_sizes", settings.get("patch_size", FlexTokConfig.patch_size))
    if "grid" in settings:
        settings["latent_size"] = _positive("max_sizes", settings.pop("grid")) * patch
    logit_normal, stratified = settings.pop("ln", False), settings.pop("stratisfied", False)
    settings["times"] = ("stratified" if stratified else "logit_normal") if logit_normal else "mode"
    return {name: value for name, value in settings.items() if value is not None}


def _nodes_of_graph(graph: Mapping[str, Any], sections: set[str], whole: bool) -> dict[str, Any]:
    """Sections, and modules of encoder and decoder as side.name, of the nested configuration."""
    nodes = {name: graph[name] for name in graph if name in sections - {"encoder", "decoder"}}
    for side in ("encoder", "decoder"):
        if side not in graph and not whole:
            continue
        section = graph.get(side)
        modules = section.get("module_dict") if isinstance(section, Mapping) else None
        if not isinstance(modules, Mapping):
            raise ValueError(f"the configuration's {side} has no module_dict; a published one has")
        nodes |= {f"{side}.{name}": node for name, node in modules.items()}
    return nodes


def _positive(name: str, value: Any, most: int = 2**20) -> int:
    """A whole number from 1 to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(f"the configuration's {name} is {value!r}; it takes a whole number from 1 to {most}")
    return value


def _class_of(where: str, node: Any) -> str:
    if not isinstance(node, Mapping) or not isinstance(node.get("_target_"), str):
        raise ValueError(f"the configuration's {where} names no class (_target_)")
    return node["_target_"].rsplit(".", 1)[-1]


def _check_moves(where: str, node: Any) -> None:
    """ValueError unless a module only moves axes or cuts sequences, as the published graph's do."""
    kind = _class_of(where, node)
    if kind == "PerSampleOp":
        kind = _class_of(f"{where}.per_sample_op", node.get("per_sample_op"))
    if kind not in ("SequenceUnpacker", "channels_first_to_last", "channels_last_to_first"):
        raise ValueError(
            f"the configuration has a module {where} ({node['_target_']}, {kind}) that this version does not "
            "accept; it builds the published 1D tokenizers"
        )


def _read(where: str, node: Any, kind: str, arguments: Mapping[str, str], settings: dict[str, Any]) -> None:
    """Check one module's class and arguments, and put its fields into `settings`."""
    if _class_of(where, node) != kind:
        raise ValueError(
            f"the configuration's {where} is {node['_target_']}; this version accepts {kind} there"
        )
    for name, value in node.items():
        if name.endswith(("_key", "_keys")):
            _check_key(where, name, value)
        if name not in arguments:
            if not any(fnmatch(name, pattern) for pattern in (*_WIRING, *_TRAINING_ONLY)):
                raise ValueError(
                    f"the configuration's {where} has an argument {name}, unknown to this version"
                )
            continue
        rule = arguments[name]
        if rule.startswith("@"):
            target = rule.strip("@?")
            if target == "levels":
                value = tuple(value) if isinstance(value, list | tuple) else value
            elif name in _SIDES:
                value = _one_side(where, name, value, 1 if target == "num_tokens" else 2)
            if settings.setdefault(target, value) != value:
                raise ValueError(
                    f"the configuration's {where} has {name}={value}; elsewhere it is {settings[target]}"
                )
        elif rule not in ("*", str(value)):
            raise ValueError(f"the configuration's {where} has {name}={value!r}; this version accepts {rule}")
    required = [name for name, rule in arguments.items() if rule[0] == "@" and rule[-1] != "?"]
    missing = [name for name in required if node.get(name) is None]
    if missing:
        raise ValueError(f"the configuration's {where} lacks {', '.join(missing)}")


def _check_key(where: str, name: str, value: Any) -> None:
    """Raise ValueError unless an argument that wires modules is a key or null, or for several a list of
    keys."""
    if value is None and not name.endswith("_keys"):
        return
    keys = value if name.endswith("_keys") and isinstance(value, list) and value else [value]
    if not all(isinstance(key, str) for key in keys):
        raise ValueError(f"the configuration's {where} has {name}={value!r}; it takes the name of a key")


def _one_side(where: str, name: str, value: Any, axes: int) -> Any:
    """The side of a square given as a list with one for each of `axes`."""
    sides = value if isinstance(value, list | tuple) else ()
    if len(sides) != axes or any(side != sides[0] for side in sides):
        raise ValueError(
            f"the configuration's {where} has {name}={value!r}; it takes a list of {axes}, and grids are "
            "square"
        )
    return sides[0]


def header_config(path: Path) -> dict[str, Any] | None:
    """The configuration in the head of a .safetensors file, whose sections are Python literals."""
    if path.suffix != ".safetensors":
        return None
    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
    config: dict[str, Any] = {}
    for name, text in header.items():
        try:
            config[name] = ast.literal_eval(text) if len(text) <= _LARGEST_SECTION else text
        except (ValueError, SyntaxError, RecursionError, MemoryError):  # nested too deeply for the parser
            config[name] = text
    return config if isinstance(config.get("encoder"), Mapping) else None
