"""Training a tokenizer: pixels, perception and an adversary, or a teacher's codes, on pictures."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import closing
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ...checkpoint import misfits
from ...files import atomic_write
from ...images import load_image, side_by_side, to_pil, to_tensor
from ...loading import create, load
from ...tokenizer import Tokenizer, TrainingOutput
from .. import data
from ..config import TrainConfig, check_schedule
from ..losses import ReconstructionLoss, proxy_code_losses
from ..objective import Objective


class TokenizerObjective(Objective):
    """A tokenizer on pictures. Raises ValueError for a configuration that its family cannot train with."""

    config_class: ClassVar[type] = TrainConfig
    loaded_by: ClassVar[str] = "vistok.load({})"

    def __init__(self, config: TrainConfig, device: torch.device, progress: bool) -> None:
        self.config, self.device, self.progress = config, device, progress
        self.tokenizer = self.model = self._tokenizer()
        self.model.require_modality("image", "this objective trains")
        self.source = self._source()
        self.teacher = load(config.teacher, device=device) if config.teacher else None
        self._loss = ReconstructionLoss(config.loss, config.perceptual_weights).to(device)
        self.weights = dict(self._loss.weights)
        if self.teacher is not None:
            self.weights["cross_entropy"] = 1.0
        if config.loss.discriminator_weight > 0:
            self.adversary, self.adversary_start = self._loss.discriminator, config.loss.discriminator_start
            self.adversary_optimizer = config.discriminator_optimizer
        self._reconstructions: tuple[Tensor, Tensor] | None = None
        self._validation = self._validation_images()

    @classmethod
    def check(cls, config: TrainConfig) -> None:
        """Refuse losses that would have no effect, and validation on pictures that train."""
        sources = [source for source in config.data.get("sources") or () if isinstance(source, dict)]
        for source in sources:
            if source.get("kind") != "photos":
                continue
            excluded = source.get("exclude", ())
            trained = set(data.photo_names()) - ({excluded} if isinstance(excluded, str) else set(excluded))
            if both := sorted(trained & set(config.validation)):
                raise ValueError(
                    f"validation photographs {', '.join(both)} are trained on too; exclude them from photos"
                )
        _check_losses(config)
        if config.loss.discriminator_weight > 0:
            steps = config.steps - config.loss.discriminator_start
            check_schedule("discriminator_optimizer", config.discriminator_optimizer, steps)

    @classmethod
    def without_effect(cls, values: Mapping[str, Any], config: TrainConfig) -> Iterator[str]:
        """Yield one sentence per setting of a part of the loss that has weight 0."""
        keys = {f"loss.{name}" for name in values.get("loss", {})} | set(values)
        parts = {
            "perceptual": ("loss.perceptual", "loss.perceptual_precision", "perceptual_weights"),
            "discriminator": (
                "loss.discriminator_start",
                "loss.discriminator_channels",
                "loss.lecam_weight",
                "discriminator_optimizer",
            ),
        }
        for part, names in parts.items():
            named = [name for name in names if name in keys]
            if named and getattr(config.loss, f"{part}_weight") == 0:
                yield (
                    f"{', '.join(named)} has no effect, as loss.{part}_weight is 0; give a weight above 0, "
                    "or leave it out"
                )
        if config.teacher and config.validation:
            yield "validation has no effect with a teacher: the model writes codes and no pictures"

    def _tokenizer(self) -> Tokenizer:
        tokenizer = self._start()
        if self.config.nested_dropout and not tokenizer.ordered:
            raise ValueError(
                f"nested_dropout needs an ordered tokenizer; {tokenizer.label} decodes full length only"
            )
        if self.config.warm_start_images and not hasattr(tokenizer, "fit_linear_path"):
            raise ValueError(
                f"warm_start_images is given, but {tokenizer.label} has nothing to fit in closed form"
            )
        if self.config.teacher and tokenizer.quantizer.kind != "indices":
            raise ValueError(
                f"a teacher's proxy codes train discrete tokens; {tokenizer.label} is continuous"
            )
        for count in self.config.validation_tokens:
            tokenizer.check_num_tokens(count)
        named = dict(tokenizer.named_parameters())
        for pattern in self.config.freeze:
            matched = [parameter for name, parameter in named.items() if fnmatch(name, pattern)]
            if not matched:
                raise ValueError(f"freeze pattern {pattern!r} matches no parameter of {tokenizer.label}")
            for parameter in matched:
                parameter.requires_grad_(False)
        return tokenizer.train()

    def _source(self) -> data.Source:
        """Where training pictures come from."""
        return data.build(self.config.data, self.tokenizer.image_size, self.config.seed)

    def _pictures(self, count: int) -> Tensor:
        """The first `count` training pictures, [count, 3, H, W] in [0, 1]."""
        size = min(256, count)
        numbers = tqdm(
            range(math.ceil(count / size)), desc="warm start", disable=not self.progress, leave=False
        )
        with closing(data.loader(self.source, size, workers=self.config.workers)) as batches:
            return torch.cat([next(batches) for _ in numbers])[:count].float() / 255

    def batches(self, start: int, rank: int, world_size: int) -> Iterator[Tensor]:
        """Pictures uint8 [B, 3, H, W]."""
        config = self.config
        return data.loader(
            self.source,
            config.batch_size,
            start=start,
            rank=rank,
            world_size=world_size,
            workers=config.workers,
        )

    def prepare(self) -> None:
        """Fit in closed form what the family can, to the first `warm_start_images` pictures."""
        if self.config.warm_start_images:
            self.tokenizer.fit_linear_path(self._pictures(self.config.warm_start_images))

    def loss(self, batch: Any, step: int) -> dict[str, Tensor]:
        """The parts of the reconstruction loss (or of the teacher's), and PSNR in dB for the log."""
        images, conditions = self._given(batch)
        output = self.model(images, **self._lengths(len(images)), **conditions)
        images = images if output.targets is None else output.targets
        losses = self._losses(images, output, step)
        figures = {}
        if self.teacher is None and output.images is not None:
            mse = (output.images.detach().float().clamp(0, 1) - images).square().mean((1, 2, 3))
            figures["psnr"] = -10 * mse.clamp_min(1e-10).log10().mean()
        if self.tokenizer.adaptive:
            figures |= {name: value.detach() for name, value in output.losses.items() if name not in losses}
        self._reconstructions = (images, output.images) if self.adversary is not None else None
        return losses | figures

    def _given(self, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        """The pictures of a batch [B, 3, H, W] in [0, 1], and what the model's forward gets beside them."""
        return batch.float() / 255, {}

    def _lengths(self, batch: int) -> dict[str, Tensor]:
        """Nested dropout: a log-uniform prefix length for the chosen images, rounded up to one that the
        tokenizer has, and full length for the others."""
        if not self.config.nested_dropout:
            return {}
        full = self.tokenizer.num_tokens
        prefix = torch.exp(torch.rand(batch) * math.log(full + 1)).long().clamp(1, full)
        allowed = torch.tensor(self.tokenizer.prefix_lengths)
        prefix = allowed[torch.searchsorted(allowed, prefix)]
        kept = torch.where(torch.rand(batch) < self.config.nested_dropout, prefix, full)
        return {"lengths": kept.to(self.device)}

    def _losses(self, images: Tensor, output: TrainingOutput, step: int) -> dict[str, Tensor]:
        losses = dict(output.losses)
        if output.images is None or not output.images.requires_grad:
            for part in ("discriminator", "perceptual"):
                if getattr(self.config.loss, f"{part}_weight") > 0:
                    judge = "a discriminator" if part == "discriminator" else "a perceptual loss"
                    raise ValueError(
                        f"{self.tokenizer.label} trains without images here (flow matching or distillation), "
                        f"so there is nothing for {judge} to judge; set loss.{part}_weight: 0"
                    )
            self.weights |= dict.fromkeys(losses, 1.0)  # the family's own losses are the whole objective
            return losses
        kl = losses.pop("kl", None)
        quantizer = sum(losses.values()) if losses else None
        if self.teacher is not None:
            codes = self.teacher.encode(images).indices
            return {**proxy_code_losses(output.images, codes), "quantizer": quantizer}
        return self._loss.generator_losses(images, output.images, step, quantizer_loss=quantizer, kl=kl)

    def adversary_loss(self, batch: Tensor) -> Tensor:
        """The discriminator's loss on the pictures and reconstructions of the last `loss`."""
        self._loss.discriminator = self.adversary  # on several processes the loop has wrapped it
        return self._loss.discriminator_step(*self._reconstructions)[0]

    @torch.no_grad()
    def extra_figures(self, batch: Any) -> dict[str, Tensor]:
        """How the bits of a binary tokenizer are used."""
        quantizer = self.tokenizer.quantizer
        if quantizer.kind != "bits":
            return {}
        # Of the bits that `encode` gives; those of the forward pass are random and have more entropy.
        return quantizer.usage(self.tokenizer.encode(self._given(batch)[0]).bits)

    def fresh(self) -> Tokenizer:
        """The tokenizer that the run started from; it is not the published model any more."""
        model = self._start()
        model.name = None
        return model

    def _start(self) -> Tokenizer:
        """The tokenizer that training starts from: of fresh weights, or the initial one, to which fields of
        `tokenizer` may add parts of fresh weights."""
        fields = dict(self.config.tokenizer)
        name = fields.pop("name")
        if not self.config.initial:
            return create(name, **fields)
        initial = load(self.config.initial)
        if name not in (initial.family, initial.name) or not fields:
            return initial
        grown = create(name, **dataclasses.asdict(initial.config) | fields)
        if grown.config == initial.config:
            return initial
        _, unexpected, misshapen = misfits(grown, initial.state_dict())
        if lines := unexpected + misshapen:
            raise ValueError(
                f"initial {self.config.initial} does not fit the fields of tokenizer; they may add parts and "
                f"change none: {len(lines)} keys differ, such as {lines[0]}"
            )
        grown.load_state_dict(initial.state_dict(), strict=False)
        return grown

    @torch.no_grad()
    def validate(self, model: Tokenizer, picture: Path) -> dict[str, float]:
        """Mean PSNR on the validation pictures at each length, in dB."""
        if not self.config.validation or self.teacher is not None:
            return {}
        images = self._validation
        row, sheet = {}, [to_pil(images)]
        for count in self.config.validation_tokens or (None,):
            decoded = model.reconstruct(images, count)
            mse = (decoded - images).square().mean((1, 2, 3)).double().clamp_min(1e-10)
            row[f"validation_psnr_{count or model.num_tokens}"] = float(-10 * mse.log10().mean())
            sheet.append(to_pil(decoded))
        sheets: Image.Image = side_by_side([list(column) for column in zip(*sheet, strict=True)])
        with atomic_write(picture) as path:
            sheets.save(path, format="PNG")
        return row

    def _validation_images(self) -> Tensor:
        """The validation pictures [n, 3, H, W], read before the first step to find a missing one."""
        names = self.config.validation
        images = [load_image(name) if Path(name).is_file() else data.photo(name) for name in names]
        return to_tensor(images, self.tokenizer.image_size).to(self.device)

    def export(self, model: Tokenizer, folder: Path) -> None:
        """Write a folder that `vistok.load` reads."""
        model.to(getattr(torch, self.config.export_dtype)).save_pretrained(folder)

    def state(self) -> dict[str, Any]:
        """The discriminator and its running means; perceptual networks are constants and stay out."""
        if self.adversary is None:
            return {}
        network = self.adversary
        if isinstance(network, DistributedDataParallel):
            network = network.module
        state = {f"discriminator.{name}": value for name, value in network.state_dict().items()}
        return state | {k: v for k, v in self._loss.state_dict().items() if k.startswith("ema_")}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back the discriminator and its running means."""
        self._loss.load_state_dict(state, strict=False)


def _check_losses(config: TrainConfig) -> None:
    """Refuse weights that no step of the run would use."""
    loss = config.loss
    if loss.discriminator_weight > 0 and loss.discriminator_start >= config.steps:
        raise ValueError(
            f"loss.discriminator_start is {loss.discriminator_start} and the run has {config.steps} steps, "
            "so the discriminator would have no effect; start it earlier, or set loss.discriminator_weight: 0"
        )
    if config.teacher:
        for part in ("perceptual", "discriminator"):
            if getattr(loss, f"{part}_weight") > 0:
                raise ValueError(
                    f"loss.{part}_weight has no effect with a teacher, whose codes are all that is learned; "
                    f"set loss.{part}_weight: 0"
                )
    elif not any((loss.reconstruction_weight, loss.perceptual_weight, loss.discriminator_weight)):
        raise ValueError("every weight of the loss is 0, so nothing would be learned; set one above 0")
