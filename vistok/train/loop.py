"""The training loop: one or several processes, mixed precision, EMA, exact resume.

Everything random is a function of (seed, step, process), so a run that was killed and resumed from its last
checkpoint ends bit for bit where an uninterrupted one would (on one machine and thread count).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from ..files import atomic_write
from ..images import load_image, side_by_side, to_pil, to_tensor
from ..loading import create, load
from ..tokenizer import Tokenizer
from . import data
from .config import OptimizerConfig, TrainConfig
from .losses import ReconstructionLoss, proxy_code_loss
from .run_folder import MODEL, SAMPLES, RunFolder
from .schedule import constant_schedule, cosine_schedule, ema_decay, no_weight_decay
from .workers import worker_errors

Log = Callable[[dict[str, float]], None]


def train(
    config: TrainConfig, output: str | Path, *, steps: int | None = None, progress: bool = True
) -> Path:
    """Train and return the folder of the finished model (EMA weights), which `vistok.load` reads.

    `output` receives run.json (the configuration), log.jsonl, samples/, checkpoint.pt (the whole state),
    checkpoint-previous.pt and model/. If it holds a checkpoint of the same configuration the run continues
    from it, or from the one before where the last is damaged. `steps` stops earlier (or later) than the
    configuration says without changing the schedule.

    Raises:
        ValueError: the folder holds another run or none of its checkpoints is whole, or the configuration
            asks for what cannot be done.
        OSError: another process trains in the folder, the disk is full, or pictures cannot be read.
        FloatingPointError: the loss is no longer finite.
    """
    _check(config)
    # Accelerate keeps the precision of a process's first run in a global; a second run may want another.
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=config.precision)
    folder = RunFolder(Path(output), _identity(config))
    with worker_errors(), folder.claimed() if accelerator.is_main_process else nullcontext():
        run = _Run(config, folder, accelerator, progress)
        return run.train(config.steps if steps is None else steps)


class _Run:
    """The state of one run and its steps."""

    def __init__(
        self, config: TrainConfig, folder: RunFolder, accelerator: Accelerator, progress: bool
    ) -> None:
        self.config, self.folder, self.accelerator = config, folder, accelerator
        self.progress = progress and self.accelerator.is_local_main_process
        self.main = self.accelerator.is_main_process
        torch.manual_seed(config.seed)
        self.tokenizer = self._tokenizer()
        self.source = data.build(config.data, self.tokenizer.image_size, config.seed)
        self.teacher = load(config.teacher, device=self.accelerator.device) if config.teacher else None
        self.loss = ReconstructionLoss(config.loss, config.perceptual_weights).to(self.accelerator.device)
        self.step = self.saved_step = 0
        self.finite = torch.tensor(True, device=self.accelerator.device)
        resumes = folder.has_checkpoint()
        if config.warm_start_images and not resumes:
            self.tokenizer.fit_linear_path(self._pictures(config.warm_start_images))
        self.ema = {name: value.detach().clone() for name, value in self.tokenizer.state_dict().items()}
        named = [(n, p) for n, p in self.tokenizer.named_parameters() if p.requires_grad]
        self.optimizer = _adamw(named, config.optimizer)
        self.discriminator_optimizer = None
        if config.loss.discriminator_weight > 0:
            named = list(self.loss.discriminator.named_parameters())
            self.discriminator_optimizer = _adamw(named, config.discriminator_optimizer)
        if resumes:
            folder.restore(self._restore)
        self.ema = {name: value.to(self.accelerator.device) for name, value in self.ema.items()}
        if config.compile:
            self.tokenizer.compile()
        self.model, self.optimizer = self.accelerator.prepare(self.tokenizer, self.optimizer)
        if self.discriminator_optimizer is not None:
            self.loss.discriminator, self.discriminator_optimizer = self.accelerator.prepare(
                self.loss.discriminator, self.discriminator_optimizer
            )
        self.validation = self._validation_images()
        # On a CPU the fused kernel's backward pass costs a third of a small model's step; plain matmuls do
        # not.
        on_cpu = self.accelerator.device.type == "cpu"
        self.attention = partial(sdpa_kernel, SDPBackend.MATH) if on_cpu else nullcontext

    # Set-up -------------------------------------------------------------------------------------------------

    def _tokenizer(self) -> Tokenizer:
        if self.config.initial:
            tokenizer = load(self.config.initial)
        else:
            fields = dict(self.config.tokenizer)
            tokenizer = create(fields.pop("name"), **fields)
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

    def _pictures(self, count: int) -> Tensor:
        """The first `count` training pictures, [count, 3, H, W] in [0, 1]."""
        size = min(256, count)
        steps = tqdm(
            range(math.ceil(count / size)), desc="warm start", disable=not self.progress, leave=False
        )
        with closing(data.loader(self.source, size, workers=self.config.workers)) as batches:
            return torch.cat([next(batches) for _ in steps])[:count].float() / 255

    def _validation_images(self) -> Tensor:
        images = [
            load_image(name) if Path(name).is_file() else data.photo(name) for name in self.config.validation
        ]
        return to_tensor(images, self.tokenizer.image_size).to(self.accelerator.device)

    # Checkpoints --------------------------------------------------------------------------------------------

    def _restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; an error of any kind where it does not fit."""
        current = self.tokenizer.state_dict()
        for part in ("model", "ema"):
            _check_shapes(part, state[part], current)
        self.tokenizer.load_state_dict(state["model"])
        for name, value in state.get("buffers", {}).items():
            self.tokenizer.get_buffer(name).copy_(value)
        self.ema = state["ema"]
        _load_optimizer(self.optimizer, state["optimizer"])
        if self.discriminator_optimizer is not None:
            self.loss.load_state_dict(state["loss"], strict=False)
            _load_optimizer(self.discriminator_optimizer, state["discriminator_optimizer"])
        self.step = self.saved_step = state["step"]

    def _save(self) -> None:
        self.accelerator.wait_for_everyone()
        if not self.main:
            return
        state = {
            "step": self.step,
            "model": self.accelerator.unwrap_model(self.model).state_dict(),
            # What training moves but no checkpoint holds (the targets of adaptive tokenizers).
            "buffers": {n: b for n, b in self.tokenizer.named_buffers() if n not in self.ema},
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
        }
        if self.discriminator_optimizer is not None:
            # The perceptual networks are constants and stay out.
            parts = ("discriminator.", "ema_")
            state["loss"] = {k: v for k, v in self.loss.state_dict().items() if k.startswith(parts)}
            state["loss"] = {
                k.replace("discriminator.module.", "discriminator."): v for k, v in state["loss"].items()
            }
            state["discriminator_optimizer"] = self.discriminator_optimizer.state_dict()
        self.folder.save(state)
        self.saved_step = self.step

    # The loop -----------------------------------------------------------------------------------------------

    def train(self, steps: int) -> Path:
        """Run to step `steps`; return the model's folder."""
        config, accelerator = self.config, self.accelerator
        log = self._open_log()
        batches = data.loader(
            self.source,
            config.batch_size,
            start=self.step * config.gradient_accumulation,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            workers=config.workers,
        )
        bar = tqdm(
            total=steps, initial=self.step, desc="train", disable=not self.progress, dynamic_ncols=True
        )
        self.model.train()
        with closing(batches), bar:
            self._steps(steps, batches, bar, log)
        return self._export()

    def _steps(self, steps: int, batches: Iterator[Tensor], bar: tqdm, log: Log) -> None:
        config, accelerator = self.config, self.accelerator
        while self.step < steps:
            torch.manual_seed(hash((config.seed, self.step, accelerator.process_index)) & (2**63 - 1))
            figures = self._optimise(batches)
            self.step += 1
            bar.update()
            last = self.step == steps
            if self.step % config.log_every == 0 or last:
                self._require_finite()
                row = {
                    name: float(accelerator.gather(value.reshape(1)).mean())
                    for name, value in figures.items()
                }
                bar.set_postfix(
                    {name: f"{value:.4g}" for name, value in row.items() if name in ("loss", "psnr")}
                )
                log(row)
            if self.step % config.validate_every == 0 or last:
                log(self._validate())
            if self.step % config.checkpoint_every == 0 or last:
                self._require_finite()
                self._save()

    def _require_finite(self) -> None:
        """Stop before anything that is not a number reaches the log or a checkpoint."""
        if not self.finite:
            kept = f"The checkpoint of step {self.saved_step} is untouched. " if self.saved_step else ""
            raise FloatingPointError(
                f"the loss was not finite by step {self.step}. {kept}Lower the learning rate, or use "
                "precision: 'no'"
            )

    def _optimise(self, batches: Iterator[Tensor]) -> dict[str, Tensor]:
        """One optimisation step of the tokenizer, and of the discriminator when it takes part."""
        config, accelerator = self.config, self.accelerator
        adversary = self.loss.uses_discriminator(self.step)
        for micro in range(config.gradient_accumulation):
            images = next(batches).to(accelerator.device).float() / 255
            more = micro + 1 < config.gradient_accumulation
            with accelerator.no_sync(self.model) if more else nullcontext(), self.attention():
                output = self.model(images, **self._lengths(len(images)))
                total, parts = self._tokenizer_loss(images, output)
                accelerator.backward(total / config.gradient_accumulation)
            if adversary:
                wrapped = self.loss.discriminator
                with accelerator.no_sync(wrapped) if more else nullcontext():
                    against, _ = self.loss.discriminator_step(images, output.images)
                    accelerator.backward(against / config.gradient_accumulation)
        if config.optimizer.clip_norm:
            accelerator.clip_grad_norm_(self.model.parameters(), config.optimizer.clip_norm)
        _step(self.optimizer, config.optimizer, self.step, config.steps)
        if adversary:
            start = config.loss.discriminator_start
            if config.discriminator_optimizer.clip_norm:
                accelerator.clip_grad_norm_(wrapped.parameters(), config.discriminator_optimizer.clip_norm)
            _step(
                self.discriminator_optimizer,
                config.discriminator_optimizer,
                self.step - start,
                config.steps - start,
            )
        self._average()
        self.finite &= torch.isfinite(total.detach())
        figures = {"loss": total.detach(), **parts}
        if self.teacher is None and output.images is not None:
            mse = (output.images.detach().float().clamp(0, 1) - images).square().mean((1, 2, 3))
            figures["psnr"] = -10 * mse.clamp_min(1e-10).log10().mean()
        if self.tokenizer.adaptive:
            figures |= {name: value.detach() for name, value in output.losses.items()}
        quantizer = self.tokenizer.quantizer
        if quantizer.kind == "bits" and (self.step + 1) % config.log_every == 0:
            # Of the bits that `encode` gives; those of the forward pass are drawn and look livelier.
            figures |= quantizer.usage(self.tokenizer.encode(images).bits)
        return figures

    def _lengths(self, batch: int) -> dict[str, Tensor]:
        """Nested dropout: a log-uniform prefix length for the chosen images, full length for the others."""
        if not self.config.nested_dropout:
            return {}
        full = self.tokenizer.num_tokens
        prefix = torch.exp(torch.rand(batch) * math.log(full + 1)).long().clamp(1, full)
        kept = torch.where(torch.rand(batch) < self.config.nested_dropout, prefix, full)
        return {"lengths": kept.to(self.accelerator.device)}

    def _tokenizer_loss(self, images: Tensor, output: Any) -> tuple[Tensor, dict[str, Tensor]]:
        losses = dict(output.losses)
        if output.images is None or not output.images.requires_grad:
            for part in ("discriminator", "perceptual"):
                if getattr(self.config.loss, f"{part}_weight") > 0:
                    judge = "a discriminator" if part == "discriminator" else "a perceptual loss"
                    raise ValueError(
                        f"{self.tokenizer.label} trains without images here (flow matching or distillation), "
                        f"so there is nothing for {judge} to judge; set loss.{part}_weight: 0"
                    )
            return sum(losses.values()), {name: value.detach() for name, value in losses.items()}
        kl = losses.pop("kl", None)
        quantizer = sum(losses.values()) if losses else None
        if self.teacher is not None:
            codes = self.teacher.encode(images).indices
            return proxy_code_loss(output.images, codes, quantizer, self.config.loss.quantizer_weight)
        return self.loss.generator_step(images, output.images, self.step, quantizer_loss=quantizer, kl=kl)

    @torch.no_grad()
    def _average(self) -> None:
        decay = ema_decay(self.step + 1, self.config.ema)
        current = self.accelerator.unwrap_model(self.model).state_dict()
        for name, average in self.ema.items():
            if average.is_floating_point():
                average.lerp_(current[name], 1 - decay)
            else:
                average.copy_(current[name])

    # What a person looks at ---------------------------------------------------------------------------------

    def _averaged(self) -> Tokenizer:
        """The tokenizer with EMA weights, in eval mode."""
        fields = dict(self.config.tokenizer)
        model = load(self.config.initial) if self.config.initial else create(fields.pop("name"), **fields)
        model.load_state_dict(self.ema)
        model.name = None  # it is not the published model it may have started from
        return model.eval().to(self.accelerator.device)

    def _validate(self) -> dict[str, float]:
        """Mean PSNR of the EMA model on the validation pictures at each length, in dB; writes a sample
        sheet."""
        if not self.main or not len(self.validation) or self.teacher is not None:
            return {}
        model = self._averaged()
        counts = self.config.validation_tokens or (None,)
        row, sheet = {}, [to_pil(self.validation)]
        for count in counts:
            decoded = model.reconstruct(self.validation, count)
            mse = (decoded - self.validation).square().mean((1, 2, 3)).double().clamp_min(1e-10)
            row[f"validation_psnr_{count or model.num_tokens}"] = float(-10 * mse.log10().mean())
            sheet.append(to_pil(decoded))
        picture: Image.Image = side_by_side([list(column) for column in zip(*sheet, strict=True)])
        with atomic_write(self.folder.path / SAMPLES / f"step_{self.step:07d}.png") as path:
            picture.save(path, format="PNG")
        return row

    def _open_log(self) -> Log:
        """A function that adds a row to log.jsonl; rows past the resume point are dropped first."""
        if not self.main:
            return lambda row: None
        self.folder.open_log(self.step)
        writer = None
        if self.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(self.folder.path / "tensorboard", purge_step=self.step)

        def log(row: dict[str, float]) -> None:
            if not row:
                return
            self.folder.log({"step": self.step, **row})
            if writer:
                for name, value in row.items():
                    writer.add_scalar(name, value, self.step)

        return log

    def _export(self) -> Path:
        folder = self.folder.path / MODEL
        if self.main:
            self._averaged().to(getattr(torch, self.config.export_dtype)).save_pretrained(folder)
        return folder


def _identity(config: TrainConfig) -> dict[str, Any]:
    """What two runs must share to be the same run."""
    loose = {
        "steps",
        "workers",
        "log_every",
        "validate_every",
        "checkpoint_every",
        "tensorboard",
        "export_dtype",
    }
    if config.optimizer.schedule == "cosine":
        loose -= {"steps"}
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in loose}


def _check_shapes(part: str, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise ValueError where tensors are not those of the model, in name or shape."""
    shapes, needed = ({name: list(value.shape) for name, value in each.items()} for each in (state, expected))
    if shapes != needed:
        names = [name for name in {**needed, **shapes} if shapes.get(name) != needed.get(name)]
        first = names[0]
        raise ValueError(
            f"{len(names)} tensors of {part} differ; {first} is {shapes.get(first, 'absent')}, here "
            f"{needed.get(first, 'absent')}"
        )


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = optimizer.state.get(parameter, {})
            if any(moments[name].shape != parameter.shape for name in moments if name.startswith("exp_avg")):
                raise ValueError(f"a moment of the optimizer does not have the shape {list(parameter.shape)}")


def _check(config: TrainConfig) -> None:
    """Refuse schedules that would only fail late in the run, losses that would have no effect, and validation
    on pictures that train."""
    sources = [source for source in config.data.get("sources") or () if isinstance(source, dict)]
    for source in sources:
        if source.get("kind") != "photos":
            continue
        excluded = source.get("exclude", ())
        trained = set(data.photo_names()) - ({excluded} if isinstance(excluded, str) else set(excluded))
        if both := sorted(trained & set(config.validation)):
            raise ValueError(f"validation photographs {', '.join(both)} also train; exclude them from photos")
    _check_losses(config)
    parts = [("optimizer", config.optimizer, 0)]
    if config.loss.discriminator_weight > 0:
        parts.append(
            ("discriminator_optimizer", config.discriminator_optimizer, config.loss.discriminator_start)
        )
    for name, optimizer, start in parts:
        if optimizer.schedule == "cosine" and config.steps - start <= optimizer.warmup:
            raise ValueError(
                f"{name}.warmup is {optimizer.warmup}, but only {config.steps - start} steps follow its "
                "start; give a shorter warm-up, more steps, or schedule: constant"
            )


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


def _adamw(named: list[tuple[str, nn.Parameter]], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with one group a (weight decay, learning-rate scale)."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        decay = 0.0 if no_weight_decay(name, parameter) else config.weight_decay
        scale = next((float(s) for pattern, s in config.scales.items() if fnmatch(name, pattern)), 1.0)
        groups.setdefault((decay, scale), []).append(parameter)
    rows = [{"params": p, "weight_decay": decay, "scale": scale} for (decay, scale), p in groups.items()]
    return torch.optim.AdamW(rows, lr=config.learning_rate, betas=config.betas)


def _step(optimizer: Any, config: OptimizerConfig, step: int, total: int) -> None:
    """Set this step's learning rates, move, and forget the gradients."""
    rate = (
        constant_schedule(step, config.learning_rate, config.warmup)
        if config.schedule == "constant"
        else cosine_schedule(step, config.learning_rate, config.end_learning_rate, config.warmup, total)
    )
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    optimizer.step()
    optimizer.zero_grad()
