"""The front door `vistok …`: parses, then imports the room it needs. Only this module may look upward to
eval."""

import sys

try:
    import json
    import logging
    import math
    import time
    import warnings
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from shutil import get_terminal_size
    from typing import TYPE_CHECKING, Annotated, Any

    import typer

    from .commands.console import Device, LogLines, Name, Weights, complain, note, say, show_warning
    from .commands.console import device as _device
    from .commands.console import table as _table
    from .commands.run_command import run_command
    from .eval.commands import app as _eval_commands
except KeyboardInterrupt:  # Ctrl-C in the first moments
    sys.exit(130)

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from .commands.image_inputs import ImageInput
    from .quantizers import Quantizer
    from .registry import Entry
    from .tokenizer import Tokenizer
    from .tokens import Tokens

DEFAULT = "vistok-mini"
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Visual tokens: images to few tokens and back.",
    pretty_exceptions_enable=False,
)
eval_app = typer.Typer(no_args_is_help=True, help="Measure tokenizers and reducers.")
eval_app.add_typer(_eval_commands)
app.add_typer(eval_app, name="eval")

Count = Annotated[
    int | None,
    typer.Option("--tokens", help="Tokens per image, for tokenizers with a choice; with a target, the most."),
]
Target = Annotated[
    float | None,
    typer.Option(
        "--target",
        help="Mean absolute error (0 to 1) to aim at, where the model chooses lengths (KARL: 0.05).",
    ),
]
TargetPSNR = Annotated[
    float | None,
    typer.Option(
        "--target-psnr", help="dB to reach with the fewest tokens, where any prefix decodes (mini, FlexTok)."
    ),
]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="Images at a time.")]
Images = Annotated[
    list[Path],
    typer.Argument(help="Image files, folders of them, or patterns ('*.png').", show_default=False),
]


def main() -> None:
    """Run the command line: every error is one line on stderr and an exit status (see `run_command`)."""
    logger, handler = logging.getLogger("vistok"), LogLines()
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            status = run_command(app, sys.argv[1:])
    finally:
        logger.removeHandler(handler)
    sys.exit(status)


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error, also after a command.")
    ] = False,
) -> None:
    """Visual tokens: images to few tokens and back."""


# Commands ---------------------------------------------------------------------------------------------------


@app.command()
def demo(
    image: Annotated[
        Path | None, typer.Argument(help="Your own picture; a shipped photograph otherwise.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Where the picture goes.")] = Path("vistok-demo.png"),
    device: Device = "auto",
) -> None:
    """Turn a photograph into tokens and back with the shipped tokenizer, offline, and show what it cost."""
    from importlib.resources import files

    from .commands.picture_names import check_picture_target, save_picture
    from .eval.metrics.image import psnr, ssim
    from .images import load_image, side_by_side, to_pil, to_tensor

    check_picture_target(out, replace_own=True)
    tokenizer = _load(DEFAULT, device)
    photo = load_image(image or Path(str(files("vistok.assets") / "coffee.jpg")))
    pixels = to_tensor(photo, tokenizer.image_size)
    tokens, encode_time = _timed(lambda: tokenizer.encode(pixels))
    columns, labels, rows = to_pil(pixels), [f"original, {pixels[0].numel():,} bytes"], []
    for count in (1, 4, 16, tokenizer.num_tokens):
        prefix = tokens.prefix(count)
        decoded, decode_time = _timed(lambda prefix=prefix: tokenizer.decode(prefix).cpu())
        payload = int(prefix.bits_per_image[0]) / 8
        quality = float(psnr(decoded, pixels)[0])
        columns += to_pil(decoded)
        labels.append(f"{count} token{'s' * (count > 1)}, {payload:g} bytes")
        rows.append(
            [
                str(count),
                f"{payload:g}",
                f"1 : {pixels.numel() / payload:,.0f}",
                f"{quality:.2f}",
                f"{float(ssim(decoded, pixels)[0]):.3f}",
                f"{decode_time * 1e3:.0f}",
            ]
        )
    sheet = side_by_side([[_enlarged(column, 256) for column in columns]], labels)
    save_picture(sheet, out)
    title = f"{image or 'coffee.jpg'} at {tokenizer.image_size}×{tokenizer.image_size} through {DEFAULT}"
    _table(title, ["tokens", "bytes", "smaller than pixels", "PSNR dB", "SSIM", "decode ms"], rows)
    parameters = sum(p.numel() for p in tokenizer.parameters()) / 1e6
    print(f"{parameters:.1f} M parameters on {tokenizer.device}; encoding took {encode_time * 1e3:.0f} ms")
    say(f"picture: {out}")


@app.command("list")
def list_(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """All tokenizers with their hub repository, licence and paper figures."""
    from dataclasses import asdict

    from .loading import create
    from .registry import entries

    table = entries()
    if as_json:
        print(json.dumps([asdict(entry) for entry in table.values()], indent=2))
        return
    from accelerate import init_empty_weights

    rows = []
    for entry in table.values():
        with init_empty_weights(include_buffers=False):
            model = create(entry.name)
        rows.append(
            [
                entry.name,
                _choice(model),
                _codebook(model.quantizer),
                f"{entry.parameters:g}",
                ", ".join(f"{k} {v:g}" for k, v in entry.figures.items()),
                entry.license,
                entry.verified or "–",
                entry.repo or "shipped with vistok",
            ]
        )
    header = ["name", "tokens", "codebook", "M params", "paper figures", "licence", "verified", "weights"]
    # A narrow terminal has no room for figures, digits and where weights are; `info` shows all three.
    narrow = sys.stdout.isatty() and get_terminal_size().columns < 130
    shown = (0, 1, 2, 3, 5) if narrow else range(len(header))
    title = f"{len(rows)} tokenizers (verified: largest errors against recorded outputs of the original)"
    _table(title, [header[i] for i in shown], [[row[i] for i in shown] for row in rows])


def _choice(model: "Tokenizer") -> str:
    """How many tokens an image has."""
    if model.adaptive:
        return f"up to {model.num_tokens}"
    return f"1–{model.num_tokens}" if model.ordered else str(model.num_tokens)


def _codebook(quantizer: "Quantizer") -> str:
    if quantizer.kind == "bits":
        return f"{len(quantizer.embed)} bits"
    sizes = quantizer.codebook_sizes
    return "continuous" if sizes is None else "×".join(f"{size:,}" for size in sizes)


@app.command()
def info(
    name: Annotated[str, typer.Argument(help="Registry name, folder or weights file.", show_default=False)],
) -> None:
    """One tokenizer: configuration, weights, licence, paper; of a file also which of its weights load."""
    from dataclasses import asdict

    from accelerate import init_empty_weights

    from .files import looks_like_path
    from .loading import create, load
    from .registry import entries, unknown_name

    if name in entries():
        facts = _published_facts(entries()[name])
        with init_empty_weights(include_buffers=False):
            model = create(name)
    elif looks_like_path(name):
        model = load(name)  # logs which weights of the file it takes
        facts = {"family": model.family, "weights": name, "name": model.name or "none"}
    else:
        raise ValueError(unknown_name(name))
    facts |= {
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M",
        "image": f"{model.image_size}×{model.image_size}",
        "tokens": _choice(model)
        + (", as many as an image needs for a target error" if model.adaptive else "")
        + (", any prefix decodes" if model.ordered else ""),
        "codebook": _codebook(model.quantizer),
    }
    _table(name, ["", ""], [[key, value] for key, value in facts.items()])
    print(json.dumps(asdict(model.config), indent=2))


def _published_facts(entry: "Entry") -> dict[str, str]:
    where = f"{entry.repo} ({entry.file})" if entry.repo else f"shipped with vistok ({entry.file})"
    return {
        "family": entry.family,
        "paper": entry.paper,
        "paper figures": ", ".join(f"{k} {v:g}" for k, v in entry.figures.items()) or "none",
        "weights": where,
        "verified": entry.verified or "no output of the original was recorded for this size",
        "licence": entry.license,
        "notes": entry.notes or "none",
    }


@app.command()
def reconstruct(
    images: Images,
    tokenizer: Name = DEFAULT,
    weights: Weights = None,
    tokens: Count = None,
    target: Target = None,
    target_psnr: TargetPSNR = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the pictures and the JSON.")] = Path(
        "reconstructions"
    ),
    batch_size: Batch = 8,
    device: Device = "auto",
) -> None:
    """Encode and decode images: side-by-side PNGs, a table and JSON of PSNR, SSIM and bytes."""
    from .commands.image_inputs import gather
    from .commands.picture_names import picture_paths, save_picture
    from .eval.metrics.image import psnr, ssim
    from .eval.metrics.summary import decibels
    from .images import side_by_side, to_pil

    quality = _quality(target, target_psnr)
    inputs = gather(images)
    stems = [each.path.name for each in inputs]
    pictures = dict(zip(inputs, picture_paths(out, stems, replace_own=True), strict=True))
    _check_json_target(out / "reconstructions.json")
    model, bad, records = _load(tokenizer, device, weights), _Bad(), []
    for batch, pixels, coded, found in _encoded(model, inputs, tokens, quality, batch_size, bad):
        decoded = model.decode(coded).cpu()
        measured = {"bytes": (coded.bits_per_image / 8).tolist()}
        measured |= {"psnr": psnr(decoded, pixels).tolist(), "ssim": ssim(decoded, pixels).tolist()}
        if target is not None:
            errors = (decoded.float() - pixels).abs().mean((1, 2, 3))
            measured |= {"error": errors.tolist(), "reached": (errors <= target).tolist()}
        for index, record in enumerate(found):
            record |= {name: values[index] for name, values in measured.items()}
            picture = pictures[batch[index]]
            pair = [to_pil(pixels[index])[0], to_pil(decoded[index])[0]]
            label = f"{record['tokens']} tokens, {record['bytes']:g} bytes, {decibels(record['psnr'])}"
            save_picture(side_by_side([pair], ["original", label]), picture)
            records.append(record | {"picture": str(picture)})
    if records:
        mean = _tabulate(f"{model.label} at {model.image_size}×{model.image_size}", records)
        record = {"tokenizer": model.label} | quality | {"mean": mean, "images": records}
        _write_json(out / "reconstructions.json", record)
        _warn_of_unreached(records, quality, model)
    bad.finish()


_FIGURES = {
    "tokens": ("tokens", "{:g}"),
    "bytes": ("bytes", "{:g}"),
    "psnr": ("PSNR dB", "{:.2f}"),
    "ssim": ("SSIM", "{:.3f}"),
    "error": ("mean error", "{:.4f}"),
    "reached": ("reached", "{:.0%}"),
}


def _tabulate(title: str, records: list[dict[str, Any]]) -> dict[str, float]:
    """Print one row per image and one of means, and return the means: of PSNR without the images that came
    back exactly, which are counted as "exact"."""
    from .eval.metrics.summary import interval, psnr_text

    columns = [name for name in _FIGURES if name in records[0]]
    mean = {name: sum(record[name] for record in records) / len(records) for name in columns}
    measured = interval([record["psnr"] for record in records])
    mean |= {"psnr": measured["value"]}

    def row(name: str, record: dict[str, Any]) -> list[str]:
        return [name, *(_cell(record[column], _FIGURES[column][1]) for column in columns)]

    rows = [row(record["image"], record) for record in records]
    header = ["image", *(_FIGURES[name][0] for name in columns)]
    averages = row(f"mean of {len(records)}", mean)
    averages[1 + columns.index("psnr")] = psnr_text(measured)
    _table(title, header, [*rows, averages])
    return mean | ({"exact": measured["exact"]} if "exact" in measured else {})


def _cell(value: float | bool, style: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "exact" if value == math.inf else style.format(value)


@app.command()
def encode(
    images: Images,
    output: Annotated[Path, typer.Option("-o", "--output", help="Token file to write.", show_default=False)],
    tokenizer: Name = DEFAULT,
    weights: Weights = None,
    tokens: Count = None,
    target: Target = None,
    target_psnr: TargetPSNR = None,
    batch_size: Batch = 8,
    device: Device = "auto",
) -> None:
    """Images → one token file; with a target, of as many tokens as each image needs."""
    from dataclasses import replace

    from .commands.image_inputs import gather
    from .eval.metrics.summary import decibels
    from .tokens import Tokens

    quality = _quality(target, target_psnr)
    _check_token_target(output)
    inputs = gather(images)
    model, bad, parts, records, names = _load(tokenizer, device, weights), _Bad(), [], [], []
    for batch, _, coded, found in _encoded(model, inputs, tokens, quality, batch_size, bad):
        parts.append(coded.to("cpu"))
        records += found
        names += [each.name for each in batch]
    if parts:
        coded = replace(Tokens.cat(parts), names=tuple(names))
        coded.save(output)
        lengths = [record["tokens"] for record in records]
        least, most, mean = min(lengths), max(lengths), sum(lengths) / len(lengths)
        each = f"{most} tokens each" if least == most else f"{least} to {most} tokens, {mean:.1f} on average"
        say(f"{output}: {_images(len(coded))}, {each}")
        payload = int(coded.bits_per_image.sum()) / 8
        print(f"{output.stat().st_size} bytes, {payload:g} of them tokens")
        for index, record in enumerate(records):
            length = f"{record['tokens']:4d} tokens  " if coded.lengths is not None else ""
            quality_text = f"{decibels(record['psnr'])}  " if "psnr" in record else ""
            short = "" if record.get("reached", True) else "  not reached"
            say(f"  {index:5d}  {length}{quality_text}{record['image']}{short}")
        _warn_of_unreached(records, quality, model)
    bad.finish()


@app.command()
def decode(
    source: Annotated[Path, typer.Argument(help="Token file of `vistok encode`.", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the PNGs.")] = Path("decoded"),
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="If not the one the file names, or that is not a registry name."),
    ] = None,
    weights: Weights = None,
    batch_size: Batch = 8,
    device: Device = "auto",
) -> None:
    """A token file → PNGs under the names of the images it was made of, or numbered in its order."""
    from .commands.picture_names import picture_paths, save_picture
    from .files import check_target
    from .images import to_pil
    from .registry import entries
    from .tokens import Tokens

    check_target(out, folder=True)
    coded = Tokens.load(source)
    name = tokenizer or coded.tokenizer
    if name is None:
        raise ValueError(f"{source} does not say which tokenizer wrote it; give --tokenizer")
    if tokenizer is None and name not in entries():
        raise ValueError(
            f"{source} names the tokenizer {name!r}, which is not a registry name; if you trust the file, "
            "give --tokenizer with that folder, weights file or hub repository"
        )
    names = coded.names or [f"{number:05d}.png" for number in range(len(coded))]
    paths = iter(picture_paths(out, names))
    model = _load(name, device, weights)
    for start in _progress(range(0, len(coded), batch_size), "decode"):
        for picture in to_pil(model.decode(coded[start : start + batch_size]).cpu()):
            save_picture(picture, next(paths))
    say(f"{_images(len(coded))} in {out}")


@app.command()
def train(
    config: Annotated[
        Path, typer.Argument(help="YAML file; assets/vistok-mini.yaml is one.", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Run folder; runs/<config name> otherwise.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Stop at this step.")] = None,
) -> None:
    """Train a tokenizer; run again to continue. Several processes: `accelerate launch -m vistok.cli`."""
    from .files import check_target

    folder = check_target(output or Path("runs") / config.stem, folder=True)

    from .train.config import read
    from .train.loop import train as run

    settings = read(config)
    model = run(settings, folder, steps=steps)
    say(f"model: {model} (vistok.load({str(model)!r})); log: {folder / 'log.jsonl'}")


@app.command()
def verify(
    cases: Annotated[list[Path], typer.Argument(help="Parity cases, NAME.json.", show_default=False)],
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option("--dtype", help="float32, float64, bfloat16, float16.")] = "float32",
) -> None:
    """Compare with recorded outputs of the originals; exit 1 on a miss, 2 on what cannot be built."""
    import torch

    from .eval.parity.case import CannotBuild
    from .eval.parity.verify import verify as run

    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ValueError(
            f"--dtype {dtype} is not a floating type; give float32, float64, bfloat16 or float16"
        )
    missed = unbuilt = 0
    for path in cases:
        start = time.perf_counter()
        try:
            rows = run(path, str(_device(device)), kind)
        except (CannotBuild, FileNotFoundError) as error:
            complain(f"{path}: {error}")
            unbuilt += 1
            continue
        misses = sum(not row.passed for row in rows)
        missed += misses
        table = [
            [
                row.name,
                f"{row.count:,}",
                f"{row.error:.0f} unequal" if row.exact else f"{row.error:.2e}",
                row.allowed,
                f"{row.worst:.3f}",
                "ok" if row.passed else "MISS",
            ]
            for row in rows
        ]
        verdict = "all within tolerance" if not misses else f"{misses} of {len(rows)} MISSED"
        title = f"{path.name}: {verdict} ({time.perf_counter() - start:.1f} s)"
        _table(title, ["tensor", "values", "largest error", "allowed", "of tolerance", ""], table)
    raise typer.Exit(2 if unbuilt else 1 if missed else 0)


@eval_app.command()
def reducers(
    repeats: Annotated[int, typer.Option(min=1, help="Paired runs.")] = 9,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    device: Device = "cpu",
    out: Annotated[Path | None, typer.Option("--out", help="JSON file to write.")] = None,
) -> None:
    """Speed of token reducers: selection against plain code, prefill against the shortened prompt."""
    from .compress import DivPrune, UniformGrid
    from .eval.speed import prefill, selection

    if out:
        _check_json_target(out)

    selected = selection.run(repeats, threads)
    _table(selected.title, selection.HEADER, selected.table())
    read = prefill.run(
        [UniformGrid(), DivPrune()], repeats=repeats, threads=threads, device=str(_device(device))
    )
    _table(read.title, prefill.HEADER, read.table())
    if out:
        _write_json(out, {"selection": selected.record(), "prefill": read.record()})


@eval_app.command()
def lengths(
    images: Annotated[
        list[Path] | None, typer.Argument(help="Image files or folders; procedural scenes otherwise.")
    ] = None,
    tokenizer: Name = DEFAULT,
    weights: Weights = None,
    target: Annotated[
        list[float] | None,
        typer.Option(help="Mean absolute error (KARL) or dB (any prefix decodes); repeat for several."),
    ] = None,
    scenes: Annotated[int, typer.Option(min=2, help="How many procedural scenes.")] = 500,
    seed: Annotated[int, typer.Option(min=0, help="Of the scenes; recipes train on another.")] = 1,
    out: Annotated[Path | None, typer.Option("--out", help="JSON file to write.")] = None,
    device: Device = "auto",
) -> None:
    """How many tokens an image gets for a quality, and whether images hard for JPEG get more of them."""
    import torch

    from .commands.image_inputs import gather
    from .eval.tasks.lengths import HEADER, measure

    if out:
        _check_json_target(out)
    inputs = gather(images or [])
    model, bad = _load(tokenizer, device, weights), _Bad()
    if images:
        pixels = [batch for _, batch in _batches(inputs, model.image_size, 64, bad, "read")]
    else:
        from .train.data import Scenes

        source = Scenes(model.image_size, seed)
        shown = _progress(range(scenes), "scenes")
        pixels = [torch.from_numpy(source.sample(i)).permute(2, 0, 1)[None].float() / 255 for i in shown]
    if pixels:
        batch = torch.cat(pixels)
        results = measure(model, batch, target or ([0.1] if model.adaptive else [20.0]))
        what = f"{len(batch)} images" if images else f"{scenes} scenes of seed {seed}"
        _table(f"{model.label} on {what}", HEADER, [result.row() for result in results])
        if out:
            _write_json(out, {"tokenizer": model.label, "results": [result.record() for result in results]})
    bad.finish()


# What the commands share ------------------------------------------------------------------------------------


class _Bad:
    """Images that could not be used: reported at once, counted, and an exit status of 1 at the end."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, path: Path, error: Exception) -> None:
        """Report one and go on."""
        self.count += 1
        note(f"skipped {path}: {error}")

    def finish(self) -> None:
        """Exit 1 if any was skipped."""
        if self.count:
            complain(f"{_images(self.count)} skipped")
            raise typer.Exit(1)


def _load(name: str, device: str, weights: Path | None = None) -> "Tokenizer":
    from .loading import load

    return load(name, device=_device(device), weights=weights)


def _quality(target: float | None, target_psnr: float | None) -> dict[str, float]:
    """The quality asked for, as an option of `encode`."""
    if target is not None and target_psnr is not None:
        raise ValueError(
            "--target (mean absolute error) and --target-psnr (dB) both choose how many tokens an image "
            "gets; give one of them"
        )
    given = {"target": target, "target_psnr": target_psnr}
    return {name: value for name, value in given.items() if value is not None}


def _check_quality(model: "Tokenizer", quality: dict[str, float]) -> None:
    """Raise ValueError for a quality that this tokenizer cannot be asked for."""
    if model.adaptive:
        takes = "it chooses lengths by --target, a mean absolute error such as 0.05"
    elif model.ordered:
        takes = "any prefix of its tokens decodes, so give --target-psnr, in dB, or --tokens"
    else:
        takes = f"it has exactly {model.num_tokens} tokens per image; `vistok list` shows those with a choice"
    if ("target" in quality and not model.adaptive) or ("target_psnr" in quality and not model.ordered):
        option = next(iter(quality)).replace("_", "-")
        raise ValueError(f"--{option} is not for {model.label}: {takes}")


def _encoded(
    model: "Tokenizer",
    inputs: "list[ImageInput]",
    count: int | None,
    quality: dict[str, float],
    batch_size: int,
    bad: _Bad,
) -> "Iterator[tuple[list[ImageInput], torch.Tensor, Tokens, list[dict[str, Any]]]]":
    """Images, pixels, tokens and one record per image, in batches: its tokens, and with `target_psnr` the
    quality."""
    _check_quality(model, quality)
    model.check_num_tokens(count)
    for batch, pixels in _batches(inputs, model.image_size, batch_size, bad, "encode"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* do not reach")  # reported once, for all batches
            coded = model.encode(pixels, count, **quality)
        measured: dict[str, list[Any]] = {}
        if "target_psnr" in quality:
            measured = {"psnr": coded.psnr.tolist(), "reached": coded.reached.tolist()}
            coded = coded.tokens
        lengths = [coded.num_tokens] * len(coded) if coded.lengths is None else coded.lengths.tolist()
        records = [{"image": str(e.path), "tokens": k} for e, k in zip(batch, lengths, strict=True)]
        for index, record in enumerate(records):
            record |= {name: values[index] for name, values in measured.items()}
        yield batch, pixels, coded, records


def _warn_of_unreached(records: list[dict[str, Any]], quality: dict[str, float], model: "Tokenizer") -> None:
    """One warning for all images that a wanted quality was out of reach for."""
    short = [record for record in records if not record.get("reached", True)]
    if not short:
        return
    which = f"{len(short)} of {_images(len(records))} did not reach"
    if "target_psnr" in quality:
        worst = min(record["psnr"] for record in short)
        warnings.warn(
            f"{which} {quality['target_psnr']:g} dB (the worst has {worst:.2f}) and kept the best prefix "
            "tried; lower --target-psnr, or raise --tokens where that is below the most",
            stacklevel=2,
        )
    else:
        worst = max(record["error"] for record in short)
        warnings.warn(
            f"{which} a mean error of {quality['target']:g} (the worst has {worst:.4f}); {model.label} "
            "estimates beforehand how many tokens that takes: lower --target where it must be kept",
            stacklevel=2,
        )


def _images(count: int) -> str:
    return f"{count} image{'s' * (count != 1)}"


def _batches(
    inputs: "list[ImageInput]", size: int, batch_size: int, bad: _Bad, title: str
) -> "Iterator[tuple[list[ImageInput], torch.Tensor]]":
    """Readable images in batches; unreadable ones are reported to `bad`."""
    import torch

    from .images import to_tensor

    batch: list[ImageInput] = []
    pixels: list[torch.Tensor] = []
    for number, each in enumerate(_progress(inputs, title), start=1):
        try:
            pixels.append(to_tensor(each.path, size))
            batch.append(each)
        except (ValueError, OSError) as error:
            bad.add(each.path, error)
        if len(batch) == batch_size or (batch and number == len(inputs)):
            yield batch, torch.cat(pixels)
            batch, pixels = [], []


def _progress(items: Any, title: str) -> Any:
    """A progress bar that appears only when the work takes more than a second."""
    from tqdm import tqdm

    return tqdm(items, desc=title, delay=1.0, leave=False, disable=not sys.stderr.isatty())


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def _enlarged(picture: "Image.Image", side: int) -> "Image.Image":
    from PIL import Image

    return picture.resize(
        (side, side), Image.Resampling.NEAREST if picture.width < side else Image.Resampling.BICUBIC
    )


def _check_token_target(path: Path) -> None:
    """Raise OSError unless a token file can be written there; only token files are written over."""
    from .files import check_target
    from .packing import MAGIC

    check_target(path)
    if path.exists():
        with path.open("rb") as file:
            if file.read(len(MAGIC)) not in (MAGIC, b""):
                raise FileExistsError(
                    f"{path} is there already and is not a token file; name another with -o"
                )


def _check_json_target(path: Path) -> None:
    """Raise OSError unless a record can be written there; only JSON files are written over."""
    from .files import check_target

    check_target(path)
    if path.exists():
        with path.open("rb") as file:
            if file.read(64).lstrip()[:1] not in (b"{", b"[", b""):
                raise FileExistsError(f"{path} is there already and is not JSON; name another with --out")


def _write_json(path: Path, record: Any) -> None:
    from .eval.engine.record import as_json
    from .files import atomic_write

    with atomic_write(path) as aside:
        aside.write_text(as_json(record), encoding="utf-8")


if __name__ == "__main__":
    main()
