"""The training loop: one or several processes, mixed precision, EMA, exact resume.

Everything random is a function of (seed, step, process), so a run that was killed and resumed from its last
checkpoint ends bit for bit where an uninterrupted one would (on one machine and thread count).
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from ..extras import needs
from .config import RunConfig, check_schedule
from .objective import Objective
from .objectives import objective_class
from .optimizers import build_optimizers, load_optimizers, take_step
from .run_folder import MODEL, SAMPLES, RunFolder
from .schedule import ema_decay
from .workers import worker_errors

with needs("accelerate", "train", "training"):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import send_to_device

Log = Callable[[dict[str, float]], None]


def train(config: RunConfig, output: str | Path, *, steps: int | None = None, progress: bool = True) -> Path:
    """Train, and return the folder of the finished model (averaged weights) as its objective exports it.

    `output` receives run.json (the configuration), log.jsonl, samples/, checkpoint.pt (the whole state),
    checkpoint-previous.pt and model/. If it holds a checkpoint of the same configuration the run continues
    from it, or from the one before where the last is damaged. `steps` stops earlier (or later) than the
    configuration states without changing the schedule.

    Raises:
        ValueError: the folder holds another run or none of its checkpoints is whole, or the configuration
            asks for what cannot be done.
        OSError: another process trains in the folder, the disk is full, or pictures cannot be read.
        FloatingPointError: the loss is no longer finite.
    """
    kind = objective_class(config)
    kind.check(config)
    check_schedule("optimizer", config.optimizer, config.steps)
    # Accelerate keeps the precision of a process's first run in a global; a second run may need another.
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=config.precision)
    folder = RunFolder(Path(output), _identity(config))
    with worker_errors(), folder.claimed() if accelerator.is_main_process else nullcontext():
        run = _Run(kind, config, folder, accelerator, progress)
        return run.train(config.steps if steps is None else steps)


class _Run:
    """The state of one run and its steps."""

    def __init__(
        self,
        kind: type[Objective],
        config: RunConfig,
        folder: RunFolder,
        accelerator: Accelerator,
        progress: bool,
    ) -> None:
        self.config, self.folder, self.accelerator = config, folder, accelerator
        self.progress = progress and self.accelerator.is_local_main_process
        self.main = self.accelerator.is_main_process
        torch.manual_seed(config.seed)
        self.objective = kind(config, accelerator.device, self.progress)
        self.learner = self.objective.model
        self.step = self.saved_step = 0
        self.finite = torch.tensor(True, device=self.accelerator.device)
        resumes = folder.has_checkpoint()
        if not resumes:
            self.objective.prepare()
        self.ema = {name: value.detach().clone() for name, value in self.learner.state_dict().items()}
        named = [(n, p) for n, p in self.learner.named_parameters() if p.requires_grad]
        self.optimizers = build_optimizers(named, config.optimizer)
        self.adversary_optimizers: list[torch.optim.Optimizer] = []
        if self.objective.adversary is not None:
            named = list(self.objective.adversary.named_parameters())
            self.adversary_optimizers = build_optimizers(named, self.objective.adversary_optimizer)
        if resumes:
            folder.restore(self._restore)
        self.ema = {name: value.to(self.accelerator.device) for name, value in self.ema.items()}
        if config.compile:
            self.learner.compile()
        self.objective.model, *self.optimizers = self.accelerator.prepare(self.learner, *self.optimizers)
        if self.adversary_optimizers:
            self.objective.adversary, *self.adversary_optimizers = self.accelerator.prepare(
                self.objective.adversary, *self.adversary_optimizers
            )
        # On a CPU the fused kernel's backward pass costs a third of a small model's step; plain matmuls do
        # not.
        on_cpu = self.accelerator.device.type == "cpu"
        self.attention = partial(sdpa_kernel, SDPBackend.MATH) if on_cpu else nullcontext

    # Checkpoints --------------------------------------------------------------------------------------------

    def _restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; an error of any kind where it does not fit."""
        current = self.learner.state_dict()
        for part in ("model", "ema"):
            _check_shapes(part, state[part], current)
        self.learner.load_state_dict(state["model"])
        for name, value in state.get("buffers", {}).items():
            self.learner.get_buffer(name).copy_(value)
        self.ema = state["ema"]
        load_optimizers(self.optimizers, state["optimizer"])
        self.objective.restore(state.get("objective", {}))
        if self.adversary_optimizers:
            load_optimizers(self.adversary_optimizers, state["adversary_optimizer"])
        self.step = self.saved_step = state["step"]

    def _save(self) -> None:
        self.accelerator.wait_for_everyone()
        if not self.main:
            return
        state = {
            "step": self.step,
            "model": self.learner.state_dict(),
            # What training moves but no checkpoint holds (the targets of adaptive tokenizers).
            "buffers": {n: b for n, b in self.learner.named_buffers() if n not in self.ema},
            "ema": self.ema,
            "optimizer": [optimizer.state_dict() for optimizer in self.optimizers],
            "objective": self.objective.state(),
        }
        if self.adversary_optimizers:
            state["adversary_optimizer"] = [each.state_dict() for each in self.adversary_optimizers]
        self.folder.save(state)
        self.saved_step = self.step

    # The loop -----------------------------------------------------------------------------------------------

    def train(self, steps: int) -> Path:
        """Run to step `steps`; return the model's folder."""
        config, accelerator = self.config, self.accelerator
        log = self._open_log()
        batches = self.objective.batches(
            self.step * config.gradient_accumulation, accelerator.process_index, accelerator.num_processes
        )
        bar = tqdm(
            total=steps, initial=self.step, desc="train", disable=not self.progress, dynamic_ncols=True
        )
        self.objective.model.train()
        with closing(batches), bar:
            self._steps(steps, batches, bar, log)
        return self._export()

    def _steps(self, steps: int, batches: Iterator[Any], bar: tqdm, log: Log) -> None:
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

    def _optimise(self, batches: Iterator[Any]) -> dict[str, Tensor]:
        """One optimisation step of the model, and of its adversary when that takes part."""
        config, accelerator, objective = self.config, self.accelerator, self.objective
        start = objective.adversary_start
        against = objective.adversary is not None and self.step >= start
        for micro in range(config.gradient_accumulation):
            batch = send_to_device(next(batches), accelerator.device)
            more = micro + 1 < config.gradient_accumulation
            with accelerator.no_sync(objective.model) if more else nullcontext(), self.attention():
                parts = objective.loss(batch, self.step)
                weighted = [
                    objective.weights[name] * parts[name] for name in parts if name in objective.weights
                ]
                total = sum(weighted)
                accelerator.backward(total / config.gradient_accumulation)
            if against:
                with accelerator.no_sync(objective.adversary) if more else nullcontext():
                    loss = objective.adversary_loss(batch)
                    accelerator.backward(loss / config.gradient_accumulation)
        if config.optimizer.clip_norm:
            accelerator.clip_grad_norm_(objective.model.parameters(), config.optimizer.clip_norm)
        take_step(self.optimizers, config.optimizer, self.step, config.steps)
        if against:
            settings = objective.adversary_optimizer
            if settings.clip_norm:
                accelerator.clip_grad_norm_(objective.adversary.parameters(), settings.clip_norm)
            take_step(self.adversary_optimizers, settings, self.step - start, config.steps - start)
        self._average()
        self.finite &= torch.isfinite(total.detach())
        figures = {"loss": total.detach()} | {name: part.detach() for name, part in parts.items()}
        if (self.step + 1) % config.log_every == 0:
            figures |= objective.extra_figures(batch)
        return figures

    @torch.no_grad()
    def _average(self) -> None:
        decay = ema_decay(self.step + 1, self.config.ema)
        current = self.learner.state_dict()
        for name, average in self.ema.items():
            if average.is_floating_point():
                average.lerp_(current[name], 1 - decay)
            else:
                average.copy_(current[name])

    # Validation, log and export -----------------------------------------------------------------------------

    def _averaged(self) -> nn.Module:
        """The model with averaged weights, in eval mode."""
        model = self.objective.fresh()
        model.load_state_dict(self.ema)
        return model.eval().to(self.accelerator.device)

    def _validate(self) -> dict[str, float]:
        if not self.main:
            return {}
        picture = self.folder.path / SAMPLES / f"step_{self.step:07d}.png"
        return self.objective.validate(self._averaged(), picture)

    def _open_log(self) -> Log:
        """A function that adds a row to log.jsonl; rows past the resume point are dropped first."""
        if not self.main:
            return lambda row: None
        self.folder.open_log(self.step)
        writer = None
        if self.config.tensorboard:
            with needs("tensorboard", "train", "`tensorboard: true`"):
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
            self.objective.export(self._averaged(), folder)
        return folder


def _identity(config: RunConfig) -> dict[str, Any]:
    """The settings that two runs must share to be the same run."""
    loose = {
        "steps",
        "workers",
        "log_every",
        "validate_every",
        "checkpoint_every",
        "tensorboard",
        "export_dtype",
    }
    values = dataclasses.asdict(config)
    if config.optimizer.schedule == "cosine":  # its every step depends on how many there are
        loose -= {"steps"}
    elif config.optimizer.schedule == "wsd":  # when the decay begins may be decided late
        del values["optimizer"]["decay"]
    return {name: value for name, value in values.items() if name not in loose}


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
