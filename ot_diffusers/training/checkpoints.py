"""All that changes during training, and how it survives: saved whole, verified on load, the oldest deleted."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config import TrainingConfig
from .batches import Schedule
from .folder import write_json
from .models import make_optimizer


@dataclass
class TrainingState:
    """All that changes during training, saved as safetensors and JSON only.

    Attributes:
        model: the prepared model.
        optimizer: the prepared optimizer.
        lr_scheduler: stepped once per update.
        ema: average of the model's parameters, None where a script keeps none.
        update: updates done.
        earlier_seconds: training time before this process took over.
    """

    model: torch.nn.Module
    optimizer: Any
    lr_scheduler: Any
    ema: EMAModel | None = None
    update: int = 0
    earlier_seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)

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
        return cls(model, optimizer, lr_scheduler, ema)

    def backward(self, accelerator: Accelerator, loss: Tensor, max_grad_norm: float) -> None:
        """Backward pass and, where the accumulation is complete, one update."""
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(self.model.parameters(), max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if accelerator.sync_gradients:
            self.lr_scheduler.step()
            self.update += 1
            if self.ema is not None:
                self.ema.step(self.model.parameters())

    def save(self, folder: Path, accelerator: Accelerator) -> None:
        """Write the state into `folder`, aside first and renamed when complete."""
        if not accelerator.is_main_process:
            return
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        model = accelerator.unwrap_model(self.model, keep_torch_compile=False)
        save_file(
            {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, partial / "model.safetensors"
        )
        optimizer = self.optimizer.state_dict()
        moments = {
            f"{index}.{name}": value for index, entry in optimizer["state"].items() for name, value in entry.items()
        }
        save_file(moments, partial / "optimizer.safetensors")
        if self.ema is not None:
            shadow = {str(index): tensor.contiguous() for index, tensor in enumerate(self.ema.shadow_params)}
            save_file(shadow, partial / "ema.safetensors")
        record = {
            "update": self.update,
            "seconds": self.seconds,
            "param_groups": optimizer["param_groups"],
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "ema_step": self.ema.optimization_step if self.ema is not None else None,
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        }
        write_json(partial / "state.json", record)
        if folder.exists():  # moved away first: a folder that is half deleted would pass for a checkpoint
            discarded = folder.with_name(f".{folder.name}.discarded")
            shutil.rmtree(discarded, ignore_errors=True)
            os.replace(folder, discarded)
            shutil.rmtree(discarded)
        os.replace(partial, folder)

    def load(self, folder: Path, accelerator: Accelerator) -> None:
        """Take up the state saved in `folder`."""
        record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        accelerator.unwrap_model(self.model, keep_torch_compile=False).load_state_dict(
            load_file(folder / "model.safetensors")
        )
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in load_file(folder / "optimizer.safetensors").items():
            index, _, moment = name.partition(".")
            state.setdefault(int(index), {})[moment] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": record["param_groups"]})
        self.lr_scheduler.load_state_dict(record["lr_scheduler"])
        if self.ema is not None:
            shadow = load_file(folder / "ema.safetensors", device=str(accelerator.device))
            self.ema.shadow_params = [shadow[str(index)] for index in range(len(shadow))]
            self.ema.optimization_step = record["ema_step"]
        if accelerator.scaler is not None and record["scaler"] is not None:
            accelerator.scaler.load_state_dict(record["scaler"])
        self.update, self.earlier_seconds = record["update"], record["seconds"]


def resume(state: TrainingState, config: TrainingConfig, accelerator: Accelerator) -> None:
    """Continue from the checkpoint that the configuration names, if there is one."""
    if config.resume_from_checkpoint is None:
        return
    if config.resume_from_checkpoint != "latest":
        state.load(Path(config.resume_from_checkpoint), accelerator)
        _discard_after(state.update, config, accelerator)
    elif folders := checkpoints(config):
        state.load(folders[-1], accelerator)
    if state.update:
        accelerator.print(f"resumed after update {state.update}")


def save_checkpoint(state: TrainingState, config: TrainingConfig, accelerator: Accelerator) -> None:
    """Save into `checkpoints/update-N` and delete the oldest beyond the limit."""
    state.save(Path(config.output_dir) / "checkpoints" / f"update-{state.update:08d}", accelerator)
    if accelerator.is_main_process:
        for folder in checkpoints(config)[: -config.checkpoints_total_limit]:
            shutil.rmtree(folder)
    accelerator.wait_for_everyone()


def _discard_after(update: int, config: TrainingConfig, accelerator: Accelerator) -> None:
    """Delete checkpoints of a continuation that is being replaced: `latest` would name one of them."""
    if accelerator.is_main_process:
        for folder in checkpoints(config):
            if int(folder.name.removeprefix("update-")) > update:
                shutil.rmtree(folder)
    accelerator.wait_for_everyone()


def checkpoints(config: TrainingConfig) -> list[Path]:
    """Complete checkpoints of the run, oldest first."""
    return sorted((Path(config.output_dir) / "checkpoints").glob("update-*"))
