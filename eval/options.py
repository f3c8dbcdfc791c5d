"""The settings of the evaluations: each field is part of a configuration, the command line and, where marked,
a record."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from ..commands.console import TOKENIZER, WEIGHTS
from ..commands.options import Setting


def names(text: str | None) -> tuple[str, ...] | None:
    """The names of a comma-separated list."""
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def numbers(text: str | None) -> tuple[int, ...] | None:
    """The whole numbers of a comma-separated list; ValueError for other text."""
    parts = names(text)
    try:
        return None if parts is None else tuple(int(part) for part in parts)
    except ValueError as error:
        raise ValueError(f"--lengths {text!r}: give whole numbers, such as 1,4,16") from error


def baseline_names(text: str) -> tuple[str, ...]:
    """The names of a comma-separated list, or none."""
    return () if text.strip() == "none" else names(text) or ()


def workers_or_cores(count: int | None) -> int:
    """Processes that decode images: `count`, or by default one per core, up to eight."""
    from .data.dataset import worker_count

    return worker_count(count)


def shares(text: str) -> tuple[float, ...]:
    """The budgets of a comma-separated list, each a share of the visual tokens in (0, 1]."""
    parts = names(text) or ()
    try:
        values = tuple(float(part) for part in parts)
    except ValueError as error:
        raise ValueError(
            f"--keep {text!r}: give shares of the visual tokens, such as 1.0,0.5,0.25"
        ) from error
    if not values or not all(0 < value <= 1 for value in values):
        raise ValueError(f"--keep {text!r}: each share of the visual tokens is above 0 and at most 1")
    return values


def loss(text: str) -> float:
    """An allowed loss, "1%" or "0.01", as a share in [0, 1)."""
    number = text.strip()
    try:
        value = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
    except ValueError as error:
        raise ValueError(f"--max-loss {text!r}: give points of accuracy, such as 1% or 0.01") from error
    if not 0 <= value < 1:
        raise ValueError(f"--max-loss {text!r}: give 0% or more, and less than 100% (0.01 is 1%)")
    return value


BASELINES = ("thumbnail", "JPEG", "WebP", "AVIF")
LOOSE = Setting(loose=True)
RECORDED = Setting(recorded=True)

Limit = Annotated[int | None, Option("--limit", min=1, help="Use only the first images.")]
Split = Annotated[str | None, Option("--split", help="Split of a hub dataset.")]
Column = Annotated[
    str | None,
    Option("--column", help="Image column of a hub dataset, manifest or shards, where there are several."),
]
Weights = Annotated[Path | None, WEIGHTS, LOOSE]
Steps = Annotated[int | None, Option("--steps", help="Steps of a stochastic decoder."), RECORDED]
Guidance = Annotated[
    float | None, Option("--guidance", help="Guidance scale of a stochastic decoder."), RECORDED
]
Semantic = Annotated[
    bool,
    Option("--semantic", help="Compare pixels of semantic tokenizers too, whose pictures only look alike."),
]
_METRICS = Option("--metrics", help="Comma-separated; by default all that can be computed.", metavar="A,B,…")
Subset = Annotated[int, Option("--kid-subset-size", min=2, help="Images per KID subset."), LOOSE]
Seed = Annotated[
    int,
    Option("--seed", min=0, max=2**63 - 1, help="Random seed of intervals, KID, Inception score and noise."),
]
Batch = Annotated[int, Option("--batch-size", min=1, help="Images per batch.")]
Workers = Annotated[
    int,
    Option(
        "--workers",
        min=0,
        max=256,
        help="Processes that decode images; by default one per core, up to eight.",
    ),
    Setting(text=int | None, parse=workers_or_cores, default=None, loose=True),
]
Every = Annotated[
    int,
    Option(
        "--checkpoint-every", min=1, help="Batches between saved states, from which a killed run continues."
    ),
    LOOSE,
]
Inception = Annotated[
    Path | None,
    Option(
        "--inception-weights", help="File of torch-fidelity's InceptionV3; by default in torch hub's cache."
    ),
]


@dataclass(frozen=True)
class WeightFiles:
    """Paths of the metrics' networks; None for the caches of the packages they belong to."""

    inception: Inception = None
    lpips: Annotated[
        Path | None, Option("--lpips-weights", help="torchvision's AlexNet or VGG16 file, or their folder.")
    ] = None
    clip: Annotated[str, Option("--clip-weights", help="File, or a cached pretrained tag of open_clip.")] = (
        "openai"
    )
    clip_model: Annotated[str, Option("--clip-model", help="Model name in open_clip.")] = "ViT-B-32"


@dataclass(frozen=True)
class ReconConfig:
    """What to measure of a tokenizer's reconstructions, on what, and how (`vistok eval recon --help`)."""

    tokenizer: Annotated[str, TOKENIZER]
    data: Annotated[
        tuple[str, ...],
        Option("--data", help="Folder, tar shards, manifest.jsonl or hub dataset; repeat for several."),
    ]
    weights: Weights = None
    split: Split = None
    column: Column = None
    limit: Limit = None
    tokens: Annotated[
        int | None, Option("--tokens", help="Tokens per image, for tokenizers of variable length."), RECORDED
    ] = None
    steps: Steps = None
    guidance: Guidance = None
    size: Annotated[
        int | None, Option("--size", min=16, help="Side of the images in pixels; by default the tokenizer's.")
    ] = None
    crop: Annotated[bool, Option("--crop/--no-crop", help="Crop the centre, or take the whole image.")] = True
    protocol: Annotated[
        Literal["round", "titok"],
        Option("--protocol", help="How images become 8-bit for Inception: round, or titok (truncates)."),
        Setting(text=str),
    ] = "round"
    metrics: Annotated[
        tuple[str, ...] | None, _METRICS, Setting(text=str | None, parse=names, loose=True)
    ] = None
    files: Annotated[WeightFiles, LOOSE] = field(default_factory=WeightFiles)
    semantic: Semantic = False
    kid_subset_size: Subset = 1000
    pfid: Annotated[bool, Option("--pfid", help="Also compute FID after perturbing the tokens.")] = False
    pfid_alpha: Annotated[
        tuple[float, ...] | None,
        Option("--pfid-alpha", help="Share of tokens to perturb; repeat for a grid."),
    ] = None
    pfid_delta: Annotated[
        tuple[int, ...] | None, Option("--pfid-delta", help="Number of nearest codes; repeat for a grid.")
    ] = None
    seed: Seed = 0
    batch_size: Batch = 32
    workers: Workers = 1
    checkpoint_every: Every = 50


@dataclass(frozen=True)
class CurvesConfig:
    """What to measure of tokenizers at all their lengths, on what, and how (`vistok eval tokens --help`)."""

    tokenizers: Annotated[
        tuple[str, ...],
        Option("--tokenizer", help="Name or weights, by default vistok-mini; repeat for several."),
        Setting(default=["vistok-mini"]),
    ]
    data: Annotated[
        tuple[str, ...],
        Argument(
            metavar="IMAGES...",
            help="Images, folders, tar shards, manifest.jsonl or a hub dataset.",
            show_default=False,
        ),
    ]
    weights: Weights = None
    split: Split = None
    column: Column = None
    limit: Limit = None
    lengths: Annotated[
        tuple[int, ...] | None,
        Option(
            "--lengths", help="Lengths of ordered tokens; by default 1, 2, 4, … and all.", metavar="K,L,…"
        ),
        Setting(text=str | None, parse=numbers),
    ] = None
    targets: Annotated[
        tuple[float, ...] | None,
        Option("--target", help="Mean absolute error, for adaptive tokenizers; repeat for several."),
    ] = None
    steps: Steps = None
    guidance: Guidance = None
    size: Annotated[
        int | None,
        Option("--size", min=16, help="Side of the images in pixels; by default the tokenizers' largest."),
    ] = None
    baselines: Annotated[
        tuple[str, ...],
        Option("--baselines", help="Comma-separated; none turns them off.", metavar="A,B,…"),
        Setting(text=str, parse=baseline_names, default=",".join(BASELINES)),
    ] = BASELINES
    metrics: Annotated[tuple[str, ...] | None, _METRICS, Setting(text=str | None, parse=names)] = None
    files: Annotated[WeightFiles, LOOSE] = field(default_factory=WeightFiles)
    semantic: Semantic = False
    seed: Seed = 0
    batch_size: Batch = 32
    workers: Workers = 1
    checkpoint_every: Every = 50


@dataclass(frozen=True)
class FidConfig:
    """Which two sets of images to compare, and how (`vistok eval fid --help`)."""

    judged: Annotated[
        str, Argument(metavar="A", help="Images (folder, shards, manifest) or .npz.", show_default=False)
    ]
    real: Annotated[str, Argument(metavar="B", help="Reference images or .npz.", show_default=False)]
    metrics: Annotated[tuple[str, ...] | None, _METRICS, Setting(text=str | None, parse=names)] = None
    limit: Limit = None
    size: Annotated[
        int | None, Option("--size", min=16, help="Resize and centre-crop all images to this side.")
    ] = None
    inception: Inception = None
    kid_subset_size: Subset = 1000
    allow_different_counts: Annotated[
        bool, Option("--allow-different-counts", help="Compare sets of different numbers of images.")
    ] = False
    save_statistics: Annotated[
        bool,
        Option("--save-statistics", help="Write mu and sigma of images to statistics-a/-b.npz."),
    ] = False
    seed: Seed = 0
    batch_size: Batch = 32
    workers: Workers = 1
    checkpoint_every: Every = 50

    @property
    def files(self) -> WeightFiles:
        """Path of the metrics' network."""
        return WeightFiles(inception=self.inception)


KEEPS = (1.0, 0.5, 0.25, 0.1, 0.05)
REDUCERS = Option(
    "--reducers",
    help="Comma-separated names of `vistok list --reducers`; by default all. `eval vlm` also takes reducers "
    "that act together, as tome:0.5+divprune:0.25.",
    metavar="A,B,…",
)
Model = Annotated[
    str,
    Option("--model", help="Folder or hub repository of a transformers model, or scenes-vlm or scenes-qwen."),
]
QuestionData = Annotated[
    str,
    Option("--data", help="scenes (drawn here), FILE.jsonl, or a hub dataset (hf://owner/name)."),
]
QuestionCount = Annotated[
    int | None, Option("--count", min=1, help="Use the first questions; 500 for scenes, else all.")
]
QuestionSplit = Annotated[
    str | None, Option("--split", help="Split of a hub dataset, or of the scenes (test by default).")
]
ScorerName = Annotated[
    str | None,
    Option("--scorer", help="exact, choice, choice-likelihood, vqa, anls or cider; by default by the data."),
]
Questions = Annotated[
    int, Option("--batch-size", min=1, help="Questions per batch; prompts are padded on the left.")
]
NewTokens = Annotated[int, Option("--max-new-tokens", min=1, help="Tokens per answer at most.")]
Prompt = Annotated[
    str | None,
    Option("--prompt", help="Text around {question} and one image, for processors without chat template."),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    Option("--dtype", help="Precision of the model: auto, float32, bfloat16 or float16."),
    Setting(text=str),
]


@dataclass(frozen=True)
class AskingConfig:
    """Which model is asked which questions, with which reducers, and how."""

    model: Model
    reducers: Annotated[tuple[str, ...] | None, REDUCERS, Setting(text=str | None, parse=names)] = None
    data: QuestionData = "scenes"
    split: QuestionSplit = None
    count: QuestionCount = None
    scorer: ScorerName = None
    prompt: Prompt = None
    batch_size: Questions = 32
    max_new_tokens: NewTokens = 32
    dtype: Dtype = "auto"
    seed: Seed = 0
    speed_repeats: Annotated[
        int, Option("--speed-repeats", min=1, help="Paired runs per setting against the full model."), LOOSE
    ] = 3


@dataclass(frozen=True)
class VlmConfig(AskingConfig):
    """Which model, reducers and budgets to compare on which questions (`vistok eval vlm --help`)."""

    keep: Annotated[
        tuple[float, ...],
        Option("--keep", help="Shares of the visual tokens.", metavar="P,Q,…"),
        Setting(text=str, parse=shares, default=",".join(f"{keep:g}" for keep in KEEPS)),
    ] = KEEPS
    positions: Annotated[
        tuple[str, ...],
        Option("--positions", help="keep, compact or paper; several are compared.", metavar="A,B,…"),
        Setting(text=str, parse=names, default="keep"),
    ] = ("keep",)
    speed: Annotated[
        bool, Option("--speed/--no-speed", help="Measure times and memory after the answers."), LOOSE
    ] = True


@dataclass(frozen=True)
class TuneConfig(AskingConfig):
    """Which model to find the cheapest reducer for, on which questions (`vistok tune --help`)."""

    max_loss: Annotated[
        float,
        Option("--max-loss", help="Points of accuracy that may be lost, such as 1%.", metavar="SHARE"),
        Setting(text=str, parse=loss, default="1%"),
    ] = 0.01
    keep: Annotated[
        tuple[float, ...],
        Option("--keep", help="Shares of the visual tokens to try.", metavar="P,Q,…"),
        Setting(text=str, parse=shares, default="0.75,0.5,0.25,0.1,0.05"),
    ] = (0.75, 0.5, 0.25, 0.1, 0.05)
    combinations: Annotated[
        bool, Option("--combinations/--no-combinations", help="Also try pairs of reducers of two stages.")
    ] = True
    speed: Annotated[
        bool, Option("--speed/--no-speed", help="Measure the time of the settings that are left."), LOOSE
    ] = True
