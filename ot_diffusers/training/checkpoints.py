"""The state of training and its checkpoints: saved completely, verified on load, the oldest deleted."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import Tensor

from ..cache import save_tensors
from ..config import TrainingConfig
from ..errors import InputError, TrainingError
from .averages import Averages
from .batches import Schedule
from .files import damage, delete, delete_partial, write_json, written_aside
from .folder import check_claim
from .models import make_optimizer

logger = logging.getLogger(__name__)


@dataclass
class TrainingState:
    """Everything that changes during training, saved as safetensors and JSON only.

    Attributes:
        model: the prepared model.
        optimizer: the prepared optimizer.
        lr_scheduler: stepped once per update.
        ema: average of the model's parameters; None in scripts without one.
        discriminator: of a GAN, trained beside the model; saved in the folder `opponent` of a checkpoint.
        max_skipped_updates: number of updates that may be skipped because their gradient is not finite.
        update: updates done, including skipped ones.
        skipped_updates: updates skipped.
        earlier_seconds: training time before this process took over.
        averages: the losses since the last record and over the epoch so far.
        gradient_norm: of the last update, before clipping.
        update_was_skipped: whether the last update was skipped.
        saved_update: the update after which the run's last checkpoint was saved; -1 before the first.
        stopped_by: reason why training ended before its last update; None if it did not.
    """

    model: torch.nn.Module
    optimizer: Any
    lr_scheduler: Any
    ema: EMAModel | None = None
    discriminator: TrainingState | None = None
    max_skipped_updates: int = 0
    update: int = 0
    skipped_updates: int = 0
    earlier_seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)
    averages: Averages = field(default_factory=Averages)
    gradient_norm: Tensor | None = None
    update_was_skipped: bool = False
    saved_update: int = -1
    stopped_by: str | None = None

    @property
    def seconds_here(self) -> float:
        """Training time of this process."""
        return time.monotonic() - self.started

    @property
    def seconds(self) -> float:
        """Training time of the whole run."""
        return self.earlier_seconds + self.seconds_here

    @classmethod
    def prepare(
        cls,
        accelerator: Accelerator,
        model: torch.nn.Module,
        config: TrainingConfig,
        schedule: Schedule,
        ema: EMAModel | None,
    ) -> TrainingState:
        """Optimizer and learning-rate schedule for `model`, prepared by the accelerator."""
        optimizer = make_optimizer(config, model)
        lr_scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=schedule.num_updates,
        )
        model, optimizer = accelerator.prepare(model, optimizer)
        if ema is not None:
            ema.to(accelerator.device)
        return cls(model, optimizer, lr_scheduler, ema, max_skipped_updates=config.max_skipped_updates)

    def backward(self, accelerator: Accelerator, loss: Tensor, max_grad_norm: float) -> None:
        """Backward pass and, where the accumulation is complete, one update.

        Raises:
            TrainingError: more updates without a finite gradient than may be skipped.
        """
        accelerator.backward(loss)
        if not accelerator.sync_gradients:
            return
        self.gradient_norm = accelerator.clip_grad_norm_(self.model.parameters(), max_grad_norm)
        self.update_was_skipped = self._skips(accelerator)
        if self.update_was_skipped:
            self.optimizer.zero_grad()
        else:
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.ema is not None:
                self.ema.step(self.model.parameters())
        self.lr_scheduler.step()
        self.update += 1

    def _skips(self, accelerator: Accelerator) -> bool:
        """Whether to skip this update. Only a run that may skip updates waits for the gradient's norm. The processes of
        a run share their gradients, and so decide alike. With fp16, the loss scaler decides."""
        norm = self.gradient_norm
        if self.max_skipped_updates == 0 or norm is None or accelerator.scaler is not None or bool(norm.isfinite()):
            return False
        self.skipped_updates += 1
        if self.skipped_updates > self.max_skipped_updates:
            raise TrainingError(
                f"the gradient is not finite in training step {self.update + 1}, and {self.max_skipped_updates} steps "
                "have already been skipped (max_skipped_updates): lower learning_rate or max_grad_norm"
            )
        accelerator.print(f"training step {self.update + 1} skipped: its gradient is not finite", flush=True)
        return True

    def save(self, folder: Path, accelerator: Accelerator) -> None:
        """Write the state into `folder` in one step.

        Raises:
            TrainingError: losses or weights that are not finite; nothing is written then.
        """
        epoch = self.averages.epoch_so_far(accelerator)
        self._check_weights(accelerator)
        if not accelerator.is_main_process:
            return
        with written_aside(folder) as partial:
            self._write(partial, accelerator, epoch)
            if self.discriminator is not None:
                (partial / "opponent").mkdir()
                self.discriminator._write(partial / "opponent", accelerator, {})

    def load(self, folder: Path, accelerator: Accelerator) -> None:
        """Load the state saved in `folder`."""
        record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        model = accelerator.unwrap_model(self.model, keep_torch_compile=False)
        model.load_state_dict(load_file(folder / "model.safetensors"))
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in load_file(folder / "optimizer.safetensors").items():
            index, _, moment = name.partition(".")
            state.setdefault(int(index), {})[moment] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": record["param_groups"]})
        self.lr_scheduler.load_state_dict(record["lr_scheduler"])
        if self.ema is not None:
            shadow = load_file(folder / "ema.safetensors")
            self.ema.shadow_params = [shadow[str(index)].to(accelerator.device) for index in range(len(shadow))]
            self.ema.optimization_step = record["ema_step"]
        if accelerator.scaler is not None and record["scaler"] is not None:
            accelerator.scaler.load_state_dict(record["scaler"])
        self.update, self.earlier_seconds = record["update"], record["seconds"]
        self.skipped_updates = record["skipped_updates"]
        self.averages = Averages(epoch={name: (total, count) for name, (total, count) in record["epoch"].items()})
        if self.discriminator is not None:
            self.discriminator.load(folder / "opponent", accelerator)

    def _write(self, folder: Path, accelerator: Accelerator, epoch: dict[str, tuple[float, int]]) -> None:
        model = accelerator.unwrap_model(self.model, keep_torch_compile=False)
        save_tensors(model.state_dict(), folder / "model.safetensors")
        optimizer = self.optimizer.state_dict()
        moments = {
            f"{index}.{name}": value for index, entry in optimizer["state"].items() for name, value in entry.items()
        }
        save_tensors(moments, folder / "optimizer.safetensors")
        if self.ema is not None:
            shadow = {str(index): tensor for index, tensor in enumerate(self.ema.shadow_params)}
            save_tensors(shadow, folder / "ema.safetensors")
        record = {
            "update": self.update,
            "skipped_updates": self.skipped_updates,
            "seconds": self.seconds,
            "epoch": epoch,
            "param_groups": optimizer["param_groups"],
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "ema_step": self.ema.optimization_step if self.ema is not None else None,
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        }
        write_json(folder / "state.json", record)

    def _check_weights(self, accelerator: Accelerator) -> None:
        models = [self.model] if self.discriminator is None else [self.model, self.discriminator.model]
        finite = [parameter.detach().isfinite().all() for model in models for parameter in model.parameters()]
        if not bool(torch.stack(finite).all()):
            raise TrainingError(
                f"the weights are not finite after training step {self.update}; the last checkpoint is good"
            )


# --- A run's checkpoints ----------------------------------------------------------------------------------------------


def checkpoints(config: TrainingConfig) -> list[Path]:
    """Checkpoints of the run, oldest first."""
    return sorted(folder for folder in _folder(config).glob("update-*") if re.fullmatch(r"update-\d{8}", folder.name))


def save_checkpoint(state: TrainingState, config: TrainingConfig, accelerator: Accelerator) -> None:
    """Save into `checkpoints/update-N`, unless the state was loaded from there; then delete the oldest ones.

    Raises:
        TrainingError: as `TrainingState.save` and `check_claim`.
    """
    check_claim(config)
    if state.saved_update == state.update:
        return
    try:
        state.save(_folder(config) / f"update-{state.update:08d}", accelerator)
    except FileNotFoundError:
        check_claim(config)
        raise
    state.saved_update = state.update
    if accelerator.is_main_process:
        for folder in checkpoints(config)[: -config.checkpoints_total_limit]:
            delete(folder)
    accelerator.wait_for_everyone()


def resume(state: TrainingState, config: TrainingConfig, accelerator: Accelerator) -> None:
    """Resume from the checkpoint that the configuration names, or from the last one that is undamaged.

    Other checkpoints are kept under another name: damaged ones as `damaged-N`, and ones later than the named checkpoint
    in `replaced-1`, `replaced-2`, …

    Raises:
        InputError: all checkpoints are damaged.
    """
    if config.resume_from_checkpoint is None:
        return
    chosen: list[Path | None] = [None]
    if accelerator.is_main_process:
        delete_partial(_folder(config))
        chosen = [_last_good(config) if config.resume_from_checkpoint == "latest" else _named(config)]
    (folder,) = broadcast_object_list(chosen)
    if folder is None:
        if (Path(config.output_dir) / "results.json").is_file():
            accelerator.print(f"no checkpoint in {_folder(config)}: training starts from the first step")
        return
    state.load(folder, accelerator)
    if folder.resolve().parent == _folder(config).resolve():
        state.saved_update = state.update
    accelerator.print(f"resumed after training step {state.update:,}", flush=True)


def _last_good(config: TrainingConfig) -> Path | None:
    """The last undamaged checkpoint; damaged ones after it are renamed.

    Raises:
        InputError: there are checkpoints, and all of them are damaged.
    """
    damaged: list[tuple[Path, str]] = []
    for folder in reversed(checkpoints(config)):
        problem = damage(folder)
        if problem is None:
            _put_aside_damaged(damaged, folder)
            return folder
        damaged.append((folder, problem))
    if damaged:
        folder, problem = damaged[0]
        raise InputError(
            f"`output_dir` must hold an undamaged checkpoint, got {config.output_dir!r}, where all {len(damaged)} are "
            f"damaged ({folder.name}: {problem}); restore one, or move {str(folder.parent)!r} away to start again"
        )
    return None


def _put_aside_damaged(damaged: Sequence[tuple[Path, str]], good: Path) -> None:
    for folder, problem in damaged:
        aside = folder.with_name(folder.name.replace("update", "damaged"))
        if aside.exists():
            delete(aside)
        folder.rename(aside)
        logger.warning(
            "%s is damaged (%s) and renamed to %s; the run resumes from %s", folder, problem, aside.name, good.name
        )


def _named(config: TrainingConfig) -> Path:
    """The checkpoint that the configuration names; later ones of the run are moved to another folder."""
    named = Path(str(config.resume_from_checkpoint))
    update = json.loads((named / "state.json").read_text(encoding="utf-8"))["update"]
    own = [folder for folder in checkpoints(config) if folder.resolve() != named.resolve()]
    _put_aside([folder for folder in own if int(folder.name.removeprefix("update-")) >= update], config)
    return named


def _put_aside(folders: Sequence[Path], config: TrainingConfig) -> None:
    if not folders:
        return
    taken = {path.name for path in _folder(config).glob("replaced-*")}
    aside = _folder(config) / next(name for n in range(1, len(taken) + 2) if (name := f"replaced-{n}") not in taken)
    aside.mkdir()
    for folder in folders:
        folder.rename(aside / folder.name)
    logger.warning("%d later checkpoints are now in %s", len(folders), aside)


def _folder(config: TrainingConfig) -> Path:
    return Path(config.output_dir) / "checkpoints"
