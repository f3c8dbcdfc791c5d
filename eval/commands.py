"""`vistok eval recon`, `tokens`, `fid` and `speed`: options, tables, JSON and reports."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..commands.console import Device, Name, Weights, note, say, table
from ..commands.console import device as named_device
from ..files import check_target

if TYPE_CHECKING:
    from .engine.record import Record
    from .report.page import Table

app = typer.Typer(no_args_is_help=True)

Split = Annotated[str | None, typer.Option("--split", help="Of a hub dataset.")]
Column = Annotated[
    str | None,
    typer.Option("--column", help="Of a hub dataset, manifest or shards, if not the only one."),
]
Steps = Annotated[int | None, typer.Option("--steps", help="Of a stochastic decoder.")]
Guidance = Annotated[float | None, typer.Option("--guidance", help="Of a stochastic decoder.")]
Metrics = Annotated[
    str | None,
    typer.Option("--metrics", help="Comma-separated; all that can be computed otherwise.", metavar="A,B,…"),
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="The first images only.")]
Inception = Annotated[
    Path | None,
    typer.Option(
        "--inception-weights", help="File of torch-fidelity's InceptionV3; torch hub's cache otherwise."
    ),
]
Lpips = Annotated[
    Path | None,
    typer.Option("--lpips-weights", help="torchvision's AlexNet or VGG16 file, or their folder."),
]
Clip = Annotated[str, typer.Option("--clip-weights", help="File, or a cached pretrained tag of open_clip.")]
ClipModel = Annotated[str, typer.Option("--clip-model", help="open_clip's name.")]
Subset = Annotated[int, typer.Option("--kid-subset-size", min=2, help="Images in each of KID's subsets.")]
Seed = Annotated[
    int, typer.Option("--seed", min=0, max=2**63 - 1, help="Of intervals, KID, Inception score and noise.")
]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="Images at a time.")]
Workers = Annotated[
    int | None,
    typer.Option("--workers", min=0, max=256, help="Processes that decode images; by the cores otherwise."),
]
Every = Annotated[
    int,
    typer.Option("--checkpoint-every", min=1, help="Batches between states that a killed run resumes from."),
]
Html = Annotated[bool, typer.Option("--html/--no-html", help="Write report.html.")]


@app.command()
def recon(
    tokenizer: Name,
    data: Annotated[
        list[str],
        typer.Option("--data", help="Folder, tar shards, manifest.jsonl or hub dataset; repeat for several."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for JSON and report.")] = Path("recon"),
    weights: Weights = None,
    split: Split = None,
    column: Column = None,
    limit: Limit = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", help="Tokens per image, for tokenizers with a choice.")
    ] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    size: Annotated[
        int | None, typer.Option("--size", min=16, help="Side of the images; the tokenizer's own otherwise.")
    ] = None,
    crop: Annotated[bool, typer.Option("--crop/--no-crop", help="Centre crop, or the whole picture.")] = True,
    protocol: Annotated[
        str, typer.Option("--protocol", help="8-bit images for Inception: round, or titok (truncates).")
    ] = "round",
    metrics: Metrics = None,
    inception_weights: Inception = None,
    lpips_weights: Lpips = None,
    clip_weights: Clip = "openai",
    clip_model: ClipModel = "ViT-B-32",
    kid_subset_size: Subset = 1000,
    pfid: Annotated[bool, typer.Option("--pfid", help="Also FID after perturbing the tokens.")] = False,
    pfid_alpha: Annotated[
        list[float] | None, typer.Option("--pfid-alpha", help="Share of tokens; repeat for a grid.")
    ] = None,
    pfid_delta: Annotated[
        list[int] | None, typer.Option("--pfid-delta", help="Nearest codes; repeat for a grid.")
    ] = None,
    seed: Seed = 0,
    batch_size: Batch = 32,
    workers: Workers = None,
    device: Device = "auto",
    checkpoint_every: Every = 50,
    html: Html = True,
) -> None:
    """How well a tokenizer gives images back: PSNR, SSIM, LPIPS, rFID, pFID, KID, codebook use and more.

    A killed run continues when it is started again. Several processes: `accelerate launch -m vistok.cli eval
    recon …`, with one --out that all see.
    """
    from .data.dataset import worker_count
    from .engine.instruments import WeightFiles
    from .engine.record import write
    from .metrics.perturbation import ALPHAS, DELTAS
    from .report import records
    from .report.charts import require
    from .tasks.reconstruction import ReconConfig, run

    _check_out(out, "reconstruction.json", "report.html")
    if html:
        require()
    if (pfid_alpha or pfid_delta) and not pfid:
        raise ValueError("--pfid-alpha and --pfid-delta are the grid of --pfid: give that as well")
    config = ReconConfig(
        tokenizer=tokenizer,
        data=tuple(data),
        weights=weights,
        split=split,
        column=column,
        limit=limit,
        tokens=tokens,
        steps=steps,
        guidance=guidance,
        size=size,
        crop=crop,
        protocol=protocol,
        metrics=_names(metrics),
        files=WeightFiles(inception_weights, lpips_weights, clip_weights, clip_model),
        kid_subset_size=kid_subset_size,
        pfid=pfid,
        pfid_alpha=tuple(pfid_alpha or ALPHAS),
        pfid_delta=tuple(pfid_delta or DELTAS),
        seed=seed,
        batch_size=batch_size,
        workers=worker_count(workers),
        checkpoint_every=checkpoint_every,
    )
    result = run(config, out, named_device(device))
    if result is None:
        return
    write(out / "reconstruction.json", result.record)
    if html:
        records.write_reconstruction(out / "report.html", result)
    result.state.remove()
    _show(result.record, records.tables(result.record), out, html)


@app.command()
def tokens(
    images: Annotated[
        list[str],
        typer.Argument(
            help="Images, folders, tar shards, manifest.jsonl or a hub dataset.", show_default=False
        ),
    ],
    tokenizer: Annotated[
        list[str] | None,
        typer.Option("--tokenizer", help="Name or weights, vistok-mini otherwise; repeat for several."),
    ] = None,
    weights: Weights = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for JSON, plot and report.")] = Path(
        "rate-distortion"
    ),
    split: Split = None,
    column: Column = None,
    limit: Limit = None,
    lengths: Annotated[
        str | None,
        typer.Option("--lengths", help="Of ordered tokens; 1, 2, 4, … and all otherwise.", metavar="K,L,…"),
    ] = None,
    target: Annotated[
        list[float] | None,
        typer.Option("--target", help="Mean absolute error, for adaptive tokenizers; repeat for several."),
    ] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    size: Annotated[
        int | None, typer.Option("--size", min=16, help="Side of the images; the largest of the tokenizers'.")
    ] = None,
    baselines: Annotated[
        str, typer.Option("--baselines", help="Comma-separated; none for none.", metavar="A,B,…")
    ] = "thumbnail,JPEG,WebP,AVIF",
    metrics: Metrics = None,
    inception_weights: Inception = None,
    lpips_weights: Lpips = None,
    clip_weights: Clip = "openai",
    clip_model: ClipModel = "ViT-B-32",
    seed: Seed = 0,
    batch_size: Batch = 32,
    workers: Workers = None,
    device: Device = "auto",
    checkpoint_every: Every = 50,
    html: Annotated[
        bool, typer.Option("--html/--no-html", help="Write report.html and rate_distortion.png.")
    ] = True,
) -> None:
    """Quality for bytes: every length of one or several tokenizers, beside thumbnail, JPEG, WebP and AVIF at
    the same bytes, with rate–FID where Inception's weights are.

    A killed run continues when it is started again. Several processes: `accelerate launch -m vistok.cli eval
    tokens …`.
    """
    from .data.dataset import worker_count
    from .engine.instruments import WeightFiles
    from .engine.record import write
    from .report import curves
    from .report.charts import require
    from .tasks.rate_distortion import CurvesConfig, run

    _check_out(out, "rate_distortion.json", "rate_distortion.png", "report.html")
    if html:
        require()
    config = CurvesConfig(
        tokenizers=tuple(tokenizer or ["vistok-mini"]),
        data=tuple(images),
        weights=weights,
        split=split,
        column=column,
        limit=limit,
        lengths=_numbers(lengths),
        targets=tuple(target) if target else None,
        steps=steps,
        guidance=guidance,
        size=size,
        baselines=() if baselines.strip() == "none" else _names(baselines),
        metrics=_names(metrics),
        files=WeightFiles(inception_weights, lpips_weights, clip_weights, clip_model),
        seed=seed,
        batch_size=batch_size,
        workers=worker_count(workers),
        checkpoint_every=checkpoint_every,
    )
    result = run(config, out, named_device(device))
    if result is None:
        return
    write(out / "rate_distortion.json", result.record)
    if html:
        curves.chart(result.record, "psnr").save(out / "rate_distortion.png")
        curves.write_curves(out / "report.html", result)
    result.state.remove()
    _show(result.record, curves.tables(result.record), out, html)


@app.command()
def fid(
    judged: Annotated[
        str,
        typer.Argument(metavar="A", help="Images (folder, shards, manifest) or .npz.", show_default=False),
    ],
    real: Annotated[str, typer.Argument(metavar="B", help="What A is judged by.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Folder for JSON and report.")] = Path("fid"),
    metrics: Metrics = None,
    limit: Limit = None,
    size: Annotated[
        int | None, typer.Option("--size", min=16, help="Resize and centre-crop all images to this side.")
    ] = None,
    inception_weights: Inception = None,
    kid_subset_size: Subset = 1000,
    allow_different_counts: Annotated[
        bool, typer.Option("--allow-different-counts", help="Compare sets of different numbers of images.")
    ] = False,
    save_statistics: Annotated[
        bool, typer.Option("--save-statistics", help="Write mu and sigma of images to statistics-a/-b.npz.")
    ] = False,
    seed: Seed = 0,
    batch_size: Batch = 32,
    workers: Workers = None,
    device: Device = "auto",
    checkpoint_every: Every = 50,
    html: Html = True,
) -> None:
    """FID, Inception score, KID, precision and recall of images A against B; either may be a .npz with mu and
    sigma, such as ADM's reference files.

    A killed run continues when it is started again. Several processes: `accelerate launch -m vistok.cli eval
    fid …`.
    """
    from .data.dataset import worker_count
    from .engine.instruments import WeightFiles
    from .engine.record import write
    from .report import records
    from .report.charts import require
    from .tasks.fid import FidConfig, run

    _check_out(out, "fid.json", "report.html", "statistics-a.npz", "statistics-b.npz")
    if html:
        require()
    config = FidConfig(
        judged=judged,
        real=real,
        limit=limit,
        size=size,
        metrics=_names(metrics),
        files=WeightFiles(inception=inception_weights),
        kid_subset_size=kid_subset_size,
        allow_different_counts=allow_different_counts,
        save_statistics=save_statistics,
        seed=seed,
        batch_size=batch_size,
        workers=worker_count(workers),
        checkpoint_every=checkpoint_every,
    )
    result = run(config, out, named_device(device))
    if result is None:
        return
    write(out / "fid.json", result.record)
    if html:
        records.write_fid(out / "report.html", result.record)
    for state in result.states:
        state.remove()
    _show(result.record, records.tables(result.record), out, html)


@app.command()
def speed(
    tokenizer: Annotated[list[str], typer.Option("--tokenizer", help="Registry name; repeat for several.")],
    batch_size: Annotated[
        list[int] | None, typer.Option("--batch-size", min=1, help="Images at a time; repeat for several.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Paired runs.")] = 5,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; PyTorch's choice otherwise.")
    ] = None,
    compile_: Annotated[bool, typer.Option("--compile", help="Also time torch.compile.")] = False,
    device: Device = "auto",
    out: Annotated[Path, typer.Option("--out", help="Folder for JSON and report.")] = Path("speed"),
    html: Html = True,
) -> None:
    """Images/s of encoding and decoding, peak memory and parameters, over batch sizes, against a
    straightforward implementation, paired in one run."""
    import torch

    from ..registry import entries, families, unknown_name
    from .engine.record import write
    from .report.charts import require
    from .report.speed import write_speed
    from .speed.tokenizers import HEADER, measure

    _check_out(out, "speed.json", "report.html")
    if html:
        require()
    if unknown := [name for name in tokenizer if name not in {**entries(), **families()}]:
        raise ValueError(unknown_name(unknown[0]))
    if threads:
        torch.set_num_threads(threads)
    found = []
    for name in tokenizer:
        for size in sorted(set(batch_size or [8])):
            found.append(measure(name, size, repeats, named_device(device), compiled=compile_))
            table(found[-1].title, HEADER, found[-1].table())
            measured = {"protocol": {"repeats": repeats, "weights": "fresh"}, "n": repeats, "seed": 0}
            write(out / "speed.json", {**measured, "results": [each.record() for each in found]})
    if html:
        write_speed(out / "report.html", found, repeats)
    say(f"{out}: {'JSON and report.html' if html else 'JSON'}")


def _check_out(out: Path, *names: str) -> None:
    """Raise OSError now for files that could not be written after the work."""
    check_target(out, folder=True)
    for name in names:
        check_target(out / name)


def _names(metrics: str | None) -> tuple[str, ...] | None:
    return None if metrics is None else tuple(name.strip() for name in metrics.split(",") if name.strip())


def _numbers(lengths: str | None) -> tuple[int, ...] | None:
    """The whole numbers of a comma-separated list."""
    names = _names(lengths)
    try:
        return None if names is None else tuple(int(name) for name in names)
    except ValueError as error:
        raise ValueError(f"--lengths {lengths!r}: give whole numbers, such as 1,4,16") from error


def _show(record: "Record", tables: "list[Table]", out: Path, html: bool) -> None:
    """The tables, what was skipped, warnings, and where the files are."""
    from .report.records import skipped

    for shown in tables:
        table(shown.title, shown.header, shown.rows)
    for names, reason in (row for shown in skipped(record) for row in shown.rows):
        note(f"skipped {names}: {reason}")
    for warning in record.warnings:
        note(warning)
    if record.bad_images:
        first = record.bad_images[0]
        note(f"{len(record.bad_images)} unreadable, the first {first['name']}: {first['reason']}")
    if record.duplicates:
        note(f"{len(record.duplicates)} images occur more than once")
    if record.rate:
        spent = sorted(record.seconds.items(), key=lambda stage: -stage[1])
        total = sum(seconds for _, seconds in spent)
        shares = ", ".join(f"{seconds / total:.0%} {stage}" for stage, seconds in spent[:4])
        print(f"{record.rate:.1f} images/s; of the time {shares}")
    say(f"{out}: {'JSON and report.html' if html else 'JSON'}")
