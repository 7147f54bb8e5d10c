"""What a run tells: losses, validation, sample grids, results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler
from diffusers.utils import make_image_grid
from torch import Tensor
from tqdm.auto import tqdm

from ..config import BaselineConfig, TrainingConfig
from ..losses import denoising_loss
from ..seeds import keyed_generator
from .batches import Images, Schedule, draw_noise, noised_batch
from .checkpoints import TrainingState
from .folder import write_json


class Record:
    """Losses of a run: means over `logging_steps` to the trackers, means over an epoch to `metrics.jsonl`.

    Values stay on the device until they are written, so that a training step never waits for them.
    """

    def __init__(
        self, config: TrainingConfig, schedule: Schedule, accelerator: Accelerator, state: TrainingState
    ) -> None:
        self.config, self.schedule, self.accelerator, self.state = config, schedule, accelerator, state
        self.file = Path(config.output_dir) / "metrics.jsonl"
        self._recent: dict[str, list[Tensor]] = {}
        self._epoch: dict[str, list[tuple[float, int]]] = {}
        self._keep_until(state.update)
        disable = not accelerator.is_main_process
        self.progress = tqdm(
            total=schedule.num_updates, initial=state.update, disable=disable, desc="updates", mininterval=1.0
        )

    def add(self, **values: Tensor) -> None:
        """Losses of one forward pass, 0-d tensors."""
        for name, value in values.items():
            self._recent.setdefault(name, []).append(value.detach())
        if self.accelerator.sync_gradients:
            self.progress.update()
            if self.state.update % self.config.logging_steps == 0:
                self._flush()

    def end_epoch(self, **values: float) -> None:
        """Append the epoch's means and `values` to `metrics.jsonl`."""
        self._flush()
        update = self.state.update
        means = {
            name: sum(mean * count for mean, count in entries) / sum(count for _, count in entries)
            for name, entries in self._epoch.items()
        }
        self._epoch = {}
        record = {
            "epoch": self.schedule.epoch(update),
            "step": update,
            "seconds": round(self.state.seconds, 2),
            **means,
            **values,
        }
        self.accelerator.log({f"epoch/{name}": value for name, value in (means | values).items()}, step=update)
        if self.accelerator.is_main_process:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        self.progress.set_postfix({name: f"{value:.4g}" for name, value in (means | values).items()})

    def out_of_time(self) -> bool:
        """Whether `max_train_seconds` are over, decided by the main process for all."""
        limit = self.config.max_train_seconds
        if limit is None or self.state.update >= self.schedule.num_updates:
            return False
        over = torch.tensor(float(self.state.seconds_here > limit), device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            torch.distributed.broadcast(over, 0)
        if over:
            self.accelerator.print(
                f"stopped after {limit} s (max_train_seconds); the same command goes on from update {self.state.update}"
            )
        return bool(over)

    def _flush(self) -> None:
        if not self._recent:
            return
        names = list(self._recent)
        means = torch.stack([torch.stack(self._recent[name]).float().mean() for name in names])
        values = dict(zip(names, self.accelerator.reduce(means, "mean").tolist(), strict=True))
        self.accelerator.log({f"train/{name}": value for name, value in values.items()}, step=self.state.update)
        for name, value in values.items():
            self._epoch.setdefault(name, []).append((value, len(self._recent[name])))
        self._recent = {}

    def _keep_until(self, update: int) -> None:
        """Drop records of updates that a resumed run will do again."""
        if self.accelerator.is_main_process and self.file.is_file():
            lines = [
                line
                for line in self.file.read_text(encoding="utf-8").splitlines()
                if json.loads(line)["step"] <= update
            ]
            self.file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


@contextmanager
def averaged_weights(state: TrainingState) -> Iterator[None]:
    """The model with its averaged weights inside, with its own again after."""
    if state.ema is None:
        yield
        return
    state.ema.store(state.model.parameters())
    state.ema.copy_to(state.model.parameters())
    try:
        yield
    finally:
        state.ema.restore(state.model.parameters())


@torch.no_grad()
def validation_loss(
    state: TrainingState, images: Images, scheduler: DDPMScheduler, config: BaselineConfig, accelerator: Accelerator
) -> float:
    """Denoising loss of the averaged weights on the first validation images, with noise that is the same at every
    epoch."""
    count = min(config.num_validation_samples, len(images))
    generator = keyed_generator(accelerator.device, config.seed, "validation")
    noise, timesteps = draw_noise(count, torch.Size(images.image_shape), config, generator)
    own = torch.arange(count)[accelerator.process_index :: accelerator.num_processes]
    total = torch.zeros(2, device=accelerator.device)
    state.model.eval()
    with averaged_weights(state):
        for rows in own.split(config.train_batch_size):
            clean = images.fetch(rows).to(accelerator.device)
            batch = noised_batch(clean, noise[rows], timesteps[rows], scheduler, rows, rows, state.update)
            output = state.model(batch.noisy, batch.timesteps).sample
            total += torch.stack([denoising_loss(output, batch.target) * len(rows), total.new_tensor(len(rows))])
    state.model.train()
    total = accelerator.reduce(total, "sum")
    return (total[0] / total[1]).item()


def save_sample_grid(
    state: TrainingState, scheduler: DDPMScheduler, config: BaselineConfig, accelerator: Accelerator, rows: int = 6
) -> None:
    """`samples/update-N.png`: rows² images by DDIM with the averaged weights, from the same noise every time."""
    if accelerator.is_main_process:
        with averaged_weights(state):
            model = accelerator.unwrap_model(state.model, keep_torch_compile=False)
            pipeline = DDIMPipeline(model.eval(), DDIMScheduler.from_config(scheduler.config))
            pipeline.set_progress_bar_config(disable=True)
            generator = torch.Generator().manual_seed(config.seed)
            images = pipeline(rows**2, generator=generator, num_inference_steps=config.num_inference_steps).images
            model.train()
        folder = Path(config.output_dir) / "samples"
        folder.mkdir(exist_ok=True)
        make_image_grid(images, rows, rows).save(folder / f"update-{state.update:08d}.png")
    accelerator.wait_for_everyone()


def save_results(
    state: TrainingState, config: TrainingConfig, schedule: Schedule, accelerator: Accelerator, **values: float
) -> None:
    """`results.json` of the run: what it cost and where it ended."""
    if accelerator.is_main_process:
        folder = Path(config.output_dir)
        metrics = folder / "metrics.jsonl"  # absent where the time was over within the first epoch
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
        results = {
            "updates": state.update,
            "complete": state.update >= schedule.num_updates,
            "training_seconds": round(state.seconds, 2),
            "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
            "last_epoch": json.loads(lines[-1]) if lines else None,
            **values,
        }
        write_json(folder / "results.json", results)
    accelerator.wait_for_everyone()
