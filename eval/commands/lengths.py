"""`vistok eval lengths`."""

from pathlib import Path
from typing import Annotated

import typer

from ...commands.batches import Skipped, batches, load_named, progress
from ...commands.console import DEFAULT_TOKENIZER, Device, Name, Weights, table
from .shared import check_json_target, write_json


def lengths(
    images: Annotated[
        list[Path] | None, typer.Argument(help="Image files or folders; procedural scenes by default.")
    ] = None,
    tokenizer: Name = DEFAULT_TOKENIZER,
    weights: Weights = None,
    target: Annotated[
        list[float] | None,
        typer.Option(help="Mean absolute error (KARL) or dB (any prefix decodes); repeat for several."),
    ] = None,
    scenes: Annotated[int, typer.Option(min=2, help="Number of procedural scenes.")] = 500,
    seed: Annotated[
        int, typer.Option(min=0, help="Random seed of the scenes; recipes train on another.")
    ] = 1,
    out: Annotated[Path | None, typer.Option("--out", help="JSON file to write.")] = None,
    device: Device = "auto",
) -> None:
    """Measure tokens per image at a target quality, and whether images with large JPEG files get more."""
    import torch

    from ...commands.image_inputs import gather
    from ..tasks.lengths import HEADER, measure

    if out:
        check_json_target(out)
    inputs = gather(images or [])
    model, skipped = load_named(tokenizer, device, weights), Skipped()
    if images:
        pixels = [batch for _, batch in batches(inputs, model.image_size, 64, skipped, "read")]
    else:
        from ...train.data import Scenes

        source = Scenes(model.image_size, seed)
        numbers = progress(range(scenes), "scenes")
        pixels = [torch.from_numpy(source.sample(i)).permute(2, 0, 1)[None].float() / 255 for i in numbers]
    if pixels:
        batch = torch.cat(pixels)
        results = measure(model, batch, target or ([0.1] if model.adaptive else [20.0]))
        what = f"{len(batch)} images" if images else f"{scenes} scenes of seed {seed}"
        table(f"{model.label} on {what}", HEADER, [result.row() for result in results])
        if out:
            write_json(out, {"tokenizer": model.label, "results": [result.record() for result in results]})
    skipped.finish()
