"""The front door `vistok …`: parses, then imports the room it needs. Only this module may look upward to
eval."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from .quantizers import Quantizer
    from .tokenizer import Tokenizer

DEFAULT = "vistok-mini"
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Visual tokens: images to few tokens and back.",
    pretty_exceptions_enable=False,
)
eval_app = typer.Typer(no_args_is_help=True, help="Measure tokenizers and reducers.")
app.add_typer(eval_app, name="eval")

Name = Annotated[
    str, typer.Option("--tokenizer", help="Registry name, hub repository, folder or weights file.")
]
Weights = Annotated[
    str | None, typer.Option("--weights", help="Local weights file or folder for a registry name.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps …")]
Count = Annotated[int | None, typer.Option("--tokens", help="Tokens an image, for tokenizers with a choice.")]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="Images at a time.")]
Images = Annotated[list[Path], typer.Argument(help="Image files, or folders of them.", show_default=False)]


def main() -> None:
    """Run the command line; errors a user can mend end as one line on stderr and exit status 1."""
    try:
        app()
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if os.environ.get("VISTOK_TRACEBACK"):
            raise
        typer.secho(f"vistok: {error}", fg="red", err=True)
        sys.exit(1)


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

    from .eval.metrics.image import psnr, ssim
    from .files import written_aside
    from .images import load_image, side_by_side, to_pil, to_tensor

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
    with written_aside(out) as path:
        sheet.save(path, format="PNG")
    title = f"{image or 'coffee.jpg'} at {tokenizer.image_size}×{tokenizer.image_size} through {DEFAULT}"
    _table(title, ["tokens", "bytes", "smaller than pixels", "PSNR dB", "SSIM", "decode ms"], rows)
    parameters = sum(p.numel() for p in tokenizer.parameters()) / 1e6
    print(f"{parameters:.1f} M parameters on {tokenizer.device}; encoding took {encode_time * 1e3:.0f} ms")
    print(f"picture: {out}")


@app.command("list")
def list_(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """All tokenizers with their hub repository, licence and paper figures."""
    from dataclasses import asdict

    from .registry import create, entries

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
                f"1–{model.num_tokens}" if model.ordered else str(model.num_tokens),
                _codebook(model.quantizer),
                f"{entry.parameters:g}",
                ", ".join(f"{k} {v:g}" for k, v in entry.figures.items()),
                entry.license,
                entry.repo or "shipped with vistok",
            ]
        )
    header = ["name", "tokens", "codebook", "M params", "paper figures", "licence", "weights"]
    _table(f"{len(rows)} tokenizers", header, rows)


def _codebook(quantizer: "Quantizer") -> str:
    if quantizer.kind == "bits":
        return f"{len(quantizer.embed)} bits"
    sizes = quantizer.codebook_sizes
    return "continuous" if sizes is None else "×".join(f"{size:,}" for size in sizes)


@app.command()
def info(name: Annotated[str, typer.Argument(help="Registry name.", show_default=False)]) -> None:
    """One tokenizer: configuration, weights, licence, paper."""
    from dataclasses import asdict

    from accelerate import init_empty_weights

    from .registry import create, entries, unknown_name

    if name not in entries():
        raise ValueError(unknown_name(name))
    entry = entries()[name]
    with init_empty_weights(include_buffers=False):
        model = create(name)
    where = f"{entry.repo} ({entry.file})" if entry.repo else f"shipped with vistok ({entry.file})"
    facts = {
        "family": entry.family,
        "paper": entry.paper,
        "paper figures": ", ".join(f"{k} {v:g}" for k, v in entry.figures.items()) or "none",
        "weights": where,
        "licence": entry.license + (f" ({entry.notes})" if entry.notes else ""),
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M",
        "image": f"{model.image_size}×{model.image_size}",
        "tokens": f"1 to {model.num_tokens}, any prefix decodes" if model.ordered else str(model.num_tokens),
        "codebook": _codebook(model.quantizer),
    }
    _table(name, ["", ""], [[key, value] for key, value in facts.items()])
    print(json.dumps(asdict(model.config), indent=2))


@app.command()
def reconstruct(
    images: Images,
    tokenizer: Name = DEFAULT,
    weights: Weights = None,
    tokens: Count = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the pictures and the JSON.")] = Path(
        "reconstructions"
    ),
    batch_size: Batch = 8,
    device: Device = "auto",
) -> None:
    """Encode and decode images: side-by-side PNGs, a table and JSON of PSNR, SSIM and bytes."""
    from .eval.metrics.image import psnr, ssim
    from .files import written_aside
    from .images import side_by_side, to_pil

    model, bad, records = _load(tokenizer, device, weights), _Bad(), []
    model.check_num_tokens(tokens)
    for paths, pixels in _batches(images, model.image_size, batch_size, bad, "reconstruct"):
        coded = model.encode(pixels, tokens)
        decoded = model.decode(coded).cpu()
        payloads, qualities = coded.bits_per_image.tolist(), psnr(decoded, pixels).tolist()
        likeness = ssim(decoded, pixels).tolist()
        for index, path in enumerate(paths):
            target = _free_name(out, path, {record["picture"] for record in records})
            pair = [to_pil(pixels[index])[0], to_pil(decoded[index])[0]]
            label = f"{coded.num_tokens} tokens, {payloads[index] / 8:g} bytes, {qualities[index]:.2f} dB"
            with written_aside(target) as aside:
                side_by_side([pair], ["original", label]).save(aside, format="PNG")
            records.append(
                {"image": str(path), "picture": str(target), "tokens": coded.num_tokens}
                | {"bytes": payloads[index] / 8, "psnr": qualities[index], "ssim": likeness[index]}
            )
    if records:
        rows = [
            [r["image"], str(r["tokens"]), f"{r['bytes']:g}", f"{r['psnr']:.2f}", f"{r['ssim']:.3f}"]
            for r in records
        ]
        mean = {key: sum(r[key] for r in records) / len(records) for key in ("bytes", "psnr", "ssim")}
        rows.append(
            [
                f"mean of {len(records)}",
                "",
                f"{mean['bytes']:g}",
                f"{mean['psnr']:.2f}",
                f"{mean['ssim']:.3f}",
            ]
        )
        _table(
            f"{model.label} at {model.image_size}×{model.image_size}",
            ["image", "tokens", "bytes", "PSNR dB", "SSIM"],
            rows,
        )
        _write_json(out / "reconstructions.json", {"tokenizer": model.label, "mean": mean, "images": records})
    bad.finish()


@app.command()
def encode(
    images: Images,
    output: Annotated[Path, typer.Option("-o", "--output", help="Token file to write.", show_default=False)],
    tokenizer: Name = DEFAULT,
    weights: Weights = None,
    tokens: Count = None,
    batch_size: Batch = 8,
    device: Device = "auto",
) -> None:
    """Images → one token file."""
    from .tokens import Tokens

    model, bad, parts, order = _load(tokenizer, device, weights), _Bad(), [], []
    model.check_num_tokens(tokens)
    for paths, pixels in _batches(images, model.image_size, batch_size, bad, "encode"):
        parts.append(model.encode(pixels, tokens).to("cpu"))
        order += paths
    if parts:
        coded = Tokens.cat(parts)
        coded.save(output)
        bits = int(coded.bits_per_image.sum())
        total, payload = output.stat().st_size, bits / 8
        print(f"{output}: {len(coded)} images, {coded.num_tokens} tokens each")
        print(f"{total} bytes, {payload:g} of them tokens")
        for index, path in enumerate(order):
            print(f"  {index:5d}  {path}")
    bad.finish()


@app.command()
def decode(
    source: Annotated[Path, typer.Argument(help="Token file of `vistok encode`.", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the PNGs.")] = Path("decoded"),
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="If not the one the file names.")
    ] = None,
    weights: Weights = None,
    batch_size: Batch = 8,
    device: Device = "auto",
) -> None:
    """A token file → PNGs, numbered in the file's order."""
    from .files import written_aside
    from .images import to_pil
    from .tokens import Tokens

    coded = Tokens.load(source)
    name = tokenizer or coded.tokenizer
    if name is None:
        raise ValueError(f"{source} does not say which tokenizer wrote it; give --tokenizer")
    model, count = _load(name, device, weights), 0
    for start in _progress(range(0, len(coded), batch_size), "decode"):
        for picture in to_pil(model.decode(coded[start : start + batch_size]).cpu()):
            with written_aside(out / f"{count:05d}.png") as path:
                picture.save(path, format="PNG")
            count += 1
    print(f"{count} images in {out}")


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
    from .train.config import read
    from .train.loop import train as run

    settings = read(config)
    folder = output or Path("runs") / config.stem
    model = run(settings, folder, steps=steps)
    print(f"model: {model} (vistok.load({str(model)!r})); log: {folder / 'log.jsonl'}")


@app.command()
def verify(
    cases: Annotated[list[Path], typer.Argument(help="Parity cases, NAME.json.", show_default=False)],
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option("--dtype", help="float32, float64, bfloat16, float16.")] = "float32",
) -> None:
    """Compare with recorded outputs of the originals; exit 1 on a miss, 2 on what cannot be built."""
    import torch

    from .eval.parity.case import CannotBuild
    from .eval.verify import verify as run

    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ValueError(f"--dtype {dtype} is no floating type; give float32, float64, bfloat16 or float16")
    missed = unbuilt = 0
    for path in cases:
        start = time.perf_counter()
        try:
            rows = run(path, str(_device(device)), kind)
        except (CannotBuild, FileNotFoundError) as error:
            typer.secho(f"{path}: {error}", fg="red", err=True)
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
def speed(
    tokenizer: Annotated[list[str], typer.Option("--tokenizer", help="Registry name; repeat for several.")],
    batch_size: Batch = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Paired runs.")] = 5,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; PyTorch's choice otherwise.")
    ] = None,
    compile_: Annotated[bool, typer.Option("--compile", help="Also time torch.compile.")] = False,
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option("--out", help="JSON file to write.")] = None,
) -> None:
    """Images/s and peak memory against a straightforward implementation, paired in one run."""
    from .eval.speed import HEADER, measure

    if threads:
        import torch

        torch.set_num_threads(threads)
    results = []
    for name in tokenizer:
        result = measure(name, batch_size, repeats, _device(device), compiled=compile_)
        _table(result.title, HEADER, result.table())
        results.append(result.record())
    if out:
        _write_json(out, {"results": results})


@eval_app.command()
def reducers(
    repeats: Annotated[int, typer.Option(min=1, help="Paired runs.")] = 9,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    device: Device = "cpu",
    out: Annotated[Path | None, typer.Option("--out", help="JSON file to write.")] = None,
) -> None:
    """Speed of token reducers: selection against plain code, prefill against the shortened prompt."""
    from .compress import DivPrune, UniformGrid
    from .eval import prefill, selection

    selected = selection.run(repeats, threads)
    _table(selected.title, selection.HEADER, selected.table())
    read = prefill.run(
        [UniformGrid(), DivPrune()], repeats=repeats, threads=threads, device=str(_device(device))
    )
    _table(read.title, prefill.HEADER, read.table())
    if out:
        _write_json(out, {"selection": selected.record(), "prefill": read.record()})


@eval_app.command()
def tokens(
    images: Images,
    tokenizer: Name = DEFAULT,
    weights: Weights = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for plot and JSON.")] = Path("rate-distortion"),
    device: Device = "auto",
) -> None:
    """PSNR at every prefix length beside thumbnail, JPEG and WebP at their real byte counts."""
    from .eval.rate_distortion import HEADER, measure, plot

    model, bad = _load(tokenizer, device, weights), _Bad()
    batches = [pixels for _, pixels in _batches(images, model.image_size, 8, bad, "read")]
    if batches:
        import torch

        curves = measure(model, torch.cat(batches))
        _table(f"{model.label}, mean of {curves.count} images", HEADER, curves.table())
        _write_json(out / "rate_distortion.json", curves.record())
        plot(curves, out / "rate_distortion.png")
        print(f"plot: {out / 'rate_distortion.png'}")
    bad.finish()


# What the commands share ------------------------------------------------------------------------------------


class _Bad:
    """Images that could not be used: told at once, counted, and the exit status at the end."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, path: Path, error: Exception) -> None:
        """Report one and go on."""
        self.count += 1
        typer.secho(f"skipped {path}: {error}", fg="yellow", err=True)

    def finish(self) -> None:
        """Exit 1 if any was skipped."""
        if self.count:
            typer.secho(f"{self.count} image{'s' * (self.count > 1)} skipped", fg="red", err=True)
            raise typer.Exit(1)


def _device(name: str) -> "torch.device":
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0]}); try --device cpu"
        ) from error
    return device


def _load(name: str, device: str, weights: str | None = None) -> "Tokenizer":
    from .registry import load

    return load(name, device=_device(device), weights=weights)


def _files(paths: list[Path]) -> list[Path]:
    """Folders opened into the images below them, in order."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(
                p
                for p in path.rglob("*")
                if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
            )
            if not inside:
                raise ValueError(f"{path} holds no images (png, jpg, jpeg, webp, bmp, tif, tiff)")
            found += inside
        else:
            found.append(path)
    return found


def _batches(
    paths: list[Path], size: int, batch_size: int, bad: _Bad, title: str
) -> Iterator[tuple[list[Path], "torch.Tensor"]]:
    """Readable images in batches; unreadable ones are reported to `bad`."""
    import torch

    from .images import to_tensor

    files = _files(paths)
    names, pixels = [], []
    for number, path in enumerate(_progress(files, title), start=1):
        try:
            pixels.append(to_tensor(path, size))
            names.append(path)
        except (ValueError, OSError) as error:
            bad.add(path, error)
        if len(names) == batch_size or (names and number == len(files)):
            yield names, torch.cat(pixels)
            names, pixels = [], []


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


def _free_name(folder: Path, source: Path, taken: set[str]) -> Path:
    """folder/<stem>.png, numbered when two sources share a stem."""
    target, number = folder / f"{source.stem}.png", 1
    while str(target) in taken:
        number += 1
        target = folder / f"{source.stem}-{number}.png"
    return target


def _write_json(path: Path, record: Any) -> None:
    from .files import written_aside

    with written_aside(path) as aside:
        aside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _table(title: str, header: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=any(header))
    for name in header:
        table.add_column(name, overflow="fold", no_wrap=name in ("name", "weights"))
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    main()
